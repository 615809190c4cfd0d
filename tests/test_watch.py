"""What a run says and tells while it goes on: lines of JSON, numbers at Ray's Prometheus endpoint, and what a stage that stands still waits for."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from conftest import DEBUG, ROOT

from d2c_ray import cli, logs, metrics, pipeline, watch
from d2c_ray import sweep as sweeps
from d2c_ray.config import load
from d2c_ray.distributed import cluster, embed, look, pool, telemetry
from d2c_ray.distributed import score as scoring
from d2c_ray.distributed.actors import Embedder, Sampler, Scorer
from d2c_ray.job import Job
from d2c_ray.progress import Progress, rewrite
from d2c_ray.rejects import Rejects
from d2c_ray.repeating import repeating
from d2c_ray.report import gather, html, outcomes
from d2c_ray.stages import teacher
from d2c_ray.watch import Facts, Operator, Worker, explain

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "d2c.json").read_text())
SUFFIX = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
SMALL = ("teacher.train.num_images=64", "teacher.train.log_every=32", "score.num_timesteps=2", "resources.num_cpus=3", "resources.actors=1")


# A run


@dataclass
class Run:
    """A run of the command line, and what was seen of it while it went on.

    Attributes:
        numbers: the value last read of each metric, by name and tags.
        workers: lines that the run's actors and training workers left in Ray's logs.
    """

    folder: Path
    lines: list[str]
    workers: list[str]
    numbers: dict[tuple[str, frozenset[tuple[str, str]]], float] = field(default_factory=dict)


def read(numbers: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> None:
    """Reads this tool's metrics as every node exports them to Prometheus."""
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as page:
            for line in page.read().decode().splitlines():
                if line.startswith("ray_d2c_"):
                    tags = frozenset((key, value) for key, value in re.findall(r'(\w+)="([^"]*)"', line) if key in (*metrics.TAGS, "state"))
                    numbers[line.partition("{")[0], tags] = float(line.rsplit(" ", 1)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`d2c score configs/debug.yaml log.format=json`, with few steps, then images of its teacher and their features. Its Ray stays."""
    ray.shutdown()
    telemetry.forget()  # what tests before told
    folder, numbers, over = tmp_path_factory.mktemp("watched"), {}, threading.Event()

    def follow() -> None:
        while not over.wait(0.3):
            with suppress(Exception):  # before Ray is there
                read(numbers)
                for (name, tags), value in list(numbers.items()):
                    if name == "ray_d2c_images_total":
                        (folder / f"read-{dict(tags)['stage']}-{value:.0f}").touch()

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, plain_again():
        patch.setenv("RAY_metrics_report_interval_ms", "200")
        patch.setattr(pipeline, "disconnect", lambda: None)
        patch.setattr(scoring, "Scorer", rests(Scorer, "__call__", folder))
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            with redirect_stderr(said), pytest.raises(SystemExit) as end:
                cli.main(["score", str(DEBUG), f"run.dir={folder}", "run.name=small", "log.format=json", *SMALL])
            assert not end.value.code, said.getvalue()
            sample_and_measure(folder / "small", folder)
        finally:
            over.set()
            follower.join()
            logs.configure("plain")
        session = Path(os.environ["D2C_RAY_TMPDIR"]) / "session_latest" / "logs"
        workers = [line for path in session.glob("worker-*.err") for line in path.read_text().splitlines() if '"run": "small"' in line]
        yield Run(folder / "small", said.getvalue().splitlines(), workers, numbers)
    ray.shutdown()
    telemetry.forget()


@contextmanager
def plain_again() -> Iterator[None]:
    """Puts back what JSON lines change of Python's logging."""
    loggers = {logger: (list(logger.handlers), logger.level) for logger in map(logging.getLogger, ("", "ray", "ray._private.worker"))}
    try:
        yield
    finally:
        logs.configure("plain")
        logging.captureWarnings(False)
        for logger, (handlers, level) in loggers.items():
            logger.handlers[:] = handlers
            logger.setLevel(level)


def rests(actor: type, work: str, folder: Path) -> type:
    """The actor class, which rests after a unit until it is read, by a file in `folder`, how many images it has counted: they go with it."""

    def worked(self: Any, unit: Any) -> Any:
        counted = metrics.tell

        def count(name: str, value: float, *args: Any, **tags: str) -> None:
            if name == "d2c_images":
                self.images = getattr(self, "images", 0) + value
            counted(name, value, *args, **tags)

        metrics.tell = count
        try:
            return getattr(actor, work)(self, unit)
        finally:
            metrics.tell = counted
            until = time.monotonic() + 60
            while not (folder / f"read-{logs.here().stage}-{self.images:.0f}").exists() and time.monotonic() < until:
                time.sleep(0.1)
            time.sleep(1.0)  # other numbers come with them, or with the next ones

    return type(actor.__name__, (actor,), {work: worked})


def sample_and_measure(folder: Path, seen: Path) -> None:
    """What the stages sample and evaluate have actors do."""
    config = load(DEBUG, SMALL)
    share, out = cluster.share(config.resources, 1), folder / "samples"
    model = next(folder.glob("teacher-*/model"))
    arguments = {
        "model": str(model), "out": str(out), "sample": config.sample, "vae": config.vae, "evaluate": config.evaluate, "networks": {}, "device": "cpu",
        "threads": 1,
    }  # fmt: skip
    with logs.working_for("sample", "samples-01234567", "small"):
        assert len(list(pool.run_pool(rests(Sampler, "run", seen), arguments, [{"unit": 0, "start": 0, "stop": 8}], share))) == 1
    progress: Any = SimpleNamespace(advance=lambda count: None)
    with logs.working_for("evaluate", "eval-01234567", "small"):
        work = embed.of_samples(sorted(out.glob("part-*.parquet")), folder / "measured")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embed, "Embedder", rests(Embedder, "run", seen))
            embed.embed_images(config, work, share, Rejects("evaluate", 8, 0.0), progress)


