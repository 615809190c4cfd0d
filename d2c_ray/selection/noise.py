"""The scoring noise, apart from the rest of scoring so that decode tasks need not import torch."""

import numpy as np

from d2c_ray.seeding import derive


def noise(seed: int, key: str, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """The noise of one image's draws 0..count-1, float32 count x shape: a pure function of (seed, key, draw index)."""
    draws = np.empty((count, *shape), np.float32)
    philox = derive(seed, "score", key)
    for index in range(count):
        draws[index] = np.random.Generator(np.random.Philox(key=philox, counter=[0, 0, 0, index])).standard_normal(shape, np.float32)
    return draws
