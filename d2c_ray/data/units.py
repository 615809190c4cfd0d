"""A unit of work: a run of manifest rows. Reading and decoding one gives a table that actors work on."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2c_ray import metrics
from d2c_ray.config import DataConfig, StorageConfig
from d2c_ray.data import manifest, storage, tables
from d2c_ray.data.decode import Undecodable, decode


@dataclass(frozen=True)
class Shard:
    """A row group of a manifest file."""

    number: int
    path: str
    row_group: int
    rows: int


def shards(paths: list[Path]) -> list[Shard]:
    """The shards of manifest files, in order."""
    found: list[Shard] = []
    for path in paths:
        with tables.whole_or_told(path):
            meta = pq.read_metadata(path)
        for group in range(meta.num_row_groups):
            found.append(Shard(len(found), str(path), group, meta.row_group(group).num_rows))
    return found


def cut(
    given: Iterable[Shard], rows_per_unit: int, done: dict[int, list[tuple[int, int]]] | None = None, most: int = 0
) -> list[dict[str, Any]]:
    """Units of at most `rows_per_unit` rows that cover shards; none spans two.

    Args:
        done: by shard number, runs of rows (start, stop) that are left out.
        most: units, behind which no further shard is begun; 0: all of them.
    """
    units: list[dict[str, Any]] = []
    for shard in given:
        if most and len(units) >= most:
            break
        for first, last in _missing(shard.rows, (done or {}).get(shard.number, [])):
            for start in range(first, last, rows_per_unit):
                stop = min(last, start + rows_per_unit)
                place = {"path": shard.path, "row_group": shard.row_group, "shard": shard.number, "start": start, "stop": stop}
                units.append({"unit": len(units), **place})
    return units


def _missing(rows: int, done: list[tuple[int, int]]) -> list[tuple[int, int]]:
    gaps, position = [], 0
    for start, stop in sorted(done):
        if start > position:
            gaps.append((position, start))
        position = max(position, stop)
    return [*gaps, (position, rows)] if position < rows else gaps


def read_rows(unit: dict[str, Any]) -> pa.Table:
    """The manifest rows of a unit."""
    return _shard(unit["path"], unit["row_group"]).slice(unit["start"], unit["stop"] - unit["start"])


@lru_cache(maxsize=1)  # the next unit is mostly of the same shard
def _shard(path: str, row_group: int) -> pa.Table:
    return tables.opened(path, path).read_row_group(row_group)


def decode_rows(
    rows: pa.Table, data: DataConfig, options: StorageConfig, keep_bytes: bool = False
) -> tuple[pa.Table, list[dict[str, str]]]:
    """Reads and decodes the images of manifest rows.

    Returns:
        The rows that could be decoded, with `pixels` (uint8, size x size x channels) and, if wanted, their encoded
        `image`; and those that could not, with key, uri and reason.

    Raises:
        StorageError: the storage did not answer, which says nothing about the images.
    """
    good, pixels, contents, rejected = [], [], [], []
    base = manifest.root(data, options)
    found = manifest.read_images(rows, base, data.image_column, options)
    metrics.tell("d2c_read_bytes", sum(len(content) for content in found if not isinstance(content, OSError)))
    keys, uris, lengths = (rows.column(name).to_pylist() for name in ("key", "uri", "length"))
    for index, content in enumerate(found):
        try:
            if isinstance(content, OSError):
                raise Undecodable(f"{content.strerror or content}: {storage.join(base, uris[index])}")
            if len(content) < lengths[index]:
                raise Undecodable(f"cut off: {len(content)} of {lengths[index]} bytes are left in {storage.join(base, uris[index])}")
            pixels.append(decode(content, data.image_size, data.channels, data.max_pixels))
        except Undecodable as error:
            rejected.append({"key": keys[index], "uri": uris[index], "reason": str(error)})
            continue
        good.append(index)
        contents.append(content)
    shape = (data.image_size, data.image_size, data.channels)
    stacked = np.stack(pixels) if pixels else np.zeros((0, *shape), np.uint8)
    table = rows.take(pa.array(good, pa.int64()))
    field = tables.arrow_schema({"pixels": "tensor"}, {"pixels": ("uint8", shape)}).field("pixels")
    table = table.append_column(field, tables.tensor_column(stacked))
    if keep_bytes:
        table = table.append_column("image", pa.array(contents, pa.binary()))
    return table, rejected


def pixels_of(table: pa.Table) -> np.ndarray:
    """The decoded pixels, N x H x W x C uint8, writable."""
    return np.array(tables.tensor_values(table, "pixels"))
