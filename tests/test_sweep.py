"""Sweeps on a real Ray: what is shared is made once, a killed driver costs nothing, and Tune ends, restarts and chooses as it is told."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from conftest import ROOT
from test_pipeline import finish, kill, start, wait_for

from d2c_ray import cli
from d2c_ray.config import StorageConfig, SweepConfig, load
from d2c_ray.distributed import sweep as tuning
from d2c_ray.report import outcomes, status

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
OWN = ("train", "samples", "eval", "sweep")  # folders of trials; all others are shared


@pytest.fixture(scope="module")
def config(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut of configs/sweep_cifar10.yaml: two selectors, one that looks at scores and one at features, and the random twin of both."""
    file = tmp_path_factory.mktemp("configs") / "small.yaml"
    changes = {
        "data": {"path": str(cifar10), "pattern": "train-000.parquet", "limit_per_class": 20},
        "teacher": {"train": {"num_images": 512}},
        "train": {"num_images": 512, "log_every": 128, "checkpoint_every": 256},
        "sample": {"num_images": 40, "steps": 4},
        "sweep": {
            "axes": {"select.budget": [40], "select.selector": ["interval", "gadc"], "train.align_weight": [0.5]},
            "seeds": [7],
            "concurrent": 1,
        },
    }
    file.write_text(yaml.safe_dump({"base": str(ROOT / "configs" / "sweep_cifar10.yaml"), **changes}))
    return file


def trials(folder: Path, state: str) -> dict[str, Path]:
    """The files of trials in a state, by id."""
    found = {path.stem: path for path in folder.glob("sweep-*/trials/*.json")}
    return {name: path for name, path in found.items() if outcomes.read_record(path.parent.parent, name)["state"] == state}


done = partial(trials, state="done")
running = partial(trials, state="running")


def results(folder: Path) -> dict[str, dict]:
    (path,) = folder.glob("sweep-*/results.parquet")
    return {row["trial"]: row for row in pq.read_table(path).to_pylist()}


