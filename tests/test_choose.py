"""Selecting by features as a stage: classes as Ray tasks, quotas, data without labels, features that are no numbers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from test_features import parts

from d2c_ray.config import Config, ResourcesConfig, SelectConfig, from_dict
from d2c_ray.data import tables
from d2c_ray.distributed import cluster
from d2c_ray.errors import UserError
from d2c_ray.job import Job, Result
from d2c_ray.rundir import StageDir
from d2c_ray.selection.by_features import BY_FEATURES
from d2c_ray.stages import select

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    cluster.connect(ResourcesConfig(num_cpus=3))
    yield
    ray.shutdown()


def features(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(count, 12)) + rng.normal(size=(3, 12))[rng.integers(0, 3, count)], 0).astype(np.float16)


def run(folder: Path, given: np.ndarray, labels: np.ndarray, options: SelectConfig, names: list[str] | None = None) -> tuple[Result, Job]:
    """The stage on made-up features; its inputs say no more than it asks of them."""
    (folder / "features").mkdir()
    parts(folder / "features", given, labels, 20)
    (folder / "manifest").mkdir()
    manifest = StageDir(folder / "manifest")
    manifest.finish({"facts": {"class_names": names or [f"class {i}" for i in range(max(1, labels.max() + 1))], "rows": len(labels)}})
    config: Config = replace(from_dict({"select": {"selector": options.selector}}), select=options)
    (folder / "out").mkdir()
    job = Job(config, {"manifest": manifest, "embed": StageDir(folder / "features")}, folder / "out", "0", "select", 2)
    return select.run(job), job


@pytest.mark.parametrize("selector", BY_FEATURES)
def test_tasks_choose_what_the_function_chooses(selector: str, tmp_path: Path) -> None:
    labels = np.random.default_rng(1).choice([0, 2, 3], 90)
    given = features(90)
    options = SelectConfig(selector, budget=12, transport=replace(SelectConfig().transport, confidence=0.0))
    result, job = run(tmp_path, given, labels, options)
    found = tables.read(job.out / "part-00000.parquet").to_pylist()
    assert result.rows_in == result.rows_done == 90
    for label in (0, 2, 3):
        mine = np.flatnonzero(labels == label)
        wanted, _ = BY_FEATURES[selector](given[mine].astype(np.float32), None, 4, options, "cpu")
        chosen = sorted((row for row in found if row["label"] == label), key=lambda row: row["position"])
        assert [row["sample_id"] for row in chosen] == mine[wanted].tolist()
        assert [row["key"] for row in chosen] == [f"x/{i:06d}.png" for i in mine[wanted]]
        assert {row["class_size"] for row in chosen} == {len(mine)} and {row["score"] for row in chosen} == {None}
    assert [row["sample_id"] for row in found] == sorted(row["sample_id"] for row in found)
    assert any("a space close to those" in notice for notice in result.facts["notices"])
    assert sorted(path.name for path in job.out.glob("*")) == ["_progress.json", "classes.parquet", "part-00000.parquet"]


def test_confidence_prefers_images_that_a_probe_is_sure_of(tmp_path: Path) -> None:
    """Half of class 0 lies among class 1: the same set without the term, none of them with it."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    given = rng.normal(size=(120, 6)).astype(np.float16)
    given[30:] += 2.5
    options = SelectConfig("gadc", budget=12)
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    result, job = run(tmp_path / "with", given, labels, replace(options, transport=replace(options.transport, confidence=200.0)))
    off, other = run(tmp_path / "without", given, labels, replace(options, transport=replace(options.transport, confidence=0.0)))
    astray = [
        sum(30 <= i < 60 for i in tables.read(each.out / "part-00000.parquet").column("sample_id").to_pylist()) for each in (job, other)
    ]
    assert astray[0] == 0 < astray[1]
    assert 0.6 < result.facts["probe_accuracy"] < 0.9 and "probe_accuracy" not in off.facts


def test_data_without_labels_is_one_class_without_a_classifier(tmp_path: Path) -> None:
    result, job = run(tmp_path, features(70), np.full(70, -1), SelectConfig("gadc", budget=0.1), [""])
    found = tables.read(job.out / "part-00000.parquet")
    assert len(found) == 7 and set(found.column("label").to_pylist()) == {-1}
    assert tables.read(job.out / "classes.parquet").select(["label", "size", "quota"]).to_pylist() == [
        {"label": -1, "size": 70, "quota": 7}
    ]
    assert result.facts["confidence"] == "none"
    assert any("the confidence term is off" in notice for notice in result.facts["notices"])


def test_quotas_shortfall_and_the_whole_dataset(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 4], [30, 2, 20])
    for name, options in (
        ("equal", SelectConfig("herding", budget=15)),
        ("proportional", SelectConfig("k_center", budget=13, balance="proportional")),
        ("whole", SelectConfig("gadc", budget=1.0)),
    ):
        (tmp_path / name).mkdir()
        result, job = run(tmp_path / name, features(52), labels, options)
        classes = {row["label"]: row for row in tables.read(job.out / "classes.parquet").to_pylist()}
        quotas = [classes[label]["quota"] for label in (0, 1, 4)]
        assert quotas == {"equal": [7, 2, 6], "proportional": [7, 1, 5], "whole": [30, 2, 20]}[name]
        short = {"equal": 3, "proportional": 0, "whole": 15}[name]  # of the 5, 1 and 17 that are class 1's share
        assert result.facts["shortfall"] == classes[1]["shortfall"] == short
        found = tables.read(job.out / "part-00000.parquet").column("sample_id").to_pylist()
        assert len(set(found)) == len(found) == sum(quotas)


def test_features_that_are_no_numbers_are_refused_by_key(tmp_path: Path) -> None:
    given = features(50)
    given[37, 3] = np.inf
    with pytest.raises(UserError, match=r"x/000037\.png: another one \(embed\.encoder\)"):
        run(tmp_path, given, np.zeros(50, int), SelectConfig("herding", budget=5))


def test_what_a_class_is_refused_for_names_it(tmp_path: Path) -> None:
    options = SelectConfig("gadc", budget=9, transport=replace(SelectConfig().transport, max_class=30))
    with pytest.raises(Exception, match=r"label 1: a class of 40 images needs"):
        run(tmp_path, features(60), np.repeat([0, 1], [20, 40]), options)
