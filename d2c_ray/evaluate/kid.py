"""Kernel Inception Distance (Binkowski et al., arXiv 1801.01401), with its standard error."""

import numpy as np

from d2c_ray.seeding import derive


def kid(real: np.ndarray, generated: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float] | None:
    """The squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, averaged over random subsets.

    Each subset is `size` rows of either side without replacement, or as many as the smaller side has; where both sides
    have no more than that, there is one subset. The estimate is unbiased, so of equal distributions it is about 0 and
    half the time below.

    Args:
        real, generated: n x d and m x d features.

    Returns:
        Mean, and its standard error: the jackknife's for one subset (two-sample U-statistic), over the square root of
        the subsets that can be disjoint. None where a side has fewer than 3 rows.
    """
    size = min(size, len(real), len(generated))
    if size < 3:
        return None
    if max(len(real), len(generated)) == size:
        subsets = 1
    rng = np.random.Generator(np.random.Philox(derive(seed, "kid")))
    found = []
    for _ in range(subsets):
        x = generated[np.sort(rng.permutation(len(generated))[:size])]
        y = real[np.sort(rng.permutation(len(real))[:size])]
        found.append(discrepancy(np.asarray(x, np.float64), np.asarray(y, np.float64)))
    values, errors = np.array(found).T
    apart = max(1.0, min(subsets, len(real) / size, len(generated) / size))
    return float(values.mean()), float(np.sqrt(np.square(errors).mean() / apart))


def discrepancy(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """MMD^2 of m x d and m x d rows and its jackknife error; the cross term's diagonal stays in, as is usual for KID.

    With pairs z = (x, y) and h(z, z') = k(x, x') + k(y, y') - k(x, y') - k(x', y), the error of the mean of h over all
    pairs is twice the deviation of h's row means over sqrt(m) (Hoeffding 1948; at most sqrt(2) too large where the
    distributions are equal).
    """
    m, width = x.shape
    kernel = _kernel(x, x, width)
    kernel += _kernel(y, y, width)
    np.fill_diagonal(kernel, 0.0)
    cross = _kernel(x, y, width)
    value = kernel.sum() / (m * (m - 1)) - 2.0 * cross.sum() / m**2
    rows = kernel.sum(1) / (m - 1) - (cross.sum(0) + cross.sum(1)) / m
    return float(value), float(2.0 * rows.std(ddof=1) / np.sqrt(m))


def _kernel(x: np.ndarray, y: np.ndarray, width: int) -> np.ndarray:
    product = x @ y.T
    product /= width
    product += 1.0
    return product * product * product
