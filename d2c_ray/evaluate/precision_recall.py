"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991), in blocks."""

import numpy as np

BLOCK = 2048


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """The distance of each row to its k-th nearest other row.

    Raises:
        ValueError: k rows or fewer.
    """
    if len(features) <= k:
        raise ValueError(f"{k} neighbours need more than {k} rows, got {len(features)}")
    found = np.empty(len(features))
    for start in range(0, len(features), BLOCK):
        squares = _squares(features[start : start + BLOCK], features)
        # A row's own distance is nothing, whatever rounding says, and is no neighbour.
        squares[np.arange(len(squares)), start + np.arange(len(squares))] = -1.0
        found[start : start + BLOCK] = np.sqrt(np.partition(squares, k, axis=1)[:, k])
    return found


def covered(features: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> float:
    """The share of rows that lie in the ball of at least one centre."""
    inside = 0
    for start in range(0, len(features), BLOCK):
        inside += int((_squares(features[start : start + BLOCK], centres) <= np.square(radius)).any(1).sum())
    return inside / len(features)


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of all rows of a to all of b, by one matrix product: many times as fast as their differences."""
    norms = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    squares = norms - 2.0 * (a @ b.T)
    squares[squares < 1e-12 * norms] = 0.0  # equal rows are at no distance, whatever rounding says
    return squares


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Precision: share of generated rows among the real ones' balls; recall: the reverse. As many of both are meant."""
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    return covered(generated, real, radii(real, k)), covered(real, generated, radii(generated, k))
