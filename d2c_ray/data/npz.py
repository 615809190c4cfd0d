"""Arrays of .npz archives that others wrote: nothing is allocated for what a header merely says, and every fault has a name."""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

_HEAD = 16_384  # bytes in which an array's header ends; NumPy's own takes no more than 10,000
# Of zipfile: damage, what is cut off, encryption, and compression that this Python does not know.
_FAULTS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, KeyError, struct.error, SyntaxError)


class Broken(Exception):
    """An archive or an array that cannot be read; the text says which and why, and not where."""


@dataclass(frozen=True)
class Header:
    """What an array says of itself; `start` is where its values begin, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int

    @property
    def words(self) -> str:
        return f"{self.dtype} of {' x '.join(map(str, self.shape)) or 'one number'}"


def members(path: Path) -> list[str]:
    """Names of the arrays in an archive."""
    with _named("it is no .npz archive"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def header(path: Path, name: str) -> Header:
    """What an array says of itself, which the archive is long enough to hold; but for Python objects, which nobody reads.

    Raises:
        Broken: no such archive, or no array in rows, or a shape that is none or of more values than are there.
    """
    with _named(name), zipfile.ZipFile(path) as archive:
        return _header(archive, name)


@contextmanager
def opened(path: Path, name: str) -> Iterator[tuple[IO[bytes], Header]]:
    """An array at its first value: np.load would hold all of it at once. Faults that reading meets are `Broken` too."""
    with _named(name), zipfile.ZipFile(path) as archive:
        found = _header(archive, name)
        with archive.open(f"{name}.npy") as file:
            file.read(found.start)
            yield file, found


def load(path: Path, name: str) -> np.ndarray:
    """A whole array of numbers; look at its `header` first, for how large it is."""
    with opened(path, name) as (file, found):
        if found.dtype.hasobject:
            raise Broken(f"{name} is {found.words}: Python objects, which are not read")
        size = math.prod(found.shape) * found.dtype.itemsize
        content = file.read(size)
        if len(content) < size:
            raise Broken(f"{name} ends after {len(content):,} of {size:,} bytes")
        file.read(1)  # the archive's checksum is compared at its end
    return np.frombuffer(content, found.dtype).reshape(found.shape)


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        head = io.BytesIO(file.read(_HEAD))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise Broken(f"{name} is written in version {version} of the format, which nobody knows")
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = parse(head)
    if any(type(side) is not int or side < 0 for side in shape):
        raise Broken(f"{name} has the shape {shape}, which is none")
    if dtype.hasobject:
        return Header(shape, dtype, head.tell())
    if by_column and len(shape) > 1:
        raise Broken(f"{name} is stored column by column (Fortran order); row by row (C order) would do")
    size, there = math.prod(shape) * dtype.itemsize, info.file_size - head.tell()
    if size > there:
        raise Broken(f"{name} says {dtype} of {' x '.join(map(str, shape))}, {size:,} bytes, and the archive holds {there:,}")
    return Header(shape, dtype, head.tell())


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise Broken(f"{what}: it cannot be read ({type(error).__name__}: {error})") from None
