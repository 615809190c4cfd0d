"""Scoring a manifest: units through Ray Data, kept in the shard ledger as they come."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import Config
from d2c_ray.data import tables
from d2c_ray.data.ledger import Ledger
from d2c_ray.data.units import shards
from d2c_ray.distributed.actors import Scorer
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.filling import fill
from d2c_ray.distributed.ingest import AddNoise
from d2c_ray.progress import Progress
from d2c_ray.rejects import Rejects
from d2c_ray.selection import difficulty

LATENTS = "latents"  # folder in the score table's, where score.cache_latents keeps them


def score(
    config: Config,
    manifest: list[Path],
    teacher: str,
    kind: str,
    class_map: list[int],
    latent_shape: tuple[int, ...],
    out: Path,
    share: Share,
    rejects: Rejects,
    progress: Progress,
    metadata: dict[str, Any],
    path: str = "linear",
) -> None:
    """Scores every row of the manifest that is not in `out` yet; leaves one Parquet part a shard.

    Args:
        teacher: model folder or hub name. kind, path: what it predicts, and on which path if that is velocity.
        class_map: the teacher's class of each label.

    Raises:
        UserError: too many images cannot be decoded, the storage does not answer, or other hardware than before.
    """
    options = config.score
    t = difficulty.timesteps(kind, options.num_timesteps, options.t_min, options.t_max).numpy()
    ledger = Ledger(out, shards(manifest), partial(_finish, t=t, kind=kind, path=path), metadata)
    actor_args = {
        "teacher": teacher, "class_map": class_map, "vae": config.vae, "score": options, "flip": config.data.flip,
        "latents": str(out / LATENTS) if options.cache_latents else "", "device": share.device, "threads": share.threads,
    }  # fmt: skip
    extend = AddNoise(options.seed, options.num_timesteps, latent_shape)
    fill(ledger, config, share, Scorer, actor_args, rejects, progress, extend)


def _finish(table: pa.Table, t: np.ndarray, kind: str, path: str) -> pa.Table:
    table = table.sort_by("sample_id")
    errors = table.column("errors").combine_chunks().flatten().to_numpy().reshape(-1, len(t))
    table = table.append_column("score", pa.array(difficulty.score(errors, t, kind, path)))
    fields = tables.arrow_schema(schema.SCORES, lists=len(t))
    return table.select(fields.names).cast(fields)
