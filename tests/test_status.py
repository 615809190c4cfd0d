"""How far a run is, from its folder alone: while it goes on, after whatever ended it, and from a copy in a bucket."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import DEBUG, ROOT
from faulty_s3 import S3Server

from d2c_ray import cli, logs, pipeline, stopping, sweep
from d2c_ray.config import StorageConfig
from d2c_ray.errors import Stopped, UserError
from d2c_ray.plan import Node, Plan, make
from d2c_ray.progress import Progress
from d2c_ray.report import outcomes, status
from d2c_ray.rundir import PROGRESS, run_folder, write_json

LOCAL = StorageConfig()
SILENT = {"say": lambda text: None}


def read(folder: Path, **later: float) -> dict:
    return status.read(str(folder), LOCAL, datetime.now().astimezone() + timedelta(**later))


def stages(found: dict) -> dict[str, str]:
    return {stage["stage"]: stage["state"] for stage in found["stages"]}


@contextmanager
def going_on(plan: Plan, upto: str = "report") -> Iterator[pipeline.Status]:
    """A run of this process, whose stages the test plays; SIGTERM stops it."""
    own = pipeline.Status(plan)
    with stopping.stoppable(), own.kept(upto):
        yield own


def test_a_stage_that_was_asked_for_is_all_there_is(debug_config) -> None:
    config = debug_config()
    pipeline.run(config, "manifest", **SILENT)
    found = read(run_folder(config))
    assert (found["state"], found["upto"], found["pid"]) == ("done", "manifest", os.getpid())
    first, *rest = found["stages"]
    assert (first["stage"], first["state"], first["done"], first["total"]) == ("manifest", "done", 120, 120)
    assert {stage["state"] for stage in rest} == {"waiting"}


def test_what_failed_says_why(debug_config) -> None:
    config = debug_config("select.budget=121")
    with pytest.raises(UserError, match="there are 120"):
        pipeline.run(config, **SILENT)
    found = read(run_folder(config))
    assert found["state"] == "failed" and stages(found)["manifest"] == "done"
    first, *rest = status.lines(found)
    assert "asks for 121 images; there are 120" in "\n".join(rest)
    assert first.endswith("; once that is mended, the same command goes on from here")


def test_a_run_that_goes_on_one_that_was_killed_and_one_elsewhere(debug_config) -> None:
    config = debug_config("arms.A.train.align_weight=0.5", "arms.B.select.selector=random")
    plan = pipeline.run(config, "manifest", **SILENT)
    (score,), (train, other) = plan.of("score"), plan.of("train")
    with going_on(plan) as own:
        own.set(score, "running")
        write_json(
            score.folder / PROGRESS,
            {"label": "score", "done": 30, "total": 120, "unit": "images", "rate": 9.0, "seconds": 4.0, "note": "slow"},
        )
        own.set(train, "running")
        write_json(
            train.folder / PROGRESS,
            {"label": "train", "done": 32, "total": 512, "unit": "images", "rate": 1.0, "seconds": 9.0, "note": "loss 1.000"},
        )
        (train.folder / "metrics.jsonl").write_text(
            '{"images": 64, "images_per_sec": 4.0}\n{"images": 128, "images_per_sec": 8.0}\n{"images": 25'
        )
        own.set(other, "failed", "ValueError: no number\n\nTraceback of many lines\nRayTaskError: no number")
        found = read(plan.folder)
        assert found["state"] == "running" and found["silent_sec"] < 60
        by_name = {stage["folder"]: stage for stage in found["stages"]}
        assert (by_name[score.name]["done"], by_name[score.name]["left_sec"]) == (30, 10.0)
        assert (by_name[train.name]["done"], by_name[train.name]["rate"], by_name[train.name]["left_sec"]) == (128, 8.0, 48.0)
        assert (by_name[train.name]["arms"], by_name[score.name]["arms"]) == (["A"], [])
        text = "\n".join(status.lines(found))
        for words in (
            "running",
            "30 of 120 images, 9.0 images/s, 10 s left, slow",
            "128 of 512 images",
            "train A",
            "train B",
            "ValueError: no number ... RayTaskError",
        ):
            assert words in text, text
        killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
        said = json.loads((plan.folder / "status.json").read_text())
    # As a SIGKILL leaves it; and on a machine whose processes are not seen from here.
    write_json(plan.folder / "status.json", {**said, "pid": int(killed.stdout)})
    found = read(plan.folder)
    assert found["state"] == "gone" and stages(found)["score"] == "stopped" and "left_sec" not in found["stages"][2]
    # Of a container that has this machine's name.
    write_json(plan.folder / "status.json", {**said, "pid": int(killed.stdout), "pid_namespace": 1})
    assert read(plan.folder)["state"] == "running"
    write_json(plan.folder / "status.json", {**said, "host": "elsewhere", "every_sec": 10.0})
    assert read(plan.folder, seconds=20)["state"] == "running"
    found = read(plan.folder, minutes=10)
    assert found["state"] == "silent" and "no sign of life of process" in status.lines(found)[0]


def test_signs_of_life_come_by_themselves(debug_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "HEARTBEAT_SEC", 0.02)
    config = debug_config()
    plan = pipeline.run(config, "manifest", **SILENT)
    path = plan.folder / "status.json"
    with going_on(plan):
        wait_until_rewritten(path)


def wait_until_rewritten(path: Path) -> None:
    """Returns once a file is another one, as a writer leaves it that gives a new file its name."""
    before, until = file_of(path), time.monotonic() + 60
    while file_of(path) == before:
        assert time.monotonic() < until, "it stays as it is"
        time.sleep(0.02)


def file_of(path: Path) -> tuple[int, int]:
    """Not the inode alone, which is soon given to another file."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def stopped(plan: Plan, node: Node) -> None:
    with going_on(plan) as own:
        own.set(node, "running")
        asked()


