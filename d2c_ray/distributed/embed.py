"""Features of images: of a whole dataset to select in, of real and generated images to measure in."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import Config, EmbedConfig
from d2c_ray.data import measured, tables, units
from d2c_ray.data.ledger import Ledger
from d2c_ray.distributed import pool
from d2c_ray.distributed.actors import Embedder, FeatureExtractor
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.filling import fill
from d2c_ray.models import networks
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
    """Writes what every network sees in a manifest-shaped file's images to `out`, as `data.measured` reads it, by sample_id."""
    _embed(config, units.cut(units.shards([rows]), ROWS_PER_UNIT), out, share, rejects, progress)


def embed_samples(config: Config, parts: list[Path], out: Path, share: Share, rejects: Rejects, progress: Progress) -> None:
    """Writes what every network sees in generated images to `out`, as `data.measured` reads it, by index."""
    _embed(config, [{"samples": str(part)} for part in parts], out, share, rejects, progress)


def _embed(config: Config, work: list[dict[str, Any]], out: Path, share: Share, rejects: Rejects, progress: Progress) -> None:
    if out.is_file():
        rejected = tables.metadata(out)["rejected"]
        rejects.add(rejected)
        progress.advance(len(tables.read(out, ["id"])) + len(rejected))
        return
    facts = networks.every(config.evaluate)
    actor_args = {
        "evaluate": config.evaluate,
        "data": config.data,
        "storage": config.storage,
        "weights": {name: own["weights"] for name, own in facts.items()},
        "device": share.device,
        "threads": share.threads,
    }
    found: list[dict[str, Any]] = []
    for _, result in pool.run_pool(Embedder, actor_args, work, share):
        rejects.add(result["rejected"])
        progress.advance(len(result["id"]) + len(result["rejected"]))
        # Copies, since what Ray gives are views that would keep every unit in the object store until the last is here.
        arrays = {name: np.array(values) for name, values in result["tensors"].items()}
        found.append(
            {"id": np.array(result["id"]), "label": np.array(result["label"]), "tensors": arrays, "rejected": list(result["rejected"])}
        )
        del result
    ids, labels = (np.concatenate([own[name] for own in found]) for name in ("id", "label"))
    order = np.argsort(ids)
    tensors = {}
    for name in list(found[0]["tensors"]):
        # Taken out one by one, so that not all networks' features are held twice.
        tensors[name] = np.concatenate([own["tensors"].pop(name) for own in found])[order]
    metadata = {"networks": list(facts.values()), "rejected": [row for own in found for row in own["rejected"]]}
    tables.write(out, measured.table(ids[order], labels[order], tensors), metadata)
