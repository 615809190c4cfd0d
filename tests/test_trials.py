"""What a sweep consists of, and what its numbers say: without running any of it."""

import itertools
import json
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import DEBUG, ROOT
from scipy import stats

from d2c_ray import logs, sweep, trials
from d2c_ray.config import Config, SweepConfig, load
from d2c_ray.errors import UserError
from d2c_ray.evaluate import paired
from d2c_ray.report import outcomes
from d2c_ray.report import sweep as report
from d2c_ray.rundir import maker, write_json

AXES = "sweep.axes={select.budget: [30, 60], select.selector: [interval, gadc], train.align_weight: [0, 0.5]}"


def given(*overrides: str) -> Config:
    config = load(DEBUG, [override for override in overrides if not override.startswith("sweep.axes=")])
    import yaml

    axes = next(
        (override.removeprefix("sweep.axes=") for override in overrides if override.startswith("sweep.axes=")), AXES.partition("=")[2]
    )
    return replace(config, sweep=replace(config.sweep, axes=yaml.safe_load(axes)))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sweep.axes={}"], "sweep.axes is empty"),
        (["sweep.axes={select.budgte: [1]}"], "did you mean 'select.budget'"),
        (["sweep.axes={resources.actors: [1]}"], "resources.actors cannot change a result"),
        (["sweep.axes={select.budget: 3}"], "a list of values would do"),
        (["sweep.axes={select.budget: []}"], "a list of values would do"),
        (["sweep.axes={select.budget: [30, 30]}"], "names a value twice"),
        (["sweep.axes={train.align_weight: [0, 0.0]}", "sweep.search=random", "sweep.num_points=2"], "names a value twice"),
        (["sweep.axes={train.lr: {low: 0.1, high: 1}}"], "a grid cannot try every value"),
        (["sweep.axes={train.lr: {low: 1, high: 0.1}}", "sweep.search=random"], "is no range"),
        (["sweep.axes={train.lr: {low: 0, high: 1, log: true}}", "sweep.search=random"], "a logarithmic one above 0"),
        (["sweep.seeds=[1,1]"], "each once"),
        (["sweep.seeds=[]"], "one seed or more"),
        (["sweep.seed_of=[train.lr]"], "train.lr is no seed"),
        (["sweep.seed_of=[train.sed]"], "did you mean 'train.seed'"),
        (["sweep.axes={train.seed: [1, 2]}"], "train.seed is an axis and in sweep.seed_of"),
        (["sweep.metrics=[fid]"], "'fid' is unknown"),
        (["sweep.metrics=[cost_seconds]"], "the cheapest point would be the best"),
        (["sweep.equal=seconds"], "needs sweep.seconds"),
        (["sweep.asha=512"], "not below train.num_images=512"),
        (["sweep.asha=16"], "less than the 32 images of a step"),
        (["sweep.metrics=[frechet,inception_score]"], "inception_score is of evaluate.network=inception"),
        (["sweep.asha=128", "sweep.axes={train.num_images: [256, 512]}"], "equally many images"),
        (["sweep.asha=128", "sweep.metrics=[frechet,kid]"], "goes by one measure"),
        (["sweep.asha=128", "sweep.equal=seconds", "sweep.seconds=9"], "one of the two"),
        (["sweep.asha=128", "sweep.search=optuna"], "one of the two"),
        (["arms.A.train.lr=1"], "a sweep has no arms"),
    ],
)
def test_a_sweep_that_means_nothing_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        trials.check(given(*overrides))
    assert said in str(error.value)


def test_a_grid_is_every_point_with_every_seed_and_a_random_twin_of_each_budget_and_strength() -> None:
    found = trials.of_points(given(), trials.points(given().sweep), trials.Planner())
    assert len(found) == (8 + 4) * 3 and len({trial.id for trial in found}) == len(found)
    twins = [trial for trial in found if trial.twin]
    assert {(trial.point["select.budget"], trial.point["train.align_weight"]) for trial in twins} == set(
        itertools.product([30, 60], [0, 0.5])
    )
    one = next(
        trial
        for trial in found
        if trial.seed == 2 and trial.point["select.selector"] == "gadc" and trial.point["train.align_weight"] == 0.5
    )
    own = one.config
    assert (own.select.selector, own.train.align_weight, own.train.seed, own.select.seed, own.sample.seed) == ("gadc", 0.5, 2, 2, 2)
    assert own.sweep == SweepConfig() and one.label.endswith("align_weight=0.5 seed=2")
    assert len({trial.plan.of("score")[0].name for trial in found if trial.plan.of("score")}) == 1, "all share one scoring"
    assert not trials.of_points(given("sweep.random_twins=false"), [{"select.budget": 30}], trials.Planner())[0].twin
    same = {
        trial.id
        for trial in trials.of_points(given("run.name=debug", "resources.actors=2"), trials.points(given().sweep), trials.Planner())
    }
    assert same == {trial.id for trial in found}, "a trial is what it is, whatever it runs on"


