"""Units of work through Ray Data: CPU tasks that read and decode, an actor pool that computes, results as they come.

A unit travels as one row that holds an Arrow stream, so that it is never split, merged or reordered within, and an
actor's call is one unit whatever the block sizes.
"""

import json
import logging
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from d2c_ray import logs, metrics
from d2c_ray.config import DataConfig, StorageConfig
from d2c_ray.data import tables
from d2c_ray.data import units as unit_io
from d2c_ray.distributed import cluster, telemetry
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.look import Operators
from d2c_ray.errors import UserError
from d2c_ray.logs import About
from d2c_ray.repeating import repeating
from d2c_ray.selection.noise import noise as scoring_noise

Extend = Callable[[pa.Table], pa.Table]
Say = Callable[[str], None]

UNITS_PER_TASK = 8  # at most; neighbours often lie in one row group of the source, which is then read once
DEATHS_WHILE_LOADING = 4  # beyond as many as load at once, after which it is no chance
QUIET_SEC = 20.0  # without a result, after which it is said what is waited for


class AddNoise:
    """Draws each image's scoring noise in the decode task, where cores are cheaper than the accelerator's time."""

    def __init__(self, seed: int, count: int, shape: tuple[int, ...]):
        self.seed, self.count, self.shape = seed, count, shape

    def __call__(self, table: pa.Table) -> pa.Table:
        keys = table.column("key").to_pylist()
        draws = np.empty((len(keys), self.count, *self.shape), np.float32)
        for index, key in enumerate(keys):
            draws[index] = scoring_noise(self.seed, key, self.count, self.shape)
        field = tables.arrow_schema({"noise": "tensor"}, {"noise": ("float32", draws.shape[1:])}).field("noise")
        return table.append_column(field, tables.tensor_column(draws))


