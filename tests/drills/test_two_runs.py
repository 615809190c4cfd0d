"""Two runs started on one folder at once: one makes it, the other one refuses."""

from pathlib import Path

import pytest
from conftest import DEBUG
from drilling import Drill
from test_pipeline import start
from test_score import check, expected, teacher_folder

from d2c_ray import plan as plans
from d2c_ray.config import load
from d2c_ray.data import tables

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time


@pytest.mark.drill("two runs started on one folder at once")
def test_the_second_of_two_runs_on_one_folder_refuses(no_ray: None, tmp_path: Path, drill: Drill) -> None:
    teacher = teacher_folder(tmp_path / "teacher", {"kind": "pixels", "channels": 1, "side": 8})
    words = [f"run.dir={tmp_path}", f"teacher.checkpoint={teacher}", "data.rows_per_shard=64", "resources.actors=1"]
    both = [start("score", str(DEBUG), *words) for _ in range(2)]
    said = [process.communicate(timeout=500)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    refused = said[[process.returncode for process in both].index(2)]
    assert refused.strip().splitlines()[-1].startswith("d2c: the run folder '") and "is being written by process" in refused
    config = load(DEBUG, words)
    (node,) = plans.make(config, "score").of("score")
    wanted = expected(config)
    check(node.dir, wanted)
    ids = tables.read(node.dir.parts()).column("sample_id").to_pylist()
    drill.measured(ids, wanted[0].column("sample_id").to_pylist(), None)
