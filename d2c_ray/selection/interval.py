"""Interval sampling (D2C, Algorithm 2): even ranks of classes sorted from easy to hard."""

from fractions import Fraction

import numpy as np


def interval_ranks(sizes: np.ndarray, quotas: np.ndarray, k: int = 0, f: float = 0.0) -> np.ndarray:
    """The ranks taken from classes of `sizes` images for their quotas: class after class, increasing in each, int64.

    By k: r_i = i k. By f: r_i = floor(i f size / quota), which needs f size >= quota. A class too small for that gets
    the largest stride that fits, k' = floor((size - 1) / (quota - 1)).

    Raises:
        ValueError: a quota above its class, or neither or both of k and f.
    """
    sizes, quotas = np.asarray(sizes, np.int64), np.asarray(quotas, np.int64)
    if (quotas > sizes).any():
        raise ValueError(f"a quota of {quotas[quotas > sizes][0]} from a class of {sizes[quotas > sizes][0]}")
    whole, rest, unit, _ = _strides(sizes, quotas, k, f)
    step = np.arange(quotas.sum()) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    ranks = step * np.repeat(whole, quotas)
    if rest.any():
        ranks = ranks + step * np.repeat(rest, quotas) // np.repeat(unit, quotas)
    return ranks.astype(np.int64)


def nominal_fractions(sizes: np.ndarray, quotas: np.ndarray, k: int = 0, f: float = 0.0) -> np.ndarray:
    """f as the paper counts it, n k / N_c for the stride that was used: the share of each class sampled evenly.

    By f it is that f, unless the class was too small for it. 0 where nothing is taken.
    """
    sizes, quotas = np.asarray(sizes, np.int64), np.asarray(quotas, np.int64)
    whole, _, _, by_f = _strides(sizes, quotas, k, f)
    strides = np.where(quotas > 1, whole, 1).astype(np.float64)
    return np.where(by_f, f, quotas * strides / np.maximum(sizes, 1))


def _strides(sizes: np.ndarray, quotas: np.ndarray, k: int, f: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(whole, rest, unit) of r_i = i whole + floor(i rest / unit), and where that is the stride of f."""
    if bool(k) == bool(f):
        raise ValueError("exactly one of k and f")
    short = (sizes - 1) // np.maximum(quotas - 1, 1)
    none, one = np.zeros_like(sizes), np.ones_like(sizes)
    if k:
        return np.where(quotas - 1 <= (sizes - 1) // k, k, short), none, one, none > 0
    # Exact: a share written as 0.7 is seven tenths, not the nearest binary fraction below it.
    share = Fraction(str(f))
    largest = share.denominator * max(int(sizes.max(initial=0)), int(quotas.max(initial=0)) ** 2)
    exact = np.int64 if largest < 2**63 else object  # object: Python's integers, which have no largest
    span, unit = sizes.astype(exact) * share.numerator, np.maximum(quotas, 1).astype(exact) * share.denominator
    by_f = ((span >= unit) & (quotas > 0)).astype(bool)
    return np.where(by_f, span // unit, short), np.where(by_f, span % unit, 0), np.where(by_f, unit, 1), by_f
