"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991), in blocks."""

import numpy as np
from scipy.spatial.distance import cdist

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
        distances = cdist(features[start : start + BLOCK], features)
        found[start : start + BLOCK] = np.partition(distances, k, axis=1)[:, k]  # column 0 would be the row itself
    return found


def covered(features: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> float:
    """The share of rows that lie in the ball of at least one centre."""
    inside = 0
    for start in range(0, len(features), BLOCK):
        inside += int((cdist(features[start : start + BLOCK], centres) <= radius).any(1).sum())
    return inside / len(features)


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Precision: share of generated rows among the real ones' balls; recall: the reverse. As many of both are meant."""
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    return covered(generated, real, radii(real, k)), covered(real, generated, radii(generated, k))
