"""Jobs on a real Ray head of these tests' own, which asks for a token: submitted, followed, refused, failed, stopped and gone on with."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import DEBUG, ROOT
from test_refusals import model_folder

from d2c_ray import cli
from d2c_ray.config import StorageConfig, load
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

    def run(self, *args: str, **environment: str) -> tuple[int, str]:
        process = self.start(*args, **environment)
        out, _ = process.communicate(timeout=240)
        return process.returncode, out

    def submit(self, *args: str, **environment: str) -> tuple[int, str]:
        return self.run("-m", "d2c_ray.cli", "submit", CONFIG, "--address", self.address, *args, **environment)

    def ray_job(self, *args: str) -> tuple[int, str]:
        return self.run("-m", "ray.scripts.scripts", "job", args[0], "--address", self.address, *args[1:])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
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
            until = time.monotonic() + 90
            while submit.answers("127.0.0.1", dashboard):
                assert process.poll() is None and time.monotonic() < until, Path(log.name).read_text()
                time.sleep(0.2)
            yield Head(f"http://127.0.0.1:{dashboard}", {**ours, "PYTHONPATH": str(ROOT)})
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
            for one in family:
                if one.is_running():
                    one.kill()
            psutil.wait_procs(family, timeout=30)
            process.wait()
            for note in folder.rglob("ray_current_cluster"):
                note.unlink()


def test_a_job_that_succeeds_is_followed_to_its_end(head: Head, tmp_path: Path) -> None:
    code, out = head.submit("--stage", "manifest", f"run.dir={tmp_path}", "--submission-id", "first", "--metadata", "who=tests")
    assert code == 0, out
    assert re.search(r"manifest \(student\): .*120 rows", out), "its log"
    found = status.read(str(tmp_path / "debug"), StorageConfig())
    assert (found["state"], found["upto"], found["job"]) == ("done", "manifest", "first")
    code, out = head.submit("--stage", "manifest", f"run.dir={tmp_path}", "--submission-id", "first")
    assert code == 2 and "there is a job of that name (SUCCEEDED)" in out


def test_a_wrong_token_and_none(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    for path in (wrong, tmp_path / "none"):
        code, out = head.submit("--stage", "manifest", f"run.dir={tmp_path}", RAY_AUTH_TOKEN_PATH=str(path))
        assert code == 2 and "token" in out and "RAY_AUTH_TOKEN_PATH" in out and "Traceback" not in out, out
    assert not (tmp_path / "debug").exists()


def test_a_failure_gives_its_own_exit_status(head: Head, tmp_path: Path) -> None:
    # Refused in the job: only the data shows that the budget is too large.
    code, out = head.submit(f"run.dir={tmp_path}", "select.budget=121")
    assert code == 2 and "there are 120" in out and "failed with exit status 2" in out, out
    # By Ray's own command, the script of jobs/, its short form and a configuration that is wrong.
    code, out = head.ray_job(
        "submit", "--working-dir", str(ROOT), "--", "python", "jobs/pipeline.py", CONFIG, "train.lrr=3", f"run.dir={tmp_path}"
    )
    assert code != 0 and "unknown configuration key 'train.lrr'" in out, out


def test_a_stopped_job_goes_on_where_it_stopped(head: Head, tmp_path: Path) -> None:
    teacher = model_folder(tmp_path / "teacher")
    slow = (
        "score.num_timesteps=64",
        "data.limit_per_class=0",
        "data.rows_per_shard=64",
        "resources.rows_per_task=16",
        "resources.actors=1",
        "score.device_batch=8",
    )
    mine = ("--stage", "score", f"run.dir={tmp_path}", f"teacher.checkpoint={teacher}", *slow)
    process = head.start("-m", "d2c_ray.cli", "submit", CONFIG, "--address", head.address, "--submission-id", "stopped", *mine)

    def parts() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "debug").glob("scores-*/part-*.parquet")}

    until = time.monotonic() + 120
    while len(parts()) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "no shard came"
        time.sleep(0.05)
    assert status.read(str(tmp_path / "debug"), StorageConfig())["state"] == "running"
    code, out = head.ray_job("stop", "stopped")
    assert code == 0, out
    out, _ = process.communicate(timeout=60)
    before, found = parts(), status.read(str(tmp_path / "debug"), StorageConfig())
    assert process.returncode == submit.STOPPED == cli.STOPPED, out
    assert "goes on from" in out
    assert found["state"] == "stopped"
    (score,) = [stage for stage in found["stages"] if stage["stage"] == "score"]
    assert score["state"] == "stopped" and 128 <= score["done"] < score["total"] == 1797

    code, out = head.submit(*mine)
    assert code == 0, out
    (begun,) = [int(count.replace(",", "")) for count in re.findall(r"score: ([\d,]+) of 1,797 images$", out, re.MULTILINE)][:1]
    assert begun >= 64 * len(before) >= 128
    assert {path: parts()[path] for path in before} == before, "finished rows are not made again"
    (record,) = (tmp_path / "debug").glob("scores-*/_SUCCESS.json")
    assert json.loads(record.read_text())["rows_done"] == 1797
    assert status.read(str(tmp_path / "debug"), StorageConfig())["state"] == "done"


# Without a cluster


def refused(
    words: str, *overrides: str, command: str = "run", folder: str = str(ROOT), exclude: tuple[str, ...] = (), config: str | Path = DEBUG
) -> None:
    with pytest.raises(UserError, match=words):
        submit.prepare(str(config), list(overrides), command, folder, list(exclude), [])


def test_what_a_job_could_not_use_is_refused_before_anything_is_uploaded(tmp_path: Path) -> None:
    there = f"run.dir={tmp_path}"
    refused("unknown configuration key 'train.lrr'", there, "train.lrr=3")
    refused("run.dir=runs is relative.*run.dir=/shared/runs")
    refused("sweep", there, command="sweep")  # of no axes
    refused("'.*debug.yaml' is not uploaded", there, exclude=("debug.yaml",))
    refused("data.classes=.* is not uploaded", there, f"data.classes={os.path.relpath(ROOT.parent)}")
    refused("there is no such folder", there, folder=str(tmp_path / "none"))
    outside = tmp_path / "mine.yaml"
    outside.write_text(f"base: {DEBUG}\n")
    refused("mine.yaml' lies outside", there, config=outside)
    refused("debug.yaml' lies outside", there, config=outside, folder=str(tmp_path))  # its base
    with pytest.raises(UserError, match=r"no Ray cluster answers there \(.*refused"):
        submit.submit(submit.prepare(str(DEBUG), [there], "run", str(ROOT), [], []), f"http://127.0.0.1:{free_port()}", "", False, print)


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
