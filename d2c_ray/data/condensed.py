"""The condensed dataset, opened for training.

Parquet is what ships. Random rows of Parquet are slow, so opening it builds, once a node, an uncompressed copy that is
memory-mapped; batches gather from it.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from d2c_ray.data import tables
from d2c_ray.errors import UserError
from d2c_ray.rundir import SUCCESS, write_json
from d2c_ray.training.batches import TrainingSet

CLASSES = "classes.parquet"
CACHE_FILES = ("labels", "sample_id", "pixels", "latent_mean", "latent_std", "vision", "vision_scale")


def read_text(path: Path) -> tuple[Tensor, Tensor] | None:
    """Text states, classes x tokens x width float32, and mask, of a class table; None where it has no text."""
    table = tables.read(path)
    if "text_states" not in table.column_names:
        return None
    states = torch.from_numpy(np.array(tables.tensor_values(table, "text_states")).view(np.int16)).view(torch.bfloat16).float()
    return states, torch.from_numpy(np.array(tables.tensor_values(table, "text_mask"))).long()


@dataclass
class Condensed:
    """An opened condensed dataset: its facts and memory-mapped arrays by column."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    text: tuple[Tensor, Tensor] | None

    def training_set(self) -> TrainingSet:
        """The arrays as the training loop takes them."""
        latent = self.meta["latent"]
        return TrainingSet(
            labels=np.maximum(self.arrays["labels"].astype(np.int64), 0),
            num_classes=max(1, len(self.meta["class_names"])),
            flip=self.meta["flip"],
            pixels=self.arrays.get("pixels"),
            latent_mean=self.arrays.get("latent_mean"),
            latent_std=self.arrays.get("latent_std"),
            latent_scale=latent.get("scale", 1.0),
            latent_shift=latent.get("shift", 0.0),
            vision=self.arrays.get("vision"),
            vision_scale=self.arrays.get("vision_scale"),
            text_states=self.text[0] if self.text else None,
            text_mask=self.text[1] if self.text else None,
        )


def open(folder: str | Path, cache_dir: str | Path | None = None) -> Condensed:
    """Opens a finished condensed dataset for random access.

    Args:
        folder: a `condensed-<hash>` folder.
        cache_dir: where the node's uncompressed copy lies or is built; the system's temporary folder by default.

    Raises:
        UserError: the folder is not whole, or the disk has no room for the copy.
    """
    folder = Path(folder)
    if not (folder / SUCCESS).is_file():
        raise UserError(f"'{folder}' is no finished condensed dataset: it has no {SUCCESS}.")
    meta = json.loads((folder / SUCCESS).read_text())["facts"]
    cache = cache_path(folder, meta, cache_dir)
    from filelock import FileLock

    cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(cache.with_suffix(".lock")):
        if not (cache / SUCCESS).is_file():
            _build_cache(folder, cache)
        arrays = {name: np.load(cache / f"{name}.npy", mmap_mode="r") for name in CACHE_FILES if (cache / f"{name}.npy").is_file()}
    return Condensed(meta, arrays, read_text(folder / CLASSES) if (folder / CLASSES).is_file() else None)


def vision_width(folder: Path) -> int:
    """Width of the vision tokens of a condensed dataset, 0 where it has none."""
    for part in sorted(folder.glob("part-*.parquet")):
        found = pq.read_schema(part)
        if "vision" in found.names:
            return int(json.loads(found.field("vision").metadata[b"shape"])[-1])
    return 0


def cache_path(folder: Path, meta: dict[str, Any], cache_dir: str | Path | None) -> Path:
    """Where the node's copy of a condensed dataset lies: by its fingerprint, so that two datasets never share one."""
    root = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir()) / f"d2c_ray-cache-{os.getuid()}"
    return root / meta["fingerprint"]


def drop_cache(folder: str | Path, cache_dir: str | Path | None = None) -> None:
    """Removes this node's copy. Processes that have it open keep reading it."""
    from filelock import FileLock

    cache = cache_path(Path(folder), json.loads((Path(folder) / SUCCESS).read_text())["facts"], cache_dir)
    if cache.parent.is_dir():
        with FileLock(cache.with_suffix(".lock")):
            shutil.rmtree(cache, ignore_errors=True)


def _build_cache(folder: Path, cache: Path) -> None:
    parts = sorted(folder.glob("part-*.parquet"))
    counts = [pq.read_metadata(part).num_rows for part in parts]
    total = sum(counts)
    found = pq.read_schema(parts[counts.index(max(counts))])
    kinds: dict[str, tuple[str, list[int]]] = {"labels": ("int32", []), "sample_id": ("int64", [])}
    for name in CACHE_FILES[2:]:
        if name in found.names:
            stored = found.field(name).metadata
            kinds[name] = (stored[b"dtype"].decode(), json.loads(stored[b"shape"]))
    needed = sum(total * np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in kinds.values())
    free = shutil.disk_usage(cache.parent).free
    if needed * 1.05 > free:
        raise UserError(
            f"opening '{folder}' needs {needed / 2**30:.1f} GiB at {cache.parent}; {free / 2**30:.1f} GiB are free. Set TMPDIR to a larger disk."
        )
    shutil.rmtree(cache, ignore_errors=True)  # the rest of a build that was cut off
    cache.mkdir(parents=True)
    arrays = {
        name: np.lib.format.open_memmap(cache / f"{name}.npy", "w+", np.dtype(dtype), (total, *shape))
        for name, (dtype, shape) in kinds.items()
    }
    start = 0
    for part, count in zip(parts, counts, strict=True):
        if count:
            table = tables.read(part, ["sample_id", "label", *(name for name in kinds if name in found.names and name != "sample_id")])
            for name, array in arrays.items():
                values = (
                    table.column("label" if name == "labels" else name).to_numpy()
                    if name in ("labels", "sample_id")
                    else tables.tensor_values(table, name)
                )
                array[start : start + count] = values
        start += count
    for array in arrays.values():
        array.flush()
    write_json(cache / SUCCESS, {"rows": total})
