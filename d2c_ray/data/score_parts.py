"""What select reads and writes: score parts in, the selection and its table of classes out."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.data import tables
from d2c_ray.selection.rank import Choice, Classes, Partition, Span, as_classes, joined, not_finite, ordered

CLASSES = "classes.parquet"
THREADS = 2  # that read parts; most of it is decompression, which holds no lock
PARTS_A_CALL = 8
ROWS_PER_PART = 1_000_000  # of the selection


def read(paths: list[Path], threads: int = THREADS) -> list[Partition]:
    """Label (-1 for none), sample_id and score of score parts, each by itself."""
    return [part for some in _on_threads(lambda some: [_columns(path) for path in some], paths, threads) for part in some]


def _columns(path: Path) -> Partition:
    # Many small files: read_table would look at each as at a data set of many.
    with tables.whole_or_told(path):
        table = tables.opened(path, path).read(columns=["label", "sample_id", "score"], use_threads=False)
    label, sample_id, score = (table.column(name).to_numpy() for name in ("label", "sample_id", "score"))
    return Partition(label, sample_id, score)


def lookup(paths: list[Path], there: list[Partition], sample_ids: np.ndarray, threads: int = THREADS) -> Iterator[pa.Table]:
    """sample_id, key, label and score of the images asked for, some parts' at a time.

    Args:
        paths: score parts in order; sample_ids ascend over all of them.
        there: what `read` gave for each.
        sample_ids: ascending.
    """

    def call(some: list[tuple[Path, Partition]]) -> list[pa.Table]:
        return [_rows(path, part, sample_ids) for path, part in some]

    for found in _on_threads(call, list(zip(paths, there, strict=True)), threads):
        yield pa.concat_tables(found)


def _on_threads(function: Callable[[list[Any]], list[Any]], parts: list[Any], threads: int) -> Iterator[list[Any]]:
    """Calls `function` on a few parts at a time: a call a part would cost more than the threads save."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, [parts[start : start + PARTS_A_CALL] for start in range(0, len(parts), PARTS_A_CALL)])


def _rows(path: Path, there: Partition, sample_ids: np.ndarray) -> pa.Table:
    ids = there.sample_id
    wanted = sample_ids[slice(*np.searchsorted(sample_ids, (ids[0], ids[-1] + 1)))] if len(ids) else ids
    rows = np.searchsorted(ids, wanted)
    found = there.take(rows)
    columns = {"sample_id": found.sample_id, "key": _keys(path, rows), "label": found.label, "score": found.score}
    return pa.table(columns)


def _keys(path: Path, rows: np.ndarray) -> pa.ChunkedArray:
    """The keys of some rows; row groups that hold none of them are not read."""
    if not len(rows):
        return pa.chunked_array([], pa.string())
    file = tables.opened(path, path)
    sizes = np.asarray([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)], np.int64)
    groups, mine = np.unique(np.searchsorted(np.cumsum(sizes), rows, side="right"), return_inverse=True)
    skipped = (np.cumsum(sizes) - sizes)[groups] - (np.cumsum(sizes[groups]) - sizes[groups])
    table = file.read_row_groups(groups.tolist(), columns=["key"], use_threads=False)
    return table.column("key").take(pa.array(rows - skipped[mine]))


@dataclass(frozen=True)
class InMemory:
    """All scores as one partition in this process. `distributed.rank.OnRay` has the same methods for more of them."""

    paths: list[Path]
    part: Partition
    ends: np.ndarray  # of each part's rows
    sizes: np.ndarray  # images by label

    @classmethod
    def of(cls, paths: list[Path], num_classes: int) -> "InMemory":
        parts = read(paths)
        part = joined(parts)
        sizes = np.bincount(as_classes(part).label, minlength=num_classes)
        return cls(paths, part, np.cumsum([len(some) for some in parts]), sizes)

    def not_finite(self) -> tuple[int, np.ndarray]:
        """How many scores are no finite number, and the first sample_ids."""
        return not_finite(self.part)

    def partitions(self) -> tuple[list[Span], Callable[..., list[Any]]]:
        """What the sorted partitions hold, and how to call a function on each."""
        part = ordered(as_classes(self.part))
        return [Span(0, len(self.sizes), 0, len(part))], lambda function, arguments: [function(part, *arguments[0])]

    def lookup(self, sample_ids: np.ndarray) -> Iterator[pa.Table]:
        """sample_id, key, label and score of images by ascending sample_id, some at a time."""
        there = [self.part.take(slice(start, stop)) for start, stop in zip([0, *self.ends], self.ends, strict=False)]
        return lookup(self.paths, there, sample_ids)


def write_selection(
    out: Path, choice: Choice, classes: Classes, found: Iterator[pa.Table], metadata: dict[str, Any]
) -> tuple[np.ndarray, ...]:
    """Writes the chosen rows by sample_id.

    Args:
        found: sample_id, key, label and score of them in that order, some at a time.

    Returns:
        By class of the chosen: label as in the scores, largest rank, lowest and highest score.
    """
    fields = tables.arrow_schema(schema.SELECTION)
    order = np.argsort(choice.sample_id)
    label, deepest = np.full((2, len(classes.sizes)), -1, np.int64)
    low, high = np.full(len(label), np.inf, np.float32), np.full(len(label), -np.inf, np.float32)
    np.maximum.at(deepest, choice.label, choice.rank)
    start = 0
    for part, table in enumerate(_gathered(found)):
        rows = order[start : start + len(table)]
        start += len(table)
        if not np.array_equal(table.column("sample_id").to_numpy(), choice.sample_id[rows]):
            raise RuntimeError(
                f"the score parts do not hold the chosen rows, or not in the order of sample_id, from part {part} of {out} on"
            )
        place = choice.label[rows]
        np.maximum.at(label, place, table.column("label").to_numpy())
        np.minimum.at(low, place, table.column("score").to_numpy())
        np.maximum.at(high, place, table.column("score").to_numpy())
        for name, values in (("rank", choice.rank[rows]), ("class_size", classes.sizes[place]), ("position", choice.position[rows])):
            table = table.append_column(name, pa.array(values))
        tables.write(out / f"part-{part:05d}.parquet", table.select(fields.names).cast(fields), metadata)
    if start != len(order):
        raise RuntimeError(f"{len(order) - start} of {len(order)} chosen rows are not in the score parts")
    return label, deepest, low, high


def _gathered(found: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables of `ROWS_PER_PART` rows, the last one of what is left."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in found:
        waiting.append(table)
        rows += len(table)
        while rows > ROWS_PER_PART:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, ROWS_PER_PART)
            waiting, rows = [whole.slice(ROWS_PER_PART)], rows - ROWS_PER_PART
    if rows:
        yield pa.concat_tables(waiting)
