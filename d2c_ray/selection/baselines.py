"""The selectors, all of one signature: `selector(members, count, options) -> ranks`.

`members` are one class's images sorted from easy to hard, ties by key; the ranks come back in order of choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from d2c_ray.config import DEFAULT_F, SelectConfig
from d2c_ray.seeding import derive
from d2c_ray.selection.interval import interval_ranks


@dataclass(frozen=True)
class Members:
    """One class, in rank order."""

    label: int
    sample_ids: np.ndarray  # int64
    scores: np.ndarray  # float32, ascending

    def __len__(self) -> int:
        return len(self.sample_ids)


def interval(members: Members, count: int, options: SelectConfig) -> np.ndarray:
    """Even ranks, by k or by f."""
    return interval_ranks(len(members), count, options.k, 0.0 if options.k else options.f or DEFAULT_F)


def random(members: Members, count: int, options: SelectConfig) -> np.ndarray:
    """The head of a permutation of the class by (seed, class): a smaller budget is a subset of a larger one."""
    by_key = np.argsort(members.sample_ids)  # sample_id is the row in key order; the scores must not matter
    order = np.random.Generator(np.random.Philox(derive(options.seed, "select", members.label))).permutation(len(members))
    return by_key[order[:count]]


def easiest(members: Members, count: int, options: SelectConfig) -> np.ndarray:
    """The lowest scores."""
    return np.arange(count)


def hardest(members: Members, count: int, options: SelectConfig) -> np.ndarray:
    """The highest scores, the hardest first."""
    return np.arange(len(members) - 1, len(members) - 1 - count, -1)


SELECTORS: dict[str, Callable[[Members, int, SelectConfig], np.ndarray]] = {
    "interval": interval,
    "random": random,
    "easiest": easiest,
    "hardest": hardest,
}
NEEDS_SCORES = {"interval", "easiest", "hardest"}