def test_points_that_come_to_the_same_are_one_trial() -> None:
    config = given("sweep.axes={select.selector: [random, interval], select.f: [0.5, 0.75]}", "sweep.seeds=[0]")
    found = trials.of_points(config, trials.points(config.sweep), trials.Planner())
    assert [trial.label for trial in found] == [
        "selector=random f=0.5 seed=0",
        "selector=interval f=0.5 seed=0",
        "selector=interval f=0.75 seed=0",
    ]
    assert found[0].also == [{"select.selector": "random", "select.f": 0.75}]


def test_a_value_that_its_field_cannot_have_is_named_with_its_point() -> None:
    with pytest.raises(UserError, match=r"at budget=30 precision=fp8: train.precision='fp8' is unknown"):
        trials.of_points(given(), [{"select.budget": 30, "train.precision": "fp8"}], trials.Planner())


def test_a_random_search_draws_points_in_range_and_the_same_ones_again() -> None:
    axes = {
        "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "train.batch_size": {"low": 1, "high": 3, "integer": True},
        "model.kind": ["sit", "dit"],
    }
    options = SweepConfig(axes=axes, search="random", num_points=200)
    found = trials.points(options)
    assert found == trials.points(options) != trials.points(replace(options, search_seed=1))
    rates = np.asarray([point["train.lr"] for point in found])
    assert rates.min() >= 1e-4 and rates.max() <= 1e-2 and 0.35 < (rates < 1e-3).mean() < 0.65, "evenly in the logarithm"
    assert {point["train.batch_size"] for point in found} == {1, 2, 3} and {point["model.kind"] for point in found} == {"sit", "dit"}
    few = SweepConfig(axes={"model.kind": ["sit", "dit"], "select.k": [1, 2]}, search="random", num_points=50)
    assert (
        sorted(map(json.dumps, trials.points(few))) == sorted({json.dumps(point) for point in trials.points(few)})
        and len(trials.points(few)) == 4
    )


def test_rungs_are_at_equal_images() -> None:
    assert trials.rungs(given("train.num_images=1000")) == [1000]
    assert trials.rungs(given("train.num_images=1000", "sweep.asha=100", "sweep.reduction=3")) == [100, 300, 900, 1000]
    assert trials.rungs(given("train.num_images=900", "sweep.asha=100", "sweep.reduction=3")) == [100, 300, 900]


# What the numbers say


def test_the_paired_test_is_scipys_and_holms_the_books() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 7), rng.normal(0, 1, 7)
    found = paired.paired(list(a), list(b))
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-12) and found.mean == pytest.approx((a - b).mean())
    assert paired.paired([1.0], [2.0]).p is None
    assert paired.paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).p == 0.0 and paired.paired([1.0, 1.0], [1.0, 1.0]).p == 1.0
    # Holm's own example: 0.01, 0.04, 0.03 become 0.03, 0.06, 0.06.
    assert (
        paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        and paired.holm([0.9, 0.8]) == [1.0, 1.0]
        and paired.holm([]) == []
    )
    with pytest.raises(ValueError, match="no pairs"):
        paired.paired([1.0], [])


OWN = load(DEBUG)
RECORD = {"network": "n", "generated": 50, "guidance": 1.0}


def row(point: dict, seed: int, value: float, cost: float = 10.0, record: dict | None = None, twin: bool = False) -> dict:
    selector = point.get("select.selector", "interval")
    return {
        "id": json.dumps([point, seed]), "label": f"{trials.label(point)} seed={seed}", "point": point, "seed": seed, "twin": twin, "also": [], "state": "done", "error": "",
        "reports": [], "folders": {}, "selector": selector, "kept": point["select.budget"], "seen": 512, "measures": {"frechet": value, "precision": 0.5, "recall": 0.25},
        "floor": 3.0, "real": 1.0, "seconds": {"train": cost}, "cost_seconds": cost, "gpu_hours": None, "device": "", "record": record or RECORD, "config": OWN,
    }  # fmt: skip


