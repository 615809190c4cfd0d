"""A pool of plain actors over independent units, for work that needs no decoding operator before it."""

import time
from collections.abc import Iterator
from typing import Any

import ray

from d2c_ray import logs
from d2c_ray.distributed import telemetry
from d2c_ray.distributed.cluster import ANYWHERE, Share
from d2c_ray.logs import About


def run_pool(actor: type, actor_args: dict[str, Any], units: list[Any], share: Share) -> Iterator[tuple[Any, Any]]:
    """Calls `actor(**actor_args).run(unit)` for every unit on `share.actors` actors, yielding (unit, result) in any order.

    Two units are in flight an actor, so that none waits for the driver. A dead actor is restarted and its units are
    run again; units must therefore be repeatable.
    """
    if not units:
        return
    remote: Any = ray.remote(num_cpus=1, num_gpus=share.gpus_per_actor, max_restarts=3, max_task_retries=3, scheduling_strategy=ANYWHERE)(
        _adopted(actor, logs.here())
    )
    actors = [remote.remote(**actor_args) for _ in range(min(share.actors, len(units)))]
    waiting = list(reversed(units))
    running: dict[Any, tuple[Any, Any]] = {}

    def give(handle: Any) -> None:
        if waiting:
            unit = waiting.pop()
            running[handle.run.remote(unit)] = (handle, unit)

    try:
        for handle in actors * 2:
            give(handle)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            handle, unit = running.pop(ready)
            give(handle)
            yield unit, ray.get(ready)
    except BaseException:
        for handle in actors:
            ray.kill(handle)
        raise
    for handle in actors:
        # Killed, they would not have told the last of their numbers; a call that ends its actor fails, and is not to be tried again.
        handle.__ray_terminate__.options(max_task_retries=0).remote()


def _adopted(actor: type, about: About) -> type:
    """The actor class, which works for a stage."""

    class Adopted(actor):
        def __init__(self, **arguments: Any):
            telemetry.adopt(about)
            started = time.monotonic()
            super().__init__(**arguments)
            seconds = time.monotonic() - started
            logs.say(f"{actor.__name__} loaded in {seconds:.1f} s", actor=actor.__name__, seconds=round(seconds, 3))

    Adopted.__name__ = Adopted.__qualname__ = actor.__name__
    return Adopted
