"""score: how hard the teacher finds every image."""

from pathlib import Path

import numpy as np

from d2c_ray.data import tables
from d2c_ray.distributed import cluster, trainer
from d2c_ray.distributed import score as scoring
from d2c_ray.errors import UserError
from d2c_ray.job import Job, Result
from d2c_ray.models import latents, weights
from d2c_ray.rejects import Rejects
from d2c_ray.selection import difficulty


def run(job: Job) -> Result:
    config, data, teacher = job.config, job.facts("manifest"), job.facts("teacher")
    checkpoint = config.teacher.checkpoint
    model = Path(checkpoint).expanduser().absolute() if checkpoint else job.inputs["teacher"].path / trainer.MODEL
    latent = latents.latent_facts(config)
    options = config.score
    t = difficulty.timesteps(teacher["kind"], options.num_timesteps, options.t_min, options.t_max).numpy()
    metadata = {
        "timesteps": t.tolist(), "num_timesteps": len(t), "seed": options.seed, "convention": difficulty.CONVENTIONS[teacher["kind"]],
        "teacher": weights.content_hash(model), "latent": latent, "image_size": config.data.image_size,
        "precision": options.precision, "device_batch": options.device_batch,
    }  # fmt: skip
    rejects = Rejects("score", data["rows"], config.data.max_rejected)
    shape = (latent["channels"], latent["side"], latent["side"])
    with job.progress(data["rows"]) as progress:
        scoring.score(
            config,
            job.inputs["manifest"].parts(),
            model,
            teacher["kind"],
            shape,
            job.out,
            cluster.share(config.resources, job.places),
            rejects,
            progress,
            metadata,
        )
    rejects.write(job.out)
    table = tables.read(sorted(job.out.glob("part-*.parquet")), ["key", "label", "errors"])
    errors = table.column("errors").combine_chunks().flatten().to_numpy().reshape(-1, len(t))
    broken = np.flatnonzero(~np.isfinite(errors).all(1))
    if len(broken):
        keys = ", ".join(table.column("key").take(broken[:5]).to_pylist())
        raise UserError(
            f"score: the teacher gives no finite error for {len(broken)} of {len(table)} images, the first {keys}. Another teacher, or score.precision=fp32, would do."
        )
    stability = difficulty.rank_stability(errors, table.column("label").to_numpy(), t, teacher["kind"])
    facts = {
        **metadata,
        "rank_stability": stability,
        "needed_timesteps": difficulty.needed_timesteps(stability, len(t)) if stability else None,
        "mean_error": float(np.mean(errors)),
    }
    return Result(data["rows"], len(table), len(rejects.rows), facts)
