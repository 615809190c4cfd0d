"""The Fréchet distance of two sets of features, exact also where they are fewer than the features are wide."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf

BLOCK = 4096  # rows taken up at once
EXACT = 1e-7  # relative error of a distance above which its last trace is computed the slow and exact way


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance (that of n - 1) of n feature rows of width d; the covariance as it is, or as a factor of it.

    A factor R, with R^T R = covariance, has as many rows as the covariance has rank: few images make a thin one.
    """

    count: int | None  # None: not known, as of most published files
    mean: np.ndarray  # d
    factor: np.ndarray | None = None  # r x d
    covariance: np.ndarray | None = None  # d x d

    @classmethod
    def of(cls, mu: np.ndarray, sigma: np.ndarray, count: int | None = None) -> "Statistics":
        """Statistics from the mean (d) and covariance (d x d) of a published file.

        Raises:
            ValueError: shapes that do not fit, values that are not finite, or no symmetric matrix.
        """
        mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"a mean of shape {mu.shape} and a covariance of shape {sigma.shape} do not fit; d and d x d would")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("a mean or a covariance that is not finite")
        if abs(sigma - sigma.T).max() > 1e-4 * abs(sigma).max():  # float32 files are symmetric to some 1e-6
            raise ValueError("a covariance that is not symmetric")
        return cls(count, mu, covariance=(sigma + sigma.T) / 2)

    @property
    def trace(self) -> float:
        if self.factor is not None:
            return float(np.square(self.factor).sum())
        assert self.covariance is not None
        return float(np.trace(self.covariance))

    @cached_property
    def sigma(self) -> np.ndarray:
        """The covariance, d x d."""
        if self.covariance is not None:
            return self.covariance
        assert self.factor is not None
        return self.factor.T @ self.factor

    @cached_property
    def root(self) -> np.ndarray:
        """A factor R, r x d, of the covariance: the one given, else Cholesky's, pivoted where the covariance is singular.

        Raises:
            ValueError: a matrix with negative eigenvalues beyond rounding.
        """
        if self.factor is not None:
            return self.factor
        assert self.covariance is not None
        matrix = torch.from_numpy(self.covariance)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return lower.T.numpy()
        # LAPACK's pivoted Cholesky stops where what is left is rounding, whose square roots would add up.
        upper, order, rank, _ = dpstrf(self.covariance)
        root = np.zeros((max(rank, 1), len(upper)))  # no row at all would be no matrix to the singular values
        root[:rank, order - 1] = np.triu(upper)[:rank]
        if abs(root.T @ root - self.covariance).max() > 1e-6 * abs(self.covariance).max():
            raise ValueError("no covariance: it has negative eigenvalues")
        return root


class Moments:
    """Count, mean and centred second moments of feature rows, in one pass, in float64; d x d of memory whatever the count.

    Parts that were accumulated apart merge into what one pass would give (Chan, Golub and LeVeque 1979).
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # sum of (x - mean) (x - mean)^T

    def update(self, features: np.ndarray) -> "Moments":
        """Takes up n x d rows, of any float type, and gives itself back.

        Raises:
            ValueError: another width, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {features.shape} were given, n x {len(self.mean)} are wanted")
        for start in range(0, len(features), BLOCK):
            rows = np.asarray(features[start : start + BLOCK], np.float64)
            mean = rows.mean(0)
            if not np.isfinite(mean).all():
                raise ValueError("features that are not finite")
            self._take(len(rows), mean, rows - mean)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Takes up what another has seen, and gives itself back.

        Raises:
            ValueError: another width.
        """
        if len(other.mean) != len(self.mean):
            raise ValueError(f"moments of width {len(other.mean)} and {len(self.mean)} do not merge")
        if other.count:
            self.scatter += other.scatter
            self._take(other.count, other.mean, np.empty((0, len(self.mean))))
        return self

    def statistics(self) -> Statistics:
        """Mean and covariance of all rows seen.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return Statistics(self.count, self.mean.copy(), covariance=self.scatter / (self.count - 1))

    def _take(self, count: int, mean: np.ndarray, centred: np.ndarray) -> None:
        """Rows centred about their own mean; the way between the two means enters as one row more."""
        total = self.count + count
        apart = mean - self.mean
        rows = np.concatenate([centred, apart[None] * np.sqrt(self.count * count / total)])
        self.scatter += rows.T @ rows
        self.mean = self.mean + apart * (count / total)
        self.count = total


def statistics(features: np.ndarray) -> Statistics:
    """Statistics of n x d features, in float64: as a factor where they are at most as many as they are wide.

    Raises:
        ValueError: fewer than two rows, or values that are not finite.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(features)}")
    if len(features) > features.shape[1]:
        return Moments(features.shape[1]).update(features).statistics()
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise ValueError("features that are not finite")
    mean = features.mean(0)
    return Statistics(len(features), mean, (features - mean) / np.sqrt(len(features) - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)) (Heusel et al., arXiv 1706.08500).

    The eigenvalues of C_a C_b are the squares of the singular values of R_a R_b^T, so the last trace is that matrix's
    nuclear norm: no square root of a matrix, and nothing to go wrong where the covariances are singular.

    Raises:
        ValueError: features of different widths.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of width {len(a.mean)} and {len(b.mean)} have no distance")
    matrix = torch.from_numpy(a.root) @ torch.from_numpy(b.root).T  # r_a x r_b
    apart = float(np.square(a.mean - b.mean).sum()) + a.trace + b.trace
    cross, error = _nuclear_norm_fast(matrix)
    if error > EXACT / 2 * (apart - 2.0 * cross):
        cross = float(torch.linalg.svdvals(matrix).sum())
    return max(0.0, apart - 2.0 * cross)


def _nuclear_norm_fast(matrix: torch.Tensor) -> tuple[float, float]:
    """The sum of singular values as that of the Gram matrix' root eigenvalues, a third of the time, and what it may be off.

    An eigenvalue is off by some rounding errors of the largest, its root by that over twice itself: much, where it is near 0.
    Errors of either sign add up as independent ones do; those of eigenvalues that are but rounding are all upwards.
    """
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).clamp_(min=0)
    noise = 4 * torch.finfo(values.dtype).eps * values[-1]
    lost = values <= noise
    error = noise.sqrt() * lost.sum() + (noise / 2 / values[~lost].sqrt()).square().sum().sqrt()
    return float(values.sqrt().sum()), float(error)
