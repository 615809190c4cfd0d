"""Herding and k-center against plain double loops in float64, and what they may not depend on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_ray.selection.geometry import herding, k_center

SELECTORS = {"herding": herding, "k_center": k_center}


def features(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Correlated and far from the origin, as pooled activations are."""
    rng = np.random.default_rng(seed)
    return (5 + rng.normal(size=(count, width)) @ rng.normal(size=(width, width))).astype(np.float32)


def plain_herding(y: np.ndarray, count: int) -> list[int]:
    y, rows = y.astype(np.float64), []
    for k in range(1, count + 1):
        total = y[rows].sum(0)
        errors = [np.linalg.norm(y.mean(0) - (total + y[j]) / k) if j not in rows else np.inf for j in range(len(y))]
        rows.append(int(np.argmin(errors)))
    return rows


def plain_k_center(y: np.ndarray, count: int) -> list[int]:
    y = y.astype(np.float64)
    rows = [int(np.argmin(np.linalg.norm(y - y.mean(0), axis=1)))]
    while len(rows) < count:
        gaps = [min(np.linalg.norm(y[j] - y[row]) for row in rows) if j not in rows else -1.0 for j in range(len(y))]
        rows.append(int(np.argmax(gaps)))
    return rows


PLAIN = {"herding": plain_herding, "k_center": plain_k_center}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("shape", [(60, 3), (150, 40), (40, 40)])
def test_picks_are_those_of_the_plain_loop(name: str, shape: tuple[int, int]) -> None:
    y = features(*shape)
    assert SELECTORS[name](y, 30).tolist() == PLAIN[name](y, 30)


@pytest.mark.parametrize("name", SELECTORS)
def test_picks_on_real_features(name: str, gadc_case) -> None:
    y = gadc_case("cat_500")["features"].astype(np.float32)
    assert SELECTORS[name](y, 12).tolist() == PLAIN[name](y, 12)


@pytest.mark.parametrize("name", SELECTORS)
@given(count=st.integers(1, 12), extra=st.integers(2, 12), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_distinct_rows_and_the_same_ones_in_any_order(name: str, count: int, extra: int, seed: int) -> None:
    y = features(count + extra, 4, seed)  # of two rows, either is as near to the mean: a tie
    rows = SELECTORS[name](y, count)
    assert rows.dtype == np.int64 and len(set(rows.tolist())) == count
    order = np.random.default_rng(seed).permutation(len(y))
    assert np.array_equal(order[SELECTORS[name](y[order], count)], rows)


def test_exact_ties_go_to_the_lower_row() -> None:
    """The corners of a square, each twice: all as far from the mean; then by rule."""
    corners = np.repeat(np.float32([[1, 0], [0, 1], [-1, 0], [0, -1]]), 2, axis=0)
    assert k_center(corners, 8).tolist() == [0, 4, 2, 6, 1, 3, 5, 7]
    assert herding(corners, 4).tolist() == [0, 4, 1, 5]


@pytest.mark.parametrize("name", SELECTORS)
def test_identical_images_and_tiny_classes(name: str) -> None:
    assert SELECTORS[name](np.full((5, 3), 0.1, np.float32), 4).tolist() == [0, 1, 2, 3]
    assert SELECTORS[name](np.ones((1, 3), np.float32), 1).tolist() == [0]
    with pytest.raises(ValueError, match="6 of 5"):
        SELECTORS[name](np.ones((5, 3), np.float32), 6)
