"""Trackers: TensorBoard, Weights & Biases and MLflow behind one small fan-out.

They are fed from what a training writes itself (metrics.jsonl and previews/), by the process that started it. So a
tracker that fails costs its own record and nothing else, and what was sent once is not sent again after a resume.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from d2c_ray import logs
from d2c_ray.config import TrackingConfig
from d2c_ray.errors import UserError
from d2c_ray.rundir import write_json
from d2c_ray.wording import first_line

SENT = "tracking.json"  # how far a training's folder was sent, and MLflow's run
PREVIEWS = "previews"


class Tracker(Protocol):
    """One open run of a tracking service."""

    def record(self, images: int, values: dict[str, float]) -> None: ...

    def picture(self, images: int, path: Path) -> None: ...

    def close(self, whole: bool) -> None: ...  # whether the training came to its end


class TensorBoard:
    """Event files in `<folder>/tensorboard`."""

    def __init__(self, options: TrackingConfig, folder: Path, name: str, run_id: str, config: dict[str, Any], sent: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def record(self, images: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"train/{key}", value, images)

    def picture(self, images: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image("preview", np.asarray(Image.open(path).convert("RGB")), images, dataformats="HWC")

    def close(self, whole: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of the project `tracking.wandb`, of the same id after a resume. Account and mode come from its own environment."""

    def __init__(self, options: TrackingConfig, folder: Path, name: str, run_id: str, config: dict[str, Any], sent: dict[str, Any]):
        import wandb

        settings = wandb.Settings(console="off", silent=True)  # the terminal is this program's
        self._picture = wandb.Image
        self._run = wandb.init(
            project=options.wandb,
            id=run_id,
            name=name,
            config=config,
            dir=str(folder),
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        self._run.define_metric("*", step_metric="images")

    def record(self, images: int, values: dict[str, float]) -> None:
        self._run.log({"images": images, **values})

    def picture(self, images: int, path: Path) -> None:
        self._run.log({"images": images, "preview": self._picture(str(path))})

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class MLflow:
    """A run of the experiment `tracking.mlflow` at `tracking.mlflow_uri`, gone on with after a resume."""

    def __init__(self, options: TrackingConfig, folder: Path, name: str, run_id: str, config: dict[str, Any], sent: dict[str, Any]):
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=options.mlflow_uri or None)
        if "mlflow" not in sent:
            known = self._client.get_experiment_by_name(options.mlflow)
            experiment = known.experiment_id if known else self._client.create_experiment(options.mlflow)
            run = self._client.create_run(experiment, run_name=name, tags={"d2c.fingerprint": run_id})
            sent["mlflow"] = run.info.run_id
            for key, value in config.items():
                self._client.log_param(sent["mlflow"], key, value)
        self._id: str = sent["mlflow"]
        self._client.update_run(self._id, status="RUNNING")

    def record(self, images: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=images)

    def picture(self, images: int, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), PREVIEWS)

    def close(self, whole: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if whole else "FAILED")


