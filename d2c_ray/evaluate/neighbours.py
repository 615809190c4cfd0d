"""Nearest rows and rows within a radius, exact, in blocks: n x m distances are never held at once.

All distances of a block come from one float32 matrix product, |x|^2 + |y|^2 - 2 x.y about a common centre, which is many
times as fast as float64 differences and off by some rounding errors of |x|^2 + |y|^2. So it only sorts out: whatever lies
within SLACK rounding errors of a decision is computed anew from differences in float64, where equal rows are at distance 0
exactly. Features may be memory-mapped.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

ROWS, COLUMNS = 4096, 4096  # of a block
SLACK = 16.0  # rounding errors of |x|^2 + |y|^2; random and real features show 2 at the most
MORE = 8  # candidates beyond the k nearest
AT_ONCE = 1 << 23  # numbers of exact differences held at once


def nearest(queries: np.ndarray, keys: np.ndarray, k: int, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest keys (m x d) of each query (n x d).

    Args:
        same: queries and keys are the same rows, and none is its own neighbour.

    Returns:
        Squared distances n x k, float64, increasing, and the keys' rows n x k; of equally near keys the lower row.

    Raises:
        ValueError: fewer than k keys, or features of different widths.
    """
    if len(keys) - same < k:
        raise ValueError(f"{k} neighbours need more than {k - (not same)} rows, got {len(keys)}")
    _same_width(queries, keys)
    centre = _centre(keys)
    squares, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), ROWS):
        own = np.arange(start, min(start + ROWS, len(queries)))
        found, where, certain = _nearest(queries[own[0] : own[-1] + 1], keys, k, centre, own if same else None, torch.float32)
        if not certain.all():  # more rows than there are candidates lie equally near
            doubtful = np.flatnonzero(~certain)
            mine = own[doubtful] if same else None
            found[doubtful], where[doubtful], certain = _nearest(queries[own[doubtful]], keys, k, centre, mine, torch.float64)
            for row in doubtful[~certain]:  # and so near that even float64 products cannot tell
                found[row], where[row] = _nearest_by_differences(queries[own[row]], keys, k, int(own[row]) if same else None)
        squares[own], rows[own] = found, where
    return squares, rows


def _nearest(
    queries: np.ndarray, keys: np.ndarray, k: int, centre: np.ndarray, own: np.ndarray | None, kind: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one block of queries: squares n x k, rows n x k, and whether each query's are surely the nearest."""
    wanted = min(k + MORE, len(keys) - (own is not None))
    x = _about(queries, centre, kind)
    x_norms = x.square().sum(1)
    best, at = torch.empty(len(x), 0, dtype=kind), torch.empty(len(x), 0, dtype=torch.int64)
    largest = 0.0
    for start, y, y_norms in _blocks(keys, centre, kind):
        largest = max(largest, float(y_norms.max()))
        block = torch.addmm(y_norms, x, y.T, alpha=-2.0)  # |x|^2 is the same along a row
        if own is not None:
            inside = np.flatnonzero((own >= start) & (own < start + len(y)))
            block[inside, own[inside] - start] = torch.inf
        values, columns = block.topk(min(wanted, block.shape[1]), largest=False, sorted=False)
        best, at = torch.cat([best, values], 1), torch.cat([at, columns + start], 1)
        if best.shape[1] > wanted:
            best, chosen = best.topk(wanted, largest=False, sorted=False)
            at = at.gather(1, chosen)
    rows = at.sort(1).values.numpy()  # so that a stable sort leaves the lower of equals first
    squares = np.empty(rows.shape)
    step = max(1, AT_ONCE // (wanted * keys.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        squares[start : start + step] = exact(queries[start : start + step, None], keys[part])
    order = np.argsort(squares, 1, kind="stable")[:, :k]
    squares, rows = np.take_along_axis(squares, order, 1), np.take_along_axis(rows, order, 1)
    slack = SLACK * torch.finfo(kind).eps * (x_norms.double() + largest)
    border = (best.max(1).values.double() + x_norms.double() - slack).numpy()  # no other row can be nearer
    everything = wanted == len(keys) - (own is not None)
    return squares, rows, (squares[:, -1] <= border) | (squares[:, -1] == 0) | everything


def _nearest_by_differences(query: np.ndarray, keys: np.ndarray, k: int, own: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Squares and rows, k of each, of one query."""
    step = max(1, AT_ONCE // keys.shape[1])
    squares = np.concatenate([exact(query, keys[start : start + step]) for start in range(0, len(keys), step)])
    if own is not None:
        squares[own] = np.inf
    rows = np.argsort(squares, kind="stable")[:k]
    return squares[rows], rows


class Within:
    """Blocks of which pairs of x (n x d) and y (m x d) are within squared radii of x's rows, and of y's."""

    def __init__(self, x: np.ndarray, y: np.ndarray, x_squares: np.ndarray, y_squares: np.ndarray) -> None:
        _same_width(x, y)
        self.x, self.y, self.limits = x, y, (x_squares, y_squares)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Gives rows, columns, and n' x m' booleans: distance <= radius of the row, <= radius of the column."""
        centre = _centre(self.y)
        x_squares, y_squares = self.limits
        for start, x, x_norms in _blocks(self.x, centre, torch.float32, ROWS):
            rows = slice(start, start + len(x))
            for begin, y, y_norms in _blocks(self.y, centre, torch.float32):
                columns = slice(begin, begin + len(y))
                block = torch.addmm(y_norms, x, y.T, alpha=-2.0).add_(x_norms[:, None])
                slack = SLACK * torch.finfo(torch.float32).eps * (x_norms[:, None] + y_norms.max())
                of_x = self._inside(block, rows, columns, x_squares[rows, None], slack)
                of_y = self._inside(block, rows, columns, y_squares[None, columns], slack)
                yield rows, columns, of_x, of_y

    def _inside(self, block: Tensor, rows: slice, columns: slice, limit: np.ndarray, slack: Tensor) -> Tensor:
        limits = torch.from_numpy(limit).float()
        inside = block <= limits
        i, j = ((block - limits).abs_() <= slack).nonzero().T.numpy()
        step = max(1, AT_ONCE // self.x.shape[1])
        limit = np.broadcast_to(limit, block.shape)
        for start in range(0, len(i), step):
            a, b = i[start : start + step], j[start : start + step]
            squares = exact(self.x[rows.start + a], self.y[columns.start + b])
            inside[a, b] = torch.from_numpy(squares <= limit[a, b])
        return inside


def exact(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances along the last axis, from differences in float64."""
    apart = np.asarray(x, np.float64) - np.asarray(y, np.float64)
    return np.einsum("...d,...d->...", apart, apart)


def _blocks(features: np.ndarray, centre: np.ndarray, kind: torch.dtype, rows: int = COLUMNS) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first row of each block, its rows about the centre, and their squared norms."""
    for start in range(0, len(features), rows):
        block = _about(features[start : start + rows], centre, kind)
        yield start, block, block.square().sum(1)


def _about(features: np.ndarray, centre: np.ndarray, kind: torch.dtype) -> Tensor:
    """Differences are taken at the features' own precision at least, and rounded after."""
    return torch.from_numpy(np.subtract(features, centre, dtype=np.result_type(features.dtype, np.float32))).to(kind)


def _centre(features: np.ndarray) -> np.ndarray:
    """Near the mean, which is enough: it only makes the norms small, and distances do not depend on it."""
    some = features[:: max(1, len(features) // ROWS)]
    return np.asarray(some, np.float64).mean(0).astype(np.result_type(features.dtype, np.float32))


def _same_width(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shapes {x.shape} and {y.shape} have no distances")
