"""A unit of work: a run of manifest rows. Reading and decoding one gives a table that actors work on."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2c_ray.config import DataConfig
from d2c_ray.data import manifest, tables
from d2c_ray.data.decode import Undecodable, decode


def cut(paths: list[Path], rows_per_unit: int) -> list[dict[str, Any]]:
    """Units of at most `rows_per_unit` rows that cover manifest files; no unit spans two row groups, which are shards."""
    units: list[dict[str, Any]] = []
    shard = 0
    for path in paths:
        meta = pq.read_metadata(path)
        for group in range(meta.num_row_groups):
            rows = meta.row_group(group).num_rows
            for start in range(0, rows, rows_per_unit):
                stop = min(rows, start + rows_per_unit)
                units.append({"unit": len(units), "path": str(path), "row_group": group, "shard": shard, "start": start, "stop": stop})
            shard += 1
    return units


def read_rows(unit: dict[str, Any]) -> pa.Table:
    """The manifest rows of a unit."""
    rows = pq.ParquetFile(unit["path"]).read_row_group(unit["row_group"])
    return rows.slice(unit["start"], unit["stop"] - unit["start"])


def decode_rows(rows: pa.Table, data: DataConfig, keep_bytes: bool = False) -> tuple[pa.Table, list[dict[str, str]]]:
    """Decodes the images of manifest rows.

    Returns:
        The rows that could be decoded, with `pixels` (uint8, size x size x channels) and, if wanted, their encoded
        `image`; and those that could not, with key, uri and reason.
    """
    good, pixels, contents, rejected = [], [], [], []
    root = manifest.root(data)
    for index, row in enumerate(rows.to_pylist()):
        try:
            content = manifest.read_bytes(row, root, data.image_column)
            pixels.append(decode(content, data.image_size, data.channels, data.max_pixels))
        except (Undecodable, FileNotFoundError, PermissionError) as error:
            reason = str(error) if isinstance(error, Undecodable) else f"{error.strerror}: {root / row['uri']}"
            rejected.append({"key": row["key"], "uri": row["uri"], "reason": reason})
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