def values(seen: Run, name: str, **tags: str) -> list[float]:
    return [value for (found, own), value in seen.numbers.items() if found == f"ray_{name}" and set(tags.items()) <= own]


def test_every_line_is_an_object_that_says_what_it_is_of(run: Run) -> None:
    said = [json.loads(line) for line in run.lines]
    assert all({"time", "level", "run", "stage", "folder", "message"} <= set(line) for line in said)
    assert {line["run"] for line in said} == {"small"}
    assert {"manifest", "teacher", "score"} <= {line["stage"] for line in said}
    scored = [line for line in said if line["stage"] == "score" and line.get("rows_done") == 120]
    last = [line for line in scored if "rows_total" in line][-1]  # of progress
    assert (last["rows_total"], last["unit"], last["level"]) == (120, "images", "info") and last["folder"].startswith("scores-")
    (end,) = [line for line in scored if "rows_total" not in line]  # what the command ends with
    assert (end["rows_rejected"], end["folder"], end["arms"]) == (0, last["folder"], ["student"]) and end["seconds"] > 0
    assert (run.folder / last["folder"]).is_dir()
    assert any(line["message"].startswith("score (student): ") for line in said), "what a command prints at its end is said too"
    assert not [line for line in said if line["level"] != "info" and line.get("logger") != "py.warnings"], "nothing stood still"


def test_actors_and_training_workers_say_it_the_same_way(run: Run) -> None:
    said = [json.loads(line) for line in run.workers]
    assert all(line["time"] > "2000" for line in said), "seconds that a line tells are not its time"
    assert {"score", "sample", "evaluate"} <= {line["stage"] for line in said if re.match(r"\w+ loaded in [\d.]+ s", line["message"])}
    trained = [line for line in said if "loss" in line]
    assert [(line["stage"], line["rows_done"]) for line in trained] == [("teacher", 32), ("teacher", 64)] and all(
        line["loss"] > 0 for line in trained
    )