def rows(better: float, noise: float, seeds: int = 4) -> list[dict]:
    """Two selectors at two budgets and two strengths; interval is lower by `better` at budget 60 alone."""
    rng, found = np.random.default_rng(1), []
    for selector, budget, weight, seed in itertools.product(("random", "interval"), (30, 60), (0, 0.5), range(seeds)):
        luck = 5.0 * np.random.default_rng(seed).normal()  # of the seed, the same for both: what pairing takes away
        gain = better if selector == "interval" and budget == 60 else 0.0
        value = 100.0 - budget / 2 + 4 * weight + luck - gain + noise * rng.normal()
        point = {"select.budget": budget, "select.selector": selector, "train.align_weight": weight}
        found.append(row(point, seed, float(value), cost=budget + 20.0 * (selector == "interval")))
    return found


def test_what_seeds_tell_apart_is_said_and_nothing_else() -> None:
    said = {
        (one.where, one.a, one.b): one
        for one in outcomes.comparisons(outcomes.groups(rows(6.0, 0.3), "frechet"), "frechet")
        if one.axis == "select.selector"
    }
    assert {key: one.verdict for key, one in said.items()} == {
        ("budget=30", "random", "interval"): "not told apart",
        ("budget=60", "random", "interval"): "worse",
    }
    one = said["budget=60", "random", "interval"]
    assert one.told.pairs == 4 and one.told.mean == pytest.approx(6.0, abs=0.5) and one.p is not None and one.p < 0.01
    every = {
        (one.axis, one.verdict)
        for one in outcomes.comparisons(outcomes.groups(rows(6.0, 0.3), "frechet"), "frechet")
        if one.axis != "select.selector"
    }
    assert every == {("select.budget", "worse"), ("train.align_weight", "better")}
    few = outcomes.comparisons(outcomes.groups(rows(6.0, 0.0, seeds=2), "frechet"), "frechet")
    assert {one.verdict for one in few} == {"too few seeds"} and all(one.p is None for one in few)
    nothing = outcomes.comparisons(outcomes.groups(rows(0.0, 3.0), "frechet"), "frechet")
    assert all(one.verdict == "not told apart" for one in nothing if one.axis == "select.selector")


def test_a_point_stands_for_those_that_come_to_the_same() -> None:
    """A random choice has no f: it is compared with the interval selector at every one."""
    found = []
    for seed, luck in enumerate((0.0, 0.3, 0.1, 0.2)):
        for f, value in ((0.5, 6.1), (0.75, 3.1)):
            found.append(row({"select.budget": 30, "select.selector": "interval", "select.f": f}, seed, value + luck))
        random = row({"select.budget": 30, "select.selector": "random", "select.f": 0.5}, seed, 5.1 + luck * luck)
        found.append({**random, "also": [{"select.budget": 30, "select.selector": "random", "select.f": 0.75}]})
    every = {(one.axis, one.a, one.b): one for one in outcomes.comparisons(outcomes.groups(found, "frechet"), "frechet")}
    one = every["select.selector", "interval", "random"]
    assert one.means[0] == pytest.approx((6.1 + 3.1) / 2 + 0.15) and one.verdict == "better"
    assert every["select.f", "0.5", "0.75"].means == pytest.approx((6.25, 3.25)), "f is compared where it means something"


def test_a_selector_is_compared_with_its_random_twin_where_it_is_no_axis() -> None:
    found = []
    for seed in range(4):
        found.append({**row({"select.budget": 30}, seed, 2.0 + 0.01 * seed), "selector": "interval"})
        found.append(row({"select.budget": 30, "select.selector": "random"}, seed, 3.0 + 0.02 * seed, twin=True))
    (one,) = [one for one in outcomes.comparisons(outcomes.groups(found, "frechet"), "frechet") if one.axis == "select.selector"]
    assert (one.a, one.b, one.verdict, one.where) == ("interval", "random", "better", "budget=30")
    page = report.summary(given("sweep.axes={select.budget: [30]}"), found)
    assert page["tuned"] == 1 and page["better_twin"] is None and page["best"].point == {"select.budget": 30}
    turned = [{**one, "measures": {"frechet": 9.0 - one["measures"]["frechet"]}} for one in found]
    assert report.summary(given("sweep.axes={select.budget: [30]}"), turned)["better_twin"].twin


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [(10, 5.0), (20, 6.0), (20, 4.0), (30, 4.0), (40, 1.0), (5, 9.0)]
    every = outcomes.groups([row({"select.budget": i}, 0, value, cost) for i, (cost, value) in enumerate(points)], "frechet")
    assert [(group.cost_seconds, group.mean) for group in outcomes.front(every, "frechet")] == [(5, 9.0), (10, 5.0), (20, 4.0), (40, 1.0)]
    assert outcomes.best(every, "frechet").point == {"select.budget": 4}
    assert outcomes.best(
        outcomes.groups([row({"select.budget": i}, 0, 1.0, cost) for i, cost in enumerate((3, 2, 4))], "frechet"), "frechet"
    ).point == {"select.budget": 1}


