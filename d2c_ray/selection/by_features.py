"""The selectors that choose in a frozen feature space, all of one signature: one class's features in, rows in order of choice out."""

from collections.abc import Callable
from typing import Any

import numpy as np

from d2c_ray.config import SelectConfig
from d2c_ray.selection import geometry, transport

Chosen = tuple[np.ndarray, dict[str, Any]]


def herding(features: np.ndarray, ce: np.ndarray | None, count: int, options: SelectConfig, device: str) -> Chosen:
    """The rows whose mean follows the class's, one after the other."""
    return geometry.herding(features, count), {}


def k_center(features: np.ndarray, ce: np.ndarray | None, count: int, options: SelectConfig, device: str) -> Chosen:
    """The rows that leave no other one far away, farthest first."""
    return geometry.k_center(features, count), {}


def gadc(features: np.ndarray, ce: np.ndarray | None, count: int, options: SelectConfig, device: str) -> Chosen:
    """The rows that carry the class's mass at the least cost, with its moments, and of which a classifier is sure."""
    return transport.gadc(features, ce, count, options.transport, device)


# features: n x d float32, rows in the order of sample_id. ce: n, or None. count: up to n.
BY_FEATURES: dict[str, Callable[[np.ndarray, np.ndarray | None, int, SelectConfig, str], Chosen]] = {
    "herding": herding,
    "k_center": k_center,
    "gadc": gadc,
}