def test_the_numbers_are_read_back_from_every_stage(run: Run) -> None:
    assert values(run, "d2c_rows_done", run="small", stage="score") == [120.0]
    assert values(run, "d2c_rows_total", run="small", stage="score") == [120.0]
    assert values(run, "d2c_rows_rejected", stage="score") == [0.0]
    assert values(run, "d2c_images_total", stage="score") == [120.0]
    assert values(run, "d2c_images_total", stage="sample") == values(run, "d2c_images_total", stage="evaluate") == [8.0]
    assert all(0 < share <= 1 for share in values(run, "d2c_actor_busy_share"))
    assert values(run, "d2c_read_bytes_total", stage="score")[0] > 120 * 60
    assert values(run, "d2c_train_images", stage="teacher")[0] in (32.0, 64.0)
    for name in ("images_per_second", "step_seconds", "loss", "grad_norm", "workers"):
        (value,) = values(run, f"d2c_train_{name}", stage="teacher")
        assert value > 0, name
    (folder,) = {value for _, own in run.numbers for key, value in own if key == "folder" and ("stage", "score") in own}
    assert (run.folder / folder / "_SUCCESS.json").is_file(), "the tag names the stage's folder"


def test_a_manifest_that_is_made_for_a_run_on_a_cluster_is_counted_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made before anything needs Ray."""

    def fail(job: Job) -> None:
        raise ValueError("the teacher is not wanted here")

    telemetry.forget()  # as a process that has not connected yet
    monkeypatch.setattr(pipeline, "disconnect", lambda: None)
    monkeypatch.setattr(teacher, "run", fail)
    words = [f"run.dir={tmp_path}", "run.name=listed", f"resources.address={ray.get_runtime_context().gcs_address}", "resources.actors=1"]
    with pytest.raises(ValueError, match="not wanted"):
        pipeline.run(load(DEBUG, words), "teacher", say=lambda text: None)

    def counted() -> list[float]:
        found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        with suppress(OSError):
            read(found)
        tags = {("run", "listed"), ("stage", "manifest")}
        return [value for (name, own), value in found.items() if name == "ray_d2c_rows_done" and tags <= own]

    until(lambda: counted() == [1.0])  # files


def test_a_sweep_counts_its_trials(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "small" / "sweep-01234567"
    for name, state in (("a", "done"), ("b", "running"), ("c", "running"), ("d", "failed")):
        outcomes.write_record(
            folder, {"id": name, "label": name, "point": {}, "seed": 0, "state": state, "error": "", "folders": {}, "reports": []}
        )
    plan: Any = SimpleNamespace(folder=folder.parent)
    telemetry.follow()
    sweeps._count(sweeps.Sweep(load(DEBUG), folder, [], plan, {}), 7, outcomes.records(folder))

    def counted() -> dict[str, float]:
        found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        with suppress(OSError):  # a node that has no time to answer
            read(found)
        return {dict(own)["state"]: value for (name, own), value in found.items() if name == "ray_d2c_sweep_trials"}

    until(lambda: counted() == {"waiting": 3.0, "running": 2.0, "done": 1.0, "stopped": 0.0, "failed": 1.0})
    read(run.numbers)
    time.sleep(3.0)  # Ray itself drops a gauge after two seconds here
    until(lambda: counted().get("running") == 2.0)


def until(condition: Callable[[], object], told: object = "", seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it never came to that {told}"
        time.sleep(0.1)


@ray.remote
class Holder:
    """Takes room."""

    def ready(self) -> None: ...


def test_a_pool_that_finds_no_room_is_named_until_it_goes_on(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    holder = Holder.options(num_cpus=3).remote()  # type: ignore[attr-defined]
    ray.get(holder.ready.remote())
    (teacher,) = run.folder.glob("teacher-*/model")
    options = ("resources.autoscaling=true", "resources.actors=1", "resources.watchdog_sec=1.5", "score.num_timesteps=2")
    config = load(DEBUG, [f"run.dir={tmp_path}", f"teacher.checkpoint={teacher}", *options])
    errors: list[BaseException] = []

    def score() -> None:
        try:
            pipeline.run(config, "score", lambda text: None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=score, daemon=True)
    thread.start()

    def status() -> dict[str, Any]:
        with suppress(FileNotFoundError):
            found = json.loads((tmp_path / "debug" / "status.json").read_text())["stages"]
            return next(value for name, value in found.items() if name.startswith("scores-"))
        return {}

    expected = (
        r"operator MapBatches\(Scorer\): 1 of 1 actor not there yet, 1 CPU each", r"\d+ x 1 CPU asked for: taken on \S+ \(0 of 3 CPU free\)",
        "actors alive: 1 Holder", r"the driver stands in d2c_ray/distributed/ingest\.py:\d+ stream .*",
    )  # fmt: skip
    last: list[str] = []

    def all_is_said() -> bool:
        """What Ray's head knows of comes a moment after the rest."""
        last[:] = status().get("waits_for", {}).get("lines", [])
        return all(any(re.fullmatch(words, line) for line in last) for words in expected)

    until(lambda: errors or all_is_said(), last)
    assert not errors, errors

    def stalled(value: float) -> bool:
        with suppress(OSError):  # a node that has no time to answer
            read(run.numbers)
        return values(run, "d2c_stage_stalled", folder=folder.name) == [value]

    folder = next((tmp_path / "debug").glob("scores-*"))
    until(lambda: json.loads((folder / "_progress.json").read_text()).get("waits_for"))
    until(lambda: stalled(1.0))
    ray.kill(holder)
    thread.join(300)
    assert not thread.is_alive() and not errors, errors
    assert status()["state"] == "done" and "waits_for" not in status()
    said = capsys.readouterr().err
    assert re.search(r"^d2c: score: no progress for \d+ s: operator MapBatches", said, re.MULTILINE)
    assert "d2c: score: goes on\n" in said
    until(lambda: stalled(0.0))