def test_numbers_of_other_measures_are_set_beside_nothing() -> None:
    other = row({"select.budget": 99}, 0, 1.0, record={**RECORD, "generated": 20})
    alike, said = outcomes.comparable([*rows(1.0, 1.0), other])
    assert other not in alike and said == [
        "1 trials are measured otherwise than the 32 shown (generated images measured), and are in results.parquet alone"
    ]


def test_the_page_says_it_all_and_the_table_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = given("sweep.seeds=[0,1,2,3]")
    found = rows(6.0, 0.3)
    failed = {
        **row({"select.budget": 60, "select.selector": "gadc", "train.align_weight": 0}, 0, 0.0),
        "state": "failed",
        "error": "no <room>",
        "measures": {},
        "record": None,
    }
    folder = tmp_path / "run" / "sweep-1"
    folder.mkdir(parents=True)
    report.write(folder, config, [*found, failed])
    page = (folder / "report.html").read_text()
    for words in (
        "budget=60 selector=interval align_weight=0", "Quality against budget", "What seeds tell apart", "What to try next", "no &lt;room&gt;", "32 trials finished, 1 failed",
        "select.budget=60 is the highest that was tried", "random against interval at budget=60", "nothing is better and cheaper", "<svg",
    ):  # fmt: skip
        assert words in page, words
    assert "fewer than 3 seeds" in page and "50 images are measured" in page
    best = load(folder / "best.yaml")
    assert best.sweep.axes == {} and best.select == OWN.select
    outcomes.write(folder / "results.parquet", [*found, failed])
    table = pq.read_table(folder / "results.parquet")
    assert len(table) == 33 and table.column("frechet").null_count == 1 and set(table.column("select.budget").to_pylist()) == {30, 60}
    assert table.column("seconds_train").to_pylist()[:1] == [30.0]
    report.show(config, folder, [*found, failed])
    printed = capsys.readouterr().out
    assert "budget=60 selector=interval align_weight=0.5  " in printed and "Fréchet distance ↓" in printed, "the table"
    assert "selector random against interval at budget=60: worse" in printed and "best: budget=60" in printed


