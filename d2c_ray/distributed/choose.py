"""Selecting in a feature space: classes as Ray tasks of their own, on a GPU each where there are some."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from d2c_ray.config import SelectConfig
from d2c_ray.data.features import Embedded
from d2c_ray.distributed.cluster import Share
from d2c_ray.selection import confidence

Advance = Callable[[int], None]


def choose(
    data: Embedded, quotas: np.ndarray, options: SelectConfig, share: Share, advance: Advance
) -> tuple[dict[int, tuple[np.ndarray, dict[str, Any]]], dict[str, Any]]:
    """Every class's rows in order of choice, with what its selector says of them; and what is true of the whole.

    Twice as many classes are in flight as there are places, so that the driver holds no more features than that.

    Args:
        quotas: images wanted of each label. advance: told how many images have been chosen.
    """
    ce: np.ndarray | None = None
    facts: dict[str, Any] = {}
    if options.selector == "gadc" and options.transport.confidence > 0:
        ce, facts = _confidence(data, options, share)
    remote: Any = ray.remote(num_cpus=1, num_gpus=share.gpus_per_actor, max_retries=3)(_choose_class)
    waiting = [label for label in data.classes.tolist() if quotas[label]]
    waiting.sort(key=lambda label: (data.of(label).stop - data.of(label).start) * quotas[label])  # the longest last in, first out
    running: dict[Any, int] = {}
    found: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
    while waiting or running:
        while waiting and len(running) < 2 * share.actors:
            label = waiting.pop()
            rows = data.of(label)
            features = np.asarray(data.features[rows], np.float32)
            running[remote.remote(features, None if ce is None else ce[rows], int(quotas[label]), options, share.device, share.threads)] = (
                label
            )
        (ready,), _ = ray.wait(list(running), num_returns=1)
        label = running.pop(ready)
        found[label] = ray.get(ready)
        advance(len(found[label][0]))
    return found, facts


def _choose_class(
    features: np.ndarray, ce: np.ndarray | None, count: int, options: SelectConfig, device: str, threads: int
) -> tuple[np.ndarray, dict[str, Any]]:
    import torch

    from d2c_ray.selection.by_features import BY_FEATURES

    torch.set_num_threads(threads)
    return BY_FEATURES[options.selector](features, ce, count, options, device)


def _confidence(data: Embedded, options: SelectConfig, share: Share) -> tuple[np.ndarray | None, dict[str, Any]]:
    found = confidence.cross_entropy(data.features, data.labels, options.seed, "cpu")
    if found is None:
        notice = "the confidence term is off: images of one class only, and so no classifier to be sure of it"
        return None, {"confidence": "none", "notices": [notice]}
    return found[0], {"confidence": "linear probe on the same features", "probe_accuracy": round(found[1], 4)}
