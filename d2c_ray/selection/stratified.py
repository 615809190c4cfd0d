"""Coverage-centric selection (CCS; Zheng et al., ICLR 2023, Algorithm 1): strata of equal score width, covered alike."""

from fractions import Fraction

import numpy as np

from d2c_ray.selection.rank import Partition


def kept(sizes: np.ndarray, quotas: np.ndarray, cutoff: float) -> np.ndarray:
    """How many images of each class stay, the easiest, when the share `cutoff` of the hardest goes; never under the quota."""
    share = Fraction(str(cutoff))  # exact, as f of the interval selector
    exact = np.int64 if share.denominator * int(sizes.max(initial=0)) < 2**63 else object
    gone = (sizes.astype(exact) * share.numerator // share.denominator).astype(np.int64)
    return np.maximum(sizes - gone, quotas)


def strata(
    part: Partition, start: int, stop: int, first: int, keep: np.ndarray, low: np.ndarray, high: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The strata that have rows in a sorted partition: number (label count + stratum), first row, rows.

    Args:
        start, stop, first: of the partition's span.
        keep: images of classes `start` to `stop` - 1 that stay. low, high: the scores between which they lie.
        count: strata a class.
    """
    sizes = np.bincount(part.label - start, minlength=stop - start)
    staying = np.clip(keep - first, 0, sizes)
    begin = np.cumsum(sizes) - sizes
    place = np.repeat(np.arange(stop - start), staying)
    rows = np.arange(len(place)) - np.repeat(np.cumsum(staying) - staying - begin, staying)
    width = np.where(high > low, high.astype(np.float64) - low, 1.0)
    stratum = ((part.score[rows] - low[place].astype(np.float64)) * count / width[place]).astype(np.int64)
    # Rows are sorted, so those of a stratum lie together.
    number = (place + start) * count + np.minimum(stratum, count - 1)
    borders = np.flatnonzero(np.append(True, number[1:] != number[:-1])[: len(number)])
    return number[borders], rows[borders], np.diff(borders, append=len(number))


def shares(owner: np.ndarray, sizes: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """How many each stratum gives: the smallest first, ties the easier, each its even share of what is left or all it has.

    Args:
        owner: the class of each stratum, ascending. sizes: images of each. quotas: of all classes.
    """
    by_size = np.lexsort((np.arange(len(sizes)), sizes, owner))
    num_strata = np.bincount(owner, minlength=len(quotas))
    starts, left = np.cumsum(num_strata) - num_strata, np.array(quotas)
    given = np.zeros(len(sizes), np.int64)
    for turn in range(int(num_strata.max(initial=0))):
        mine = np.flatnonzero(num_strata > turn)
        stratum = by_size[starts[mine] + turn]
        given[stratum] = np.minimum(sizes[stratum], left[mine] // (num_strata[mine] - turn))
        left[mine] -= given[stratum]
    return given