def test_every_metric_was_there(run: Run) -> None:
    """Comes after those that use the run's Ray."""
    assert {f"ray_{name}{SUFFIX[known.kind]}" for name, known in metrics.METRICS.items()} <= {name for name, _ in run.numbers}


# The dashboard


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    drawn = {
        name for panel in DASHBOARD["panels"] for target in panel.get("targets", []) for name in re.findall(r"ray_\w+", target["expr"])
    }
    assert drawn == {f"ray_{name}{SUFFIX[known.kind]}" for name, known in metrics.METRICS.items()}
    targets = " ".join(json.dumps(panel.get("targets")) for panel in DASHBOARD["panels"])
    by_tag = re.findall(r"by \(([\w, ]+)\)", targets) + re.findall(r"\{\{(\w+)\}\}", targets)
    tags = {*metrics.TAGS, *(tag for known in metrics.METRICS.values() for tag in known.tags), "le"}
    assert {tag.strip() for group in by_tag for tag in group.split(",")} <= tags


def test_grafana_can_load_the_dashboard() -> None:
    assert DASHBOARD["uid"] == "d2c-ray" and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    places = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & places, panel["title"]
        places |= cells
        if panel["type"] == "row":
            continue
        assert panel["targets"] and panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert set(re.findall(r'"\$(\w+)"', target["expr"])) <= set(variables)


def test_names_say_what_they_are_in() -> None:
    for name, known in metrics.METRICS.items():
        assert re.fullmatch(r"d2c_[a-z0-9_]+", name) and not name.endswith("_total_total") and known.text.endswith(".")
        assert (known.kind == "histogram") == bool(known.boundaries)


# Lines


