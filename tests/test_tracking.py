"""Trackers: what arrives in real event files and stores, that nothing arrives twice, and that none can end a training."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from d2c_ray import tracking
from d2c_ray.config import TrackingConfig
from d2c_ray.errors import UserError

RECORDS = [{"images": 64 * step, "loss": 1.0 / step, "grad_norm": 0.5, "mfu_peak": None} for step in (1, 2, 3)]


def preview(folder: Path, images: int) -> None:
    (folder / "previews").mkdir(exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(folder / "previews" / f"images-{images:012d}.png")


def trackers(options: TrackingConfig, folder: Path) -> tracking.Trackers:
    return tracking.Trackers(options, folder, "digits/D2C", "1a2b3c4d", {"train.lr": 1e-4})


def test_tensorboard_gets_every_record_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = TrackingConfig(tensorboard=True)
    first = trackers(options, tmp_path)
    first.follow(RECORDS[:2])
    preview(tmp_path, 128)
    first.follow(RECORDS[:2])
    first.close()
    again = trackers(options, tmp_path)  # the training was killed and went on from image 64
    again.follow(RECORDS)
    again.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (record["images"], pytest.approx(record["loss"])) for record in RECORDS
    ]
    assert sorted(found.Tags()["scalars"]) == ["train/grad_norm", "train/loss"]
    assert [event.step for event in found.Images("preview")] == [128]


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    options = TrackingConfig(mlflow="students", mlflow_uri=f"file://{tmp_path}/store")
    for records in (RECORDS[:2], RECORDS):
        preview(tmp_path, 64)
        opened = trackers(options, tmp_path)
        opened.follow(records)
        opened.close()
    client = MlflowClient(tracking_uri=options.mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("students").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.lr": "0.0001"}
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [64, 128, 192]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "previews")] == ["previews/images-000000000064.png"]


def test_wandb_writes_its_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened = trackers(TrackingConfig(wandb="students"), tmp_path)
    preview(tmp_path, 64)
    opened.follow(RECORDS)
    opened.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*-1a2b3c4d/run-1a2b3c4d.wandb")
    deadline = time.monotonic() + 60
    while b"preview" not in run.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's own process writes, and on a busy machine may do so after its run was closed
    content = run.read_bytes()
    assert b"grad_norm" in content
    assert b"preview" in content
    assert json.loads((tmp_path / tracking.SENT).read_text()) == {"images": 192, "preview": 64}


def test_a_tracker_that_fails_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    options = TrackingConfig(mlflow="students", mlflow_uri=f"file://{tmp_path}/taken/store", tensorboard=True)
    opened = trackers(options, tmp_path)
    assert "tracking.mlflow failed and is off from here" in capsys.readouterr().err
    opened.follow(RECORDS)
    opened.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_sweeps_trials_are_runs_with_their_points_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HParams of TensorBoard, and a run of MLflow each; what was sent is not sent again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    options = TrackingConfig(tensorboard=True, mlflow="sweep", mlflow_uri=f"file://{tmp_path}/store")
    for seed in (0, 1, 0):
        parameters = {"select.budget": 100, "select.selector": "gadc", "seed": seed}
        tracking.trial(options, tmp_path, f"id{seed}", f"gadc seed={seed}", parameters, {"frechet": 2.0 + seed, "cost_seconds": 9.0})
    found = EventAccumulator(str(tmp_path / "tensorboard" / "id1"))
    found.Reload()
    assert found.Scalars("sweep/frechet")[0].value == 3.0 and len(list((tmp_path / "tensorboard" / "id0").iterdir())) == 2
    content = found.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["select.selector"].string_value == "gadc" and told["select.budget"].number_value == 100
    client = MlflowClient(tracking_uri=options.mlflow_uri)
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    assert sorted((run.data.params["seed"], run.data.metrics["frechet"], run.info.status) for run in runs) == [
        ("0", 2.0, "FINISHED"),
        ("1", 3.0, "FINISHED"),
    ]
    assert {run.info.run_name for run in runs} == {"gadc seed=0", "gadc seed=1"}


def test_a_trial_that_cannot_be_sent_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb
    from mlflow import MlflowClient
    from torch.utils.tensorboard import SummaryWriter

    closed: list[object] = []

    def fail(*given: object, **more: object) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(MlflowClient, "log_metric", fail)
    monkeypatch.setattr(SummaryWriter, "add_hparams", fail)
    monkeypatch.setattr(SummaryWriter, "close", lambda writer: closed.append("tensorboard"))
    monkeypatch.setattr(
        wandb,
        "init",
        lambda **given: SimpleNamespace(summary=SimpleNamespace(update=fail), finish=lambda exit_code: closed.append(exit_code)),
    )
    options = TrackingConfig(tensorboard=True, wandb="sweep", mlflow="sweep", mlflow_uri=f"file://{tmp_path}/store")
    tracking.trial(options, tmp_path, "id0", "gadc", {"seed": 0}, {"frechet": 2.0})
    assert closed == ["tensorboard", 1]
    client = MlflowClient(tracking_uri=options.mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    assert run.info.status == "FAILED"
    assert capsys.readouterr().err.count("the server is away") == 3


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    tracking.check(TrackingConfig())
    with pytest.raises(UserError, match=r"tracking\.wandb is on.*d2c-ray\[wandb\]"):
        tracking.check(TrackingConfig(wandb="students"))
