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
    sampled, subset = config.sample.num_images, job.inputs["attach"].success()["rows_done"]
    share = cluster.share(config.resources, job.places)
    rejects = Rejects("evaluate", sampled + subset, 0.0)
    with job.progress(sampled + subset) as progress:
        embed.embed_samples(config, job.inputs["sample"].parts(), job.out / "samples.parquet", share, rejects, progress)
        embed.embed_rows(config, subset_rows, job.out / "subset.parquet", share, rejects, progress)
    reference_path = job.inputs["reference"].path / "features.parquet"
    ids, labels, features = _features(reference_path)
    held_out = np.isin(ids, job.facts("reference")["held_out_ids"])
    _, asked, generated = _features(job.out / "samples.parquet")
    _, _, kept = _features(job.out / "subset.parquet")
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
    return Result(sampled + subset, sampled + subset, 0, {**metrics, "record": record})


def _features(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = tables.read(path)
    return table.column("id").to_numpy(), table.column("label").to_numpy(), tables.tensor_values(table, "features")
