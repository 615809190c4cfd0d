"""Features of images: of a whole dataset to select in, of real and generated images to measure in."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import Config, EmbedConfig
from d2c_ray.data import tables, units
from d2c_ray.data.ledger import Ledger
from d2c_ray.distributed import pool
from d2c_ray.distributed.actors import Embedder, FeatureExtractor
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.filling import fill
from d2c_ray.progress import Progress
from d2c_ray.rejects import Rejects

ROWS_PER_UNIT = 128


def embed(
    config: Config,
    options: EmbedConfig,
    manifest: list[Path],
    out: Path,
    share: Share,
    rejects: Rejects,
    progress: Progress,
    metadata: dict[str, Any],
) -> None:
    """Embeds every row of the manifest that is not in `out` yet; leaves one Parquet part a shard, as scoring does.

    Raises:
        UserError: too many images cannot be decoded, the storage does not answer, or other hardware than before.
    """
    ledger = Ledger(out, units.shards(manifest), _finish, metadata)
    actor_args = {"embed": options, "device": share.device, "threads": share.threads}
    fill(ledger, config, share, FeatureExtractor, actor_args, rejects, progress)


def _finish(table: pa.Table) -> pa.Table:
    return table.sort_by("sample_id").select(list(schema.EMBEDDINGS))


def embed_rows(config: Config, rows: Path, out: Path, share: Share, rejects: Rejects, progress: Progress) -> None:
    """Writes the features of a manifest-shaped file's images to `out`, in the order of sample_id."""
    _embed(config, units.cut(units.shards([rows]), ROWS_PER_UNIT), out, share, rejects, progress)


def embed_samples(config: Config, parts: list[Path], out: Path, share: Share, rejects: Rejects, progress: Progress) -> None:
    """Writes the features of generated images to `out`, in the order of their index."""
    _embed(config, [{"samples": str(part)} for part in parts], out, share, rejects, progress)


def _embed(config: Config, work: list[dict[str, Any]], out: Path, share: Share, rejects: Rejects, progress: Progress) -> None:
    if out.is_file():
        rejected = tables.metadata(out)["rejected"]
        rejects.add(rejected)
        progress.advance(len(tables.read(out, ["id"])) + len(rejected))
        return
    actor_args = {
        "evaluate": config.evaluate,
        "data": config.data,
        "storage": config.storage,
        "device": share.device,
        "threads": share.threads,
    }
    found = []
    for _, result in pool.run_pool(Embedder, actor_args, work, share):
        rejects.add(result["rejected"])
        progress.advance(len(result["id"]) + len(result["rejected"]))
        found.append(result)
    ids, labels, features = (np.concatenate([result[name] for result in found]) for name in ("id", "label", "features"))
    order = np.argsort(ids)
    fields = tables.arrow_schema(schema.FEATURES, {"features": ("float32", features.shape[1:])})
    columns = [pa.array(ids[order].astype(np.int64)), pa.array(labels[order].astype(np.int32)), tables.tensor_column(features[order])]
    tables.write(
        out,
        pa.table(columns, schema=fields),
        {"network": config.evaluate.network, "rejected": [row for result in found for row in result["rejected"]]},
    )
