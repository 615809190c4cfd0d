"""manifest: lists every image of the source with its label and where its bytes are."""

import numpy as np

from d2c_ray.data import manifest, tables
from d2c_ray.job import Job, Result

SHARDS_PER_PART = 64


def run(job: Job) -> Result:
    data = job.config.data
    source = manifest.find(data)
    with job.progress(max(1, len(source.files)), "files") as progress:
        table, names = manifest.scan(source, data, progress)
    rows_per_part = data.rows_per_shard * SHARDS_PER_PART
    for part, start in enumerate(range(0, len(table), rows_per_part)):
        # A row group is a shard, so that a unit of work reads its own rows only.
        tables.write(job.out / f"part-{part:05d}.parquet", table.slice(start, rows_per_part), {}, data.rows_per_shard)
    labels = np.maximum(table.column("label").to_numpy(), 0)
    counts = np.bincount(labels, minlength=max(1, len(names)))
    facts = {"rows": len(table), "class_names": names or [""], "class_counts": counts.tolist(), "source": source.kind}
    return Result(len(table), len(table), 0, facts)
