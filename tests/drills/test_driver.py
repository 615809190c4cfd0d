"""The driver killed in every stage, one after the other: it ends with the bytes of a run that nothing happened to."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from conftest import DEBUG, ROOT
from drilling import Drill, contents
from ray.cluster_utils import Cluster
from test_pipeline import finish, kill, only, wait_for
from test_pipeline import start as command

from d2c_ray.data import tables
from d2c_ray.plan import STAGES
from d2c_ray.rundir import PLAN, SUCCESS

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

STUDIED = 512  # images that a training sees
SETTINGS = (
    "data.rows_per_shard=10", "attach.rows_per_part=8", "sample.device_batch=1", "sample.num_images=40", "resources.rows_per_task=5",
    "resources.actors=1", "sample.steps=400",
)  # fmt: skip
FEATURES = ("select.selector=gadc", "evaluate.unguided=true", "data.limit_per_class=30")  # of real images more than are measured at once


def start(log: Path, folder: Path, settings: tuple[str, ...], *pause: str) -> subprocess.Popen:
    watched = str(ROOT / "tests" / "drills" / "watched.py")
    words = [watched, str(log), *pause, "--", "run", str(DEBUG), f"run.dir={folder.parent}", *settings]
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def work(log: Path) -> dict[str, int]:
    """What was begun so far, by what it was."""
    found: dict[str, int] = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        record = json.loads(line)
        found[record["what"]] = found.get(record["what"], 0) + record["number"]
    return found


def made(folder: Path, stage: str) -> Path:
    """Where a stage of a run that is planned leaves what it makes."""
    nodes = json.loads((folder / PLAN).read_text())["nodes"]
    (name,) = (node["folder"] for node in nodes if node["stage"] == stage)
    return folder / name


def seen(stage: Path) -> int:
    """Images that a training's metrics have."""
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line)["images"] for line in lines)


def rows(folder: Path, stage: str) -> list:
    """Ids of the rows that a stage left; of a training the images after which it wrote metrics."""
    if stage in ("teacher", "train"):
        return [json.loads(line)["images"] for line in (made(folder, stage) / "metrics.jsonl").read_text().splitlines()]
    name = {"sample": "index", "unguided": "index", "reference": "id", "evaluate": "id"}.get(stage, "sample_id")
    below = {"reference": "features/", "evaluate": "samples/"}.get(stage, "")
    parts = sorted(made(folder, stage).glob(f"{below}part-*.parquet"))
    return [row for path in parts for row in tables.read(path, [name]).column(name).to_pylist()]


def files(folder: Path) -> set[str]:
    """What lies in a run's stages, by name; checkpoints without the times that they are called by."""
    return {re.sub(r"checkpoint_[\d_.-]+", "checkpoint", name) for name in contents(folder) if "/" in name}


def same(one: Path, other: Path) -> None:
    """All tables, models and metrics of two runs, byte by byte; a table that says when or where it was made by its rows."""
    for pattern in ("condensed-*/part-*.parquet", "samples-*/part-*.parquet", "*/model/*.safetensors", "reference-*/*.npz"):
        mine, others = (sorted(run.glob(pattern)) for run in (one, other))
        assert [path.relative_to(one) for path in mine] == [path.relative_to(other) for path in others] and mine
        for path, twin in zip(mine, others, strict=True):
            assert path.read_bytes() == twin.read_bytes(), path
    chosen_by = "scores" if list(other.glob("scores-*")) else "features"
    for tabled in ("manifest-*", f"{chosen_by}-*", "selection-*", "reference-*/features"):
        mine, others = (tables.read(sorted(run.glob(f"{tabled}/part-*.parquet"))) for run in (one, other))
        assert mine.equals(others), tabled
    assert only(one, "eval-*/metrics.json").read_bytes() == only(other, "eval-*/metrics.json").read_bytes()


def exists(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(pattern))


# Stages of the plan, where in its folder each is killed, and what is counted of its work.
BY_SCORES = (
    ("manifest", "pause part-*.parquet", "manifest"),
    ("teacher", "checkpoints/checkpoint_*/state.json", "images"),
    ("score", "part-00000[2-9].parquet", "Scorer"),
    ("select", "pause part-*.parquet", "select"),
    ("attach", "part-000002.parquet", "Attacher"),
    ("train", "checkpoints/checkpoint_*/state.json", "images"),
    ("sample", "part-000001.parquet", "Sampler"),
    ("evaluate", "samples/part-000000.parquet", "Embedder"),
)
BY_FEATURES = (
    ("embed", "part-00000[2-9].parquet", "FeatureExtractor"),
    ("select", "pause part-*.parquet", "select"),
    ("unguided", "part-000001.parquet", "Sampler"),
    ("reference", "features/part-000000.parquet", "Embedder"),
)


