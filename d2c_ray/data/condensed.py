"""The condensed dataset: writing its parts, and opening it for training.

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
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from d2c_ray import schema
from d2c_ray.data import tables
from d2c_ray.data.latent_cache import Latents
from d2c_ray.errors import UserError
from d2c_ray.models.frozen import Vae, VisionEncoder, quantise
from d2c_ray.rundir import SUCCESS, write_json
from d2c_ray.training.batches import TrainingSet, dequantise

CLASSES = "classes.parquet"
CACHE_FILES = ("labels", "sample_id", "pixels", "latent_mean", "latent_std", "vision", "vision_scale")


def model_input(pixels: Tensor, vae: Vae | None) -> Tensor:
    """What a model sees of uint8 N x H x W x C: pixels in [-1, 1], or the scaled posterior mean; N x c x h x w float32."""
    if vae is None:
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return scaled(vae.encode(pixels)[0], vae)


def scaled(mean: Tensor, vae: Vae) -> Tensor:
    """Latents as a model sees them."""
    return (mean - vae.shift) * vae.scale


def posterior(pixels: Tensor, vae: Vae, flip: bool) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of each image, and of its mirror image where `flip`: N x F x c x h x w float32."""
    both = [vae.encode(side) for side in ([pixels, pixels.flip(2)] if flip else [pixels])]
    return torch.stack([mean for mean, _ in both], 1), torch.stack([std for _, std in both], 1)


def write_part(
    path: Path, rows: pa.Table, pixels: Tensor, rejected: list[dict[str, str]], *,
    vae: Vae | None, vision: VisionEncoder | None, grid: int, flip: bool, storage: str, keep_images: bool,
    latents: Latents | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Attaches to decoded images what a student trains on, and writes them as one Parquet file.

    Args:
        rows: manifest rows, and their encoded `image` where `keep_images`.
        pixels: uint8 N x H x W x C, of the same rows.
        grid: side of the student's token grid, on which the vision tokens lie.
        flip: attach to the mirrored image too; tensors then have two rows a flip, the plain one first.
        storage: 'int8' or 'bf16', of the vision tokens.
        latents: of these rows, as scoring kept them; None: encode.

    Returns:
        Facts of the part: rows, rejected rows, and the smallest cosine of a stored token to the encoder's own.
    """
    sides = [pixels, pixels.flip(2)] if flip else [pixels]
    tensors: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {"rows": len(rows), "rejected": rejected, "vision_cosine_min": None}
    if vae is None:
        tensors["pixels"] = pixels.numpy()
    elif latents is not None:
        tensors |= latents
    else:
        mean, std = posterior(pixels, vae, flip)
        tensors["latent_mean"], tensors["latent_std"] = mean.half().numpy(), std.half().numpy()
    if vision is not None and len(rows):
        tokens = torch.stack([vision.tokens(side, grid) for side in sides], 1)  # N x F x L x V
        if storage == "int8":
            tensors["vision"], tensors["vision_scale"] = quantise(tokens.numpy())
        else:
            tensors["vision"] = tokens.bfloat16().view(torch.int16).numpy().view(np.uint16)
        stored = dequantise(tensors["vision"], tensors.get("vision_scale"))
        facts["vision_cosine_min"] = float(F.cosine_similarity(stored, tokens, dim=-1).min())
    kinds = {name: (str(values.dtype), values.shape[1:]) for name, values in tensors.items()}
    wanted = {name: kind for name, kind in schema.CONDENSED.items() if kind == "tensor" or name in rows.column_names}
    if not keep_images:
        wanted.pop("image", None)
    fields = tables.arrow_schema(wanted, kinds)
    columns = [
        tables.tensor_column(tensors[name]) if name in tensors else rows.column(name).cast(fields.field(name).type) for name in fields.names
    ]
    tables.write(path, pa.table(columns, schema=fields), facts)
    return facts


def write_classes(path: Path, names: list[str], prompts: list[str], text: tuple[Tensor, Tensor] | None) -> None:
    """The class table: label, name, prompt, and the text states (bf16 bits as uint16) and mask of each class."""
    columns: dict[str, Any] = {
        "label": pa.array(range(len(names)), pa.int32()),
        "name": pa.array(names),
        "prompt": pa.array(prompts, pa.string()),
    }
    kinds = {}
    if text is not None:
        states, mask = text[0].bfloat16().view(torch.int16).numpy().view(np.uint16), text[1].numpy().astype(np.int8)
        kinds = {"text_states": ("uint16", states.shape[1:]), "text_mask": ("int8", mask.shape[1:])}
        columns |= {"text_states": tables.tensor_column(states), "text_mask": tables.tensor_column(mask)}
    fields = tables.arrow_schema(schema.CLASSES, kinds)
    tables.write(path, pa.table([columns[name] for name in fields.names], schema=fields), {})


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
