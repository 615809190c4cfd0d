"""A disk that is full while a run writes: it says so, what is finished stays, and the same command goes on once there is room."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEBUG, ROOT
from drilling import Drill
from test_driver import rows, same
from test_pipeline import finish, start

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

SETTINGS = (
    "data.rows_per_shard=10",
    "attach.rows_per_part=8",
    "resources.rows_per_task=2",
    "resources.actors=1",
    "resources.max_failures=1",
)


def attempts(tmp_path: Path, *words: str, patterns: tuple[str, ...]) -> list[dict]:
    """What came of runs on a file system of their own that was filled at each of the patterns, and of the last one, which had room."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    probe = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
    if shutil.which("unshare") is None or (failed := subprocess.run([*inside, *probe], capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here, not even in a namespace of one's own: {failed.stderr.strip() or 'no unshare'}")
    script = [sys.executable, str(ROOT / "tests" / "drills" / "full_disk.py"), str(tmp_path / "disk"), str(tmp_path / "out"), *patterns]
    run = ["-m", "d2c_ray.cli", *words, f"run.dir={tmp_path / 'disk'}"]
    done = subprocess.run([*inside, *script, "--", *run], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "out" / "attempts.json").read_text())


def refused(attempt: dict) -> None:
    """It ended by itself, in words and not in a traceback, and left room."""
    assert attempt["code"] == 2, (attempt["pattern"], attempt["said"])
    assert "no room is left" in attempt["said"] and "Traceback" not in attempt["said"].rsplit("d2c: ", 1)[1]
    assert attempt["said"].rstrip().splitlines()[-1].startswith("d2c: "), attempt["said"][-500:]


@pytest.mark.drill("disk full while the manifest is written")
def test_a_full_disk_is_said(tmp_path: Path, drill: Drill) -> None:
    """Without a Ray: the first file that is written on it."""
    full, room = attempts(tmp_path, "manifest", str(DEBUG), patterns=("debug/config.yaml",))
    refused(full)
    assert str(tmp_path / "disk" / "debug") in full["said"]
    assert room["code"] == 0, room["said"]
    found = rows(tmp_path / "out" / "disk" / "debug", "manifest")
    drill.measured(found, range(120), None)


@pytest.mark.drill("disk full", ci=False)
def test_a_disk_that_fills_up_in_three_stages_costs_nothing_that_was_finished(tmp_path: Path, drill: Drill) -> None:
    patterns = ("debug/scores-*/part-000002.parquet", "debug/condensed-*/part-000001.parquet", "debug/train-*/metrics.jsonl")
    *full, room = attempts(tmp_path, "run", str(DEBUG), *SETTINGS, patterns=patterns)
    for attempt in full:
        refused(attempt)
    assert room["code"] == 0, room["said"]
    for attempt in full:
        assert attempt["before"].items() <= room["before"].items(), "what was finished when the disk filled up was made again"
    undisturbed = tmp_path / "undisturbed" / "debug"
    finish(start("run", str(DEBUG), f"run.dir={undisturbed.parent}", *SETTINGS))
    folder = tmp_path / "out" / "disk" / "debug"
    same(folder, undisturbed)
    for stage, name, attempt in zip(("score", "attach", "train"), ("scores", "condensed", "train"), full, strict=True):
        there = sum(f"/{name}-" in path and "part-" in path for path in attempt["before"])
        drill.measured(rows(folder, stage), rows(undisturbed, stage), None, f"disk full: {stage}, {there} parts were there")
