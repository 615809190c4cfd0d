"""Scoring a manifest: shards through Ray Data, one Parquet file a finished shard."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import Config
from d2c_ray.data import tables, units
from d2c_ray.distributed.actors import Scorer
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.ingest import AddNoise, stream
from d2c_ray.progress import Progress
from d2c_ray.rejects import Rejects
from d2c_ray.selection import difficulty


def score(
    config: Config,
    manifest: list[Path],
    teacher: Path,
    kind: str,
    latent_shape: tuple[int, ...],
    out: Path,
    share: Share,
    rejects: Rejects,
    progress: Progress,
    metadata: dict[str, Any],
) -> None:
    """Scores every row of the manifest that has no finished shard in `out`.

    A shard is written when its last row has come back; one that is there already is not read again.
    """
    options = config.score
    t = difficulty.timesteps(kind, options.num_timesteps, options.t_min, options.t_max).numpy()
    todo = units.cut(manifest, share.rows_per_task)
    finished = {int(path.stem.split("-")[1]) for path in out.glob("part-*.parquet")}
    expected: dict[int, int] = {}
    for unit in todo:
        expected[unit["shard"]] = expected.get(unit["shard"], 0) + unit["stop"] - unit["start"]
    for shard in sorted(finished & set(expected)):
        rejects.add(tables.metadata(out / f"part-{shard:06d}.parquet")["rejected"])
        progress.advance(expected[shard])
    collected: dict[int, list[pa.Table]] = {}
    bad: dict[int, list[dict[str, str]]] = {}
    arrived: dict[int, int] = {}
    actor_args = {"teacher": str(teacher), "vae": config.vae, "score": options, "device": share.device, "threads": share.threads}
    extend = AddNoise(options.seed, options.num_timesteps, latent_shape)
    work = [unit for unit in todo if unit["shard"] not in finished]
    for unit, result in stream(work, config.data, share, Scorer, actor_args, extend):
        shard, rows = unit["shard"], unit["stop"] - unit["start"]
        rejected = rejects.of(result)
        rejects.add(rejected)
        collected.setdefault(shard, []).append(result)
        bad.setdefault(shard, []).extend(rejected)
        arrived[shard] = arrived.get(shard, 0) + rows
        progress.advance(rows)
        if arrived[shard] == expected[shard]:
            table = _finish(pa.concat_tables([part.replace_schema_metadata(None) for part in collected.pop(shard)]), t, kind)
            tables.write(out / f"part-{shard:06d}.parquet", table, {**metadata, "rejected": bad.pop(shard)})


def _finish(table: pa.Table, t: np.ndarray, kind: str) -> pa.Table:
    table = table.sort_by("sample_id")
    errors = table.column("errors").combine_chunks().flatten().to_numpy().reshape(-1, len(t))
    table = table.append_column("score", pa.array(difficulty.score(errors, t, kind)))
    fields = tables.arrow_schema(schema.SCORES, lists=len(t))
    return table.select(fields.names).cast(fields)
