"""The node's uncompressed copy of a condensed dataset: a .npy file a column, which every process of the node maps.

The copy is built part by part. What is done is written down after its bytes have reached the disk, so a build that was
killed goes on with the next part, and columns that nobody needed at first are added later.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from d2c_ray.config import StorageConfig
from d2c_ray.data import storage, tables
from d2c_ray.errors import UserError
from d2c_ray.rundir import check_own, write_json

STATE = "state.json"
FORMAT = 1  # of the copy; another one never meets this one's files
BATCH_BYTES = 4 << 20  # decoded at a time, or one row; more would be memory anew each time, less does not pay
NOTE_SEC = 0.2  # between two notes of what is done; a sync takes milliseconds, a small part less
FETCH_BYTES = 8 * storage.PIECE_BYTES  # of a remote part at a time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SYNC = getattr(os, "fdatasync", os.fsync)  # the former where there is one
INTEGERS = {"sample_id": np.dtype(np.int64), "label": np.dtype(np.int64)}  # plain columns; the rest are tensors
ELSEWHERE = "resources.cache_dir, in Python open(..., cache_dir=...), puts it on another disk."
AGAIN = "Copy the dataset again from where it came from, or run its stage again."


@dataclass(frozen=True)
class Part:
    """A Parquet file of the dataset."""

    name: str
    uri: str
    num_bytes: int
    rows: int
    digest: str  # sha256 of the file where `sealed`, else of its footer
    sealed: bool  # the dataset came with the file's sha256


@dataclass(frozen=True)
class Kind:
    """dtype and shape of one row of a column."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def kind_of(fields: pa.Schema, name: str, uri: str) -> Kind:
    """The kind of a column; UserError where it is not stored as one."""
    if name not in fields.names:
        raise UserError(f"'{uri}' has no column '{name}', which the dataset's first part has. {AGAIN}")
    field = fields.field(name)
    if name in INTEGERS:
        if not pa.types.is_integer(field.type):
            raise UserError(f"'{uri}': column '{name}' is {field.type}, not an integer. {AGAIN}")
        return Kind(INTEGERS[name], ())
    try:
        found = Kind(np.dtype(field.metadata[b"dtype"].decode()), tuple(json.loads(field.metadata[b"shape"])))
        stored = field.type.byte_width
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(
            f"'{uri}': column '{name}' is {field.type} without the dtype and shape of its tensors in the field's metadata. {AGAIN}"
        ) from None
    if any(type(size) is not int or size <= 0 for size in found.shape) or found.dtype.kind not in "biuf":
        raise UserError(
            f"'{uri}': column '{name}' says {found.dtype} {list(found.shape)}; numbers in a shape of positive sizes would do. {AGAIN}"
        )
    if found.num_bytes != stored:
        raise UserError(
            f"'{uri}': column '{name}' says {found.dtype} {list(found.shape)}, {found.num_bytes} bytes, and holds {stored} a row. {AGAIN}"
        )
    return found