def test_people_get_the_lines_they_always_got(capsys: pytest.CaptureFixture) -> None:
    logs.say("starting Ray", rows_done=3)
    with logs.results():
        print("a table")
    assert capsys.readouterr() == ("a table\n", "d2c: starting Ray\n")


def test_a_row_of_results_is_an_object_with_its_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run's students, of the classes of a selection, and of what a stage made; what is said beside them stays in one piece."""
    measures = {"frechet": 12.5, "frechet_interval": [11.0, 14.0], "kid": 0.01, "kid_error": 0.002, "precision": 0.5, "recall": 0.25}
    common = {
        "record": {"network": "n"},
        "counts": {"generated": 80, "real": 70, "subset": 30},
        "real": {"frechet": 3.0},
        "subset": {"frechet": 4.0},
    }
    found = [
        gather.Arm(name, {}, {**common, "generated": {**measures, "frechet": own}, "label_agreement": 0.75}, [], None, "all", {"train": 3.0, "score": 1.5}, {})
        for name, own in (("one", 12.5), ("two", 99.0))
    ]  # fmt: skip
    classes = {
        "label": 3,
        "name": "cat",
        "size": 9,
        "quota": 2,
        "shortfall": 0,
        "nominal_f": 0.75,
        "deepest_rank": 0.5,
        "score_min": 1.0,
        "score_max": 2.0,
    }
    monkeypatch.setattr(gather, "arms", lambda plan: found)
    monkeypatch.setattr(gather, "selection_classes", lambda node, most: (1, [classes]))
    monkeypatch.setattr(html, "notices", lambda plan, arms: ["word " * 60])
    success = {"rows_done": 80, "rows_rejected": 1, "seconds": 2.5}
    node = SimpleNamespace(
        dir=SimpleNamespace(success=lambda: success), arms=["one", "two"], folder=Path("/runs/small/selection-0"), name="selection-0"
    )
    plan = SimpleNamespace(folder=Path("/runs/small"), of=lambda stage: [node])
    for format in ("plain", "json"):
        monkeypatch.setattr(logs, "_process", logs.About("small", format=format))
        for upto in ("report", "select"):
            with logs.results():
                cli._print_results(plan, upto)
    out, err = capsys.readouterr()
    assert "Fréchet distance ↓" in out and "two" in out and "cat" in out and "{" not in out
    said = [json.loads(line) for line in err.splitlines()]
    rows = [line for line in said if "kind" in line]
    assert [(row["kind"], row["arm"], row["images"], row["frechet"]) for row in rows] == [
        ("real", "", 70, 3.0), ("student", "one", 80, 12.5), ("floor", "one", 30, 4.0), ("student", "two", 80, 99.0), ("floor", "two", 30, 4.0),
    ]  # fmt: skip
    assert rows[1] == {**rows[1], **measures, "agreement": 0.75, "network": "n", "run": "small"}
    assert rows[1]["message"] == "one: Fréchet distance 12.50, KID 0.0100, precision 0.500, recall 0.250, label agreement 75.0%"
    (bill,) = [line for line in said if line.get("arm") == "two" and "seconds" in line]
    assert (bill["seconds"], bill["seconds_training"]) == (4.5, 3.0)
    assert [line["message"] for line in said if "word" in line["message"]] == [f"note: {'word ' * 60}".strip()]
    (made,) = [line for line in said if line.get("stage") == "select"]
    assert made == {**made, **success, "folder": "selection-0", "arms": ["one", "two"]}
    (own,) = [line for line in said if "quota" in line]
    assert own == {**own, **classes, "message": "cat: 2 of 9 images"}
    assert not any(set(line["message"]) & set("│┃━┏") for line in said), "no drawn table"


def test_a_mistake_is_an_object_too(capsys: pytest.CaptureFixture) -> None:
    with plain_again(), pytest.raises(SystemExit) as end:
        cli.main(["run", str(DEBUG), "train.lrr=3", "log.format=json"])
    assert end.value.code == 2
    said = json.loads(capsys.readouterr().err)
    assert said["level"] == "error" and said["message"].startswith("unknown configuration key 'train.lrr'")


