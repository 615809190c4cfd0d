"""Whether one way is better than another by what several seeds say of both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST = 3  # pairs with fewer of which nothing is called better
LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Differences a - b of pairs.

    Attributes:
        pairs: their number.
        mean, deviation: of the differences (deviation of n - 1; 0 for one pair).
        p: of the two-sided paired t-test that the mean is 0; None of fewer than two pairs.
    """

    pairs: int
    mean: float
    deviation: float
    p: float | None


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compares measures of the same seeds, in the same order.

    Raises:
        ValueError: none, or not as many of both.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} measures are no pairs")
    apart = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    mean = float(apart.mean())
    if len(apart) < 2:
        return Paired(1, mean, 0.0, None)
    deviation = float(apart.std(ddof=1))
    if deviation == 0.0:  # the same difference every time, or none
        return Paired(len(apart), mean, 0.0, 1.0 if mean == 0.0 else 0.0)
    t = mean / (deviation / np.sqrt(len(apart)))
    return Paired(len(apart), mean, deviation, float(2 * stats.t.sf(abs(t), len(apart) - 1)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values as they stand when all of them are looked at (Holm 1979): each is below a level only if its test is still significant."""
    order = np.argsort(p)
    adjusted, most = np.empty(len(p)), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = most
    return [float(value) for value in adjusted]
