"""Precision, recall (Kynkäänniemi et al., arXiv 1904.06991), density and coverage (Naeem et al., arXiv 2002.09797)."""

from typing import NamedTuple

import numpy as np

from d2c_ray.evaluate import neighbours


class Overlap(NamedTuple):
    """How two sets of features overlap; all but the density between 0 and 1."""

    precision: float  # share of generated rows in the ball of some real row
    recall: float  # share of real rows in the ball of some generated row
    density: float  # balls of real rows that a generated row lies in, over k: about 1 for equal distributions
    coverage: float  # share of real rows whose ball holds a generated row


def overlap(real: np.ndarray, generated: np.ndarray, k: int) -> Overlap:
    """All four, from one pass over the n x m distances. A row's ball reaches to its k-th nearest other row, border included.

    Precision, recall and coverage depend on the counts; as many rows of both are meant.

    Raises:
        ValueError: a side with k rows or fewer.
    """
    real_squares = neighbours.nearest(real, real, k, same=True)[0][:, -1]
    generated_squares = neighbours.nearest(generated, generated, k, same=True)[0][:, -1]
    precise, covered, recalled = np.zeros(len(generated), bool), np.zeros(len(real), bool), np.zeros(len(real), bool)
    pairs = 0
    for rows, columns, of_generated, of_real in neighbours.Within(generated, real, generated_squares, real_squares):
        precise[rows] |= of_real.any(1).numpy()
        covered[columns] |= of_real.any(0).numpy()
        recalled[columns] |= of_generated.any(0).numpy()
        pairs += int(of_real.sum())
    return Overlap(float(precise.mean()), float(recalled.mean()), pairs / (k * len(generated)), float(covered.mean()))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Precision: share of generated rows among the real ones' balls; recall: the reverse. As many of both are meant."""
    return overlap(real, generated, k)[:2]