def stream(
    units: list[dict[str, Any]],
    data: DataConfig,
    storage: StorageConfig,
    share: Share,
    actor: type,
    actor_args: dict[str, Any],
    extend: Extend | None = None,
    keep_bytes: bool = False,
    say: Say = lambda text: None,
    *,
    notes: Path,
    then: Sequence[dict[str, Any]] = (),
) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    """Runs every unit through decoding and `actor`, yielding (unit, result) in any order.

    A dead actor, worker or node costs the work in flight there, which is done again elsewhere.

    Args:
        units: as `data.units.cut` makes them, with more keys at will; they come back as given.
        actor: class of `distributed.actors`, called with (unit, table of decoded rows, rejected rows).
        extend: adds columns to the decoded table in the decode task (the noise of scoring).
        keep_bytes: keep the encoded bytes beside the pixels.
        say: told what is waited for while nothing comes.
        notes: a folder that all nodes see, where actors leave a note while they load.
        then: arguments of further pools of `actor`, each of which works on what the one before it gives. The share's
            actors are spread over the pools.

    Raises:
        UserError: actors die again and again while they load.
    """
    if not units:
        return
    _quiet()
    about = logs.here()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 3  # a node taken away while its actor loads is no reason to fail
    context.execution_options.preserve_order = False
    context.target_max_block_size = 1  # every row is a unit, and a block of its own: an actor starts on the first one decoded
    if share.autoscaling:
        context.execution_no_progress_timeout_s = -1  # new nodes may take longer than its half hour
    per_task = min(UNITS_PER_TASK, max(1, len(units) // (4 * max(1, int(ray.cluster_resources().get("CPU", 1))))))
    tasks = [units[start : start + per_task] for start in range(0, len(units), per_task)]
    dataset: Any = ray.data.from_items([{"units": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
    dataset = dataset.map_batches(
        _decode, batch_size=1, batch_format="pyarrow", zero_copy_batch=True,
        fn_kwargs={"data": data, "storage": storage, "extend": extend, "keep_bytes": keep_bytes, "about": about}, num_cpus=1,
        memory=1,  # a byte: tasks that ask for just what the actors ask for would be fused into them, and decode in turn with computing
    )  # fmt: skip
    given = [actor_args, *then]
    share = replace(share, actors=max(share.actors, len(given)))
    for index, arguments in enumerate(given):
        most = min(len(range(index, share.actors, len(given))), len(units))
        dataset = dataset.map_batches(
            _noted(actor, notes, about), batch_size=1, batch_format="pyarrow", zero_copy_batch=True, fn_constructor_kwargs=arguments,
            # Two calls at once, of which one computes: the next unit is unpacked by Ray while this one is worked on.
            compute=ActorPoolStrategy(min_size=min(share.min_actors or most, most), max_size=most, max_concurrent_calls_per_actor=2),
            num_cpus=1, num_gpus=share.gpus_per_actor or None,
        )  # fmt: skip
    loads, operators = _Loads(notes, share.actors), Operators(about.folder)
    dataset.context.custom_execution_callback_classes = [lambda: loads, lambda: operators]
    with _Listener(share, say).listening() as listener, _words_of_actors():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            listener.heard()
            loads.heard()
            for row, unit in enumerate(batch.column("unit").to_pylist()):
                yield json.loads(unit), unpack(batch.column("payload"), row)


def _noted(actor: type, notes: Path, about: About) -> type:
    """The actor class, leaving a note while it loads: Ray starts a process that dies there again without end or a word."""

    class Noted(actor):
        def __init__(self, **arguments: Any):
            telemetry.adopt(about)
            started = time.monotonic()
            notes.mkdir(parents=True, exist_ok=True)
            note = notes / uuid.uuid4().hex
            note.write_text(socket.gethostname())
            try:
                super().__init__(**arguments)
            finally:
                note.unlink(missing_ok=True)
            seconds = time.monotonic() - started
            logs.say(f"{actor.__name__} loaded in {seconds:.1f} s", actor=actor.__name__, seconds=round(seconds, 3))

    Noted.__name__ = Noted.__qualname__ = actor.__name__
    return Noted


@contextmanager
def _words_of_actors() -> Iterator[None]:
    """Gives a `UserError` of an actor's constructor back, which Ray tells as text alone."""
    try:
        yield
    except ray.exceptions.ActorDiedError as error:
        _, ours, words = str(error).rpartition(f"\n{UserError.__module__}.{UserError.__qualname__}: ")
        if ours:
            raise UserError(words.strip()) from error
        raise


class _Listener:
    """Says what a silent pool waits for."""

    def __init__(self, share: Share, say: Say):
        self._share, self._say = share, say
        self._last = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator["_Listener"]:
        with repeating(self._listen, 1.0, "d2c-listener"):
            yield self

    def heard(self) -> None:
        self._last = time.monotonic()

    def _listen(self) -> None:
        if time.monotonic() - self._last > QUIET_SEC:
            self._say(cluster.waiting_for(self._share))


class _Loads:
    """Ends an execution whose actors die again and again while they load, as their notes tell. A callback of Ray Data's."""

    def __init__(self, notes: Path, actors: int):
        self._notes, self._actors = notes, actors
        self._before = 0  # notes that were left when a result last came
        self._looked = 0.0

    def heard(self) -> None:
        self._before = len(self._left())

    def before_execution_starts(self, executor: object) -> None:
        shutil.rmtree(self._notes, ignore_errors=True)

    def after_execution_succeeds(self, executor: object) -> None:
        shutil.rmtree(self._notes, ignore_errors=True)

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...

    def on_execution_step(self, executor: object) -> None:
        """Called at every turn of the scheduling; an error raised here ends the execution."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        self._looked = now
        left = self._left()
        died = len(left) - self._before - self._actors  # as many may be loading
        if died < DEATHS_WHILE_LOADING:
            return
        hosts = set()
        for note in left:
            with suppress(FileNotFoundError):  # one that has loaded by now
                hosts.add(note.read_text())
        raise UserError(
            f"actors died {died} times while they loaded their models, on {', '.join(sorted(hosts)[:3])}. Most often the memory of the machine "
            "or of the GPU does not hold what each of them loads: fewer actors (resources.actors) or larger nodes would do. "
            "What is finished is kept; Ray's logs (raylet.out, worker-*.err of the node) have more."
        )

    def _left(self) -> list[Path]:
        with suppress(FileNotFoundError):  # an execution that begins or ends in another thread clears the folder away
            return list(self._notes.iterdir())
        return []


def pack(unit: str, table: pa.Table) -> pa.Table:
    """One row that carries a whole table."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    payload = pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.array([0, sink.tell()], pa.int64()).buffers()[1], sink.getvalue()])
    return pa.table({"unit": pa.array([unit]), "payload": payload})


def unpack(payloads: pa.ChunkedArray, row: int = 0) -> pa.Table:
    """The table that `pack` packed, without a copy: a scalar of the column would be one."""
    (array,) = payloads.slice(row, 1).chunks
    _, offsets, values = array.buffers()
    start, stop = np.frombuffer(offsets, np.int64, 2, 8 * array.offset)
    return pa.ipc.open_stream(values.slice(int(start), int(stop - start))).read_all()


def _quiet() -> None:
    # Progress is ours to show; Ray Data's own lines would stand between. Its log file keeps them.
    for name in ("ray.data", "ray.data._internal"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
                if logs.as_json():
                    handler.setFormatter(logs.Formatter())


def _decode(
    batch: pa.Table, data: DataConfig, storage: StorageConfig, extend: Extend | None, keep_bytes: bool, about: About
) -> Iterator[pa.Table]:
    telemetry.adopt(about)  # the process of a task may have worked for another stage before
    (task,) = batch.column("units").to_pylist()
    for unit in json.loads(task):
        started = time.monotonic()
        table, rejected = unit_io.decode_rows(unit_io.read_rows(unit), data, storage, keep_bytes)
        if extend is not None:
            table = extend(table)
        metrics.tell("d2c_decode_seconds", time.monotonic() - started)
        yield pack(json.dumps(unit), table.replace_schema_metadata({b"rejected": json.dumps(rejected).encode()}))
