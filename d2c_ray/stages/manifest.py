"""manifest: lists every image of the source with its label and where its bytes are."""

from d2c_ray.data import manifest, tables
from d2c_ray.job import Job, Result

SHARDS_PER_PART = 64


def run(job: Job) -> Result:
    config = job.config
    data, storage = config.data, config.storage
    source = manifest.find(data, storage)
    listing = manifest.Listing()
    count, unit = source.work
    for stale in job.out.glob("part-*.parquet"):  # of an attempt that was cut off
        stale.unlink()
    with job.progress(count, unit) as progress:
        found = manifest.scan(source, data, storage, listing, data.rows_per_shard * SHARDS_PER_PART, progress)
        for part, table in enumerate(found):
            # A row group is a shard, so that a unit of work reads its own rows only.
            tables.write(job.out / f"part-{part:05d}.parquet", table, {}, data.rows_per_shard)
    names = listing.class_names(source, data, storage)
    counts = listing.counts.tolist() if not listing.unlabelled else [listing.rows]
    facts = {
        "rows": listing.rows, "class_names": names or [""], "class_counts": counts + [0] * (len(names) - len(counts)),
        "source": source.kind, "passed_over": listing.passed_over,
    }  # fmt: skip
    return Result(listing.rows, listing.rows, 0, facts)