def test_lines_of_libraries_take_the_same_shape() -> None:
    made = logging.LogRecord("ray.data", logging.WARNING, "file.py", 3, "%d blocks\nare late", (4,), None)
    said = json.loads(logs.Formatter().format(made))
    assert (said["level"], said["message"], said["logger"]) == ("warning", "4 blocks\nare late", "ray.data")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["time"])


def test_logging_neither_hangs_nor_raises_where_it_is_called() -> None:
    code = """
import logging
from d2c_ray import logs

class Talks:
    def __str__(self):
        logging.getLogger("d2c_test").warning("inner")
        return "outer"

logs.configure("json", "small")
logging.getLogger("d2c_test").warning("%s", Talks())
logging.getLogger("d2c_test").warning("%d", "no number")
with logs.results():
    print("all of it", end="")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line)["message"] for line in done.stderr.splitlines() if line.startswith("{")]
    assert said == ["inner", "outer", "all of it"]


def test_work_is_repeated_until_the_block_ends() -> None:
    calls: list[float] = []
    with repeating(lambda: calls.append(time.monotonic()), 0.02, "d2c-test"):
        until(lambda: len(calls) >= 3)
        assert any(thread.name == "d2c-test" for thread in threading.enumerate())
    count = len(calls)
    time.sleep(0.1)
    assert len(calls) == count and not any(thread.name == "d2c-test" for thread in threading.enumerate())


def test_work_that_fails_is_repeated_all_the_same_and_each_failure_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    errors = [OSError("stale\nof many lines"), OSError("stale"), None, OSError("stale"), ValueError("other")]
    calls: list[Exception | None] = []

    def work() -> None:
        calls.append(errors[len(calls)] if len(calls) < len(errors) else None)
        if calls[-1] is not None:
            raise calls[-1]

    with repeating(work, 0.01, "d2c-test"):
        until(lambda: len(calls) > len(errors), 5)
    said = [line for line in capsys.readouterr().err.splitlines() if "d2c-test" in line]
    assert said == ["d2c: d2c-test: OSError: stale", "d2c: d2c-test: OSError: stale", "d2c: d2c-test: ValueError: other"]


def test_progress_that_is_over_is_not_written_again(tmp_path: Path) -> None:
    with Progress("score", 3, "images", tmp_path) as progress:
        progress.done = 2
        rewrite(tmp_path.name)
        assert json.loads((tmp_path / "_progress.json").read_text())["done"] == 2
    (tmp_path / "_progress.json").unlink()  # as the end of a stage does
    rewrite(tmp_path.name)
    progress._write()
    assert not (tmp_path / "_progress.json").exists()


# What is waited for, of Ray's own answers

HEAD, GPU = "e685ea6c3c3db67c608a940177631471c3e878acd9c1004d95a5941f", "99c1fd6c3c3db67c608a940177631471c3e878acd9c1004d95a50000"


def node(name: str, alive: bool = True, reason: str = "", **resources: float) -> dict[str, Any]:
    """As ray.nodes() gives it."""
    return {
        "NodeID": name, "Alive": alive, "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "vm", "MetricsExportPort": 45059, "DeathReason": 0,
        "DeathReasonMessage": reason, "alive": alive, "Labels": {"ray.io/node-id": name},
        "Resources": {"node:10.0.0.1": 1.0, "object_store_memory": 7462581043.0, "memory": 17412689101.0, **resources} if alive else {},
    }  # fmt: skip


def actor(name: str, state: str) -> dict[str, Any]:
    """As the head's actor table gives it."""
    return {
        "ActorID": "55fd629c125a6986ce1f273701000000", "ActorClassName": name, "IsDetached": False, "Name": "", "JobID": "01000000",
        "Address": {"IPAddress": "", "Port": 0, "NodeID": HEAD}, "State": state, "NumRestarts": 0, "Pid": 0,
    }  # fmt: skip


