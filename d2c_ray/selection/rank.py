"""Quotas of the classes and the exact ranks of every image in its class.

Rows lie in partitions: whole classes, or one class from one score to another. How many there are changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2c_ray.errors import UserError


def budget_images(budget: float, total: int) -> int:
    """The budget in images: a count, or up to 1 a share of `total`, rounded down."""
    return int(budget * total + 1e-9) if budget <= 1 else int(budget)


def quotas(sizes: np.ndarray, budget: int, balance: str) -> np.ndarray:
    """How many images each class gives, summing to `budget`; never more than a class has.

    The `shares` of the classes. What a class is short of goes one image each to the others in label order, round after
    round.

    Raises:
        UserError: a budget above the dataset or under one image a class.
    """
    sizes = np.asarray(sizes, np.int64)
    taken = np.minimum(shares(sizes, budget, balance), sizes)
    return taken + _in_rounds(sizes - taken, budget - int(taken.sum()))


def shares(sizes: np.ndarray, budget: int, balance: str) -> np.ndarray:
    """What each class would give if none could be too small for it, summing to `budget`.

    equal: the same for all, the remainder one each to the first classes in label order. proportional: by size, largest
    remainders first, and one image a class at least.

    Raises:
        UserError: a budget above the dataset or under one image a class.
    """
    sizes = np.asarray(sizes, np.int64)
    present, total = np.flatnonzero(sizes), int(sizes.sum())
    if not total:
        raise UserError("there are no images to select from: none could be decoded.")
    if budget > total:
        raise UserError(f"select.budget asks for {budget} images; there are {total}. A budget up to {total} (or a share up to 1) would do.")
    if budget < len(present):
        raise UserError(
            f"select.budget asks for {budget} images of {len(present)} classes, under one a class; {len(present)} or more would do."
        )
    wanted = np.zeros(len(sizes), np.int64)
    if balance == "equal":
        wanted[present] = budget // len(present)
        wanted[present[: budget % len(present)]] += 1
        return wanted
    exact = sizes * budget  # in units of 1 / total, to stay in integers
    wanted = np.maximum(exact // total, (sizes > 0).astype(np.int64))
    remainders, missing = exact - wanted * total, budget - int(wanted.sum())
    if missing >= 0:
        wanted[np.argsort(-remainders, kind="stable")[:missing]] += 1
    else:  # one image a class at least has given away too many: the smallest remainders give them back
        order = np.argsort(remainders, kind="stable")
        wanted[order] -= _in_rounds(wanted[order] - 1, -missing)
    return wanted


def _in_rounds(room: np.ndarray, count: int) -> np.ndarray:
    """`count` given out one each in the order given, round after round, to those with room left."""
    low, high = 0, count + 1  # low: as many whole rounds as there is enough for
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.clip(room, 0, middle).sum() <= count else (low, middle)
    given = np.clip(room, 0, low)
    given[np.flatnonzero(room > low)[: count - int(given.sum())]] += 1
    return given


@dataclass(frozen=True)
class Partition:
    """Rows of whole classes, or of a part of one class that no other partition's scores reach into."""

    label: np.ndarray  # int32, N
    sample_id: np.ndarray  # int64, N
    score: np.ndarray  # float32, N

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, rows: Any) -> "Partition":
        return Partition(self.label[rows], self.sample_id[rows], self.score[rows])


def joined(parts: list[Partition]) -> Partition:
    """The rows of several partitions as one."""
    return Partition(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("label", "sample_id", "score")))


def as_classes(rows: Partition) -> Partition:
    """The rows with 0, the only class there is without labels, in place of -1."""
    return Partition(np.maximum(rows.label, 0), rows.sample_id, rows.score)


@dataclass(frozen=True)
class Span:
    """What a partition holds: classes `start` to `stop` - 1, from rank `first` on where it is a part of one class."""

    start: int
    stop: int
    first: int
    rows: int


@dataclass(frozen=True)
class Classes:
    """All classes by label."""

    sizes: np.ndarray  # int64
    quotas: np.ndarray  # int64

    def before(self, span: Span, place: np.ndarray) -> np.ndarray:
        """What to add to a rank in the classes `place` for its row in a sorted partition."""
        begin = np.cumsum(self.sizes) - self.sizes
        return begin[place] - begin[span.start] - span.first


@dataclass(frozen=True)
class Choice:
    """The chosen rows, class by class in order of choice."""

    label: np.ndarray  # int32; the class, 0 without labels
    sample_id: np.ndarray  # int64
    rank: np.ndarray  # int64
    position: np.ndarray  # int32


# Calls a function on every sorted partition, with the further arguments of each, and gives the results in order.
Each = Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]]


