"""Drawing at random without an order to draw in: every image has a pseudo-random key, and the lowest keys are taken."""

import numpy as np

from d2c_ray.seeding import derive
from d2c_ray.selection.rank import Choice, Classes, Each, Partition, Span, order, positions


def random_keys(seed: int, sample_id: np.ndarray) -> np.ndarray:
    """A 64-bit key of each image, uint64: a pure function of (seed, sample_id) that never gives two images the same.

    SplitMix64 (Steele, Lea and Flood, 2014): output number `sample_id` of the sequence that starts at the derived seed.
    """
    z = (sample_id.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(seed, "select"))
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def lowest(part: Partition, starts: np.ndarray, counts: np.ndarray, quotas: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """The rows of the lowest keys of each group, as many as its quota or as there are.

    Args:
        starts, counts: which rows of the sorted partition are a group.

    Returns:
        Number of the group, row, sample_id and key of each, by group and key.
    """
    within = positions(counts)
    group = np.repeat(np.arange(len(counts)), counts)
    rows = np.repeat(starts, counts) + within
    keys = random_keys(seed, part.sample_id[rows])
    sorted_rows = _by_key(group, keys)[within < np.repeat(quotas, counts)]
    return group[sorted_rows], rows[sorted_rows], part.sample_id[rows[sorted_rows]], keys[sorted_rows]


def drawn(
    groups: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    totals: tuple[np.ndarray, np.ndarray, np.ndarray],
    seed: int,
    classes: Classes,
    spans: list[Span],
    each: Each,
) -> Choice:
    """Draws from groups of rows, each a part of a class; a group may lie in several partitions.

    Args:
        groups: of each partition the numbers of its groups, and which of its sorted rows (first, how many) they are.
        totals: of all groups the number, ascending in the order of the classes, the class and the quota.
    """
    number, owner, quotas = totals
    mine = [np.searchsorted(number, some) for some, _, _ in groups]
    arguments = [(starts, counts, quotas[index], seed) for index, (_, starts, counts) in zip(mine, groups, strict=True)]
    group, rank, sample_id, keys = [], [], [], []
    for span, index, (within, rows, ids, key) in zip(spans, mine, each(lowest, arguments), strict=True):
        group.append(index[within])
        rank.append(rows - classes.before(span, owner[group[-1]]))
        sample_id.append(ids)
        keys.append(key)
    groups_of, every_key = np.concatenate(group), np.concatenate(keys)
    # The lowest of all partitions' lowest.
    sorted_rows = _by_key(groups_of, every_key)
    sorted_rows = sorted_rows[positions(np.bincount(groups_of, minlength=len(quotas))) < quotas[groups_of[sorted_rows]]]
    label = owner[groups_of[sorted_rows]].astype(np.int32)
    return Choice(label, np.concatenate(sample_id)[sorted_rows], np.concatenate(rank)[sorted_rows], positions(classes.quotas))


def _by_key(group: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return order(group.astype(np.uint64) << np.uint64(32) | keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF))
