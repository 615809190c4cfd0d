"""reference: features of real images, some to measure against and some held out to measure themselves; in every network."""

import numpy as np
import pyarrow as pa

from d2c_ray.data import manifest, measured, reference_stats, tables
from d2c_ray.distributed import cluster, embed
from d2c_ray.evaluate import frechet, record
from d2c_ray.job import Job, Result
from d2c_ray.models import networks
from d2c_ray.rejects import Rejects
from d2c_ray.rundir import StageDir
from d2c_ray.seeding import derive


def run(job: Job) -> Result:
    config, data = job.config, job.facts("manifest")
    order = np.random.Generator(np.random.Philox(derive(config.evaluate.seed, "held out"))).permutation(data["rows"])
    held_out = min(config.sample.num_images, data["rows"] // 2)
    most = config.evaluate.max_reference or data["rows"]
    chosen = np.sort(order[: held_out + most])
    table = tables.rows_of(job.inputs["manifest"].parts(), chosen)
    tables.write(job.out / "rows.parquet", table, {}, embed.ROWS_PER_GROUP)
    rejects = Rejects("reference", len(table), config.data.max_rejected)
    with job.progress(len(table)) as progress:
        work = embed.of_rows(job.out / "rows.parquet", job.out / measured.FEATURES)
        embed.embed_images(config, work, cluster.share(config.resources, job.places), rejects, progress)
    rejects.write(job.out)
    parts = StageDir(job.out / measured.FEATURES).parts()
    # What evaluate.reference of another run, and clean-fid, can take distances to.
    found = {}
    for index, own in enumerate(networks.every(config.evaluate).values()):
        moments = frechet.Moments(own["width"])
        for block in measured.blocks(parts, own["network"]):
            moments.update(block.features[~np.isin(block.ids, order[:held_out])])
        file = f"statistics{f'-{index}' if index else ''}.npz"
        if moments.count > 1:
            reference_stats.write(job.out / file, moments.statistics())
        found[own["network"]] = {**own, "images": moments.count, "statistics": file if moments.count > 1 else None}
    done, _ = measured.listed(parts)
    measured_against = table.filter(pa.array(np.isin(chosen, done) & ~np.isin(chosen, order[:held_out])))
    facts = {
        "held_out_ids": sorted(int(i) for i in order[:held_out]), "reference": len(chosen) - held_out, "networks": found,
        "reference_images": _which(job, measured_against),
    }  # fmt: skip
    return Result(len(table), len(done), len(rejects.rows), facts)


def _which(job: Job, rows: pa.Table) -> str:
    """A hash of what the images of manifest rows are: where in which source, and what is made of them before a network sees them."""
    data, storage = job.config.data, job.config.storage
    source = manifest.fingerprint(manifest.find(data, storage), data, storage)
    about = f"{source}|{data.image_column}|{data.image_size}|{data.channels}"
    return record.images_hash([about, *rows.column("key").to_pylist()])
