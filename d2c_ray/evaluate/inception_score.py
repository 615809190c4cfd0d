"""Inception Score (Salimans et al., arXiv 1606.03498)."""

import numpy as np
from scipy.special import xlogy


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float] | None:
    """exp(E KL(p(y|x) || p(y))) in `splits` equal parts of the rows, as they come: mean and standard deviation.

    ADM's evaluator takes parts of 5,000, which are the same ones for its 50,000 images. Rows that come class by class
    want shuffling first: a part of few classes scores low.

    Args:
        probabilities: n x classes, rows summing to 1.

    Returns:
        None where there are fewer rows than parts.
    """
    n = len(probabilities)
    if n < splits:
        return None
    scores = []
    for part in range(splits):
        p = np.asarray(probabilities[part * n // splits : (part + 1) * n // splits], np.float64)
        mean = p.mean(0)
        # sum p log p - sum p log mean, where mean is 0 only if all p are.
        scores.append(np.exp((xlogy(p, p).sum() - xlogy(p, np.where(mean > 0, mean, 1.0)).sum()) / len(p)))
    return float(np.mean(scores)), float(np.std(scores))
