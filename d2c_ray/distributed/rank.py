"""Ranking more scores than fit in memory: partitions as plain tasks, by the functions that rank them in one process.

    count         tasks over groups of score parts: images by class, and samples of the classes above a partition
    split         the same groups again: their rows by partition, into the object store
    sort          a task a partition
    each, lookup  what the selectors ask of sorted partitions; the keys of the chosen rows

The driver holds counts and what was chosen, never a column of all rows.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from d2c_ray.data import score_parts
from d2c_ray.distributed.cluster import ANYWHERE, LIGHT_CPUS
from d2c_ray.selection import rank
from d2c_ray.selection.rank import Partition, Span

GROUPS_PER_PARTITION = 4  # a group of score parts holds about a quarter of a partition's rows
SAMPLES_PER_GROUP = 8  # borders inside a class are wrong by an eighth of a partition at the most


@dataclass(frozen=True)
class OnRay:
    """As `data.score_parts.InMemory`, with any number of partitions."""

    groups: list[list[Path]]
    sizes: np.ndarray  # images by label
    broken: tuple[int, np.ndarray]
    rows_per_partition: int
    say: Callable[[str], None]

    @classmethod
    def of(cls, paths: list[Path], num_classes: int, rows_per_partition: int, rows_per_part: int, say: Callable[[str], None]) -> "OnRay":
        """Counts the images of every class. Ray must be connected."""
        together = max(1, rows_per_partition // GROUPS_PER_PARTITION // rows_per_part)
        groups = [paths[start : start + together] for start in range(0, len(paths), together)]
        sizes, broken, first = np.zeros(num_classes, np.int64), 0, []
        for index, (counts, number, some) in enumerate(_in_order(_count, [(group, num_classes) for group in groups])):
            say(f"counted {index + 1} of {len(groups)} groups")
            sizes, broken = sizes + counts, broken + number
            first.append(some)
        return cls(groups, sizes, (broken, np.concatenate(first)[:5]), rows_per_partition, say)

    def not_finite(self) -> tuple[int, np.ndarray]:
        """How many scores are no finite number, and the first sample_ids."""
        return self.broken

    def partitions(self) -> tuple[list[Span], Callable[..., list[Any]]]:
        """What the sorted partitions hold, and how to call a function on each."""
        cuts = rank.cut(self.sizes, self.rows_per_partition)
        borders = self._borders({start: pieces for start, _, pieces in cuts if pieces > 1})
        first_of = np.cumsum([0, *(pieces for _, _, pieces in cuts)])
        home = np.repeat(first_of[:-1], [stop - start for start, stop, _ in cuts]).astype(np.int32)
        shared, rows = [ray.put(home), ray.put(borders)], np.zeros(first_of[-1], np.int64)
        pieces: list[list[Any]] = [[] for _ in rows]
        split: Any = ray.remote(num_cpus=1, scheduling_strategy=ANYWHERE, num_returns=len(rows) + 1)(_split)

        def submit(group: list[Path]) -> Any:
            counts, *parts = split.remote(group, *shared, len(rows))
            for partition, part in zip(pieces, parts, strict=True):
                partition.append(part)
            return counts

        for index, counts in enumerate(_window(submit, [(group,) for group in self.groups])):
            self.say(f"split {index + 1} of {len(self.groups)} groups")
            rows += counts
        spans = []
        for (start, stop, number), begin in zip(cuts, first_of, strict=False):
            firsts = np.cumsum(rows[begin : begin + number]) - rows[begin : begin + number]
            spans += [Span(start, stop, int(first), int(rows[begin + index])) for index, first in enumerate(firsts)]
        sort: Any = ray.remote(num_cpus=1, scheduling_strategy=ANYWHERE, num_returns=2)(_sort)
        partitions: list[Any] = []

        def submit_sort(number: int) -> Any:
            partition, done = sort.remote(*pieces[number])
            pieces[number].clear()  # the task holds them now, and is the last to
            partitions.append(partition)
            return done

        for index, _ in enumerate(_window(submit_sort, [(number,) for number in range(len(rows))])):
            self.say(f"sorted {index + 1} of {len(rows)} partitions")

        def each(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
            given = [(function, partition, *more) for partition, more in zip(partitions, arguments, strict=True)]
            return list(_in_order(_call, given))

        return spans, each

    def _borders(self, large: dict[int, int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The first (score key, sample_id) of every piece but the first, of each class that is cut into so many pieces."""
        if not large:
            return {}
        every = max(1, self.rows_per_partition // (SAMPLES_PER_GROUP * len(self.groups)))
        samples: dict[int, list[Partition]] = {label: [] for label in large}
        for index, found in enumerate(_in_order(_sample, [(group, list(large), every) for group in self.groups])):
            self.say(f"sampled {index + 1} of {len(self.groups)} groups")
            for label, some in found.items():
                samples[label].append(some)
        borders = {}
        for label, pieces in large.items():
            merged = rank.ordered(rank.joined(samples[label]))
            at = np.arange(1, pieces) * len(merged) // pieces
            borders[label] = (rank.score_key(merged.score[at]), merged.sample_id[at])
        return borders

    def lookup(self, sample_ids: np.ndarray) -> Iterator[pa.Table]:
        """sample_id, key, label and score of images by ascending sample_id, some at a time."""
        shared = ray.put(sample_ids)
        for index, table in enumerate(_in_order(_lookup, [(group, shared) for group in self.groups])):
            self.say(f"read the keys of {index + 1} of {len(self.groups)} groups")
            yield table


def _in_order(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Iterator[Any]:
    """The results of one task a tuple of arguments."""
    return _window(ray.remote(num_cpus=1, scheduling_strategy=ANYWHERE)(function).remote, arguments)


def _window(submit: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Iterator[Any]:
    """The results of tasks in order. No more in flight than there are cores: each holds a good part of a partition."""
    width = max(1, int(ray.cluster_resources().get("CPU", 1)) - LIGHT_CPUS)
    running: deque[Any] = deque()
    for given in arguments:
        if len(running) == width:
            yield ray.get(running.popleft())
        running.append(submit(*given))
    while running:
        yield ray.get(running.popleft())


def _count(paths: list[Path], num_classes: int) -> tuple[np.ndarray, int, np.ndarray]:
    rows = _read(paths)
    return np.bincount(rows.label, minlength=num_classes), *rank.not_finite(rows)


def _sample(paths: list[Path], labels: list[int], every: int) -> dict[int, Partition]:
    rows = _read(paths)
    return {label: rank.ordered(rows.take(np.flatnonzero(rows.label == label))).take(slice(None, None, every)) for label in labels}


def _split(paths: list[Path], home: np.ndarray, borders: dict[int, tuple[np.ndarray, np.ndarray]], count: int) -> tuple[Any, ...]:
    """How many rows each partition gets, and they. home: the first partition of each label."""
    rows = _read(paths)
    target = home[rows.label]
    for label, (keys, ids) in borders.items():
        mine = np.flatnonzero(rows.label == label)
        target[mine] += rank.pieces(rows.take(mine), keys, ids)
    order = np.argsort(target.astype(np.uint16) if count <= 1 << 16 else target, kind="stable")  # 16 bits are sorted by radix
    counts = np.bincount(target, minlength=count)
    return counts, *(rows.take(some) for some in np.split(order, np.cumsum(counts)[:-1]))


def _sort(*pieces: Partition) -> tuple[Partition, int]:
    return rank.ordered(rank.joined(list(pieces))), 0


def _read(paths: list[Path]) -> Partition:
    return rank.as_classes(rank.joined(score_parts.read(paths, 1)))


def _call(function: Callable[..., Any], part: Partition, *arguments: Any) -> Any:
    return function(part, *arguments)


def _lookup(paths: list[Path], sample_ids: np.ndarray) -> pa.Table:
    return pa.concat_tables(score_parts.lookup(paths, score_parts.read(paths, 1), sample_ids, 1))
