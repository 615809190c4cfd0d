"""Generated images as files: Parquet parts, a folder of PNGs, the .npz that ADM's evaluator reads.

The parts are the ledger of a sampling: each is whole or not there, and the other two forms are made of them at the end.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from d2c_ray import schema
from d2c_ray.data import measured, tables
from d2c_ray.data.decode import encode_png
from d2c_ray.rundir import whole, write_bytes

IMAGES = "images"
NPZ = "samples.npz"


def part(indices: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> pa.Table:
    """A part's rows: index, label, image (PNG), of uint8 N x H x W x C."""
    images = pa.array([encode_png(image) for image in pixels], pa.binary())
    fields = tables.arrow_schema(schema.SAMPLES)
    return pa.table([pa.array(indices.astype(np.int64)), pa.array(labels.astype(np.int32)), images], schema=fields)


def part_of_features(indices: np.ndarray, labels: np.ndarray, tensors: dict[str, np.ndarray]) -> pa.Table:
    """A part's rows where images are not kept: index, label, and the tensors as `measured.table` has them."""
    table = measured.table(indices, labels, tensors)
    return table.rename_columns(["index" if name == "id" else name for name in table.column_names])


def clean(folder: Path) -> None:
    """Removes the halves of files that a killed attempt was writing."""
    for stale in (*folder.glob(".part-*"), *folder.glob(f".{NPZ}.*"), *(folder / IMAGES).glob(".*.png.*")):
        stale.unlink(missing_ok=True)


def write_pngs(parts: list[Path], folder: Path, advance: Callable[[int], None]) -> None:
    """`images/000000.png` and so on, by index; those that are there already are left alone."""
    for path in parts:
        rows = tables.read(path, ["index", "image"]).to_pylist()
        for row in rows:
            out = folder / IMAGES / f"{row['index']:06d}.png"
            if not out.is_file():
                write_bytes(out, row["image"])
        advance(len(rows))


def write_npz(parts: list[Path], out: Path, count: int, advance: Callable[[int], None]) -> None:
    """An .npz of arr_0, uint8 N x H x W x 3 (grey is repeated), and arr_1, the labels asked for, int64 N, both by index.

    Written a part at a time into an archive without compression, as np.savez makes it: 50,000 images of 256 px are 9.8 GB,
    more than a copy in memory should take. Nothing is done where the file is there.

    Args:
        parts: of all images, in order. count: how many images.

    Raises:
        ValueError: the parts do not hold images 0 to count - 1 in turn.
    """
    if out.is_file():
        advance(count)
        return
    labels = np.concatenate([tables.read(path, ["label"]).column("label").to_numpy() for path in parts]).astype(np.int64)
    images = _in_order(parts, count, advance)
    first = next(images)
    with whole(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _header(file, first.dtype, (count, *first.shape))
            file.write(first.tobytes())
            for image in images:
                file.write(image.tobytes())
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            _header(file, labels.dtype, labels.shape)
            file.write(labels.tobytes())


def _in_order(parts: list[Path], count: int, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    at = 0
    for path in parts:
        table = tables.read(path, ["index", "image"])
        if table.column("index").to_pylist() != list(range(at, at + len(table))):
            raise ValueError(f"'{path}' does not go on at image {at}")
        for content in table.column("image").to_pylist():
            with Image.open(io.BytesIO(content)) as image:
                yield np.asarray(image.convert("RGB"))
        at += len(table)
        advance(len(table))
    if at != count:
        raise ValueError(f"the parts hold {at} images, not {count}")


def _header(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Of .npy version 1.0, which ADM's evaluator can stream from."""
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
