"""reference: features of real images, some to measure against and some held out to measure themselves."""

import numpy as np
import pyarrow as pa

from d2c_ray.data import tables
from d2c_ray.distributed import cluster, embed
from d2c_ray.job import Job, Result
from d2c_ray.rejects import Rejects
from d2c_ray.seeding import derive


def run(job: Job) -> Result:
    config, data = job.config, job.facts("manifest")
    order = np.random.Generator(np.random.Philox(derive(config.evaluate.seed, "held out"))).permutation(data["rows"])
    held_out = min(config.sample.num_images, data["rows"] // 2)
    most = config.evaluate.max_reference or data["rows"]
    chosen = np.sort(order[: held_out + most])
    table = pa.concat_tables([tables.read(path) for path in job.inputs["manifest"].parts()]).take(pa.array(chosen))
    tables.write(job.out / "rows.parquet", table, {}, embed.ROWS_PER_UNIT)
    rejects = Rejects("reference", len(table), config.data.max_rejected)
    with job.progress(len(table)) as progress:
        embed.embed_rows(
            config, job.out / "rows.parquet", job.out / "features.parquet", cluster.share(config.resources, job.places), rejects, progress
        )
    rejects.write(job.out)
    facts = {
        "held_out_ids": sorted(int(i) for i in order[:held_out]),
        "reference": len(chosen) - held_out,
        "network": config.evaluate.network,
    }
    done = len(tables.read(job.out / "features.parquet", ["id"]))
    return Result(len(table), done, len(rejects.rows), facts)
