"""Arrow schemas of the tables in `d2c_ray.schema`, and reading and writing their Parquet files."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2c_ray.errors import UserError
from d2c_ray.rundir import whole

_TYPES = {
    "string": pa.string(),
    "binary": pa.binary(),
    "int8": pa.int8(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
METADATA = b"d2c"
_EXTENSION = b"ARROW:extension:name"
# Of files that others wrote. A column of a value that is said a million times takes next to nothing in a file, and its rows take all of it each.
_AT_ONCE_BYTES = 1 << 30
_UNPACKED_BYTES, _UNPACKED_TIMES = 1 << 30, 100


def arrow_schema(columns: dict[str, str], tensors: Mapping[str, tuple[str, Sequence[int]]] | None = None, lists: int = 0) -> pa.Schema:
    """The Arrow schema of a table.

    Args:
        columns: name to type, as in `d2c_ray.schema`; a `tensor` column that `tensors` does not name is left out.
        tensors: name to (NumPy dtype, shape). Stored as fixed-size binary: raw row-major bytes take no more room than
            the array, where Parquet would store a list of int8 as 32-bit integers.
        lists: length of the `list<...>` columns.
    """
    fields = []
    for name, kind in columns.items():
        if kind == "tensor":
            if tensors is None or name not in tensors:
                continue
            dtype, shape = tensors[name]
            width = np.dtype(dtype).itemsize * int(np.prod(shape))
            fields.append(pa.field(name, pa.binary(width), metadata={b"dtype": dtype.encode(), b"shape": json.dumps(list(shape)).encode()}))
        elif kind.startswith("list<"):
            fields.append(pa.field(name, pa.list_(_TYPES[kind[5:-1]], lists)))
        else:
            fields.append(pa.field(name, _TYPES[kind]))
    return pa.schema(fields)


def tensor_column(values: np.ndarray) -> pa.Array:
    """Rows of an array as fixed-size binary."""
    values = np.ascontiguousarray(values)
    width = values.itemsize * int(np.prod(values.shape[1:]))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])


def tensor_values(table: pa.Table, name: str) -> np.ndarray:
    """A tensor column as an array of rows x shape. Copies only where the column has several chunks."""
    field = table.schema.field(name)
    dtype, shape = np.dtype(field.metadata[b"dtype"].decode()), json.loads(field.metadata[b"shape"])
    width = dtype.itemsize * int(np.prod(shape))
    chunks = []
    for chunk in table.column(name).chunks:
        data = np.frombuffer(chunk.buffers()[1], np.uint8, count=len(chunk) * width, offset=chunk.offset * width)
        chunks.append(data.view(dtype).reshape(len(chunk), *shape))
    return np.concatenate(chunks) if len(chunks) != 1 else chunks[0]


def tensor_shape(path: Path, name: str) -> list[int]:
    """The shape of a row of a file's tensor column."""
    return json.loads(pq.read_schema(path).field(name).metadata[b"shape"])


def columns(path: Path) -> list[str]:
    """The names of a file's columns."""
    return pq.read_schema(path).names


def opened(source: Any, where: object, columns: Sequence[str] | None = None) -> pq.ParquetFile:
    """A Parquet file, called `where` in an error, none of whose `columns` (None: all) is of an extension type.

    Raises:
        UserError: one is.
        ArrowInvalid, OSError: it is no Parquet file, or a damaged one.
    """
    file = pq.ParquetFile(source)
    try:
        check_plain(file.schema_arrow, where, columns)
    except UserError:
        file.close()
        raise
    return file


def check_plain(fields: pa.Schema, where: object, columns: Sequence[str] | None = None) -> None:
    """Refuses columns of extension types: to give a value of one as Python's is up to whoever registered the type, and Ray's unpickles it.

    The name in the metadata counts as well: where nobody has registered it yet, the column looks like a plain one.

    Args:
        where: what an error calls the file. columns: that are read, with what lies below them; None: all.

    Raises:
        UserError: names the column and the type.
    """
    for field in fields:
        if columns is None or field.name in columns or any(field.name.startswith(f"{name}.") for name in columns):
            kind = extension(field)
            if kind is not None:
                raise UserError(
                    f"'{where}': column '{field.name}' is of the extension type '{kind}', which is not read, since code may belong to it. "
                    "Plain numbers, text or binary would do."
                )