# By the field of `tracking` that switches it on: the extra, and the package that must be there.
TRACKERS: dict[str, tuple[Callable[..., Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (Wandb, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


def check(options: TrackingConfig) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        UserError: names it and how to install it.
    """
    for name, (_, package) in TRACKERS.items():
        if getattr(options, name) and find_spec(package) is None:
            raise UserError(
                f"tracking.{name} is on, and the package '{package}' is not installed: pip install 'd2c-ray[{name}]', or switch it off."
            )


class Trackers:
    """Everything that is switched on, for one training.

    Args:
        folder: of the training; its metrics file and previews are read, and how far they were sent is kept there.
        name: of the run, for people.
        run_id: of the run, the same for the same training.
        config: what was asked for, by dotted key.
    """

    def __init__(self, options: TrackingConfig, folder: Path, name: str, run_id: str, config: dict[str, Any]):
        self._folder, self._sent = folder, _read(folder / SENT)
        self._open: dict[str, Tracker] = {}
        for kind, (tracker, _) in TRACKERS.items():
            if getattr(options, kind):
                with _Guard(kind, self._open):
                    self._open[kind] = tracker(options, folder, name, run_id, config, self._sent)
        if self._open:
            write_json(folder / SENT, self._sent)

    def follow(self, records: list[dict[str, Any]]) -> None:
        """Sends the records that were not sent yet, and new previews.

        Args:
            records: of metrics.jsonl, from its beginning; after a resume the same images come again with the same values.
        """
        if not self._open:
            return
        before = dict(self._sent)
        for record in records:
            if record.get("images", -1) > self._sent.get("images", -1):
                values = {key: value for key, value in record.items() if key != "images" and isinstance(value, int | float)}
                self._each("record", record["images"], values)
                self._sent["images"] = record["images"]
        for path in sorted((self._folder / PREVIEWS).glob("images-*.png")):
            images = int(path.stem.rpartition("-")[2])
            if images > self._sent.get("preview", -1):
                self._each("picture", images, path)
                self._sent["preview"] = images
        if self._sent != before:
            write_json(self._folder / SENT, self._sent)

    def close(self, whole: bool = True) -> None:
        """Ends every run; `whole` says whether the training came to its end."""
        self._each("close", whole)
        self._open.clear()

    def _each(self, method: str, *values: Any) -> None:
        for kind in list(self._open):
            with _Guard(kind, self._open):
                getattr(self._open[kind], method)(*values)


def trial(options: TrackingConfig, folder: Path, name: str, label: str, parameters: dict[str, Any], measures: dict[str, float]) -> None:
    """Sends a finished trial of a sweep to all that is switched on, once: what was chosen, and what was measured.

    Args:
        folder: of the sweep; what was sent is noted below it.
        name, label: of the trial, for machines and for people.
    """
    note = folder / "tracked" / f"{name}.json"
    sent = _read(note)
    for kind, send in TRIALS.items():
        if getattr(options, kind) and sent.get(kind) != measures:
            unsent: dict[str, Any] = {kind: None}
            with _Guard(kind, unsent):
                send(options, folder, name, label, parameters, measures)
            if kind in unsent:  # and did not fail
                sent[kind] = measures
                write_json(note, sent)


def _trial_to_tensorboard(
    options: TrackingConfig, folder: Path, name: str, label: str, parameters: dict[str, Any], measures: dict[str, float]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    plain = {key: value if isinstance(value, bool | int | float | str) else json.dumps(value) for key, value in parameters.items()}
    with SummaryWriter(str(folder / "tensorboard" / name)) as writer:
        writer.add_hparams(plain, {f"sweep/{key}": value for key, value in measures.items()}, run_name=".")  # HParams of TensorBoard


def _trial_to_wandb(
    options: TrackingConfig, folder: Path, name: str, label: str, parameters: dict[str, Any], measures: dict[str, float]
) -> None:
    import wandb

    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(
        project=options.wandb, id=f"trial-{name}", name=label, group=folder.name, config=parameters, dir=str(folder), resume="allow",
        reinit="create_new", settings=settings,
    )  # fmt: skip
    exit_code = 1
    try:
        run.summary.update(measures)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


def _trial_to_mlflow(
    options: TrackingConfig, folder: Path, name: str, label: str, parameters: dict[str, Any], measures: dict[str, float]
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=options.mlflow_uri or None)
    known = client.get_experiment_by_name(options.mlflow)
    experiment = known.experiment_id if known else client.create_experiment(options.mlflow)
    run = client.create_run(experiment, run_name=label, tags={"d2c.trial": name, "d2c.sweep": folder.name}).info.run_id
    state = "FAILED"
    try:
        for key, value in parameters.items():
            client.log_param(run, key, value)
        for key, value in measures.items():
            client.log_metric(run, key, value)
        state = "FINISHED"
    finally:
        with nullcontext() if state == "FINISHED" else suppress(Exception):  # what failed first is what is told
            client.set_terminated(run, state)


# By the field of `tracking`, what sends a sweep's trial.
TRIALS: dict[str, Callable[..., None]] = {"tensorboard": _trial_to_tensorboard, "wandb": _trial_to_wandb, "mlflow": _trial_to_mlflow}


class _Guard:
    """A tracker that fails is dropped, and says so: a training of days does not end because a server is away."""

    def __init__(self, kind: str, trackers: dict[str, Tracker]):
        self._kind, self._trackers = kind, trackers

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._trackers.pop(self._kind, None)
        logs.say(f"tracking.{self._kind} failed and is off from here: {type(error).__name__}: {first_line(error)}", "warning")
        return True


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
