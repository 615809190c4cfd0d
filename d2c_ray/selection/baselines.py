"""The selectors that need no more than scores, all of one signature: `selector(classes, spans, each, options) -> choice`.

`each` reaches the partitions, which are sorted from easy to hard, ties by key, and hold what `spans` say.
"""

from collections.abc import Callable

import numpy as np

from d2c_ray.config import DEFAULT_F, SelectConfig
from d2c_ray.selection import stratified as ccs
from d2c_ray.selection.draw import drawn
from d2c_ray.selection.interval import interval_ranks, nominal_fractions
from d2c_ray.selection.rank import Choice, Classes, Each, Span, at, at_ranks, positions


def interval(classes: Classes, spans: list[Span], each: Each, options: SelectConfig) -> Choice:
    """Even ranks, by k or by f."""
    return at_ranks(interval_ranks(classes.sizes, classes.quotas, options.k, _f(options)), classes, spans, each)


def easiest(classes: Classes, spans: list[Span], each: Each, options: SelectConfig) -> Choice:
    """The lowest scores."""
    return at_ranks(positions(classes.quotas).astype(np.int64), classes, spans, each)


def hardest(classes: Classes, spans: list[Span], each: Each, options: SelectConfig) -> Choice:
    """The highest scores, the hardest first."""
    return at_ranks(np.repeat(classes.sizes - 1, classes.quotas) - positions(classes.quotas), classes, spans, each)


def medium(classes: Classes, spans: list[Span], each: Each, options: SelectConfig) -> Choice:
    """The median outwards: rank floor((size - 1) / 2), then the next harder, the next easier, and so on in turn."""
    step = positions(classes.quotas).astype(np.int64)
    away = np.where(step % 2, (step + 1) // 2, -(step // 2))
    return at_ranks(np.repeat((classes.sizes - 1) // 2, classes.quotas) + away, classes, spans, each)


def random(classes: Classes, spans: list[Span], each: Each, options: SelectConfig) -> Choice:
    """The lowest random keys: independent of the scores, and a smaller quota's images are among a larger one's."""
    groups = []
    for span in spans:
        sizes = classes.sizes[span.start : span.stop] if span.stop > span.start + 1 else np.asarray([span.rows])
        groups.append((np.arange(span.start, span.stop), np.cumsum(sizes) - sizes, sizes))
    every = np.arange(len(classes.sizes))
    return drawn(groups, (every, every, classes.quotas), options.seed, classes, spans, each)


def stratified(classes: Classes, spans: list[Span], each: Each, options: SelectConfig) -> Choice:
    """Random keys within strata of the score, without the hardest; stratum by stratum from easy to hard."""
    keep, count = ccs.kept(classes.sizes, classes.quotas, options.cutoff), options.strata
    present = np.flatnonzero(classes.quotas)
    low, high = np.zeros((2, len(keep)), np.float32)
    low[present] = at("score", present, np.zeros_like(present), classes, spans, each)
    high[present] = at("score", present, keep[present] - 1, classes, spans, each)
    inside = [slice(span.start, span.stop) for span in spans]
    arguments = [
        (span.start, span.stop, span.first, keep[mine], low[mine], high[mine], count) for span, mine in zip(spans, inside, strict=True)
    ]
    groups = each(ccs.strata, arguments)
    number, index = np.unique(np.concatenate([some for some, _, _ in groups]), return_inverse=True)
    sizes = np.zeros(len(number), np.int64)
    np.add.at(sizes, index, np.concatenate([counts for _, _, counts in groups]))
    owner = number // count
    return drawn(groups, (number, owner, ccs.shares(owner, sizes, classes.quotas)), options.seed, classes, spans, each)


def nominal(classes: Classes, options: SelectConfig) -> np.ndarray | None:
    """The nominal f of each class; None where a selector has none."""
    return nominal_fractions(classes.sizes, classes.quotas, options.k, _f(options)) if options.selector == "interval" else None


def _f(options: SelectConfig) -> float:
    return 0.0 if options.k else options.f or DEFAULT_F


SELECTORS: dict[str, Callable[[Classes, list[Span], Each, SelectConfig], Choice]] = {
    "interval": interval,
    "random": random,
    "easiest": easiest,
    "hardest": hardest,
    "medium": medium,
    "stratified": stratified,
}
NEEDS_SCORES = {"interval", "easiest", "hardest", "medium", "stratified"}