class NodeCache:
    """The copy of one dataset, below a folder that the node's processes share.

    Args:
        root: the folder of all copies.
        source: where the dataset lies, for messages.
        fingerprint: of the stage that made it. Two builds of one stage may differ in bytes (other hardware), so the
            copy's own folder is named by the parts' digests too.
        private: whether `root` must be a folder that nobody else can look into or write to.
    """

    def __init__(
        self, root: Path, source: str, fingerprint: str, parts: Sequence[Part], options: StorageConfig, private: bool = False
    ):  # fmt: skip
        self._private = private
        self._source, self._parts, self._options = source, parts, options
        self._rows = sum(part.rows for part in parts)
        content = json.dumps([FORMAT, fingerprint, [[part.name, part.num_bytes, part.rows, part.digest] for part in parts]])
        self.folder = root / f"condensed-{hashlib.sha256(content.encode()).hexdigest()[:24]}"

    def open(self, kinds: dict[str, Kind]) -> dict[str, np.ndarray]:
        """The columns `kinds` as read-only memory maps of rows x shape, built where they are not there yet.

        Raises:
            UserError: the disk has no room, the folder cannot be used, or a part is not what it should be.
        """
        with self._lock():
            found = {name: self._mapped(name, kind) for name, kind in kinds.items()}
            missing = {name: kinds[name] for name, array in found.items() if array is None}
            if missing:
                try:
                    self._build(missing)
                except OSError as error:
                    if error.filename in {part.uri for part in self._parts}:
                        raise UserError(f"'{error.filename}' cannot be read: {error.strerror}.") from None
                    if error.errno in FULL:  # what is begun would keep the disk full, of others too
                        for name in missing:
                            self._path(name).unlink(missing_ok=True)
                    raise UserError(
                        f"the copy of '{self._source}' cannot be written to {self.folder}: {error.strerror or error}. {ELSEWHERE}"
                    ) from error
                found |= {name: self._mapped(name, kind) for name, kind in missing.items()}
        arrays = {name: array for name, array in found.items() if array is not None}
        assert len(arrays) == len(kinds), "a column that was just built is whole"
        return arrays

    def drop(self) -> None:
        """Removes the copy. Processes that have it open keep reading it."""
        if os.path.isdir(self.folder.parent):
            with self._lock():
                shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        from filelock import FileLock

        root, lock = self.folder.parent, FileLock(self.folder.with_suffix(".lock"))
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._private:
                check_own(root, "copies of condensed datasets", ELSEWHERE, secret=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{root} cannot be used for copies of condensed datasets: {why}. {ELSEWHERE}") from None
        try:
            yield
        finally:
            lock.release()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _done(self) -> dict[str, int]:
        """How many parts of each column are on the disk."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((self.folder / STATE).read_text())["parts"]
            return found if isinstance(found, dict) else {}
        return {}

    def _mapped(self, name: str, kind: Kind) -> np.ndarray | None:
        """The finished column, or None."""
        if self._done().get(name) != len(self._parts) or not self._sized(name, kind):
            return None
        return np.load(self._path(name), mmap_mode="r", allow_pickle=False)

    def _sized(self, name: str, kind: Kind) -> bool:
        """Whether the column's file is of the size and kind it must have; a foreign or truncated one is not gone on with."""
        try:
            with open(self._path(name), "rb") as file:
                version = np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                whole = file.tell() + self._rows * kind.num_bytes == os.fstat(file.fileno()).st_size
        except (OSError, ValueError):
            return False
        return version == (1, 0) and (shape, fortran, dtype) == ((self._rows, *kind.shape), False, kind.dtype) and whole

    def _build(self, kinds: dict[str, Kind]) -> None:
        done = {name: count for name, count in self._done().items() if name not in kinds or self._sized(name, kinds[name])}
        done |= {name: done.get(name, 0) for name in kinds}
        self._check_room(kinds, done)
        self.folder.mkdir(exist_ok=True)
        self._note(done)  # before a file is made anew: a note of the old one must not outlive it
        with ExitStack() as stack:
            files = {name: stack.enter_context(self._file(name, kind, anew=not done[name])) for name, kind in kinds.items()}
            start, noted = 0, time.monotonic()
            for number, part in enumerate(self._parts):
                wanted = {name: kind for name, kind in kinds.items() if done[name] <= number}
                if wanted and part.rows:
                    self._copy(part, wanted, files, start)
                done |= dict.fromkeys(wanted, number + 1)
                if wanted and (time.monotonic() - noted >= NOTE_SEC or number + 1 == len(self._parts)):
                    for file in files.values():
                        SYNC(file.fileno())
                    self._note(done)
                    noted = time.monotonic()
                start += part.rows

    def _note(self, done: dict[str, int]) -> None:
        write_json(self.folder / STATE, {"source": self._source, "rows": self._rows, "parts": done})

    def _check_room(self, kinds: dict[str, Kind], done: dict[str, int]) -> None:
        needed = sum(kind.num_bytes * sum(part.rows for part in self._parts[done[name] :]) for name, kind in kinds.items())
        if storage.is_remote(self._source):
            needed += max(part.num_bytes for part in self._parts)  # one is kept while it is unpacked
        free = shutil.disk_usage(self.folder.parent).free
        if needed * 1.05 > free:
            raise UserError(
                f"opening '{self._source}' needs {needed / 2**30:.1f} GiB at {self.folder.parent}; {free / 2**30:.1f} GiB are free. {ELSEWHERE}"
            )

    @contextmanager
    def _file(self, name: str, kind: Kind, anew: bool) -> Iterator[IO[bytes]]:
        with open(self._path(name), "wb" if anew else "r+b", buffering=0) as file:
            if anew:
                header = {
                    "descr": np.lib.format.dtype_to_descr(kind.dtype), "fortran_order": False, "shape": (self._rows, *kind.shape),
                }  # fmt: skip
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + self._rows * kind.num_bytes)
            yield file

    def _copy(self, part: Part, kinds: dict[str, Kind], files: dict[str, IO[bytes]], start: int) -> None:
        """Writes the columns of a part to the rows from `start` on."""
        with self._content(part) as content:
            for name, at, values in _runs(part, content, kinds):
                handle, row_bytes = files[name].fileno(), kinds[name].num_bytes
                header = os.fstat(handle).st_size - self._rows * row_bytes
                _write(handle, values, header + (start + at) * row_bytes)

    @contextmanager
    def _content(self, part: Part) -> Iterator[pa.Buffer]:
        """The bytes of a part, memory-mapped; read once, and compared with the digest they should have."""
        with tempfile.TemporaryFile(dir=self.folder) if storage.is_remote(part.uri) else open(part.uri, "rb") as file:
            if storage.is_remote(part.uri):
                for offset in range(0, part.num_bytes, FETCH_BYTES):
                    file.write(storage.read(part.uri, offset, min(FETCH_BYTES, part.num_bytes - offset), self._options))
                file.flush()
            found = os.fstat(file.fileno()).st_size
            if found != part.num_bytes or not found:
                raise UserError(f"'{part.uri}' has {found} bytes, {part.num_bytes} are listed. {AGAIN}")
            content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if part.sealed and (digest := hashlib.sha256(content).hexdigest()) != part.digest:
                raise UserError(f"'{part.uri}' is damaged: its sha256 is {digest}, provenance.json says {part.digest}. {AGAIN}")
            yield content