def test_as_json_a_point_is_a_line_with_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "_process", logs.About("run", format="json"))
    with logs.results():
        report.show(given("sweep.seeds=[0,1,2,3]"), tmp_path, rows(6.0, 0.3))
    out, err = capsys.readouterr()
    said = [json.loads(line) for line in err.splitlines()]
    points = [line for line in said if "point" in line]
    assert not out and len(points) == 8 and all(line["message"] == line["message"].strip() for line in said)
    best = points[0]
    assert best["point"] == {"select.budget": 60, "select.selector": "interval", "train.align_weight": 0}
    assert (best["metric"], best["seeds"], best["images"], best["floor"], best["cost_seconds"]) == ("frechet", 4, 60, 3.0, 80.0)
    values = [one["measures"]["frechet"] for one in rows(6.0, 0.3) if one["point"] == best["point"]]
    assert best["mean"] == pytest.approx(np.mean(values)) and best["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert any(line["message"].startswith("best: budget=60") for line in said)


def test_one_seed_has_no_spread_and_prose_no_arrow(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "sweep-1"
    folder.mkdir(parents=True)
    report.write(folder, given("sweep.seeds=[0]"), [one for one in rows(6.0, 0.3) if one["seed"] == 0])
    page = (folder / "report.html").read_text()
    assert "too few seeds" in page and not re.search(r"<td>[+-][0-9.e-]+ ± ", page)
    assert re.search(r"</b>: Fréchet distance [0-9]", page)
    report.write(folder, given("sweep.seeds=[0,1]"), [one for one in rows(6.0, 0.3) if one["seed"] < 2])
    assert re.search(r"<td>[+-][0-9.e-]+ ± [0-9]", (folder / "report.html").read_text())


def test_the_pace_of_a_training_leaves_its_first_record_out() -> None:
    curve = [{"images": 100, "images_per_sec": 1.0}, {"images": 200, "images_per_sec": 50.0}, {"images": 250, "images_per_sec": 100.0}]
    assert outcomes.pace(curve) == pytest.approx(150 / (100 / 50 + 50 / 100)) and outcomes.pace(curve[:1]) == 1.0


# Work that several processes want


def test_a_maker_that_dies_is_replaced_by_who_waits(tmp_path: Path) -> None:
    """Three processes want the same folder: one makes it and is killed, one of the others goes on, the last finds it made."""
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from d2c_ray.rundir import maker
        folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
        with maker(folder, lambda text: (folder.parent / f"waiting-{name}").write_text(text)):
            if not (folder.parent / "made").exists():
                (folder.parent / f"making-{name}").touch()
                time.sleep(seconds)
                (folder.parent / "made").write_text(name)
    """)

    def started(name: str, seconds: float) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "stage-1"), name, str(seconds)], cwd=ROOT)

    def wait_for(*names: str) -> None:
        until = time.monotonic() + 60
        while not all((tmp_path / name).exists() for name in names):
            assert time.monotonic() < until, names
            time.sleep(0.01)

    first = started("a", 600)
    wait_for("making-a")
    others = [started("b", 0.5), started("c", 0.5)]
    wait_for("waiting-b", "waiting-c")
    assert not list(tmp_path.glob("making-[bc]"))
    first.kill()
    assert [process.wait(60) for process in others] == [0, 0]
    assert len(list(tmp_path.glob("making-[bc]"))) == 1, "one of them made it"
    assert "stage-1 is being made by another process" in (tmp_path / "waiting-b").read_text()
    with maker(tmp_path / "stage-1"):  # and nobody holds it
        pass


def test_a_sweep_is_planned_without_reading_an_image(tmp_path: Path) -> None:
    config = given(f"run.dir={tmp_path}")
    made = sweep.make(config)
    assert len(made.trials) == 36 and not list(tmp_path.iterdir())
    counts = {
        stage: len(made.plan.of(stage)) for stage in ("manifest", "teacher", "score", "embed", "reference", "select", "attach", "train")
    }
    # Seeds draw other random subsets and probes; attachments do not depend on their strength.
    assert counts == {"manifest": 1, "teacher": 1, "score": 1, "embed": 1, "reference": 1, "select": 14, "attach": 14, "train": 36}
    assert sweep.make(replace(config, resources=replace(config.resources, actors=2))).folder == made.folder
    assert sweep.make(given(f"run.dir={tmp_path}", "sweep.seeds=[0]")).folder != made.folder


def test_a_trial_that_has_not_begun_waits(tmp_path: Path) -> None:
    assert outcomes.read_record(tmp_path, "x")["state"] == "waiting"
    write_json(tmp_path / "trials" / "x.json", {"id": "x", "state": "done"})
    assert outcomes.read_record(tmp_path, "x")["state"] == "done"


def test_a_dry_run_says_what_it_takes_and_makes_nothing_but_the_list_of_images(tmp_path: Path) -> None:
    whole = given(f"run.dir={tmp_path}", "sweep.axes={select.budget: [20, 40]}", "sweep.seeds=[0, 1]", "sweep.concurrent=1")
    found = sweep.forecast(whole)
    assert (found["trials"], found["points"], found["twins"], found["finished"], found["concurrent"]) == (8, 4, 4, 0, 1)
    assert found["stages"]["train"] == {"folders": 8, "to_make": 8} and found["stages"]["score"] == {"folders": 1, "to_make": 1}
    assert found["stages"]["select"]["folders"] == 6, "interval draws nothing, a random choice is another with another seed"
    assert found["seconds"] == pytest.approx(found["shared_seconds"] + found["trial_seconds"]) and 5 < found["seconds"] < 3600
    assert set(found["images_per_second"]) == {"teacher", "score", "attach", "train", "sample", "reference", "evaluate"} - {"reference"}
    assert found["bytes"]["checkpoints"] > 8 * 4 * 1000 and found["bytes"]["datasets"] > 0
    assert [path.name.split("-")[0] for path in (tmp_path / "debug").iterdir() if path.is_dir() and not path.name.startswith(".")] == [
        "manifest"
    ]
    printed = "\n".join(report.forecast_lines(found))
    assert "8 trials of 4 points, 4 of them random twins; 1 at once" in printed and "hours: 0." in printed
    for node in (node for trial in sweep.make(whole).trials for node in trial.plan.nodes if not node.dir.done):
        node.folder.mkdir()
        (node.folder / "_SUCCESS.json").write_text("{}")
    found = sweep.forecast(whole)
    assert not any(stage["to_make"] for stage in found["stages"].values()) and found["trial_seconds"] == 0, "nothing is left to do"
    optuna = sweep._unknown(sweep.make(given(f"run.dir={tmp_path}", "sweep.search=optuna", "sweep.num_points=3")))
    assert len(optuna) == 3 * 3 * 2 and sum(trial.twin for trial in optuna) == 9