def score_key(score: np.ndarray) -> np.ndarray:
    """Finite float32 as uint32 of the same order; -0.0 is 0.0."""
    bits = (score + np.float32(0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def order(major: np.ndarray, minor: np.ndarray) -> np.ndarray:
    """The rows sorted by (major uint64, minor): np.lexsort((minor, major)) where no pair comes twice, in a fraction of its time.

    NumPy sorts numbers faster than it finds their order, so that `major` is sorted with each row's place in its lowest
    bits where there is room for it. Runs of equal `major` are then sorted again by `minor`, if they are not already.
    """
    if not len(major):
        return np.zeros(0, np.int64)
    rows, found = _sorted(major)
    same = found[1:] == found[:-1]
    del found
    if not same.any():
        return rows
    tied = np.append(same, False)
    tied[1:] |= same
    places = np.flatnonzero(tied)
    within = minor[rows[places]]
    first = ~np.append(False, same)[places]  # of its run
    if (within[1:] > within[:-1])[~first[1:]].all():
        return rows
    within = (within - within.min()).astype(np.uint64)
    runs, bits = np.cumsum(first).astype(np.uint64), int(within.max()).bit_length()
    if int(runs[-1]).bit_length() + bits <= 64:
        again, _ = _sorted(runs << np.uint64(bits) | within)
    else:
        again = np.lexsort((within, runs))
    rows[places] = rows[places[again]]
    return rows


def _sorted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of `values` (uint64), equal ones in any order, and the values in that order less the least."""
    values = values - values.min()
    bits = (len(values) - 1).bit_length()
    if int(values.max()).bit_length() + bits > 64:
        rows = np.argsort(values)
        return rows, values[rows]
    values <<= np.uint64(bits)
    values |= np.arange(len(values), dtype=np.uint64)
    values.sort()
    rows = (values & np.uint64((1 << bits) - 1)).astype(np.int64)
    values >>= np.uint64(bits)
    return rows, values


def ordered(rows: Partition) -> Partition:
    """The rows by label, from easy to hard, ties by sample_id, which is key order."""
    if not len(rows):
        return rows
    key = score_key(rows.score)
    key -= key.min()
    major = rows.label.astype(np.uint64)
    major <<= np.uint64(int(key.max()).bit_length())
    major |= key
    return rows.take(order(major, rows.sample_id))


def not_finite(rows: Partition) -> tuple[int, np.ndarray]:
    """How many scores are no finite number, and the first five sample_ids."""
    broken = rows.sample_id[~np.isfinite(rows.score)]
    return len(broken), np.sort(broken)[:5]


def cut(sizes: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """Partitions of at most `limit` rows: runs of labels (start, stop), each with how many pieces it takes.

    Only a class above the limit takes more than one, and is then alone.
    """
    ends, found, start = np.cumsum(sizes), [], 0
    while start < len(sizes):
        before = int(ends[start] - sizes[start])
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        found.append((start, stop, max(1, -(-int(ends[stop - 1] - before) // limit))))
        start = stop
    return found


def pieces(rows: Partition, keys: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """Which piece of its class each row belongs to, int32; piece i + 1 begins at (score key, sample_id) i."""
    mine, found = score_key(rows.score), np.zeros(len(rows), np.int32)
    for key, sample_id in zip(keys, sample_ids, strict=True):
        found += (mine > key) | ((mine == key) & (rows.sample_id >= sample_id))
    return found


def column(part: Partition, name: str, rows: np.ndarray) -> np.ndarray:
    """Some rows of a partition's column."""
    return getattr(part, name)[rows]


def at(name: str, place: np.ndarray, ranks: np.ndarray, classes: Classes, spans: list[Span], each: Each) -> np.ndarray:
    """A column's values at ranks in the classes `place`, which must be in label order."""
    where, arguments = [], []
    for span in spans:
        low, high = np.searchsorted(place, (span.start, span.stop))
        inside = low + np.flatnonzero((ranks[low:high] >= span.first) & (ranks[low:high] < span.first + span.rows))
        where.append(inside)
        arguments.append((name, ranks[inside] + classes.before(span, place[inside])))
    found = each(column, arguments)
    return np.concatenate(found)[np.argsort(np.concatenate(where))] if len(found) > 1 else found[0]


def at_ranks(ranks: np.ndarray, classes: Classes, spans: list[Span], each: Each) -> Choice:
    """The choice of the rows at `ranks`: of every class as many as its quota, in order of choice."""
    place = np.repeat(np.arange(len(classes.sizes), dtype=np.int32), classes.quotas)
    return Choice(place, at("sample_id", place, ranks, classes, spans, each), ranks, positions(classes.quotas))


def positions(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for as many as each of `counts` says, one after another, int32."""
    return (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)