GROUP = {
    "placement_group_id": "7e81f9c268f0922fe75d1e4d724f01000000", "name": "", "bundles": {0: {"GPU": 1.0, "CPU": 1.0}, 1: {"GPU": 1.0, "CPU": 1.0}},
    "bundles_to_node_id": {0: "", 1: ""}, "strategy": "PACK", "state": "PENDING",
    "stats": {"end_to_end_creation_latency_ms": 0.0, "scheduling_latency_ms": 0.0, "scheduling_attempt": 1, "scheduling_state": "INFEASIBLE"},
}  # fmt: skip
ALONE = Facts(nodes=[node(HEAD, CPU=2.0)], free={HEAD: {"CPU": 0.0, "memory": 17412689101.0}})


def test_an_operator_whose_actors_find_no_gpu() -> None:
    operators = [
        Operator("MapBatches(_decode)", 0, 5, asks={"CPU": 1.0}),
        Operator("MapBatches(Scorer)", 0, 3, True, 0, 2, 0, {"CPU": 1.0, "GPU": 1.0}, after="MapBatches(_decode)"),
    ]
    facts = replace(
        ALONE,
        operators=operators,
        actors=[actor("MapWorker(MapBatches(Scorer))", "PENDING_CREATION")],
        demands=[({"CPU": 1.0, "GPU": 1.0}, 2)],
    )
    assert explain(facts, "d2c_ray/distributed/ingest.py:129 stream (in wait)") == [
        "operator MapBatches(_decode): 5 blocks queued, and no task runs (1 CPU each)",
        "operator MapBatches(Scorer): 2 of 2 actors not there yet, 1 CPU and 1 GPU each",
        "2 x 1 CPU and 1 GPU asked for: none of 1 node has 1 GPU",
        "the driver stands in d2c_ray/distributed/ingest.py:129 stream (in wait)",
    ]


def test_a_training_whose_workers_find_no_room() -> None:
    assert explain(replace(ALONE, placement_groups=[GROUP, {**GROUP, "state": "CREATED"}, {**GROUP, "state": "REMOVED"}])) == [
        "placement group 7e81f9c2 (2 x 1 CPU and 1 GPU, PACK) waits: none of 1 node has 1 GPU"
    ]


def test_room_that_others_have_taken() -> None:
    facts = replace(
        ALONE,
        actors=[actor("Blocker", "ALIVE"), actor("Sampler", "PENDING_CREATION"), actor("Sampler", "DEAD")],
        demands=[({"CPU": 1.0}, 1)],
    )
    assert explain(facts) == [
        "1 actor Sampler: waiting to be placed, or loading",
        f"1 x 1 CPU asked for: taken on 10.0.0.1/{HEAD[:8]} (0 of 2 CPU free)",
        "actors alive: 1 Blocker",
    ]


def test_a_node_that_died_and_actors_that_start_again() -> None:
    operators = [Operator("MapBatches(Scorer)", 2, 1, True, 1, 0, 1, {"CPU": 1.0})]
    facts = replace(ALONE, operators=operators, nodes=[*ALONE.nodes, node(GPU, False, "received SIGTERM")], operators_age=75.0)
    assert explain(facts) == [
        "operator MapBatches(Scorer): 1 actor being started again",
        "operator MapBatches(Scorer): 2 tasks not finished, 1 block behind them",
        "Ray Data has not turned its operators for 75 s",
        f"node 10.0.0.1/{GPU[:8]} is dead: received SIGTERM",
    ]


