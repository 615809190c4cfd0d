"""Which of many rows are looked at: always the same ones, and not the first, since rows often come class by class."""

import numpy as np


def drawn(total: int, count: int) -> np.ndarray | slice:
    """Which `count` of so many rows to take, increasing; all of them where there are no more."""
    return slice(None) if count >= total else np.sort(shuffled(total)[:count])


def shuffled(total: int) -> np.ndarray:
    """The one order that rows are drawn in."""
    return np.random.Generator(np.random.Philox(0)).permutation(total)
