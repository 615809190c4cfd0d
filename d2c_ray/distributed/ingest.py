"""Units of work through Ray Data: CPU tasks that read and decode, an actor pool that computes, results as they come.

A unit travels as one row that holds an Arrow stream, so that it is never split, merged or reordered within, and an
actor's call is one unit whatever the block sizes.
"""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from d2c_ray.config import DataConfig
from d2c_ray.data import tables
from d2c_ray.data import units as unit_io
from d2c_ray.distributed.cluster import Share
from d2c_ray.selection.noise import noise as scoring_noise

Extend = Callable[[pa.Table], pa.Table]


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
    share: Share,
    actor: type,
    actor_args: dict[str, Any],
    extend: Extend | None = None,
    keep_bytes: bool = False,
) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    """Runs every unit through decoding and `actor`, yielding (unit, result) in any order.

    Args:
        units: as `data.units.cut` makes them, with more keys at will; they come back as given.
        actor: class of `distributed.actors`, called with (unit, table of decoded rows, rejected rows).
        extend: adds columns to the decoded table in the decode task (the noise of scoring).
        keep_bytes: keep the encoded bytes beside the pixels.
    """
    if not units:
        return
    _quiet()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 3  # a node taken away while its actor loads is no reason to fail
    context.execution_options.preserve_order = False
    dataset: Any = ray.data.from_items([{"unit": json.dumps(unit)} for unit in units], override_num_blocks=len(units))
    dataset = dataset.map_batches(
        _decode, batch_size=1, batch_format="pyarrow", zero_copy_batch=True,
        fn_kwargs={"data": data, "extend": extend, "keep_bytes": keep_bytes}, num_cpus=1,
    )  # fmt: skip
    dataset = dataset.map_batches(
        actor, batch_size=1, batch_format="pyarrow", zero_copy_batch=True,
        fn_constructor_kwargs=actor_args, compute=ActorPoolStrategy(size=min(share.actors, len(units))),
        num_cpus=1, num_gpus=share.gpus_per_actor or None,
    )  # fmt: skip
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for unit, payload in zip(batch.column("unit").to_pylist(), batch.column("payload"), strict=True):
            yield json.loads(unit), unpack(payload)


def pack(unit: str, table: pa.Table) -> pa.Table:
    """One row that carries a whole table."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    payload = pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.array([0, sink.tell()], pa.int64()).buffers()[1], sink.getvalue()])
    return pa.table({"unit": pa.array([unit]), "payload": payload})


def unpack(payload: pa.Scalar) -> pa.Table:
    """The table that `pack` packed, without a copy."""
    return pa.ipc.open_stream(payload.as_buffer()).read_all()


def _quiet() -> None:
    # Progress is ours to show; Ray Data's own lines would stand between. Its log file keeps them.
    for name in ("ray.data", "ray.data._internal"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)


def _decode(batch: pa.Table, data: DataConfig, extend: Extend | None, keep_bytes: bool) -> pa.Table:
    (unit,) = batch.column("unit").to_pylist()
    table, rejected = unit_io.decode_rows(unit_io.read_rows(json.loads(unit)), data, keep_bytes)
    if extend is not None:
        table = extend(table)
    return pack(unit, table.replace_schema_metadata({b"rejected": json.dumps(rejected).encode()}))