def extension(field: pa.Field) -> str | None:
    """The name of the extension type that a field is of, or that lies in it; None where there is none."""
    kind = field.type
    named = (field.metadata or {}).get(_EXTENSION)
    if named is not None or isinstance(kind, pa.BaseExtensionType):
        return named.decode("utf-8", "replace") if named is not None else kind.extension_name
    inside = [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        inside.append(pa.field("values", kind.value_type))
    return next((name for name in map(extension, inside) if name is not None), None)


def rows_at_once(file: pq.ParquetFile, columns: Sequence[str], most: int) -> int:
    """Up to `most` rows of a file, fewer where as many of its largest possible value would not fit into memory: for `iter_batches`."""
    groups = range(file.metadata.num_row_groups)
    largest = max((_stored(file, group, columns)[1] for group in groups), default=0)  # no value is larger than what stores all of them
    return max(1, min(most, _AT_ONCE_BYTES // max(1, largest)))


def read_column(file: pq.ParquetFile, group: int, name: str, where: str) -> pa.ChunkedArray:
    """A column of a row group of somebody's file, called `where` in an error.

    Raises:
        UserError: it unpacks to far more than the file holds, or is of an extension type.
    """
    check_plain(file.schema_arrow, where, [name])
    stored, unpacked = _stored(file, group, [name])
    limit, held = max(_UNPACKED_BYTES, _UNPACKED_TIMES * stored), 0
    chunks: list[pa.Array] = []
    if unpacked <= limit:
        for batch in file.iter_batches(rows_at_once(file, [name], 1024), row_groups=[group], columns=[name]):
            chunks.append(batch.column(0))
            held += batch.nbytes
            if held > limit:
                break
    if max(held, unpacked) > limit:
        raise UserError(
            f"'{where}': column '{name}' of row group {group} holds {stored:,} bytes that unpack to more than {limit:,}, as no images do. "
            "Leave the file out (data.pattern), or write it again in smaller row groups."
        )
    return pa.chunked_array(chunks, file.schema_arrow.field(name).type)


def _stored(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> tuple[int, int]:
    """Bytes of the columns in a row group: in the file, and unpacked as its pages are."""
    stored = unpacked = 0
    found = file.metadata.row_group(group)
    for index in range(found.num_columns):
        column = found.column(index)
        if column.path_in_schema in columns or any(column.path_in_schema.startswith(f"{name}.") for name in columns):
            stored, unpacked = stored + column.total_compressed_size, unpacked + column.total_uncompressed_size
    return stored, unpacked


def num_rows(path: Path) -> int:
    """How many rows a file has."""
    return pq.read_metadata(path).num_rows


def write(path: Path, table: pa.Table, metadata: dict[str, Any] | None = None, row_group_rows: int | None = None) -> None:
    """Writes a Parquet file whole, with `metadata` as JSON in its schema under the key 'd2c'."""
    if metadata is not None:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: json.dumps(metadata).encode()})
    with whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_rows or 65_536)


def read(paths: Path | Iterable[Path], columns: list[str] | None = None) -> pa.Table:
    """The rows of one or several Parquet files of one schema, in the order given.

    Raises:
        UserError: a file is cut off, or a column of an extension type.
    """
    if isinstance(paths, Path):
        paths = [paths]
    tables = [_read(path, columns) for path in paths]
    if not tables:
        raise FileNotFoundError("no Parquet file to read")
    return pa.concat_tables(tables)


def rows_of(paths: Iterable[Path], sample_ids: np.ndarray) -> pa.Table:
    """The rows of some images, one file at a time in memory.

    Args:
        paths: of a table whose sample_ids ascend over all of them. sample_ids: ascending.
    """
    found: list[pa.Table] = []
    for path in paths:
        table = read(path)
        ids = table.column("sample_id").to_numpy()
        wanted = sample_ids[slice(*np.searchsorted(sample_ids, (ids[0], ids[-1] + 1)))] if len(ids) else ids
        if len(wanted) or not found:
            found.append(table.filter(pa.array(np.isin(ids, wanted, assume_unique=True))))
    return pa.concat_tables(found)


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    with whole_or_told(path):
        table = pq.read_table(path, columns=columns, partitioning=None)
    check_plain(table.schema, path)
    return table


@contextmanager
def whole_or_told(path: Path) -> Iterator[None]:
    """Around reading a table of a finished stage.

    Raises:
        UserError: what failed to be read is cut off.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if not path.is_file() or is_whole(path):
            raise
        raise UserError(
            f"'{path}' is cut off: {path.stat().st_size} bytes that do not end as a Parquet file does. Move the folder it lies in away; the same "
            "command makes it again, with what other folders have."
        ) from error


def is_whole(path: Path) -> bool:
    """Whether a Parquet file ends as one does. Reads four bytes; a file that appears whole is cut off by a power cut alone."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4))
        return size > 8 and file.read() == b"PAR1"


def metadata(path: Path) -> dict[str, Any]:
    """What `write` stored beside the rows."""
    return json.loads(pq.read_schema(path).metadata[METADATA])
