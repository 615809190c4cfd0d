"""embed: features of every image, the space that some selectors choose in."""

import pyarrow.parquet as pq

from d2c_ray.distributed import cluster, embed
from d2c_ray.job import Job, Result
from d2c_ray.models import frozen
from d2c_ray.rejects import Rejects


def run(job: Job) -> Result:
    config, data = job.config, job.facts("manifest")
    options = config.embed
    facts = {
        "encoder": options.encoder, "weights": frozen.file_hash(frozen.weights_file(options.encoder)), "image_size": options.image_size,
        "device_batch": options.device_batch, "width": frozen.EFFICIENTNETS[options.encoder][2],
    }  # fmt: skip
    rejects = Rejects("embed", data["rows"], config.data.max_rejected)
    with job.progress(data["rows"]) as progress:
        embed.embed(
            config, options, job.inputs["manifest"].parts(), job.out, cluster.share(config.resources, job.places), rejects, progress, facts
        )
    rejects.write(job.out)
    rows = sum(pq.read_metadata(path).num_rows for path in job.out.glob("part-*.parquet"))
    return Result(data["rows"], rows, len(rejects.rows), facts)