def _runs(part: Part, content: pa.Buffer, kinds: dict[str, Kind]) -> Iterator[tuple[str, int, np.ndarray]]:
    """The columns `kinds` of a part, one after the other, as (column, first row, values). Rows, dtypes and shapes are checked."""
    try:
        file = tables.opened(pa.BufferReader(content), part.uri)
        if file.metadata.num_rows != part.rows:
            raise UserError(f"'{part.uri}' holds {file.metadata.num_rows} rows, {part.rows} are listed. {AGAIN}")
        for name, kind in kinds.items():
            found = kind_of(file.schema_arrow, name, part.uri)
            if found != kind:
                raise UserError(
                    f"'{part.uri}': column '{name}' is {found.dtype} {list(found.shape)}, "
                    f"{kind.dtype} {list(kind.shape)} in the dataset's first part. {AGAIN}"
                )
        for name, kind in kinds.items():
            at = 0
            # Without threads, which have nothing to do at one column, and may outlive the memory map.
            for batch in file.iter_batches(max(1, BATCH_BYTES // kind.num_bytes), columns=[name], use_threads=False):
                if batch.column(0).null_count:
                    raise UserError(f"'{part.uri}': column '{name}' holds nulls. {AGAIN}")
                yield name, at, _values(pa.Table.from_batches([batch]), name)
                at += len(batch)
    except (pa.ArrowException, OSError) as error:  # only Parquet's own: what the caller does between two runs is not raised in here
        raise unreadable(part.uri, error) from None


def unreadable(uri: str, error: Exception) -> UserError:
    return UserError(f"'{uri}' cannot be read as Parquet: {' '.join(str(error).split())}. {AGAIN}")


def _values(table: pa.Table, name: str) -> np.ndarray:
    return table.column(name).to_numpy().astype(INTEGERS[name]) if name in INTEGERS else tables.tensor_values(table, name)


def _write(handle: int, values: np.ndarray, offset: int) -> None:
    # Not through a memory map: a disk that fills up gives an error here, and a signal there.
    left = np.ascontiguousarray(values).data.cast("B")
    while left:
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written
