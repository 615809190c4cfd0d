"""Attaching to chosen images: parts through Ray Data, each written whole by the actor that made it."""

from pathlib import Path
from typing import Any

from d2c_ray.config import AttachConfig, Config
from d2c_ray.data import tables, units
from d2c_ray.distributed.actors import Attacher
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.ingest import stream
from d2c_ray.progress import Progress
from d2c_ray.rejects import Rejects


def attach(
    config: Config,
    options: AttachConfig,
    rows: list[Path],
    grid: int,
    out: Path,
    share: Share,
    rejects: Rejects,
    progress: Progress,
    keep_images: bool,
    latents: Path | None = None,
) -> list[dict[str, Any]]:
    """Attaches to every row of manifest-shaped files; parts that are there already stay.

    Args:
        rows: manifest files, or a file of selected manifest rows.
        grid: side of the student's token grid.
        latents: where scoring kept latents, which need not be made again.

    Returns:
        The facts of every part, in order.
    """
    todo = units.cut(units.shards(rows), options.rows_per_part)
    actor_args = {
        "out": str(out), "vae": config.vae, "attach": options, "grid": grid, "flip": config.data.flip,
        "keep_images": keep_images, "latents": str(latents or ""), "device": share.device, "threads": share.threads,
    }  # fmt: skip
    parts = {unit["unit"]: out / f"part-{unit['unit']:06d}.parquet" for unit in todo}
    work = []

    def say(text: str) -> None:
        progress.at(progress.done, text)

    for unit in todo:
        if parts[unit["unit"]].is_file():
            rejects.add(tables.metadata(parts[unit["unit"]])["rejected"])
            progress.advance(unit["stop"] - unit["start"])
        else:
            work.append(unit)
    for unit, _ in stream(
        work, config.data, config.storage, share, Attacher, actor_args, keep_bytes=keep_images, say=say, notes=out / "loading"
    ):
        rejects.add(tables.metadata(parts[unit["unit"]])["rejected"])
        progress.advance(unit["stop"] - unit["start"])
    return [tables.metadata(path) for path in parts.values()]
