"""Selecting in a feature space: classes as Ray tasks of their own, on a GPU each where there are some."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from d2c_ray.config import SelectConfig
from d2c_ray.data.features import Embedded
from d2c_ray.distributed.cluster import ANYWHERE, Share
from d2c_ray.errors import UserError
from d2c_ray.selection import confidence

Advance = Callable[[int], None]
ON_GPU = {"gadc"}


def choose(
    data: Embedded, quotas: np.ndarray, options: SelectConfig, share: Share, advance: Advance
) -> tuple[dict[int, tuple[np.ndarray, dict[str, Any]]], dict[str, Any]]:
    """Every class's rows in order of choice, with what its selector says of them; and what is true of the whole.

    As many classes are worked on as there are places, since each holds its own distances. Tasks read the features from
    the file, so that the driver holds none.

    Args:
        quotas: images wanted of each label. advance: told how many images have been chosen.

    Raises:
        UserError: a class that its selector cannot work on; names it.
    """
    device, gpus = (share.device, share.gpus_per_actor) if options.selector in ON_GPU else ("cpu", 0)
    own: Any = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 3, "scheduling_strategy": ANYWHERE}
    ce: np.ndarray | None = None
    facts: dict[str, Any] = {}
    if options.selector == "gadc" and options.transport.confidence > 0:
        probed = ray.get(ray.remote(**own)(_probe).remote(data.path, data.labels, options.seed, device, share.threads))
        if probed is None:
            notice = "the confidence term is off: images of one class only, and so no classifier to be sure of it"
            facts = {"confidence": "none", "notices": [notice]}
        else:
            ce, facts = probed[0], {"confidence": "linear probe on the same features", "probe_accuracy": round(probed[1], 4)}
    remote: Any = ray.remote(**own)(_choose_class)
    waiting = [label for label in data.classes.tolist() if quotas[label]]
    waiting.sort(key=lambda label: (data.of(label).stop - data.of(label).start) * quotas[label])  # the longest last in, first out
    running: dict[Any, int] = {}
    found: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
    while waiting or running:
        while waiting and len(running) < share.actors:
            label = waiting.pop()
            rows = data.of(label)
            sure = None if ce is None else ce[rows]
            running[remote.remote(data.path, rows, label, sure, int(quotas[label]), options, device, share.threads)] = label
        (ready,), _ = ray.wait(list(running), num_returns=1)
        label = running.pop(ready)
        found[label] = ray.get(ready)
        advance(len(found[label][0]))
    return found, facts


def _choose_class(
    path: str, rows: slice, label: int, ce: np.ndarray | None, count: int, options: SelectConfig, device: str, threads: int
) -> tuple[np.ndarray, dict[str, Any]]:
    import torch

    from d2c_ray.selection.by_features import BY_FEATURES

    torch.set_num_threads(threads)
    features = np.load(path, mmap_mode="r", allow_pickle=False)[rows].astype(np.float32)
    try:
        return BY_FEATURES[options.selector](features, ce, count, options, device)
    except UserError as error:
        raise UserError(f"label {label}: {error}") from error


def _probe(path: str, labels: np.ndarray, seed: int, device: str, threads: int) -> tuple[np.ndarray, float] | None:
    import torch

    torch.set_num_threads(threads)
    return confidence.cross_entropy(np.load(path, mmap_mode="r", allow_pickle=False), labels, seed, device)
