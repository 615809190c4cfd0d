"""score: how hard the teacher finds every image."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2c_ray.data import latent_cache, tables
from d2c_ray.distributed import cluster, trainer
from d2c_ray.distributed import score as scoring
from d2c_ray.errors import UserError
from d2c_ray.job import Job, Result
from d2c_ray.models import latents, teachers
from d2c_ray.rejects import Rejects
from d2c_ray.selection import difficulty

STABILITY_ROWS = 10_000_000  # that the driver holds for it, some 50 bytes each


def run(job: Job) -> Result:
    config, data, teacher = job.config, job.facts("manifest"), job.facts("teacher")
    # A hub name stays a name: every node finds it in its own cache.
    given = Path(config.teacher.checkpoint).expanduser()
    trained = job.inputs["teacher"].path / trainer.MODEL
    model = str(given.absolute() if given.exists() else config.teacher.checkpoint) if config.teacher.checkpoint else str(trained)
    latent = latents.latent_facts(config)
    options, path = config.score, teacher.get("path", "linear")
    t = difficulty.timesteps(teacher["kind"], options.num_timesteps, options.t_min, options.t_max).numpy()
    metadata = {
        "timesteps": t.tolist(), "num_timesteps": len(t), "seed": options.seed, "convention": difficulty.CONVENTIONS[teacher["kind"]],
        "teacher": teachers.content_hash(teachers.resolve(model)), "latent": latent, "image_size": config.data.image_size,
        "precision": options.precision, "device_batch": options.device_batch, "compile": options.compile, **({"path": path} if path != "linear" else {}),
    }  # fmt: skip
    rejects = Rejects("score", data["rows"], config.data.max_rejected)
    shape = (latent["channels"], latent["side"], latent["side"])
    if options.cache_latents:
        _check_space(job, data["rows"] * latent_cache.row_bytes(latent["channels"], latent["side"], config.data.flip))
    with job.progress(data["rows"]) as progress:
        scoring.score(
            config,
            job.inputs["manifest"].parts(),
            model,
            teacher["kind"],
            teacher["class_map"],
            shape,
            job.out,
            cluster.share(config.resources, job.places),
            rejects,
            progress,
            metadata,
            path,
        )
    rejects.write(job.out)
    rows, summary = summarise(sorted(job.out.glob("part-*.parquet")), t, teacher["kind"], path)
    return Result(data["rows"], rows, len(rejects.rows), {**metadata, **summary})


def summarise(parts: list[Path], t: np.ndarray, kind: str, path: str = "linear") -> tuple[int, dict]:
    """Rows, and what a finished table says of itself; a part at a time is in memory.

    Stability is that of the images whose number is a multiple of k, where k = 1 up to `STABILITY_ROWS` images.

    Raises:
        UserError: the teacher gave an error that is not finite.
    """
    broken: list[str] = []
    num_broken, total, rows, device = 0, 0.0, 0, ""
    labels, even, odd = [], [], []
    every = -(-sum(map(tables.num_rows, parts)) // STABILITY_ROWS)
    for part in parts:
        table = tables.read(part, ["sample_id", "key", "label", "errors"])
        device = tables.metadata(part)["device"]
        errors = table.column("errors").combine_chunks().flatten().to_numpy().reshape(-1, len(t))
        bad = np.flatnonzero(~np.isfinite(errors).all(1))
        num_broken += len(bad)
        broken += table.column("key").take(bad[: 5 - len(broken)]).to_pylist()
        total += float(errors.sum(dtype=np.float64))
        rows += len(table)
        if every > 1:
            kept = table.column("sample_id").to_numpy() % every == 0
            table, errors = table.filter(pa.array(kept)), errors[kept]
        labels.append(table.column("label").to_numpy())
        halves = difficulty.half_scores(errors, t, kind, path) if len(t) > 1 else (errors[:, 0], errors[:, 0])
        even.append(halves[0])
        odd.append(halves[1])
    if num_broken:
        raise UserError(
            f"score: the teacher gives no finite error for {num_broken} of {rows} images, the first {', '.join(broken)}. Another teacher, or score.precision=fp32, would do."
        )
    stability = (
        difficulty.rank_stability(np.concatenate(even), np.concatenate(odd), np.concatenate(labels)) if rows and len(t) > 1 else None
    )
    return rows, {
        "rank_stability": stability,
        "needed_timesteps": difficulty.needed_timesteps(stability, len(t)) if stability else None,
        "mean_error": total / max(1, rows * len(t)),
        "device": device,
    }


def _check_space(job: Job, needed: int) -> None:
    there = sum(path.stat().st_size for path in (job.out / scoring.LATENTS).rglob("*.arrow"))
    free = shutil.disk_usage(job.out).free
    if needed - there > free:
        raise UserError(
            f"score.cache_latents=true wants {needed / 2**30:.1f} GiB at {job.out}; {free / 2**30:.1f} GiB are free. Without it attach encodes the chosen images itself."
        )
