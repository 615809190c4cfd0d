"""The numbers of `d2c_ray.metrics` through Ray, whose nodes export them to Prometheus; and what a worker works for."""

import threading
import time
from contextlib import suppress
from functools import cache
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from d2c_ray import logs, metrics
from d2c_ray.logs import About

_SEND = {"counter": "inc", "gauge": "set", "histogram": "observe"}
AGAIN_SEC = 4.0  # between two tellings of what gauges stand at: Ray drops one that it has not heard of for two of its intervals, 20 s
MOST_GAUGES = 1024  # that are told again; a process that serves one trial after the other sets those of each
_gauges: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

_setting = threading.Lock()  # stages side by side do


def adopt(about: About) -> None:
    """Has this process, a worker's, speak and count for a stage."""
    logs.adopt(about)
    metrics.listen(_send)


def follow() -> None:
    """Has this process, a driver's, count too."""
    metrics.listen(_send)


def forget() -> None:
    """Lets go of Ray's metrics, which belong to the Ray that has ended."""
    metrics.listen(None)
    with _setting:
        _gauges.clear()
    _metric.cache_clear()


def _send(name: str, value: float, tags: dict[str, str]) -> None:
    kind = metrics.METRICS[name].kind
    if kind == "gauge":
        with _setting:
            key = name, frozenset(tags.items())
            _gauges.pop(key, None)  # the one that was set last comes last
            _gauges[key] = value
            while len(_gauges) > MOST_GAUGES:
                del _gauges[next(iter(_gauges))]
            _repeat()
    if ray.is_initialized() and not (kind == "counter" and value <= 0):  # by nothing at all, Ray lets none grow
        getattr(_metric(name, ray.get_runtime_context().gcs_address), _SEND[kind])(value, tags)


@cache
def _repeat() -> None:
    """Starts the thread that tells gauges again, once a process."""

    def again() -> None:
        while True:
            time.sleep(AGAIN_SEC)
            with _setting:
                every = list(_gauges.items())
            for (name, tags), value in every:
                with suppress(Exception):  # a Ray that ends just now
                    if ray.is_initialized():
                        _metric(name, ray.get_runtime_context().gcs_address).set(value, dict(tags))

    threading.Thread(target=again, daemon=True, name="d2c-gauges").start()


@cache
def _metric(name: str, cluster: str) -> Any:
    """The metric of one Ray: it ends with it."""
    known = metrics.METRICS[name]
    tags = (*metrics.TAGS, *known.tags)
    if known.kind == "histogram":
        return ray_metrics.Histogram(name, known.text, boundaries=list(known.boundaries), tag_keys=tags)
    return (ray_metrics.Counter if known.kind == "counter" else ray_metrics.Gauge)(name, known.text, tag_keys=tags)
