"""Selection by place in a feature space: herding and k-center, of one class's n images with d features.

One matrix-vector product a pick, where the plain way computes all distances anew. Float64 throughout, so that rounding
of float32 features' products decides no pick; ties go to the lower row, so callers give rows in sample_id order.
"""

import numpy as np

TIE = 1e-12  # of the largest squared norm; what differs by less, differs by rounding


def herding(features: np.ndarray, count: int) -> np.ndarray:
    """`count` of n rows whose running mean follows the class mean; int64, in order of choice, none twice.

    Welling 2009, as in iCaRL (arXiv 1611.07725, Algorithm 4): pick k is the argmin over j of ||mu - (sum + y_j) / k||,
    on the features as given. Expanded, with centred y and their sum s: ||s||^2 + 2 <s, y_j> + ||y_j||^2.

    Raises:
        ValueError: a count outside of 1 to n.
    """
    y, norms = _centred(features, count)
    inner = np.zeros(len(y))  # n, <s, y_j>
    free = np.ones(len(y), bool)
    rows = np.empty(count, np.int64)
    for k in range(count):
        rows[k] = row = _first(np.where(free, 2 * inner + norms, np.inf), norms)
        free[row] = False
        inner += y @ y[row]
    return rows


def k_center(features: np.ndarray, count: int) -> np.ndarray:
    """`count` of n rows by greedy farthest-first traversal; int64, in order of choice, none twice.

    Gonzalez 1985; k-Center-Greedy of arXiv 1708.00489. The first pick is the row nearest to the class mean, every
    further one the row farthest from its nearest pick.

    Raises:
        ValueError: a count outside of 1 to n.
    """
    y, norms = _centred(features, count)
    rows = np.empty(count, np.int64)
    nearest = np.full(len(y), np.inf)  # n, squared distance to the nearest pick; -inf: picked
    row = _first(norms, norms)
    for k in range(count):
        rows[k] = row
        np.minimum(nearest, np.maximum(norms - 2 * (y @ y[row]) + norms[row], 0), out=nearest)
        nearest[row] = -np.inf  # duplicates of picks are at 0 and still come last, the lower row first
        row = _first(-nearest, norms)
    return rows


def _first(values: np.ndarray, norms: np.ndarray) -> int:
    """The lowest row among the least values."""
    return int(np.flatnonzero(values <= values.min() + TIE * norms.max())[0])


def _centred(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """n x d features about their mean and their squared norms, float64."""
    if not 1 <= count <= len(features):
        raise ValueError(f"{count} of {len(features)} rows cannot be chosen")
    y = np.asarray(features, np.float64)
    y = y - y.mean(0)
    return y, np.einsum("nd,nd->n", y, y)
