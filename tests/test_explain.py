"""The selection explains itself, selectors are compared, and one that looks at features needs no teacher."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import DEBUG
from test_pipeline import finish, start

from d2c_ray import pipeline
from d2c_ray.config import Config, SelectConfig
from d2c_ray.data import tables
from d2c_ray.errors import UserError
from d2c_ray.plan import Plan
from d2c_ray.report import explain

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

SILENT = {"say": lambda text: None}
FEATURES = ("embed.image_size=32", "evaluate.image_size=32")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explained")


@pytest.fixture(scope="module")
def compared(root: Path) -> str:
    return finish(start("selectors", str(DEBUG), f"run.dir={root}", *FEATURES))


@pytest.fixture
def plan(compared: str, root: Path, debug_config: Callable[..., Config]) -> Plan:
    """Interval and random, both selected by now."""
    arms = ("arms.interval.select.selector=interval", "arms.random.select.selector=random")
    return pipeline.run(debug_config(f"run.dir={root}", *FEATURES, *arms), "select", **SILENT)


def test_all_selectors_are_compared_in_a_space_they_did_not_select_in(compared: str, root: Path) -> None:
    found = json.loads((root / "debug" / "selectors" / "selectors.json").read_text())
    names = {"interval", "random", "easiest", "hardest", "medium", "stratified", "herding", "k_center", "gadc"}
    assert set(found["selectors"]) == names == set(found["jaccard"])
    assert (found["record"]["network"], found["record"]["selected_in"]) == ("efficientnet-lite2", "efficientnet-lite0")
    for name, row in found["selectors"].items():
        assert (row["images"], row["least"], row["most"]) == (40, 4, 4), name
        assert row["frechet"] > 0 and 0 <= row["recall"] <= 1 and 0 <= row["precision"] <= 1
        assert found["jaccard"][name][name] == 1
        assert np.diff(row["score_quantiles"]).min() >= 0
    assert found["jaccard"]["easiest"]["hardest"] == 0, "4 of 12 from either end"
    medians = {name: row["score_quantiles"][3] for name, row in found["selectors"].items()}
    assert medians["easiest"] < medians["medium"] < medians["hardest"]
    page = (root / "debug" / "selectors" / "selectors.html").read_text()
    for name in names:
        assert name in compared and f"<td>{name}</td>" in page
    assert page.count("<svg") == 1 and not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not (root / "debug" / "config.yaml").exists(), "a comparison is not the run"


def test_every_image_is_explained(plan: Plan) -> None:
    (score,) = plan.of("score")
    table = tables.read(score.dir.parts())
    keys, labels, scores = (table.column(name).to_pylist() for name in ("key", "label", "score"))
    ids = table.column("sample_id").to_pylist()
    chosen = {node.config.select.selector: tables.read(node.dir.parts()).to_pylist() for node in plan.of("select")}
    kept = {row["key"]: row for row in chosen["interval"]}
    for index in range(0, 120, 11):
        text = "\n".join(explain.lines(plan, keys[index]))
        mine = sorted((scores[i], ids[i]) for i in range(120) if labels[i] == labels[index])
        rank = mine.index((scores[index], ids[index]))
        assert f"score {scores[index]:.4f}: rank {rank} of 12 in its class" in text
        assert len(re.findall(r"\n +0\.\d+ +\d", text)) == 4, "an error a timestep"
        interval = text[text.index("interval, 40 images") : text.index("random, 40 images")]
        if keys[index] in kept:
            assert f"kept, as number {kept[keys[index]]['position'] + 1} of 4" in interval
        else:
            assert "not kept" in interval
        neighbours = [row for row in chosen["interval"] if row["label"] == labels[index] and row["rank"] != rank]
        above = min((row for row in neighbours if row["rank"] > rank), key=lambda row: row["rank"], default=None)
        below = max((row for row in neighbours if row["rank"] < rank), key=lambda row: row["rank"], default=None)
        for name, row in (("easier", below), ("harder", above)):
            told = f"the next {name} one that is kept: {row['key']} (rank {row['rank']}, score {row['score']:.4f})" if row else None
            assert told in interval if told else f"next {name}" not in interval
        if above is None and keys[index] not in kept:
            assert "harder than the hardest that is kept" in interval
        assert ("kept, as number" in text[text.index("random, 40") :]) == (keys[index] in {row["key"] for row in chosen["random"]})


def test_a_key_may_be_given_by_its_end_and_an_unknown_one_is_refused(plan: Plan) -> None:
    assert explain.image_of(plan, "digits.parquet#000000042")["sample_id"] == 42
    assert explain.image_of(plan, "00042")["sample_id"] == 42
    with pytest.raises(UserError, match=r"ends the keys of several images: .*Give one of them whole"):
        explain.image_of(plan, "2")
    with pytest.raises(UserError, match=r"no image has the key 'nothing'.*for example 'digits\.parquet#"):
        explain.image_of(plan, "nothing")


def test_an_interval_with_the_hardest_left_out_says_so(plan: Plan) -> None:
    node = next(node for node in plan.of("select") if node.config.select.selector == "interval")
    table = tables.read(node.dir.parts())
    chosen = table.filter(np.maximum(table.column("label").to_numpy(), 0) == 3)
    deepest = max(chosen.column("rank").to_pylist())
    place = explain.Scored(1.0, 11, 12, [0.5], np.ones(1), np.ones((3, 1)), np.ones(12))
    text = "\n".join(explain.reason(SelectConfig(f=0.75), {"sample_id": -5}, chosen, place))
    assert f"0 to {deepest} of 12 in steps of 2, the hardest {1 - (deepest + 1) / 12:.0%} are never used" in text
    assert f"its rank 11 is harder than the hardest that is kept ({deepest})" in text


def test_a_selector_of_features_needs_no_teacher(root: Path, compared: str) -> None:
    own = root / "without"
    out = finish(start("run", str(DEBUG), f"run.dir={own}", "select.selector=gadc", *FEATURES))
    folder = own / "debug"
    assert not list(folder.glob("teacher-*")) and not list(folder.glob("scores-*"))
    selection = tables.read(next(folder.glob("selection-*/part-*.parquet")))
    assert len(selection) == 40 and selection.column("score").null_count == selection.column("rank").null_count == 40
    assert np.bincount(selection.column("label").to_numpy()).tolist() == [4] * 10
    assert set(selection.column("class_size").to_pylist()) == {12}
    there = tables.read(next(root.glob("debug/selection-*/part-*.parquet")))
    assert there.column_names == selection.column_names
    page = (folder / "report.html").read_text()
    assert "No student needed difficulty scores" in page and page.count("<svg") == 1
    assert "gadc selected in the features of efficientnet-lite0" in page and "gadc selected in" in " ".join(out.split())
    kept = selection.column("key")[0].as_py()
    explained = finish(start("explain", str(DEBUG), kept, f"run.dir={own}", "select.selector=gadc", *FEATURES))
    assert "kept, as number" in explained and "looks at the whole set in feature space" in explained
