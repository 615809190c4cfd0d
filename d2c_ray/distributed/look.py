"""What Ray knows of what a stage waits for, for the watchdog; and training workers that say where they stand.

All of it comes from the head's own store, which every cluster has: the State API is a service of the dashboard, and a local Ray has none.
"""

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as store
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import placement_group_table

from d2c_ray.errors import UserError
from d2c_ray.repeating import repeating
from d2c_ray.rundir import write_json
from d2c_ray.watch import Facts, Operator, Worker, where

WORKERS = "workers"  # in a training's folder, a file a rank
BEAT_SEC = 10.0  # between two notes of a training worker
PATIENCE_SEC = 5.0  # longest that a note may hold up the end of a training
TURN_SEC = 1.0  # between two looks at a dataset's operators

_operators: dict[str, tuple[float, list[Operator]]] = {}  # by the stage's folder, of the executions in this process


class Operators:
    """Notes how the operators of an execution stand, for as long as it runs. A callback of Ray Data's."""

    def __init__(self, folder: str):
        self._folder, self._looked = folder, 0.0

    def before_execution_starts(self, executor: object) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        now = time.monotonic()
        if now - self._looked >= TURN_SEC:
            self._looked = now
            _operators[self._folder] = (now, [_state(op, queues) for op, queues in executor._topology.items() if not op.has_completed()])

    def after_execution_succeeds(self, executor: object) -> None:
        _operators.pop(self._folder, None)

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        _operators.pop(self._folder, None)


def _state(op: Any, queues: Any) -> Operator:
    """One operator of a running execution."""
    actors, least = op.get_actor_info(), op.min_scheduling_resources()
    before = op.input_dependencies[0] if op.input_dependencies else None
    return Operator(
        op.name, op.num_active_tasks(), queues.total_enqueued_input_blocks(), bool(op.get_autoscaling_actor_pools()), actors.running, actors.pending,
        actors.restarting, {name: float(amount) for name, amount in (("CPU", least.cpu), ("GPU", least.gpu)) if amount},
        before.name if before is not None and not before.has_completed() else "",
    )  # fmt: skip


def look(folder: Path) -> Facts:
    """The cluster as it is, and what is known of the stage with this folder."""
    turned, operators = _operators.get(folder.name, (time.monotonic(), []))
    workers, num_workers = _workers(folder / WORKERS)
    age = time.monotonic() - turned
    if not ray.is_initialized():
        return Facts(operators, age, workers=workers, num_workers=num_workers)
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    free = {
        node.node_id: {own.resource_name: own.total - own.used for own in node.resource_usage.usage}
        for node in [*status.active_nodes, *status.idle_nodes]
        if node.node_id and node.resource_usage is not None
    }
    demands = [
        (dict(asked.bundle), asked.count) for demand in status.resource_demands.ray_task_actor_demand for asked in demand.bundles_by_count
    ]
    return Facts(
        operators, age, list(store.actor_table(None).values()), list(placement_group_table().values()), ray.nodes(), free, demands, workers, num_workers
    )  # fmt: skip


def _workers(folder: Path) -> tuple[list[Worker], int]:
    """What the workers of a training last said, and how many there are."""
    notes = []
    for note in sorted(folder.glob("rank-*.json")):
        with suppress(FileNotFoundError, json.JSONDecodeError):  # the training ends just now
            notes.append(json.loads(note.read_text()))
    # An elastic training starts again with fewer or more, and those of before have left notes.
    whole = max(notes, key=lambda said: said["time"])["workers"] if notes else 0
    return [
        Worker(said["rank"], said["host"], said["at"], said["images"], max(0.0, time.time() - said["time"]))
        for said in notes
        if said["workers"] == whole
    ], whole


class Beat:
    """Has a training worker say every few seconds where its main thread stands: in a step that never ends nothing else can."""

    def __init__(self, out: Path, rank: int, workers: int):
        self._path, self._rank, self._workers = out / WORKERS / f"rank-{rank:05d}.json", rank, workers
        self.images = 0

    @contextmanager
    def beating(self) -> Iterator["Beat"]:
        """While the block lasts, of whose thread it is said."""
        thread = threading.get_ident()

        def note() -> None:
            with suppress(OSError, UserError):  # a storage that stalls or is full is nothing to end a training for
                self._note(where(sys._current_frames().get(thread)))

        note()
        with repeating(note, BEAT_SEC, "d2c-beat", patience_sec=PATIENCE_SEC):
            yield self

    def _note(self, at: str) -> None:
        write_json(
            self._path,
            {
                "rank": self._rank, "workers": self._workers, "host": socket.gethostname(), "pid": os.getpid(), "images": self.images, "at": at,
                "time": time.time(),
            },
        )  # fmt: skip


def forget_workers(out: Path) -> None:
    """Removes what the workers of a training, or of an attempt before it, have said."""
    shutil.rmtree(out / WORKERS, ignore_errors=True)