def failed_beside(plan: Plan, node: Node) -> None:
    with going_on(plan) as own:
        own.set(node, "running")
        own.ends(ValueError("the one"))
        own.set(node, "failed", "Ray went away under it")  # is not what was wrong
        raise ValueError("the one")


def test_a_full_disk_ends_no_heartbeat_and_hides_no_other_error(debug_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "HEARTBEAT_SEC", 0.02)
    plan = pipeline.run(debug_config(), "manifest", **SILENT)
    path = plan.folder / "status.json"

    def full(*names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def disturbed() -> None:
        with going_on(plan) as own:
            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", full)
                with pytest.raises(UserError, match="no room"):
                    own.write()
                time.sleep(0.2)
                own.ends(ValueError("another"))
            wait_until_rewritten(path)  # there is room again
            monkeypatch.setattr(os, "replace", full)
            raise ValueError("the one")

    with pytest.raises(ValueError, match="the one"):
        disturbed()


def test_sigterm_stops_a_run_that_then_says_so(debug_config) -> None:
    config = debug_config()
    plan = make(config)
    (score,) = plan.of("score")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        stopped(plan, score)
    assert signal.getsignal(signal.SIGTERM) == before
    assert read(plan.folder)["state"] == "stopped" and stages(read(plan.folder))["score"] == "stopped"

    with pytest.raises(ValueError, match="the one"):
        failed_beside(plan, score)
    found = read(plan.folder)
    assert stages(found)["score"] == "stopped" and found["error"] == "ValueError: the one"
    assert status.lines(found)[0].endswith("); the same command goes on from here"), "it may not come again"


def test_a_run_that_is_stopped_after_it_failed_says_why_it_failed(debug_config) -> None:
    """While it cleans up, by somebody who lost patience."""
    plan = make(debug_config())
    own = pipeline.Status(plan)
    own.ends(ValueError("the one"))
    own.ends(Stopped())
    found = read(plan.folder)
    assert (found["state"], found["error"]) == ("stopped", "ValueError: the one")


class Late:
    """Asks the process to end while it is finalised, where Python drops what is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)


def asked() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def swallowed() -> None:
    with suppress(BaseException):
        asked()


@pytest.mark.parametrize("where", [Late, swallowed])
def test_a_request_to_stop_that_gets_lost_comes_again(where: Callable[[], object]) -> None:
    cleaned: list[str] = []

    def work() -> None:
        where()
        cleaned.append("went on")
        try:
            time.sleep(30)
        finally:
            for _ in range(3):  # of whoever is impatient
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2 * stopping.AGAIN_SEC)
            cleaned.append("cleaned up")

    with pytest.raises(Stopped), stopping.stoppable():
        work()
    assert cleaned == ["went on", "cleaned up"]
    with pytest.raises(Stopped), stopping.stoppable():  # while the first exception is still known
        asked()


def test_what_is_left_of_a_lost_one_stops_nothing_later() -> None:
    before = signal.signal(signal.SIGTERM, lambda *of: pytest.fail("a signal after the block"))
    try:
        with stopping.stoppable():
            swallowed()
        time.sleep(4 * stopping.AGAIN_SEC)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_copy_in_a_bucket_says_the_same(debug_config, server: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    config = debug_config()
    pipeline.run(config, "manifest", **SILENT)
    folder = run_folder(config)
    for path in folder.rglob("*"):
        if path.is_file():
            server.put("copies", f"of/debug/{path.relative_to(folder)}", path.read_bytes())
    cli.app(["status", "s3://copies/of/debug/", "--json", f"storage.endpoint={server.endpoint}"], standalone_mode=False)
    copy, here = json.loads(capsys.readouterr().out), read(folder)
    assert copy["run"] == "s3://copies/of/debug"
    assert {**copy, "run": "", "silent_sec": 0} == {**here, "run": "", "silent_sec": 0}
    with pytest.raises(UserError, match="there is no such folder"):
        status.read("s3://copies/of/nothing", StorageConfig(endpoint=server.endpoint))


def test_a_configuration_means_its_run(debug_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = debug_config()
    pipeline.run(config, "manifest", **SILENT)
    capsys.readouterr()

    def d2c(*given: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["status", *given])
        return ended.value.code, "".join(capsys.readouterr())

    code, text = d2c(str(DEBUG), f"run.dir={tmp_path}")
    assert code == 0 and text.startswith(f"{run_folder(config)}: done up to manifest")
    for given, words in (
        ([str(DEBUG), f"run.dir={tmp_path / 'other'}"], "there is no such folder"),
        ([str(tmp_path)], "it holds no plan.json"),
        ([str(run_folder(config)), "train.lr=1"], "train.lr=1 means nothing"),
        (["gs://bucket/run"], "is not"),
    ):
        code, text = d2c(*given)
        assert code == 2 and words in text, text


def test_it_needs_neither_ray_nor_torch() -> None:
    code = "import sys; from d2c_ray.report import status; print([m for m in ('torch', 'ray', 'pyarrow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


def test_a_full_disk_is_found_in_what_ray_train_makes_of_it() -> None:
    from ray.train import ControllerError, WorkerGroupError

    for error in (OSError(errno.ENOSPC, "Error writing bytes to file"), UserError("no room is left on the disk of x")):
        for wrapped in (ControllerError(error), WorkerGroupError("one failed", {0: error})):
            found = pipeline.unwrap(wrapped)
            assert found is not None and "no room is left" in str(found)
        assert pipeline.unwrap(ControllerError(ValueError("another"))) is None


def test_what_a_stage_waits_for_is_said(debug_config) -> None:
    plan = pipeline.run(debug_config(), "manifest", **SILENT)
    (teacher,) = plan.of("teacher")
    with going_on(plan) as own:
        own.set(teacher, "running")
        own.waits(teacher, ["operator MapBatches(Scorer): \x1b[2J", "the driver stands in x"])
        found = read(plan.folder)
        assert next(stage for stage in found["stages"] if stage["stage"] == "teacher")["waits_for"][1] == "the driver stands in x"
        assert [line.strip() for line in status.lines(found) if "waits:" in line][1] == "waits: the driver stands in x"
        own.waits(teacher, [])
        assert not [line for line in status.lines(read(plan.folder)) if "waits:" in line]


def test_what_a_run_did_just_before_it_was_stopped_counts(debug_config) -> None:
    """Whoever asks it to end kills it seconds later: the stage itself may write nothing any more."""
    plan = pipeline.run(debug_config(), "manifest", **SILENT)
    (score,) = plan.of("score")
    own = pipeline.Status(plan)
    own.set(score, "running")
    with logs.working_for("score", score.name, score.folder.parent.name), Progress("score", 120, "images", score.folder) as progress:
        progress.advance(48)  # at once, so that it is not written by itself
        own.ends(Stopped())
        (stage,) = [stage for stage in read(plan.folder)["stages"] if stage["stage"] == "score"]
    assert (stage["state"], stage["done"], stage["total"]) == ("stopped", 48, 120)


def test_a_sweep_counts_its_trials(debug_config) -> None:
    config = debug_config("sweep.axes={select.selector: [interval, hardest]}", "sweep.seeds=[7]")
    planned = sweep.make(config)
    one, two, _ = planned.trials
    write_json(planned.folder / "sweep.json", {"trials": {trial.id: trial.label for trial in planned.trials}})

    def ended(trial: sweep.Trial, state: str, error: str = "") -> None:
        outcomes.write_record(planned.folder, {**sweep.about(trial), "state": state, "error": error, "folders": {}, "reports": []})

    own = pipeline.Status(planned.plan)
    with own.kept("sweep", sweep=planned.folder.name):
        ended(one, "running")
        ended(two, "failed", "no budget")
        train = planned.plan.arms[one.id]["train"].folder
        write_json(train / PROGRESS, {"done": 128, "total": 512, "unit": "images", "rate": 2.0})
        found = read(planned.plan.folder)
    assert found["sweep"]["counts"] == {"done": 0, "running": 1, "cut_off": 0, "failed": 1, "stopped": 0, "waiting": 1}
    assert found["sweep"]["running"] == [{"label": one.label, "stage": "train", "done": 128, "total": 512, "unit": "images", "rate": 2.0}]
    assert found["sweep"]["failed"] == [{"label": two.label, "error": "no budget"}]
    assert not {"train", "sample", "evaluate"} & set(stages(found)), "trials' own stages are told by trial"
    assert "3 trials: 1 running, 1 failed, 1 waiting" in "\n".join(status.lines(found))
    found = status.read(str(planned.folder), LOCAL)  # by its own folder, after the run
    assert found["sweep"]["folder"] == planned.folder.name and (found["sweep"]["counts"]["cut_off"], found["sweep"]["running"]) == (1, [])