def test_a_sweep_that_is_stopped_and_one_whose_driver_is_killed_end_as_one_that_is_not(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed" / "small"
    process = start("sweep", str(config), f"run.dir={os.path.relpath(folder.parent, ROOT)}")  # trials find it from wherever they work
    wait_for(lambda: done(folder) and running(folder), process)
    process.terminate()
    out, _ = process.communicate(timeout=500)
    assert process.returncode == cli.STOPPED and "stopped; the same command goes on" in out and "Traceback" not in out, out[-4000:]
    found = status.read(str(folder), StorageConfig())
    assert found["state"] == "stopped" and found["sweep"]["counts"]["cut_off"] == 1, found

    (trial,) = running(folder).values()
    before = trial.stat().st_mtime_ns
    process = start("sweep", str(config), f"run.dir={folder.parent}")
    wait_for(lambda: trial.stat().st_mtime_ns != before, process)  # it has taken it up
    kill(process)
    kept = {path: path.stat().st_mtime_ns for path in [*folder.glob("*/_SUCCESS.json"), *done(folder).values()]}
    assert 1 <= len(done(folder)) < 3
    out = finish(start("sweep", str(config), f"run.dir={folder.parent}"))
    assert "best: budget=40 selector=" in out and len(done(folder)) == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was finished is not made again"
    counts = {
        name: len(list(folder.glob(f"{name}-*")))
        for name in ("teacher", "scores", "features", "selection", "condensed", "reference", "train", "eval")
    }
    # A selection and a dataset of all images that any of the three chose, beside their own.
    assert counts == {"teacher": 1, "scores": 1, "features": 1, "selection": 4, "condensed": 4, "reference": 1, "train": 3, "eval": 3}
    taken = [json.loads(path.read_text())["facts"].get("taken_from") for path in folder.glob("condensed-*/_SUCCESS.json")]
    assert taken.count(None) == 1 and len(set(taken)) == 2

    apart = tmp_path / "undisturbed" / "small"
    shutil.copytree(folder, apart, ignore=lambda _, names: [name for name in names if name.split("-")[0] in OWN])
    finish(start("sweep", str(config), f"run.dir={apart.parent}"))
    mine, other = results(folder), results(apart)
    same = ("label", "seed", "twin", "state", "selector", "images_kept", "images_seen", "frechet", "kid", "precision", "recall", "coverage", "agreement", "frechet_floor", "record")  # fmt: skip
    assert {name: {key: row[key] for key in same} for name, row in mine.items()} == {
        name: {key: row[key] for key in same} for name, row in other.items()
    }
    assert {row["selector"]: row["twin"] for row in mine.values()} == {"interval": False, "gadc": False, "random": True}

    random = next(row for row in mine.values() if row["selector"] == "random")
    chosen = next(row for row in mine.values() if row["selector"] == "interval")
    assert random["seconds_score"] is None and chosen["seconds_score"] > 0, "scoring is charged to those that look at scores"
    assert random["seconds_attach"] > 0
    best = load(next(folder.glob("sweep-*/best.yaml")))
    assert best.sweep == SweepConfig() and best.train.seed == 7
    again = finish(start("sweep", str(config), f"run.dir={apart.parent}"))
    assert "all 3 trials are finished" in again and "starting Ray" not in again


# What Tune does with work that takes no time.


def told(folder: Path) -> Callable[[dict, str], None]:
    return lambda chosen, how: (folder / f"ended-{chosen.get('name', 'point')}").write_text(how)


def rises(folder: Path, given: dict, report: Callable[[dict], None]) -> None:
    for images in (100, 200, 400, 800):
        (folder / f"{given['name']}-{images}").touch()
        report({"images": images, "frechet": given["value"], **({"finished": 1.0} if images == 800 else {})})


def test_asha_ends_the_worse_trials_at_equal_images(local_ray: None, tmp_path: Path) -> None:
    options = SweepConfig(asha=100, reduction=2)
    given = [{"name": f"n{value}", "value": float(value)} for value in (1, 8, 2, 7, 3, 9)]
    tuning.try_each(partial(rises, tmp_path), given, options, 1, False, 800, told(tmp_path))
    ended = {path.name: path.read_text() for path in tmp_path.glob("ended-*")}
    assert ended["ended-n1"] == "done" and ended["ended-n8"] == ended["ended-n9"] == "stopped"
    assert sorted(path.name for path in tmp_path.glob("n9-*")) == ["n9-100"], "no image more than the first rung's"
    assert len(list(tmp_path.glob("n1-*"))) == 4


def dies_once(folder: Path, given: dict, report: Callable[[dict], None]) -> None:
    if given["name"] == "dies" and not (folder / "died").exists():
        (folder / "died").touch()
        os._exit(1)
    if given["name"] == "fails":
        (folder / f"tried-{os.urandom(4).hex()}").touch()
        raise RuntimeError("it is the disk")
    report({"frechet": 1.0, "finished": 1.0})


def test_a_trial_whose_process_dies_starts_again_and_one_that_fails_for_good_ends_alone(local_ray: None, tmp_path: Path) -> None:
    given = [{"name": name} for name in ("dies", "fails", "lives")]
    tuning.try_each(partial(dies_once, tmp_path), given, SweepConfig(max_failures=1), 2, False, 1, told(tmp_path))
    ended = {path.name.removeprefix("ended-"): path.read_text() for path in tmp_path.glob("ended-*")}
    assert ended == {"dies": "done", "lives": "done", "fails": "failed"}
    assert len(list(tmp_path.glob("tried-*"))) == 2


def bowl(folder: Path, point: dict, report: Callable[[dict], None]) -> None:
    with (folder / "points.jsonl").open("a") as file:
        file.write(json.dumps(point) + "\n")
    value = (point["train.lr"] - 0.3) ** 2 + (point["model.kind"] == "dit")
    report({"frechet": value, "cost_seconds": point["train.lr"], "finished": 1.0})


@pytest.mark.parametrize("metrics", [["frechet"], ["frechet", "cost_seconds"]])
def test_optuna_learns_from_what_was_measured_and_begins_with_earlier_points(local_ray: None, tmp_path: Path, metrics: list[str]) -> None:
    axes = {"train.lr": {"low": 0.01, "high": 1.0, "log": True}, "model.kind": ["sit", "dit"]}
    options = SweepConfig(axes=axes, search="optuna", num_points=16, metrics=metrics)
    before = [{"train.lr": 0.9, "model.kind": "dit"}, {"train.lr": 0.25, "model.kind": "sit"}]
    tuning.optimise(partial(bowl, tmp_path), options, before, 1, [False] * len(metrics), told(tmp_path))
    points = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
    assert points[:2] == before and len(points) == 16
    assert all(0.01 <= point["train.lr"] <= 1.0 for point in points)
    assert [point["model.kind"] for point in points[8:]].count("sit") >= 6, "what is worse is left"
