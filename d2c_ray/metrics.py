"""The numbers that a run tells a monitoring system, their names spelled once. cluster/grafana/d2c.json draws them.

Whoever has a number gives it here, whether anybody listens or not; `distributed.telemetry` listens where there is a Ray, which
exports them on every node as `ray_<name>`, counters as `ray_<name>_total`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from d2c_ray import logs
from d2c_ray.logs import About

TAGS = ("run", "stage", "folder")  # of every metric; a stage's folder tells students and trials apart
Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    kind: Kind
    text: str
    tags: tuple[str, ...] = ()  # besides TAGS
    boundaries: tuple[float, ...] = ()


METRICS = {
    # Of every stage, by its driver.
    "d2c_stage_running": Metric("gauge", "1 while a stage is made."),
    "d2c_stage_stalled": Metric("gauge", "1 while a stage makes no progress for resources.watchdog_sec."),
    "d2c_rows_done": Metric("gauge", "Rows (images) that a stage has finished, those of earlier attempts among them."),
    "d2c_rows_total": Metric("gauge", "Rows (images) that a stage has in all."),
    "d2c_rows_rejected": Metric("gauge", "Images that a stage could not use."),
    # By actors and tasks.
    "d2c_images": Metric("counter", "Images that actors scored, embedded, attached to, sampled or measured; the tag stage says which."),
    "d2c_actor_busy_share": Metric("gauge", "Share of time since its first batch that an actor computed."),
    "d2c_read_bytes": Metric("counter", "Bytes of images read from the source."),
    "d2c_decode_seconds": Metric("counter", "Seconds of a core that reading and decoding took."),
    # By rank 0 of a training.
    "d2c_train_images": Metric("gauge", "Images that a training has shown the model."),
    "d2c_train_images_per_second": Metric("gauge", "Images a second of a training, all workers together, since the last log."),
    "d2c_train_step_seconds": Metric("gauge", "Seconds a step of a training, since the last log."),
    "d2c_train_loss": Metric("gauge", "Diffusion loss of a training, mean since the last log."),
    "d2c_train_grad_norm": Metric("gauge", "Gradient norm of a training, mean since the last log."),
    "d2c_train_data_wait_share": Metric("gauge", "Share of a training's time that it waited for batches."),
    "d2c_train_workers": Metric("gauge", "Workers of a training."),
    "d2c_checkpoint_seconds": Metric(
        "histogram",
        "Seconds from a snapshot to its whole checkpoint on the storage.",
        boundaries=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    ),
    # Of a sweep, by its driver.
    "d2c_sweep_trials": Metric("gauge", "Trials of a sweep by state: waiting, running, done, stopped, failed.", ("state",)),
}

Sink = Callable[[str, float, dict[str, str]], None]
_sink: Sink | None = None


def listen(sink: Sink | None) -> None:
    """Has `sink` told every number of this process: its name, the value and the tags."""
    global _sink
    _sink = sink


def tell(name: str, value: float, about: About | None = None, **tags: str) -> None:
    """Gives a number: what a gauge stands at, what a counter grows by, what a histogram takes up.

    Args:
        about: what it is of, where that is not this thread's stage.
        tags: those of the metric besides TAGS.
    """
    if (sink := _sink) is not None:  # which another thread may take away meanwhile
        about = about or logs.here()
        sink(name, value, {"run": about.run, "stage": about.stage, "folder": about.folder, **tags})