def test_a_training_worker_that_the_others_wait_for() -> None:
    workers = [
        Worker(0, "a", "d2c_ray/training/loop.py:190 train", 64, 3.0), Worker(1, "b", "d2c_ray/training/prefetch.py:40 take", 64, 4.0),
        Worker(2, "c", "d2c_ray/training/loop.py:190 train", 64, 3.0), Worker(3, "d", "d2c_ray/training/loop.py:190 train", 64, 300.0),
    ]  # fmt: skip
    assert explain(Facts(workers=workers, num_workers=5)) == [
        "training workers that have not reported: rank 4 of 5",
        "training worker of rank 3 on d is silent for 300 s, last in d2c_ray/training/loop.py:190 train",
        "training workers in d2c_ray/training/prefetch.py:40 take: rank 1",
        "training workers in d2c_ray/training/loop.py:190 train: rank 0, rank 2",
    ]


def test_training_workers_say_where_they_stand_until_the_training_is_over(tmp_path: Path) -> None:
    def work(rank: int, workers: int) -> None:
        beat = look.Beat(tmp_path, rank, workers)
        beat.images = 64
        with beat.beating():
            until(lambda: any(said.rank == rank for said in look._workers(tmp_path / look.WORKERS)[0]))

    work(2, 3)
    work(0, 2)  # another attempt, with fewer
    (worker,), whole = look._workers(tmp_path / look.WORKERS)
    assert (worker.rank, worker.images, whole) == (0, 64, 2) and worker.seconds_ago < 60
    assert explain(Facts(workers=[worker], num_workers=whole))[0] == "training workers that have not reported: rank 1 of 2"
    look.forget_workers(tmp_path)
    assert look._workers(tmp_path / look.WORKERS) == ([], 0)


class Clock:
    """Stands for `time` where the watchdog reads it: seconds pass when a test says so, and the watchdog looks all the time."""

    def __init__(self) -> None:
        self._now, self._looks = 1000.0, 0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._looks += 1
        time.sleep(0.005)

    def passes(self, seconds: float) -> None:
        """Lets time pass, and returns when the watchdog has looked since."""
        self._now += seconds
        looks = self._looks
        until(lambda: self._looks >= looks + 2)  # the first may end a look that began before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


def test_a_long_wait_is_logged_once_and_looked_at_by_one_thread(
    clock: Clock, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_SEC", 0.01)
    asked, silent = [], threading.Event()
    seconds = iter(range(60, 1000))

    def hangs() -> Facts:
        asked.append(1)
        silent.wait(600)
        return Facts()

    told: list[list[str]] = []
    with watch.stage(logs.About("small", "score", "scores-00000000"), 10.0, told.append, hangs):
        for _ in range(4):
            clock.passes(10.5)
    assert len(asked) == 1 and len(told) >= 4
    silent.set()
    capsys.readouterr()
    monkeypatch.setattr(watch, "LOOK_SEC", 60.0)
    told.clear()
    with watch.stage(logs.About("small", "score", "scores-1"), 10.0, told.append, lambda: Facts(silent=f"silent for {next(seconds)} s")):
        for _ in range(4):
            clock.passes(10.5)
        assert len(told) == 4 and told[0] != told[1]
        assert capsys.readouterr().err.count("no progress for") == 1
        clock.passes(100.0)
        assert capsys.readouterr().err.count("no progress for") == 1, "after ten times as long it is said again"


def test_nothing_is_said_while_there_is_progress_and_a_head_that_is_gone_is(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    def gone() -> Facts:
        raise ConnectionError("no answer")

    told: list[list[str]] = []
    about = logs.About("small", "score", "scores-00000000")
    with watch.stage(about, 10.0, told.append, gone):
        for done in range(8):
            watch.heard(about.folder, done, "score")
            clock.passes(9.0)
        assert not told and not watch.waits_for(about.folder)
        clock.passes(1.5)
        assert told and watch.waits_for(about.folder)[0] == "Ray could not be asked (ConnectionError: no answer)"
        watch.heard(about.folder, 9, "score")
        clock.passes(0.0)
        assert told[-1] == []
    said = capsys.readouterr().err
    assert said.count("no progress for") == 1 and said.count("score: goes on") == 1
    with watch.stage(about, 0.0, told.append, gone):
        assert not watch._stages, "0 switches it off"
