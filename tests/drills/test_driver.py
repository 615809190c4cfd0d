"""The driver killed in every stage, one after the other: it ends with the bytes of a run that nothing happened to."""

import json
import os
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
from drilling import Drill
from ray.cluster_utils import Cluster
from test_pipeline import finish, kill, only, wait_for
from test_pipeline import start as command

from d2c_ray.data import tables

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

STUDIED = 512  # images that a training sees
SETTINGS = (
    "data.rows_per_shard=10", "attach.rows_per_part=8", "sample.device_batch=1", "sample.num_images=40", "resources.rows_per_task=5",
    "resources.actors=1",
)  # fmt: skip


def start(log: Path, folder: Path, *pause: str) -> subprocess.Popen:
    words = [
        str(ROOT / "tests" / "drills" / "watched.py"),
        str(log),
        *pause,
        "--",
        "run",
        str(DEBUG),
        f"run.dir={folder.parent}",
        *SETTINGS,
    ]
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def work(log: Path) -> dict[str, int]:
    """What was begun so far, by what it was."""
    found: dict[str, int] = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        record = json.loads(line)
        found[record["what"]] = found.get(record["what"], 0) + record["number"]
    return found


def seen(folder: Path, stage: str) -> int:
    """Images that a training's metrics have."""
    lines = [line for path in folder.glob(f"{stage}-*/metrics.jsonl") for line in path.read_text().splitlines()]
    return max((json.loads(line)["images"] for line in lines), default=0)


def rows(folder: Path, stage: str) -> list:
    """Ids of the rows that a stage left; of a training the images after which it wrote metrics."""
    if stage in ("teacher", "train"):
        return [json.loads(line)["images"] for line in only(folder, f"{stage}-*/metrics.jsonl").read_text().splitlines()]
    if stage == "eval":
        parts = folder.glob("eval-*/samples/part-*.parquet")
        return [row for path in sorted(parts) for row in tables.read(path, ["id"]).column("id").to_pylist()]
    name = "index" if stage == "samples" else "sample_id"
    return [row for path in sorted(folder.glob(f"{stage}-*/part-*.parquet")) for row in tables.read(path, [name]).column(name).to_pylist()]


def same(one: Path, other: Path) -> None:
    """All tables, models and metrics of two runs, byte by byte; a table that says when or where it was made by its rows."""
    for pattern in ("condensed-*/part-*.parquet", "samples-*/part-*.parquet", "*/model/*.safetensors"):
        mine, others = (sorted(run.glob(pattern)) for run in (one, other))
        assert [path.relative_to(one) for path in mine] == [path.relative_to(other) for path in others] and mine
        for path, twin in zip(mine, others, strict=True):
            assert path.read_bytes() == twin.read_bytes(), path
    for stage in ("manifest", "scores", "selection"):
        mine, others = (tables.read(sorted(run.glob(f"{stage}-*/part-*.parquet"))) for run in (one, other))
        assert mine.equals(others), stage
    assert only(one, "eval-*/metrics.json").read_bytes() == only(other, "eval-*/metrics.json").read_bytes()


def exists(folder: Path, pattern: str, count: int = 1) -> Callable[[], bool]:
    return lambda: len(list(folder.glob(pattern))) >= count


STAGES = (
    # stage, where it is killed, and what is counted of its work
    ("manifest", "pause manifest-*/part-*.parquet", "manifest"),
    ("teacher", "teacher-*/checkpoints/checkpoint_*/state.json", "images"),
    ("scores", "scores-*/part-00000[2-9].parquet", "Scorer"),
    ("selection", "pause selection-*/part-*.parquet", "select"),
    ("condensed", "condensed-*/part-000002.parquet", "Attacher"),
    ("train", "train-*/checkpoints/checkpoint_*/state.json", "images"),
    ("samples", "samples-*/part-000001.parquet", "Sampler"),
    ("eval", "eval-*/samples/part-000000.parquet", "Embedder"),
)


@pytest.mark.drill("driver killed", ci=False)
def test_a_driver_killed_in_each_stage_ends_as_if_undisturbed(tmp_path: Path, drill: Drill) -> None:
    undisturbed = tmp_path / "undisturbed" / "debug"
    finish(start(tmp_path / "undisturbed.log", undisturbed))
    once = work(tmp_path / "undisturbed.log")
    folder, log = tmp_path / "disturbed" / "debug", tmp_path / "disturbed.log"
    redone, kept, seconds = {}, {}, {}
    for stage, at, what in STAGES:
        began, marker = time.monotonic(), tmp_path / f"{stage}-stands-still"
        pausing = at.startswith("pause ")
        process = start(log, folder, *(("--pause", at.removeprefix("pause "), str(marker)) if pausing else ()))
        wait_for(marker.exists if pausing else exists(folder, at), process)
        kill(process)
        assert not list(folder.glob(f"{stage}-*/_SUCCESS.json")), f"{stage} was over before it was killed"
        if what == "images":
            states = folder.glob(f"{stage}-*/checkpoints/checkpoint_*/state.json")
            redone[stage] = (seen(folder, stage) - max(json.loads(path.read_text())["images"] for path in states)) / STUDIED
        seconds[stage] = time.monotonic() - began
        kept |= {path: path.stat().st_mtime_ns for path in folder.glob("*/_SUCCESS.json")}
    finish(start(log, folder))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished work was done again"
    same(folder, undisturbed)
    begun = work(log)
    for stage, _, what in STAGES:
        whole = once[what] if what in ("manifest", "select") else len(rows(undisturbed, stage))  # an actor may work for two stages
        again = redone[stage] if stage in redone else (begun[what] - once[what]) / whole
        drill.measured(rows(folder, stage), rows(undisturbed, stage), again, f"driver killed: {stage}", seconds[stage])


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
        assert not (only(folder, pattern.split("/")[0]) / "_SUCCESS.json").exists(), f"{pattern}: the stage was over before"
        process = command(*words, f"run.dir={folder.parent}")
    finish(process)
    same(folder, undisturbed)
    found, wanted = ([row for stage in ("scores", "condensed", "train") for row in rows(run, stage)] for run in (folder, undisturbed))
    for stage in ("scores", "condensed", "train"):
        assert rows(folder, stage) == rows(undisturbed, stage), stage
    drill.measured(list(enumerate(found)), list(enumerate(wanted)), None)
