"""Features of images: of a whole dataset to select in, of real and generated images to measure in."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import Config, EmbedConfig
from d2c_ray.data import tables, units
from d2c_ray.data.ledger import Ledger
from d2c_ray.distributed import pool
from d2c_ray.distributed.actors import Embedder, FeatureExtractor
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.filling import fill
from d2c_ray.errors import UserError
from d2c_ray.models import networks
from d2c_ray.progress import Progress
from d2c_ray.rejects import Rejects

ROWS_PER_UNIT = 256  # images a part
ROWS_PER_GROUP = 4096  # of a file of rows to embed, which actors read a row group at a time


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


def of_rows(rows: Path, out: Path, mirrored: bool = False) -> list[dict[str, Any]]:
    """Work for `embed_images`: a manifest-shaped file's images, or their mirror images, into parts of the folder `out` by sample_id."""
    work = units.cut(units.shards([rows]), ROWS_PER_UNIT)
    return [{**unit, "mirrored": mirrored, "part": str(out / f"part-{unit['unit']:06d}.parquet")} for unit in work]


def of_samples(parts: list[Path], out: Path) -> list[dict[str, Any]]:
    """Work for `embed_images`: parts of generated images into parts of the folder `out`, by index."""
    return [{"samples": str(part), "part": str(out / part.name)} for part in parts]


def embed_images(config: Config, work: list[dict[str, Any]], share: Share, rejects: Rejects, progress: Progress) -> None:
    """Writes what every network sees in images, as `data.measured` reads it: a part a unit, whole or not there.

    An actor writes the parts it makes, so that no features pass through this process; parts that are there are not made again.

    Raises:
        UserError: too many images cannot be decoded, or other hardware than before.
    """
    device = ""

    def take(unit: dict[str, Any], facts: dict[str, Any]) -> None:
        nonlocal device
        device = device or facts["device"]
        if facts["device"] != device:
            Path(unit["part"]).unlink()
            raise UserError(
                f"'{Path(unit['part']).parent}' was begun on {device}, and this part comes from {facts['device']}: features that are compared are made on "
                "one kind of hardware, since their last bits differ between kinds. Go on where it was begun, or move the folder away to begin anew."
            )
        rejects.add(facts["rejected"])
        progress.advance(facts["rows"] + len(facts["rejected"]))

    missing = []
    for folder in {Path(unit["part"]).parent for unit in work}:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".part-*"):  # what a killed process was writing
            stale.unlink(missing_ok=True)
    for unit in work:
        facts = _there(Path(unit["part"]))
        if facts:
            take(unit, facts)
        else:
            missing.append(unit)
    actor_args = {
        "evaluate": config.evaluate,
        "data": config.data,
        "storage": config.storage,
        "weights": {name: own["weights"] for name, own in networks.every(config.evaluate).items()},
        "device": share.device,
        "threads": share.threads,
    }
    for unit, facts in pool.run_pool(Embedder, actor_args, missing, share):
        take(unit, facts)


def _there(part: Path) -> dict[str, Any] | None:
    """The facts of a part that is there and can be read: a machine that lost power may leave half of one."""
    try:
        return tables.metadata(part)
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None
