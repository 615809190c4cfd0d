"""evaluate: what a student's images are worth, beside what real images and the subset itself would score."""

import hashlib
from pathlib import Path

import numpy as np

from d2c_ray.data import tables
from d2c_ray.distributed import cluster, embed
from d2c_ray.evaluate.measures import measure
from d2c_ray.job import Job, Result
from d2c_ray.models import frozen
from d2c_ray.rejects import Rejects
from d2c_ray.rundir import write_json


def run(job: Job) -> Result:
    config = job.config
    subset_rows = job.inputs["attach"].path / "rows.parquet"
    ids, labels, features = _features(job.inputs["reference"].path / "features.parquet")
    subset = tables.read(subset_rows, ["sample_id"]).column("sample_id").to_numpy()
    # Small datasets are in the reference whole, so that the subset's features are there already.
    known = bool(np.isin(subset, ids).all())
    total = config.sample.num_images + (0 if known else len(subset))
    share = cluster.share(config.resources, job.places)
    rejects = Rejects("evaluate", total, 0.0)
    with job.progress(total) as progress:
        embed.embed_samples(config, job.inputs["sample"].parts(), job.out / "samples.parquet", share, rejects, progress)
        if not known:
            embed.embed_rows(config, subset_rows, job.out / "subset.parquet", share, rejects, progress)
    held_out = np.isin(ids, job.facts("reference")["held_out_ids"])
    _, asked, generated = _features(job.out / "samples.parquet")
    kept = features[np.isin(ids, subset)] if known else _features(job.out / "subset.parquet")[2]
    metrics = measure(
        reference=features[~held_out], reference_labels=labels[~held_out], held_out=features[held_out], held_out_labels=labels[held_out],
        generated=generated, asked=asked, subset=kept, neighbours=config.evaluate.neighbours,
    )  # fmt: skip
    record = {
        **job.facts("sample")["record"],
        "network": config.evaluate.network,
        "network_weights": frozen.file_hash(frozen.weights_file(config.evaluate.network)),
        "network_image_size": config.evaluate.image_size,
        "image_size": config.data.image_size,
        "generated": metrics["counts"]["generated"],
        "reference": metrics["counts"]["reference"],
        "reference_features": hashlib.sha256(features[~held_out].tobytes()).hexdigest()[:16],
        "neighbours": config.evaluate.neighbours,
        "seeds": 1,
    }
    write_json(job.out / "metrics.json", {**metrics, "record": record})
    return Result(total, total, 0, {**metrics, "record": record})


def _features(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = tables.read(path)
    return table.column("id").to_numpy(), table.column("label").to_numpy(), tables.tensor_values(table, "features")
