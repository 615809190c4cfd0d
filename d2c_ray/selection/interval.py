"""Interval sampling (D2C, Algorithm 2): even ranks of a class sorted from easy to hard."""

from fractions import Fraction

import numpy as np


def interval_ranks(size: int, count: int, k: int = 0, f: float = 0.0) -> np.ndarray:
    """The ranks taken from a class of `size` images for a quota of `count`, increasing, int64.

    By k: r_i = i k. By f: r_i = floor(i f size / count), which needs f size >= count. A class too small for that gets
    the largest stride that fits, k' = floor((size - 1) / (count - 1)).

    Raises:
        ValueError: a quota above the class, or neither or both of k and f.
    """
    if count > size:
        raise ValueError(f"a quota of {count} from a class of {size}")
    if bool(k) == bool(f):
        raise ValueError("exactly one of k and f")
    steps = np.arange(count, dtype=np.int64)
    if k and (count - 1) * k + 1 <= size:
        return steps * k
    if f:
        # Exact: a share written as 0.7 is seven tenths, not the nearest binary fraction below it.
        share = Fraction(str(f))
        if share * size >= count:
            return np.asarray([i * share.numerator * size // (share.denominator * count) for i in range(count)], np.int64)
    return steps * ((size - 1) // (count - 1)) if count > 1 else steps


def nominal_fraction(ranks: np.ndarray, size: int, f: float = 0.0) -> float:
    """f as the paper counts it, n k / N_c for the stride that was used: the share of the class sampled evenly.

    By f it is that f, unless the class was too small for it.
    """
    if f and Fraction(str(f)) * size >= len(ranks):
        return f
    if len(ranks) < 2:
        return 1 / size if len(ranks) else 0.0
    return len(ranks) * (ranks[-1] / (len(ranks) - 1)) / size
