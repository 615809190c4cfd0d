"""A sweep's trial killed while its student trains: Tune starts it again, and the sweep ends with the numbers of one that nothing happened to."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from drilling import Drill
from test_pipeline import finish, start, wait_for
from test_sweep import OWN, config, results  # noqa: F401 - a fixture

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

SAME = (
    "label", "seed", "twin", "state", "selector", "images_kept", "images_seen", "frechet", "kid", "precision", "recall", "coverage",
    "agreement", "frechet_floor", "record",
)  # fmt: skip


def trial_processes(driver: int) -> list[int]:
    """Process ids of trials that are at work."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error):  # it ends just now
            found += [child.pid] if "ImplicitFunc" in " ".join(child.cmdline()[:1]) else []
    return found


def losses(path: Path) -> list[tuple[int, float]]:
    return [(record["images"], record["loss"]) for record in map(json.loads, path.read_text().splitlines())]


@pytest.mark.drill("Tune trial killed", ci=False)
def test_a_trial_killed_while_it_trains_costs_no_number(config: Path, tmp_path: Path, drill: Drill) -> None:  # noqa: F811
    folder = tmp_path / "killed" / "small"
    process = start("sweep", str(config), f"run.dir={folder.parent}")
    wait_for(lambda: list(folder.glob("train-*/checkpoints/checkpoint_*/state.json")), process)
    (trial,) = trial_processes(process.pid)
    os.kill(trial, signal.SIGKILL)
    state = max(folder.glob("train-*/checkpoints/checkpoint_*/state.json"))
    (metrics,) = folder.glob("train-*/metrics.jsonl")
    seen = json.loads(metrics.read_text().splitlines()[-1])["images"]
    assert not list(folder.glob("train-*/_SUCCESS.json")), "it was over before it was killed"
    redone = (seen - json.loads(state.read_text())["images"]) / 512 / 3  # of three trials
    wait_for(lambda: set(trial_processes(process.pid)) - {trial}, process)  # Tune's, in its place
    out = finish(process)
    assert "best: budget=40 selector=" in out

    apart = tmp_path / "undisturbed" / "small"
    shutil.copytree(folder, apart, ignore=lambda _, names: [name for name in names if name.split("-")[0] in OWN])
    finish(start("sweep", str(config), f"run.dir={apart.parent}"))
    mine, other = ({name: {key: row[key] for key in SAME} for name, row in results(run).items()} for run in (folder, apart))
    assert mine == other
    for pattern in ("train-*/model/*.safetensors", "train-*/metrics.jsonl", "samples-*/part-*.parquet", "eval-*/metrics.json"):
        found = sorted(folder.glob(pattern))
        assert [path.relative_to(folder) for path in found] == sorted(path.relative_to(apart) for path in apart.glob(pattern)) and found
        for path in found:
            if path.name == "metrics.jsonl":  # a step's loss; how long it took is another matter
                assert losses(path) == losses(apart / path.relative_to(folder)), path
            else:
                assert path.read_bytes() == (apart / path.relative_to(folder)).read_bytes(), path
    drill.measured(mine, other, redone)