def test_no_stage_is_left_out() -> None:
    assert {stage for stage, _, _ in (*BY_SCORES, *BY_FEATURES)} == set(STAGES)


@pytest.mark.drill("driver killed", ci=False)
@pytest.mark.parametrize(("stages", "chosen"), [(BY_SCORES, ()), (BY_FEATURES, FEATURES)], ids=["by scores", "by features"])
def test_a_driver_killed_in_each_stage_ends_as_if_undisturbed(
    tmp_path: Path, drill: Drill, stages: tuple[tuple[str, str, str], ...], chosen: tuple[str, ...]
) -> None:
    settings = (*SETTINGS, *chosen)
    undisturbed = tmp_path / "undisturbed" / "debug"
    finish(start(tmp_path / "undisturbed.log", undisturbed, settings))
    once = work(tmp_path / "undisturbed.log")
    folder, log = tmp_path / "disturbed" / "debug", tmp_path / "disturbed.log"
    redone, kept, seconds = {}, {}, {}
    for stage, at, what in stages:
        began, marker = time.monotonic(), tmp_path / f"{stage}-stands-still"
        own = folder / made(undisturbed, stage).name
        pausing = at.startswith("pause ")
        last = at.removeprefix("pause ") if pausing else SUCCESS  # no stage is over before it is killed, however fast it goes
        process = start(log, folder, settings, "--pause", f"{own.name}/{last}", str(marker))
        wait_for(marker.exists if pausing else exists(own, at), process)
        kill(process)
        assert not (own / SUCCESS).exists(), f"{stage} was over before it was killed"
        if what == "images":
            states = own.glob("checkpoints/checkpoint_*/state.json")
            redone[stage] = (seen(own) - max(json.loads(path.read_text())["images"] for path in states)) / STUDIED
        seconds[stage] = time.monotonic() - began
        kept |= {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{SUCCESS}")}
    finish(start(log, folder, settings))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished work was done again"
    same(folder, undisturbed)
    assert files(folder) == files(undisturbed), "nothing of what was cut off is left"
    begun = work(log)
    for stage, _, what in stages:
        whole = once[what] if what in ("manifest", "select") else len(rows(undisturbed, stage))  # an actor may work for two stages
        again = redone[stage] if stage in redone else (begun[what] - once[what]) / whole
        name = f"driver killed: {stage}{' by features' if stage == 'select' and chosen else ''}"
        drill.measured(rows(folder, stage), rows(undisturbed, stage), again, name, seconds[stage])


@pytest.fixture
def address(no_ray: None) -> Iterator[str]:
    """Of a cluster whose head has no CPUs, as where each node is a pod, and of one node that works."""
    folder = tempfile.mkdtemp(prefix="d2c-", dir="/tmp")
    options = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": False}
    running = Cluster(initialize_head=True, head_node_args=options)
    running.add_node(num_cpus=4)
    ray.init(address=running.address, log_to_driver=False)
    running.wait_for_nodes()
    ray.shutdown()
    yield running.address
    running.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.drill("driver alone killed on a cluster whose head has no CPUs, and started again at once", ci=False)
def test_a_driver_killed_beside_its_workers_ends_as_if_undisturbed(address: str, tmp_path: Path, drill: Drill) -> None:
    """What it had at work may still write while the next one does: nothing waits until Ray has ended it."""
    words = ("run", str(DEBUG), f"resources.address={address}", *SETTINGS)
    undisturbed, folder = tmp_path / "undisturbed" / "debug", tmp_path / "disturbed" / "debug"
    finish(command(*words, f"run.dir={undisturbed.parent}"))
    process = command(*words, f"run.dir={folder.parent}")
    for pattern in ("scores-*/part-000001.parquet", "condensed-*/part-000001.parquet", "train-*/checkpoints/checkpoint_*/state.json"):
        wait_for(exists(folder, pattern), process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (only(folder, pattern.split("/")[0]) / SUCCESS).exists(), f"{pattern}: the stage was over before"
        process = command(*words, f"run.dir={folder.parent}")
    finish(process)
    same(folder, undisturbed)
    found, wanted = ([row for stage in ("score", "attach", "train") for row in rows(run, stage)] for run in (folder, undisturbed))
    for stage in ("score", "attach", "train"):
        assert rows(folder, stage) == rows(undisturbed, stage), stage
    drill.measured(list(enumerate(found)), list(enumerate(wanted)), None)
