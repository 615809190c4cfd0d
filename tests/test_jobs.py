"""Jobs on a real Ray head of these tests' own, which asks for a token: submitted, followed, refused, failed, stopped and gone on with."""

import asyncio
import json
import logging
import os
import re
import runpy
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import ray
import requests
from aiohttp import web
from conftest import DEBUG, ROOT
from drilling import Drill, contents
from test_refusals import model_folder

from d2c_ray import cli
from d2c_ray.config import StorageConfig, load
from d2c_ray.data import tables
from d2c_ray.distributed import submit
from d2c_ray.errors import UserError
from d2c_ray.report import status
from d2c_ray.rundir import run_folder

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

CONFIG = "configs/debug.yaml"


@dataclass
class Head:
    """A head node. `environment` is that of its clients: the token's, and nothing that leads to another Ray."""

    address: str
    token: str
    environment: dict[str, str]

    def start(self, *args: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *args],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ended(process: subprocess.Popen, code: int) -> str:
    """The output of a process, which ends with that exit status."""
    out, _ = process.communicate(timeout=500)
    print(out)
    assert process.returncode == code
    return out


def free_port() -> int:
    """One below those that the system gives to whoever asks for any, and above those of Ray's workers: nobody else takes it meanwhile."""
    while True:
        with socket.socket() as listening, suppress(OSError):
            listening.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            return listening.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    ray.shutdown()  # of the tests before
    folder = Path(os.environ["D2C_RAY_TMPDIR"])
    ours = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH")}
    ours |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # of the `python` that a job calls
    }  # fmt: skip
    dashboard = free_port()
    options = {
        "port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port(), "dashboard-agent-grpc-port": free_port(),
        "metrics-export-port": free_port(), "ray-client-server-port": free_port(), "runtime-env-agent-port": free_port(), "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1", "num-cpus": 4, "object-store-memory": 150_000_000, "temp-dir": folder / "head",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        *(f"--{key}={value}" for key, value in options.items()),
    ]
    with (tmp_path_factory.mktemp("log") / "head").open("w+") as log:
        process = subprocess.Popen(command, env=ours, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            until = time.monotonic() + 300
            while submit.answers("127.0.0.1", dashboard):
                assert process.poll() is None and time.monotonic() < until, Path(log.name).read_text()
                time.sleep(0.2)
            yield Head(f"http://127.0.0.1:{dashboard}", token.read_text(), {**ours, "PYTHONPATH": str(ROOT)})
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
            for one in family:
                if one.is_running():
                    one.kill()
            psutil.wait_procs(family, timeout=30)
            process.wait()
            for note in folder.rglob("ray_current_cluster"):
                note.unlink()


def submitted(head: Head, *script: str, name: str = "") -> subprocess.Popen:
    """`ray job submit` with a script of jobs/."""
    named = ("--submission-id", name) if name else ()
    own = ("-m", "ray.scripts.scripts", "job", "submit", "--address", head.address)
    return head.start(*own, *named, "--working-dir", str(ROOT), "--", "python", *script)


# Ray's own command, which takes seconds to load and does its work once a file is there.
AT_ONCE = """
import sys, time
from pathlib import Path
from ray.scripts import scripts

go = Path(sys.argv.pop(1))
while not go.exists():
    time.sleep(0.02)
scripts.main()
"""


def driver_of(mark: str) -> psutil.Process:
    """The Python process of a job that has `mark` in its words, and not a shell around it."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if "jobs/pipeline.py" in words and mark in words and "job" not in words and "python" in Path(words[0]).name:
                    return process
        time.sleep(0.05)
    raise AssertionError("the job's driver did not come")


@pytest.mark.drill("ray job: exit statuses")
def test_each_end_of_a_job_has_its_exit_status(head: Head, tmp_path: Path, drill: Drill) -> None:
    """By `d2c submit` one that succeeds and one that only the data shows to be wrong; by Ray's own command one that succeeds and one
    whose driver is killed. Then what is refused: a configuration in the job, and a name that is taken."""
    mine = ("-m", "d2c_ray.cli", "submit", CONFIG, "--address", head.address, f"run.dir={tmp_path}")
    done = head.start(*mine, "--stage", "manifest", "--submission-id", "first", "--metadata", "who=tests")
    failed = head.start(*mine, "run.name=failed", "select.budget=121")
    plain = submitted(head, "jobs/pipeline.py", "manifest", CONFIG, "resources.address=auto", f"run.dir={tmp_path}", "run.name=plain")
    killed = submitted(head, "jobs/pipeline.py", CONFIG, "resources.address=auto", f"run.dir={tmp_path}", "run.name=killed", name="killed")
    driver = driver_of("run.name=killed")
    wait_until(lambda: (tmp_path / "killed" / "status.json").is_file(), killed)
    driver.kill()

    out = ended(done, 0)
    assert re.search(r"manifest \(student\): .*120 rows", out), "its log"
    found = status.read(str(tmp_path / "debug"), StorageConfig())
    assert (found["state"], found["upto"], found["job"]) == ("done", "manifest", "first")

    out = ended(failed, 2)
    assert "select.budget asks for 121 images; there are 120" in out and "failed with exit status 2" in out
    found = status.read(str(tmp_path / "failed"), StorageConfig())
    assert found["state"] == "failed" and "there are 120" in found["error"]

    assert re.search(r"manifest \(student\): .*120 rows", ended(plain, 0))
    assert "killed' failed" in ended(killed, 1), "Ray's own command ends with 1 whatever the job ended with"
    assert job_info(head, "killed")["driver_exit_code"] in (-9, 137), "the signal, or what a shell says of it"

    before = contents(tmp_path / "plain")
    wrong = submitted(head, "jobs/pipeline.py", CONFIG, f"run.dir={tmp_path}", "run.name=plain", "train.lrr=3", name="wrong")
    taken = head.start(*mine, "--submission-id", "first")
    assert "unknown configuration key 'train.lrr'" in ended(wrong, 1)
    assert job_info(head, "wrong")["driver_exit_code"] == 2
    assert "there is a job of that name (SUCCEEDED)" in ended(taken, 2)
    drill.refused(before, contents(tmp_path / "plain"))


def job_info(head: Head, name: str) -> dict:
    answer = requests.get(f"{head.address}/api/jobs/{name}", headers={"Authorization": f"Bearer {head.token}"}, timeout=30)
    answer.raise_for_status()
    return answer.json()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.05)


def test_a_wrong_token_and_none(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    mine = ("-m", "d2c_ray.cli", "submit", CONFIG, "--address", head.address, "--stage", "manifest", f"run.dir={tmp_path}")
    for process in [head.start(*mine, RAY_AUTH_TOKEN_PATH=str(path)) for path in (wrong, tmp_path / "none")]:
        out = ended(process, 2)
        assert "refuses the token" in out and "RAY_AUTH_TOKEN_PATH" in out and "Traceback" not in out, out
    assert not (tmp_path / "debug").exists()


@pytest.mark.drill("ray job stop, submitted again")
def test_a_stopped_job_goes_on_where_it_stopped(head: Head, tmp_path: Path, drill: Drill) -> None:
    """Stopped while it scores, it ends with the content of one that ran beside it and was not stopped."""
    slow = (
        "data.limit_per_class=52",
        "data.rows_per_shard=64",
        "score.num_timesteps=64",
        "score.device_batch=8",
        "resources.rows_per_task=16",
        "resources.actors=1",
        "run.name=debug",
        f"teacher.checkpoint={model_folder(tmp_path / 'teacher')}",
    )
    folder, twin = tmp_path / "stopped" / "debug", tmp_path / "undisturbed" / "debug"
    mine = ("-m", "d2c_ray.cli", "submit", CONFIG, "--address", head.address, "--stage", "attach", f"run.dir={folder.parent}", *slow)
    process = head.start(*mine, "--submission-id", "stopped")
    stop = head.start("-c", AT_ONCE, str(tmp_path / "go"), "job", "stop", "--address", head.address, "stopped")
    undisturbed = submitted(head, "jobs/pipeline.py", "attach", CONFIG, "resources.address=auto", f"run.dir={twin.parent}", *slow)

    def parts() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.glob("scores-*/part-*.parquet")}

    wait_until(lambda: len(parts()) >= 2, process)
    assert status.read(str(folder), StorageConfig())["state"] == "running"
    (tmp_path / "go").touch()
    ended(stop, 0)
    ended(process, submit.STOPPED)
    assert submit.STOPPED == cli.STOPPED
    before, found = parts(), status.read(str(folder), StorageConfig())
    (score,) = [stage for stage in found["stages"] if stage["stage"] == "score"]
    assert found["state"] == score["state"] == "stopped"
    unit = 16  # the last rows that were kept may not have been counted yet
    assert 2 * 64 - unit <= score["done"] < score["total"] == 520

    ended(head.start(*mine), 0)
    ended(undisturbed, 0)
    assert {path: parts()[path] for path in before} == before, "finished rows are not made again"
    (record,) = folder.glob("scores-*/_SUCCESS.json")
    assert json.loads(record.read_text())["rows_done"] == 520
    assert status.read(str(folder), StorageConfig())["state"] == "done"
    for stage in ("manifest", "scores", "selection"):
        assert table(folder, stage).equals(table(twin, stage)), stage
    made = {path.relative_to(folder): path.read_bytes() for path in folder.glob("condensed-*/part-*.parquet")}
    assert made == {path.relative_to(twin): path.read_bytes() for path in twin.glob("condensed-*/part-*.parquet")} and made
    ids = [table(run, "scores").column("sample_id").to_pylist() for run in (folder, twin)]
    drill.measured(*ids, None)


def table(folder: Path, stage: str) -> pa.Table:
    return tables.read(sorted(folder.glob(f"{stage}-*/part-*.parquet")))


# Without a cluster


@pytest.mark.parametrize("script", ["pipeline", "sweep"])
def test_the_scripts_say_how_they_are_submitted(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command lines above a script are ones that it takes, and fit a job: a file that is there, a cluster, a run folder that stays."""
    text = (ROOT / "jobs" / f"{script}.py").read_text()
    lines = re.findall(r"^ +ray job submit --working-dir \. -- python (.*)$", text, re.MULTILINE)
    assert len(lines) == {"pipeline": 2, "sweep": 1}[script]
    for line in lines:
        called: list[list[str]] = []
        path, *words = line.replace(" key=value", "").split()
        assert path == f"jobs/{script}.py"
        monkeypatch.setattr(sys, "argv", [path, *words])
        monkeypatch.setattr(cli, "main", called.append)
        runpy.run_path(str(ROOT / path), run_name="__main__")
        ((command, file, *overrides),) = called
        assert command in cli.COMMANDS and command == {"pipeline": words[0] if len(words) == 4 else "run", "sweep": "sweep"}[script]
        given = load(ROOT / file, overrides)
        assert given.resources.address == "auto" and given.run.dir.startswith("/")
        submit.prepare(str(ROOT / file), overrides, command, str(ROOT), [], [])


def refused(
    words: str, *overrides: str, command: str = "run", folder: str = str(ROOT), exclude: tuple[str, ...] = (), config: str | Path = DEBUG
) -> None:
    with pytest.raises(UserError, match=words):
        submit.prepare(str(config), list(overrides), command, folder, list(exclude), [])


def test_what_a_job_could_not_use_is_refused_before_anything_is_uploaded(tmp_path: Path) -> None:
    there = f"run.dir={tmp_path}"
    refused("unknown configuration key 'train.lrr'", there, "train.lrr=3")
    refused("run.dir=runs is relative.*/shared/runs would do")
    refused("run.dir= is relative", "run.dir=''")
    refused("sweep", there, command="sweep")  # of no axes
    refused("'.*debug.yaml' is not uploaded", there, exclude=("debug.yaml",))
    refused("data.classes=.* is not uploaded", there, f"data.classes={os.path.relpath(ROOT.parent)}")
    refused(
        r"data.path=.* is not uploaded.*every node sees would do, or s3://\.",
        there,
        "data.source=auto",
        f"data.path={os.path.relpath(ROOT.parent)}",
    )
    refused("there is no such folder", there, folder=str(tmp_path / "none"))
    outside = tmp_path / "mine.yaml"
    outside.write_text(f"base: {DEBUG}\n")
    refused("mine.yaml' lies outside", there, config=outside)
    refused("debug.yaml' lies outside", there, config=outside, folder=str(tmp_path))  # its base
    with pytest.raises(UserError, match=r"no Ray cluster answers there \(.*refused"):
        submit.submit(submit.prepare(str(DEBUG), [there], "run", str(ROOT), [], []), f"http://127.0.0.1:{free_port()}", "", False, print)
    for address in ("ftp://x", "os://head:8265"):  # of which Ray would take the scheme for a module to import
        with pytest.raises(UserError, match=rf"--address {address}: http://HEAD:8265, the dashboard's address, would do, or HEAD:PORT\.$"):
            submit.submit(submit.prepare(str(DEBUG), [there], "run", str(ROOT), [], []), address, "", False, print)


def test_what_a_job_leaves_behind_lies_where_it_stays() -> None:
    """By an absolute path, or on storage of its own: relative ones would be in Ray's copy of the folder, which it removes."""
    there = "run.dir=/shared/runs"
    refused(r"run.dir=~/runs lies in a home folder, and the cluster's is another", "run.dir=~/runs")
    for key in ("resources.checkpoint_storage", "resources.cache_dir", "tracking.mlflow_uri"):
        refused(rf"{key}=kept/here is relative", there, f"{key}=kept/here")
        refused(rf"{key}=~/kept lies in a home folder", there, f"{key}=~/kept")
    refused("tracking.mlflow_uri=sqlite:///mlflow.db is relative", there, "tracking.mlflow_uri=sqlite:///mlflow.db")
    refused("tracking.mlflow_uri=file:mlruns is relative", there, "tracking.mlflow_uri=file:mlruns")
    for given in (
        "resources.checkpoint_storage=s3://bucket/checkpoints", "resources.checkpoint_storage=/shared/checkpoints", "resources.cache_dir=/scratch",
        "tracking.mlflow_uri=http://mlflow:5000", "tracking.mlflow_uri=sqlite:////shared/mlflow.db", "tracking.mlflow_uri=file:///shared/mlruns",
        "tracking.mlflow_uri=databricks",
    ):  # fmt: skip
        submit.prepare(str(DEBUG), [there, given], "run", str(ROOT), [], [])


def test_paths_are_those_of_the_uploaded_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job works in the upload: what is beside the command's own folder counts only where the two are one."""
    root, here = tmp_path / "work", tmp_path / "work" / "sub"
    here.mkdir(parents=True)
    (root / "my.yaml").write_text("data: {source: digits, image_size: 8, channels: 1}\n")
    (root / "names.txt").write_text("zero\n")
    (here / "mine.txt").write_text("zero\n")
    monkeypatch.chdir(here)

    def prepared(*given: str) -> submit.Job:
        return submit.prepare("../my.yaml", ["run.dir=/shared/runs", *given], "run", "..", [], [])

    job = prepared()
    assert job.folder == root and job.entrypoint.split()[4] == "my.yaml"
    prepared("data.classes=names.txt")  # not here, and there
    prepared("data.classes=sub/mine.txt")
    with pytest.raises(UserError, match=r"data.classes=mine.txt is not uploaded by that name.* sub/mine.txt would do"):
        prepared("data.classes=mine.txt")  # here, and not there


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("arms.A.attach.text.encoder", ["arms={A: {attach: {text: {encoder: VALUE}}}}"]),
        ("arms.A.train.start", ["arms={A: {train: {start: VALUE}}}"]),
        ("attach.also.more.encoder", ["attach.also={more: {encoder: VALUE}}"]),
        ("evaluate.network", ["evaluate.network=VALUE"]),
        ("evaluate.more_networks", ["evaluate.more_networks=[VALUE]"]),
        ("sweep.axes.train.start", ["sweep.axes={train.start: ['', VALUE]}"]),
    ],
)
def test_weights_are_looked_for_wherever_they_may_be_named(
    key: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "work"
    shutil.copytree(ROOT / "configs", root / "configs")
    for name in ("weights/own", "weights/sent"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    monkeypatch.chdir(root)
    command = "sweep" if key.startswith("sweep") else "run"

    def prepare(value: str) -> None:
        overrides = ["run.dir=/shared/runs", *(each.replace("VALUE", value) for each in given)]
        submit.prepare("configs/debug.yaml", overrides, command, str(root), ["/weights/own"], [])

    prepare("weights/sent")
    prepare("/shared/weights/some")
    prepare("owner/model")
    with pytest.raises(UserError, match=rf"{re.escape(key)}=weights/own is not uploaded.*every node sees would do\.$"):
        prepare("weights/own")


def test_what_is_uploaded_and_how_much(tmp_path: Path) -> None:
    root = tmp_path / "work"
    for name in (".git/objects/x", "runs/a/part.parquet", ".venv/lib/y", "d2c_ray/__pycache__/z.pyc", ".pytest_cache/v", "build/lib/w", "ignored.txt", "sub/skipped.bin",
                 "outputs/old/b", "my.yaml", "d2c_ray/x.py", "data/images.tar", "src/runs/kept.py"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("12345")
    (root / "my.yaml").write_text("data: {source: digits, image_size: 8, channels: 1}\n")
    (root / ".gitignore").write_text("ignored.txt\n")
    (root / "sub" / ".rayignore").write_text("*.bin\n")
    given = [f"run.dir={root}/outputs"]
    job = submit.prepare(str(root / "my.yaml"), given, "run", str(root), ["data/*.tar"], ["team=a"])
    assert set(job.files) == {".gitignore", "sub/.rayignore", "my.yaml", "d2c_ray/x.py", "src/runs/kept.py"}
    assert job.entrypoint == f"python -m d2c_ray.cli run my.yaml resources.address=auto run.dir={root}/outputs"
    assert (job.metadata["run"], job.metadata["config"], job.metadata["team"]) == (
        str(run_folder(load(root / "my.yaml", given))),
        "my.yaml",
        "a",
    )
    with (root / "data" / "images.tar").open("wb") as file:
        file.truncate(submit.LIMIT_BYTES)  # sparse
    with pytest.raises(
        UserError, match=r"less than 512.0 MiB. Most is in data/ \(512.0 MiB\).*largest files are data/images.tar \(512.0 MiB\).*--exclude"
    ):
        submit.prepare(str(root / "my.yaml"), given, "run", str(root), [], [])


class FlakyHead:
    """The part of a head's HTTP that following a job asks, from a script: of each connection to the log what it sends, and how it ends."""

    def __init__(self, connections: list[tuple[list[str], str]], details: dict[str, object]):
        self._connections, self._details = iter(connections), {"type": "SUBMISSION", "entrypoint": "", **details}

    def __enter__(self) -> "FlakyHead":
        self._loop, started = asyncio.new_event_loop(), threading.Event()

        async def serve() -> None:
            app = web.Application()
            app.router.add_get("/api/version", self._version)
            app.router.add_get("/api/jobs/{name}", self._job)
            app.router.add_get("/api/jobs/{name}/logs/tail", self._log)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            self.address = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
            started.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert started.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self._details)

    async def _log(self, request: web.Request) -> web.WebSocketResponse:
        channel = web.WebSocketResponse()
        await channel.prepare(request)
        pieces, end = next(self._connections)
        for piece in pieces:
            await channel.send_str(piece)
        if end == "silence":
            await asyncio.sleep(30)
        elif end == "quiet and cut":
            await asyncio.sleep(4 * submit.PATIENCE_SEC)
            self._details |= self.over
            request.transport.abort()
        elif end == "cut":
            await asyncio.sleep(0.2)
            request.transport.abort()
        return channel


def follow(head: FlakyHead) -> int:
    return asyncio.run(submit._follow(submit._Client(head.address), "job", print))


def test_a_log_is_followed_over_lost_connections(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("ray.dashboard.modules.job.sdk"), "handle", told.append)
    with FlakyHead(
        [(["one\n", "two\n"], "cut"), (["one\ntwo\nth", "ree\n"], "close")], {"status": "SUCCEEDED", "driver_exit_code": 0}
    ) as head:
        assert follow(head) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert not [one for one in told if "WebSocket closed" in one.getMessage()], "of which nobody learns anything"

    monkeypatch.setattr(submit, "SILENT_SEC", 0.1)
    with FlakyHead([(["one\n"], "silence")], {"status": "FAILED", "driver_exit_code": -9}) as head:
        assert follow(head) == 137
    with FlakyHead([([], "close")], {"status": "FAILED", "message": "no room for its environment"}) as head:
        assert follow(head) == submit.LOST
    assert "no room for its environment" in capsys.readouterr().out

    monkeypatch.setattr(submit, "PATIENCE_SEC", 0.5)
    quiet = [(["one\n"], "quiet and cut"), (["one\ntwo\n"], "close")]  # for longer than patience lasts, but the head answers
    with FlakyHead(quiet, {"status": "RUNNING"}) as head:
        head.over = {"status": "SUCCEEDED", "driver_exit_code": 0}
        assert follow(head) == 0
    assert capsys.readouterr().out == "one\ntwo\n"

    with FlakyHead([], {"status": "RUNNING"}) as head:
        client = submit._Client(head.address)
    assert asyncio.run(submit._follow(client, "job", print)) == submit.LOST
    assert "what becomes of job is not known" in capsys.readouterr().out
