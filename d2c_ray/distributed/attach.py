"""Attaching to chosen images: one pass through Ray Data for all encoders, parts written whole by the actor that made them.

condensed-<hash>/
  part-000003.parquet    a finished unit; a run that goes on makes those that are missing
  storage.json           token columns that turned out to need bf16
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from d2c_ray.config import Config, TextConfig, VisionConfig, encoder_key
from d2c_ray.data import tables, units
from d2c_ray.data.attached import FAITHFUL
from d2c_ray.distributed.actors import Attacher, Busy
from d2c_ray.distributed.cluster import ANYWHERE, Share
from d2c_ray.distributed.ingest import stream
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, text
from d2c_ray.models import vision as encoders_of_images
from d2c_ray.progress import Progress
from d2c_ray.rejects import Rejects
from d2c_ray.rundir import write_json

STORAGE = "storage.json"


class _TooCoarse(Exception):
    """A token lost too much in int8."""

    def __init__(self, columns: list[str]):
        self.columns = columns


def attach(
    config: Config,
    vision: dict[str, VisionConfig],
    rows: list[Path],
    grid: int,
    out: Path,
    share: Share,
    rejects: Rejects,
    progress: Progress,
    rows_per_part: int,
    keep_images: bool,
    latents: tuple[Path, str] | None = None,
    class_names: list[str] | None = None,
    online: Sequence[str] = (),
    all_readable: bool = True,
) -> list[dict[str, Any]]:
    """Attaches to every row of manifest-shaped files; parts that are there already stay.

    Args:
        vision: encoders by the name of their column; those of `online` are left out.
        rows: manifest files, or a file of selected manifest rows.
        grid: side of the student's token grid.
        keep_images: keep the images' encoded bytes too.
        latents: where scoring kept latents, which need not be made again, and what they were made on.
        class_names: of a table that ships; None: of a teacher's.
        online: what is encoded while training: 'latent' and columns of vision. Pixels are stored in its place.
        all_readable: rows that cannot be decoded now were once, so that a part without them is made again.

    Returns:
        The facts of every part, in order.

    Raises:
        UserError: too many images cannot be decoded, the storage does not answer, other hardware than before, or actors
            that cannot load.
    """
    vision = {column: options for column, options in vision.items() if column not in online}
    weights = {column: encoders_of_images.facts(options, grid, encoder_key(column))["weights"] for column, options in vision.items()}
    latent = bool(config.vae.path) and "latent" not in online
    if latent:
        weights["latent"] = frozen.encoder_hash(config.vae.path, config.vae.subfolder)
    while True:
        rejects.rows.clear()
        progress.at(0)
        wide = json.loads((out / STORAGE).read_text()) if (out / STORAGE).is_file() else []
        int8 = {column: options.storage != "bf16" and column not in wide for column, options in vision.items()}
        arguments = {
            "out": str(out), "vae": config.vae, "vision": vision, "int8": int8, "grid": grid, "flip": config.data.flip,
            "latents": str(latents[0]) if latents else "", "latents_device": latents[1] if latents else "",
            "weights": weights, "keep_pixels": not latent or bool(online), "class_names": class_names, "device": share.device, "threads": share.threads,
        }  # fmt: skip
        try:
            chain = _chain(config, (["latent"] if latent else []) + list(vision), arguments)
            parts = _attach(config, chain, rows, out, share, rejects, progress, rows_per_part, keep_images, all_readable)
        except _TooCoarse as found:
            # Whichever part shows it, and whenever: the table is bf16 if any token of it has to be.
            write_json(out / STORAGE, sorted({*wide, *found.columns}))
            progress.at(0, f"{', '.join(found.columns)}: int8 would lose too much, again in bf16")
            continue
        if all(_fits(facts, int8) for facts in parts):  # no actor of the attempt before wrote a last part
            return parts


def _there(part: Path) -> dict[str, Any] | None:
    """The facts of a part that is there and can be read: a machine that lost power may leave half of one."""
    try:
        return tables.metadata(part)
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None


def _fits(facts: dict[str, Any], int8: dict[str, bool]) -> bool:
    """Whether a part is stored as the table is."""
    return facts["storage"] == {column: "int8" if small else "bf16" for column, small in int8.items()}


def _chain(config: Config, encoders: list[str], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of one pool for all encoders, or of one for each."""
    groups = [(name,) for name in encoders] if config.resources.encoders_apart and encoders else [tuple(encoders)]
    return [{**arguments, "encoders": group, "writes": group is groups[-1]} for group in groups]


def _attach(
    config: Config,
    chain: list[dict[str, Any]],
    rows: list[Path],
    out: Path,
    share: Share,
    rejects: Rejects,
    progress: Progress,
    rows_per_part: int,
    keep_images: bool,
    all_readable: bool,
) -> list[dict[str, Any]]:
    todo = units.cut(units.shards(rows), rows_per_part)
    parts = {unit["unit"]: out / f"part-{unit['unit']:06d}.parquet" for unit in todo}
    auto = {column for column, options in chain[0]["vision"].items() if options.storage == "auto" and chain[0]["int8"][column]}
    busy, device, work = Busy(), "", []

    def say(text: str) -> None:
        progress.at(progress.done, text)

    def take(unit: dict[str, Any], note: str = "") -> None:
        nonlocal device
        facts = tables.metadata(parts[unit["unit"]])
        device = device or facts["device"]
        if facts["device"] != device:
            parts[unit["unit"]].unlink()
            raise UserError(
                f"'{out}' was begun on {device}, and this part comes from {facts['device']}: one table is made on one kind of hardware, since the last "
                "bits of what is attached differ between kinds. Go on where it was begun, or move the folder away to begin anew."
            )
        cosines = {column: facts["cosine"][column] for column in auto}
        coarse = [column for column, cosine in cosines.items() if cosine is not None and cosine < FAITHFUL]
        if coarse:
            raise _TooCoarse(coarse)
        rejects.add(facts["rejected"])
        progress.advance(unit["stop"] - unit["start"], note)

    for unit in todo:
        facts = _there(parts[unit["unit"]])
        # What could not be read may be there again now; a table that ships holds all that was chosen, where that is known.
        if facts and _fits(facts, chain[0]["int8"]) and not (all_readable and chain[0]["class_names"] is not None and facts["rejected"]):
            take(unit)
        else:
            work.append(unit)
    for unit, result in stream(
        work, config.data, config.storage, share, Attacher, chain[0], keep_bytes=keep_images, say=say, notes=out / "loading", then=chain[1:]
    ):
        busy.add(result)
        take(unit, busy.note())
    return [tables.metadata(path) for path in parts.values()]


def start_text(options: TextConfig, prompts: list[str], share: Share) -> Callable[[], tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """Begins to encode prompts on a node that has room.

    Returns:
        A function that waits for states and mask, as `models.text.encode` gives them, and for the prompts that were cut.
    """
    task: Any = ray.remote(num_cpus=1, num_gpus=share.gpus_per_actor, max_retries=3, scheduling_strategy=ANYWHERE)(_encode_text)
    pending = task.remote(options, prompts, text.facts(options)["weights"], share.device, share.threads)

    def finish() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        states, mask, cut = ray.get(pending)
        return torch.from_numpy(np.array(states)), torch.from_numpy(np.array(mask)), cut

    return finish


def _encode_text(
    options: TextConfig, prompts: list[str], weights: str, device: str, threads: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    torch.set_num_threads(threads)
    frozen.check_weights(text.KEY, text.facts(options)["weights"], weights)
    states, mask = text.encode(options, prompts, torch.device(device))
    return states.numpy(), mask.numpy(), text.cut(options, prompts)
