"""A condensed dataset of some of another's images: its rows are taken as they are, and nothing is encoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray.data import attached, tables, units


def take(source: list[Path], rows: list[Path], out: Path, rows_per_part: int, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """Writes the parts that attaching to `rows` would have made, from those of a dataset that has all of these images.

    A part of the source is in memory at a time, beside the one that is being written.

    Args:
        source: parts of the larger dataset, ascending by sample_id.
        rows: manifest rows of the images, ascending by sample_id. Parts that are there already stay.
        advance: is told the number of images of every part.

    Returns:
        The facts of every part, in order. Their cosine of a token column is the least of the whole source, which is no more
        than that of these images alone.

    Raises:
        RuntimeError: the source lacks one of the images.
    """
    told = [tables.metadata(path) for path in source]
    cosine = {column: _least([facts["cosine"][column] for facts in told]) for column in told[0]["cosine"]}
    facts = {"rejected": [], "storage": told[0]["storage"], "cosine": cosine, "device": told[0]["device"]}
    cut = units.cut(units.shards(rows), rows_per_part)
    missing = [unit for unit in cut if not _part(out, unit).is_file()]
    unwritten = {unit["unit"] for unit in missing}
    for unit in cut:
        if unit["unit"] not in unwritten:
            advance(unit["stop"] - unit["start"])
    wanted = pa.concat_arrays(
        [units.read_rows(unit).column("sample_id").combine_chunks() for unit in missing] or [pa.array([], pa.int64())]
    )
    ahead: list[pa.Table] = []  # found, and not written yet
    for path in source:
        if pc.any(pc.is_in(tables.read(path, ["sample_id"]).column("sample_id"), wanted)).as_py():
            part = tables.read(path)
            ahead.append(part.filter(pc.is_in(part.column("sample_id"), wanted)))
        while missing and sum(map(len, ahead)) >= (count := missing[0]["stop"] - missing[0]["start"]):
            joined = pa.concat_tables(ahead)
            unit, table, ahead = missing.pop(0), joined.slice(0, count).combine_chunks(), [joined.slice(count)]
            if not table.column("sample_id").equals(units.read_rows(unit).column("sample_id")):
                raise RuntimeError(f"'{source[0].parent}' lacks images of unit {unit['unit']}")
            tables.write(_part(out, unit), table, {"rows": count, **facts}, attached.row_group_rows(table))
            advance(count)
    if missing:
        raise RuntimeError(f"'{source[0].parent}' lacks images of {len(missing)} units")
    return [{"rows": unit["stop"] - unit["start"], **facts} for unit in cut]


def _part(out: Path, unit: dict[str, Any]) -> Path:
    return out / f"part-{unit['unit']:06d}.parquet"


def _least(values: list[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
