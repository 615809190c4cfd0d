"""Anybody's images to measure: a folder, an .npz as ADM's evaluator reads it, Parquet, or what this project sampled.

Nothing is held but a few images: archives and tables are read as streams.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from d2c_ray.data import npz, tables
from d2c_ray.data.decode import Undecodable, centre_crop, decode, decode_whole
from d2c_ray.errors import UserError
from d2c_ray.rundir import PROGRESS
from d2c_ray.wording import first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES, LABELS = "arr_0", "arr_1"  # of an .npz, as ADM's samples and reference batches name them
MEAN, COVARIANCE = "mu", "sigma"
ROWS = 256  # of a table that are read at once
DECODERS = 4  # threads, and decoded images held at once
MAX_PIXELS = 50_000_000  # of an image, where nobody says otherwise: `DECODERS` of them decoded are some GB at the worst
WOULD_DO = (
    f"a folder with images ({', '.join(SUFFIXES[:4])}, ...; class folders give labels), an .npz with {IMAGES} (uint8, N x H x W x C), a "
    "samples-* folder or Parquet with an 'image' column would do"
)
_MOST_LABEL = 2**31 - 1
Item = tuple[str, int, bytes | np.ndarray]  # name, label or -1, encoded or decoded


@dataclass(frozen=True)
class ImageSet:
    """Images that are not read yet.

    Attributes:
        kind: folder | npz | parquet | samples.
        count: images that are listed; some may turn out to be undecodable.
        class_names: of the labels, where class folders give them.
        sides: height and width of every image, where it is known before any is read.
        items: reads them all, in an order of their own that never changes.
    """

    path: Path
    kind: str
    count: int
    items: Callable[[], Iterator[Item]]
    class_names: list[str] | None = None
    sides: tuple[int, int] | None = None


@dataclass
class Read:
    """What was found while a set was read: a row for every image that could be decoded, in the order of the set."""

    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # -1: none
    sizes: dict[str, int] = field(default_factory=dict)  # images of each size, '32 x 32'
    rejected: list[tuple[str, str]] = field(default_factory=list)  # name and reason


def find(given: str | Path) -> ImageSet:
    """The images at a path.

    Raises:
        UserError: nothing there, no images in it, or arrays and tables of another layout.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise UserError(f"there is no '{given}'; {WOULD_DO}.")
    if path.suffix.lower() == ".npz":
        return _of_npz(path)
    if path.suffix.lower() == ".parquet":
        return _of_parquet(path, [path])
    raise UserError(f"'{given}' is a file of a kind that is not read; {WOULD_DO}.")


def holds_statistics(given: str | Path) -> bool:
    """Whether a path is an .npz with a mean and a covariance (`mu`, `sigma`)."""
    path = Path(given).expanduser()
    return path.is_file() and path.suffix.lower() == ".npz" and {MEAN, COVARIANCE} <= set(_members(path))


def holds_images(given: str | Path) -> bool:
    """Whether a path is something else than an .npz of statistics alone."""
    path = Path(given).expanduser()
    return not (path.is_file() and path.suffix.lower() == ".npz") or IMAGES in _members(path)


def decoded(images: ImageSet, size: int, max_pixels: int, read: Read) -> Iterator[np.ndarray]:
    """Every decodable image once, in the order of the set, uint8 H x W x C; `DECODERS` of them are held at once.

    Args:
        size: pixels a side of ADM's centre crop; 0: images stay as they are.
        max_pixels: of an image, above which it is refused as a decompression bomb.
        read: has a row for an image once that comes.

    Raises:
        UserError: damage that takes all further images with it, as of an archive.
    """

    def pixels_of(item: Item) -> np.ndarray | Undecodable:
        content = item[2]
        try:
            if isinstance(content, np.ndarray):
                return content if not size or content.shape[:2] == (size, size) else _cropped(content, size)
            return decode(content, size, 3, max_pixels) if size else decode_whole(content, max_pixels)
        except Undecodable as error:
            return error

    if images.sides and min(images.sides):
        height, width = images.sides
        if height * width * max(1.0, size / min(height, width)) ** 2 > max_pixels:
            cropped = f" when cropped to {size}" if size else ""
            raise UserError(f"'{images.path}': images of {width} x {height} pixels are more than --max-pixels {max_pixels}{cropped}.")
    waiting: deque[tuple[str, int, Future[np.ndarray | Undecodable]]] = deque()

    def first() -> Iterator[np.ndarray]:
        name, label, made = waiting.popleft()
        pixels = made.result()
        if isinstance(pixels, Undecodable):
            read.rejected.append((name, str(pixels)))
            return
        shown = f"{pixels.shape[1]} x {pixels.shape[0]}"
        read.sizes[shown] = read.sizes.get(shown, 0) + 1
        read.names.append(name)
        read.labels.append(label)
        yield pixels

    with ThreadPoolExecutor(DECODERS) as threads:
        for item in images.items():
            if not -_MOST_LABEL <= item[1] <= _MOST_LABEL:
                raise UserError(f"'{images.path}': {item[0]} has the label {item[1]}, which is no class; numbers from 0 would do.")
            waiting.append((item[0], item[1], threads.submit(pixels_of, item)))
            if len(waiting) == DECODERS:
                yield from first()
        while waiting:
            yield from first()


