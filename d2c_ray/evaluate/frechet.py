"""The Fréchet distance of two sets of features, exact also where they are fewer than the features are wide."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of n feature rows of width d, the covariance as a factor R with R^T R = covariance (n - 1)."""

    count: int
    mean: np.ndarray  # d
    factor: np.ndarray  # r x d, r = min(n, d)

    @property
    def trace(self) -> float:
        return float(np.square(self.factor).sum())


def statistics(features: np.ndarray) -> Statistics:
    """Statistics of n x d features, in float64.

    Raises:
        ValueError: fewer than two rows, or values that are not finite.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(features)}")
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise ValueError("features that are not finite")
    mean = features.mean(0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    if len(features) > features.shape[1]:
        centred = np.linalg.qr(centred, mode="r")
    return Statistics(len(features), mean, centred)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)) (Heusel et al., arXiv 1706.08500).

    The eigenvalues of C_a C_b are the squares of the singular values of R_a R_b^T, so the last trace is that matrix's
    nuclear norm: no square root of a matrix, and nothing to go wrong where the covariances are singular.
    """
    cross = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    distance = float(np.square(a.mean - b.mean).sum()) + a.trace + b.trace - 2.0 * float(cross)
    return max(0.0, distance)