def _of_folder(path: Path) -> ImageSet:
    parts = sorted(path.glob("part-*.parquet"))
    if parts:
        if (path / PROGRESS).is_file():
            raise UserError(f"'{path}' is not finished: the command that writes it goes on where it stopped, or is still at it.")
        return _of_parquet(path, parts)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file())
    if not files:
        others = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
        if others:
            return _of_parquet(path, others)
        raise UserError(f"no images in '{path}'; {WOULD_DO}.")
    inner = [file.relative_to(path) for file in files]
    classes = sorted({name.parts[0] for name in inner}) if all(len(name.parts) > 1 for name in inner) else []
    # One folder that holds everything is no class.
    label = {name: index for index, name in enumerate(classes)} if len(classes) > 1 else {}

    def items() -> Iterator[Item]:
        for file, name in zip(files, inner, strict=True):
            yield name.as_posix(), label.get(name.parts[0], -1), file.read_bytes()

    return ImageSet(path, "folder", len(files), items, classes if label else None)


def _of_npz(path: Path) -> ImageSet:
    found = _members(path)
    if IMAGES not in found:
        also = " (statistics, which can be a reference and nothing else)" if {MEAN, COVARIANCE} <= set(found) else ""
        raise UserError(f"'{path}' holds {', '.join(found) or 'nothing'}{also} and no {IMAGES}; {WOULD_DO}.")
    images = _header(path, IMAGES)
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
        raise UserError(f"'{path}': {IMAGES} is {images.words}; uint8 of N x H x W x 3 (or 1) would do.")
    if not min(shape[1:3]):
        raise UserError(f"'{path}': {IMAGES} is {images.words}, images without a pixel; sides of 1 and more would do.")
    labelled = LABELS in found
    if labelled:
        labels = _header(path, LABELS)
        if labels.shape != (shape[0],) or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"'{path}': {LABELS} is {labels.words}; one whole number for each of the {shape[0]} images would do.")

    def items() -> Iterator[Item]:
        one = math.prod(shape[1:])
        try:
            with npz.opened(path, IMAGES) as (file, _), npz.opened(path, LABELS) if labelled else nullcontext((None, None)) as (beside, of):
                for index in range(shape[0]):
                    content = file.read(one)
                    label = beside.read(of.dtype.itemsize) if beside and of else None
                    if len(content) < one or (label is not None and of and len(label) < of.dtype.itemsize):
                        raise UserError(f"'{path}' ends after {index} of {shape[0]} images.")
                    number = -1 if label is None or not of else int(np.frombuffer(label, of.dtype)[0])
                    yield f"{IMAGES}[{index}]", number, np.frombuffer(content, np.uint8).reshape(shape[1:])
        except npz.Broken as error:
            raise UserError(f"'{path}': {error}.") from None

    return ImageSet(path, "npz", shape[0], items, sides=shape[1:3])


def _of_parquet(path: Path, files: list[Path]) -> ImageSet:
    try:
        schema = pq.read_schema(files[0])
        count = sum(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"'{path}': no Parquet file could be read ({first_line(error)}).") from None
    column = _image_column(path, schema)
    ours = "index" in schema.names
    names = next((name for name in ("index", "key") if name in schema.names), None)
    label = next((name for name in ("label", "labels") if name in schema.names and pa.types.is_integer(schema.field(name).type)), None)
    wanted = [name for name in (column, names, label) if name]
    tables.check_plain(schema, files[0], wanted)

    def items() -> Iterator[Item]:
        for file in files:
            row = 0
            opened = tables.opened(file, file, wanted)
            for some in opened.iter_batches(tables.rows_at_once(opened, wanted, ROWS), columns=wanted):
                table = pa.table(some)
                named = table.column(names).to_pylist() if names else [f"{file.name}#{row + i}" for i in range(len(table))]
                labels = table.column(label).to_pylist() if label else [-1] * len(table)
                for name, value, image in zip(named, labels, table.column(column).to_pylist(), strict=True):
                    content = image["bytes"] if isinstance(image, dict) else image
                    yield f"sample {name}" if ours else str(name), -1 if value is None else value, content or b""
                row += len(table)

    return ImageSet(path, "samples" if ours else "parquet", count, items)


def _image_column(path: Path, schema: pa.Schema) -> str:
    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [column.name for column in schema if is_image(column.type)]
    for name in ("image", "img"):
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    kept = " It was sampled with sample.keep=none, which keeps features and no images." if "index" in schema.names else ""
    raise UserError(f"'{path}' has the columns {', '.join(schema.names)}, and no column 'image' of encoded images among them.{kept}")


def _members(path: Path) -> list[str]:
    try:
        return npz.members(path)
    except npz.Broken as error:
        raise UserError(f"'{path}': {error}; {WOULD_DO}.") from None


def _header(path: Path, name: str) -> npz.Header:
    try:
        return npz.header(path, name)
    except npz.Broken as error:
        raise UserError(f"'{path}': {error}.") from None


def _cropped(pixels: np.ndarray, size: int) -> np.ndarray:
    return centre_crop(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), size)
