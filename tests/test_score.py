"""Scoring on a real Ray: one table to the bit, whatever is killed, spoilt or started again on the way."""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from conftest import DEBUG
from drilling import Drill
from faulty_s3 import FaultyProxy, S3Server, once_each
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from test_pipeline import kill, start_and_stand_still, wait_for
from test_tar import pack

from d2c_ray import pipeline
from d2c_ray import plan as plans
from d2c_ray.config import Config, ResourcesConfig, StorageConfig
from d2c_ray.data import latent_cache, ledger, tables, units
from d2c_ray.data.storage import StorageError
from d2c_ray.distributed import cluster, filling, ingest
from d2c_ray.distributed import score as scoring
from d2c_ray.distributed.actors import Scorer
from d2c_ray.errors import UserError
from d2c_ray.models import latents, teachers, weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.progress import Progress
from d2c_ray.rundir import StageDir
from d2c_ray.selection import difficulty

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

CPU = torch.device("cpu")
COLUMNS = ["sample_id", "key", "label", "score", "errors", "shard"]
FAULTS = ("503", "reset", "cut", "stall")


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    yield
    ray.shutdown()


def teacher_folder(path: Path, latent: dict) -> Path:
    """A teacher with weights that all matter: as initialised, its last layers would be zero."""
    torch.manual_seed(0)
    spec = TransformerSpec("sit", latent["side"], latent["channels"], 2, 2, 32, 2, 10)
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in Transformer(spec).state_dict().items()}
    weights.save(path, spec, {"ema": state, "raw": state}, {"latent": latent}, None)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_folder(tmp_path_factory.mktemp("teacher"), {"kind": "pixels", "channels": 1, "side": 8})


@pytest.fixture
def configured(debug_config: Callable[..., Config], teacher: Path) -> Callable[..., Config]:
    """240 digits in four shards, and a teacher that is there."""

    def make(*overrides: str) -> Config:
        return debug_config(
            f"teacher.checkpoint={teacher}", "data.limit_per_class=24", "data.rows_per_shard=64", "score.device_batch=16",
            "resources.rows_per_task=16", "resources.actors=2", *overrides,
        )  # fmt: skip

    return make


def score(config: Config) -> StageDir:
    (node,) = pipeline.run(config, "score", say=lambda text: None).of("score")
    return node.dir


def expected(config: Config) -> tuple[pa.Table, list[dict[str, str]]]:
    """The table and the rejected rows from a bare loop in this process."""
    (node,) = pipeline.run(config, "manifest", say=lambda text: None).of("manifest")
    rows, rejected = units.decode_rows(tables.read(node.dir.parts()), config.data, config.storage)
    options, judge = config.score, teachers.load(Path(config.teacher.checkpoint), CPU, config.score.precision)
    t = difficulty.timesteps(judge.kind, options.num_timesteps, options.t_min, options.t_max)
    noise = ingest.AddNoise(options.seed, options.num_timesteps, (judge.channels, config.data.image_size, config.data.image_size))(rows)
    z = torch.from_numpy(units.pixels_of(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(rows.column("label").to_numpy().astype(np.int64))
    errors = difficulty.errors(
        judge, z, labels, torch.from_numpy(np.array(tables.tensor_values(noise, "noise"))), t, options.device_batch
    ).numpy()
    table = rows.append_column("score", pa.array(difficulty.score(errors, t.numpy(), judge.kind)))
    return table.append_column("errors", pa.FixedSizeListArray.from_arrays(pa.array(errors.reshape(-1)), len(t))).select(COLUMNS), rejected


def check(folder: StageDir, wanted: tuple[pa.Table, list[dict[str, str]]]) -> None:
    """The table of a finished stage is the wanted one, to the bit and in order; no row is lost or there twice."""
    table, rejected = wanted
    found = tables.read(folder.parts())
    assert found.column("sample_id").to_pylist() == table.column("sample_id").to_pylist()
    for name in COLUMNS:
        left, right = (one.column(name).combine_chunks() for one in (found, table))
        if name == "errors":
            left, right = left.flatten(), right.flatten()
        assert left.equals(right), name
    assert len(np.unique(found.column("score").to_numpy())) > 0.9 * len(table), "scores that tell images apart"
    rows = tables.read(folder.path / "rejected.parquet").to_pylist()
    assert rows == [{"key": row["key"], "uri": row["uri"], "stage": "score", "reason": row["reason"]} for row in rejected]
    record = folder.success()
    assert (record["rows_done"], record["rows_rejected"], record["rows_in"]) == (len(table), len(rows), len(table) + len(rows))
    assert not (folder.path / "unfinished").exists()
    assert not list(folder.path.glob(".*.parquet.*"))


def ledger_files(run: Path, pattern: str = "unfinished/*.parquet") -> list[Path]:
    return sorted(run.glob(f"scores-*/{pattern}"))


class Chaos(threading.Thread):
    """Does something once, as soon as `when()`; `check` says what came of it."""

    def __init__(self, when: Callable[[], bool], what: Callable[[], None], seconds: float = 300):
        super().__init__(daemon=True)
        self.when, self.what, self.until = when, what, time.monotonic() + seconds
        self.error: BaseException | None = TimeoutError("it never came to that")

    def run(self) -> None:
        try:
            while not self.when():
                if time.monotonic() > self.until:
                    return
                time.sleep(0.02)
            self.what()
            self.error = None
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        self.join(30)
        assert self.error is None, self.error


def marked(folder: Path, pause: float) -> type:
    """A scorer that takes its time and leaves '<process id>-<node id>' of every actor that has loaded, and beside the folder what each began."""
    folder.mkdir()
    log = folder.with_suffix(".work")

    class Marked(Scorer):
        def __init__(self, **args: object):
            super().__init__(**args)  # type: ignore[arg-type]
            (folder / f"{os.getpid()}-{ray.get_runtime_context().get_node_id()}").touch()

        def __call__(self, batch: pa.Table) -> pa.Table:
            with log.open("a") as file:
                file.write(batch.column("unit")[0].as_py() + "\n")
            time.sleep(pause)
            return super().__call__(batch)

    return Marked


def redone(folder: Path, rows: int) -> float:
    """The share of rows that actors of `marked` began a second time."""
    work = [json.loads(line) for line in folder.with_suffix(".work").read_text().splitlines()]
    return sum(unit["stop"] - unit["start"] for unit in work) / rows - 1


def measure(drill: Drill, folder: StageDir, wanted: tuple[pa.Table, list[dict[str, str]]], redone: float) -> None:
    """Checks a disturbed run's table, and keeps what the disturbance cost."""
    check(folder, wanted)
    found = tables.read(folder.parts()).column("sample_id").to_pylist()
    drill.measured(found, wanted[0].column("sample_id").to_pylist(), redone)


def actors(folder: Path) -> list[tuple[int, str]]:
    return [(int(pid), node) for pid, node in (path.name.split("-") for path in sorted(folder.iterdir()))]


@pytest.mark.parametrize(
    ("precision", "num_actors", "rows_per_task", "limit"),
    [("fp32", 1, 64, 24), ("fp32", 2, 7, 24), ("fp32", 4, 1, 4), ("bf16", 1, 64, 24), ("bf16", 2, 7, 24)],
)
def test_the_table_depends_on_no_knob_and_no_order(
    configured, local_ray: None, monkeypatch: pytest.MonkeyPatch, precision: str, num_actors: int, rows_per_task: int, limit: int
) -> None:
    config = configured(
        f"score.precision={precision}", f"resources.actors={num_actors}", f"resources.rows_per_task={rows_per_task}", f"data.limit_per_class={limit}",
    )  # fmt: skip
    in_order = ledger.Ledger.todo

    def shuffled(self: ledger.Ledger, rows_per_unit: int, most: int = 0) -> list[dict]:
        work = in_order(self, rows_per_unit, most)
        random.Random(rows_per_task).shuffle(work)
        return work

    monkeypatch.setattr(ledger.Ledger, "todo", shuffled)
    if (precision, num_actors) == ("fp32", 2):
        monkeypatch.setattr(filling, "MOST_UNITS", 20)  # of 36, so that they go through Ray Data in two turns
    folder = score(config)
    assert len(folder.parts()) == -(-10 * limit // 64)
    check(folder, expected(config))
    assert folder.success()["facts"]["precision"] == precision


@pytest.mark.drill("scoring actor killed")
def test_an_actor_killed_while_it_scores_costs_nothing(
    configured, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drill: Drill
) -> None:
    monkeypatch.setattr(scoring, "Scorer", marked(tmp_path / "actors", 0.2))
    killed: list[int] = []

    def some_are_there() -> bool:
        return bool(ledger_files(tmp_path / "debug"))

    def kill_one() -> None:
        killed.append(actors(tmp_path / "actors")[0][0])
        os.kill(killed[0], signal.SIGKILL)

    chaos = Chaos(some_are_there, kill_one)
    chaos.start()
    folder = score(configured("resources.actors=1"))
    chaos.check()
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(killed[0]).status() == psutil.STATUS_ZOMBIE
    assert len(actors(tmp_path / "actors")) == 2, "the actor and one in place of it"
    monkeypatch.undo()
    measure(drill, folder, expected(configured()), redone(tmp_path / "actors", 240))


def test_an_actor_that_dies_while_it_loads_is_started_again(
    configured, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "died"

    class DiesOnce(Scorer):
        def __init__(self, **args: object):
            if not marker.exists():
                marker.touch()
                os._exit(1)
            super().__init__(**args)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "Scorer", DiesOnce)
    folder = score(configured("resources.actors=1"))
    assert marker.exists()
    check(folder, expected(configured()))


@pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
def test_an_actor_that_can_never_load_ends_the_run(
    configured, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    class Never(Scorer):
        def __init__(self, **args: object):
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)  # as the system does that has no memory left
            raise UserError("no such weights")

    monkeypatch.setattr(scoring, "Scorer", Never)
    monkeypatch.setattr(ingest, "DEATHS_WHILE_LOADING", 2)
    began = time.monotonic()
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the error is Ray's, with ours inside
        score(configured("resources.actors=1"))
    assert time.monotonic() - began < 300
    error = pipeline.unwrap(raised.value)
    assert isinstance(error, UserError)
    if dies:
        assert re.match(r"actors died 2 times while they loaded their models, on \S+\. .* \(resources\.actors\)", str(error))
    else:
        assert str(error) == "no such weights"


def test_notes_that_are_cleared_away_while_they_are_read_end_nothing(tmp_path: Path) -> None:
    """The scheduling's thread clears them when the last result is there, and the driver's counts them when it takes one."""
    loads, over = ingest._Loads(tmp_path / "loading", 1), threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            (tmp_path / "loading").mkdir()
            (tmp_path / "loading" / "note").touch()
            loads.after_execution_succeeds(None)

    thread, interval = threading.Thread(target=come_and_go), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(3000):
            loads.heard()
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_a_broken_image_is_one_rejected_row(configured, local_ray: None, cifar10: Path, tmp_path: Path) -> None:
    members = colour_members(cifar10, 40)
    broken, cut_off = 6, 70  # of members; an image and its label each
    members[broken] = (members[broken][0], b"this is no picture")
    members[cut_off] = (members[cut_off][0], members[cut_off][1][:300])
    pack(tmp_path / "source" / "x.tar", members)
    config = configured(
        f"data.path={tmp_path / 'source'}", "data.source=webdataset", "data.limit_per_class=0", "data.max_rejected=0.1", "data.rows_per_shard=16",
        "resources.rows_per_task=5", "attach.text.encoder=none", "select.budget=20",
    )  # fmt: skip
    wanted = expected(config)
    assert [row["key"] for row in wanted[1]] == ["x.tar#000003.png", "x.tar#000035.png"]
    assert all(row["reason"] for row in wanted[1]) and len(wanted[0]) == 38
    check(score(config), wanted)


def colour_members(cifar10: Path, count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Real images with their labels, as members of a tar."""
    rows = pq.ParquetFile(cifar10 / "train-000.parquet").read_row_group(0).slice(first, count).to_pylist()
    assert len(rows) == count
    return [
        member
        for number, row in enumerate(rows, first)
        for member in ((f"{number:06d}.png", row["image"]["bytes"]), (f"{number:06d}.cls", str(row["label"]).encode()))
    ]


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory, cifar10: Path, server: S3Server) -> Path:
    """240 real images as two tars and as two Parquet files, in folders and in the bucket 'pictures' under the same names."""
    root = tmp_path_factory.mktemp("colours")
    (root / "parquet").mkdir()
    for number in range(2):
        pack(root / "tars" / f"{number}.tar", colour_members(cifar10, 120, 120 * number))
        rows = pq.ParquetFile(cifar10 / "train-000.parquet").read_row_group(0).slice(120 * number, 120)
        pq.write_table(rows, root / "parquet" / f"{number}.parquet", row_group_size=50)
    for path in root.glob("*/*"):
        server.put("pictures", f"{path.parent.name}/{path.name}", path.read_bytes())
    return root


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.endpoint, stall_sec=60.0) as running:
        yield running


def remote(config: Config, kind: str, proxy: FaultyProxy, run: Path, *overrides: str) -> Config:
    """The same run on the source in the bucket, in a folder of its own."""
    from dataclasses import replace

    values = dict(override.split("=") for override in overrides)
    options = StorageConfig(proxy.endpoint, attempts=int(values.get("attempts", 8)), timeout_sec=float(values.get("timeout_sec", 30)))
    return replace(config, run=replace(config.run, dir=str(run)), data=replace(config.data, path=f"s3://pictures/{kind}"), storage=options)


def of_colours(configured: Callable[..., Config], colours: Path, kind: str) -> Config:
    return configured(
        f"data.path={colours / kind}", "data.source=auto", "data.limit_per_class=0", "attach.text.encoder=none", "select.budget=20"
    )


def planning_gets(config: Config, proxy: FaultyProxy) -> list[tuple[str, str | None]]:
    """What is asked for before the cluster: names, and both ends of every archive."""
    proxy.reset()
    plans.make(config)
    return sorted(proxy.gets)


@pytest.mark.drill("S3 with 503s, resets, cut bodies and stalls at the first try of every range")
@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_storage_that_fails_at_every_turn_gives_the_table_of_local_files(
    configured, local_ray: None, colours: Path, proxy: FaultyProxy, tmp_path: Path, kind: str, drill: Drill
) -> None:
    local = of_colours(configured, colours, kind)
    wanted = expected(local)
    config = remote(local, kind, proxy, tmp_path / "remote", "timeout_sec=2")  # of what stalls alone: an answer takes milliseconds
    pipeline.run(config, "manifest", say=lambda text: None)
    planning = planning_gets(config, proxy)
    spoil = once_each(FAULTS)
    proxy.reset(lambda number, path, tries: "ok" if number < len(planning) else spoil(number, path, tries))
    folder = score(config)
    images = proxy.gets[len(planning) :]
    spoilt = sum(proxy.counts[fault] for fault in FAULTS)
    measure(drill, folder, wanted, spoilt / (len(images) - spoilt))
    assert sorted(proxy.gets[: len(planning)]) == planning
    assert set(proxy.counts) == {*FAULTS, "ok"} and sum(proxy.counts[fault] for fault in FAULTS) >= len(set(images))
    assert set(images).isdisjoint(planning)

    proxy.reset()
    assert score(config).path == folder.path
    assert sorted(proxy.gets) == planning, "a finished run reads no image"


@pytest.mark.drill("S3 that answers nothing more; the run ends and is started again")
def test_storage_that_gives_up_ends_the_run_and_the_next_one_reads_what_is_missing(
    configured, local_ray: None, colours: Path, proxy: FaultyProxy, tmp_path: Path, drill: Drill
) -> None:
    local = of_colours(configured, colours, "tars")
    wanted = expected(local)
    config = remote(local, "tars", proxy, tmp_path / "remote", "attempts=1", "timeout_sec=600")
    pipeline.run(config, "manifest", say=lambda text: None)
    planning = planning_gets(config, proxy)
    run = tmp_path / "remote" / "debug"

    def finished_rows() -> list[Path]:
        return [*ledger_files(run), *ledger_files(run, "part-*.parquet")]

    def breaks(number: int, path: str, tries: int) -> str:
        if number < len(planning) + 6:
            return "ok"
        until = time.monotonic() + 300  # in which actors load
        while not finished_rows() and time.monotonic() < until:
            time.sleep(0.05)
        return "503"

    proxy.reset(breaks)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the error is Ray's, with ours inside
        score(config)
    error = pipeline.unwrap(raised.value)
    assert isinstance(error, StorageError) and "could not be read in 1 tries; the last one: SlowDown (HTTP 503)" in str(error)
    assert not ledger_files(run, "rejected.parquet")
    assert all(tables.metadata(path)["rejected"] == [] for path in ledger_files(run))
    there = {row for path in finished_rows() for row in tables.read(path).column("sample_id").to_pylist()}
    assert 0 < len(there) < 240

    proxy.reset()
    again: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "stream", watched(again))
        folder = score(config)
    measure(drill, folder, wanted, (len(there) + sum(again)) / 240 - 1)
    (node,) = pipeline.run(config, "manifest", say=lambda text: None).of("manifest")
    for path, asked in proxy.gets:
        if asked is None or (path, asked) in planning:
            continue
        first, last = (int(digits) for digits in asked.removeprefix("bytes=").split("-"))
        covered = {
            row["sample_id"]
            for row in tables.read(node.dir.parts()).to_pylist()
            if path.endswith(f"/{row['uri']}") and row["offset"] <= last and row["offset"] + row["length"] > first
        }
        assert covered and not covered & there, "bytes of finished rows were asked for again"


@pytest.mark.drill("shard of the source cut off before it is read, and put back")
@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_a_source_that_is_cut_off_on_the_way_ends_the_run_and_costs_nothing_once_it_is_back(
    configured, local_ray: None, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drill: Drill, kind: str
) -> None:
    shutil.copytree(colours / kind, tmp_path / "source" / kind)
    config = of_colours(configured, tmp_path / "source", kind)
    wanted = expected(config)
    monkeypatch.setattr(scoring, "Scorer", marked(tmp_path / "actors", 0.1))
    source = max((tmp_path / "source" / kind).iterdir())
    content, in_full = source.read_bytes(), filling.stream

    def cut(*args: object, **options: object) -> Iterator:
        """The run has made its plan by now."""
        source.write_bytes(content[: len(content) // 2])
        return in_full(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(filling, "stream", cut)
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the error is Ray's, with ours inside
            score(config)
    error = str(pipeline.unwrap(raised.value))
    assert source.name in error and re.search(r"of 240 images cannot be used, more than data\.max_rejected=0\.01|cut off", error), error
    assert not ledger_files(tmp_path / "debug", "_SUCCESS.json")
    source.write_bytes(content)
    measure(drill, score(config), wanted, redone(tmp_path / "actors", 240))


@pytest.mark.drill("part of an unfinished score table cut off, as by a power cut")
def test_a_part_that_is_cut_off_is_made_again_and_no_other(
    configured, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drill: Drill
) -> None:
    folder = score(configured())
    (folder.path / "_SUCCESS.json").unlink()
    first, second, *_ = folder.parts()
    second.write_bytes(second.read_bytes()[:1000])
    kept = first.stat().st_mtime_ns
    asked: list[int] = []
    monkeypatch.setattr(filling, "stream", watched(asked))
    folder = score(configured())
    assert first.stat().st_mtime_ns == kept
    measure(drill, folder, expected(configured()), sum(asked) / 240)
    assert asked == [64]

    second.write_bytes(second.read_bytes()[:1000])  # now that the table counts as finished
    with pytest.raises(UserError, match=rf"{second.name}' is cut off: 1000 bytes .* Move the folder it lies in away"):
        pipeline.run(configured(), "select", say=lambda text: None)


def watched(asked: list[int]) -> Callable[..., Iterator]:
    """`ingest.stream`, that notes how many rows it is asked for."""
    in_full = ingest.stream

    def stream(work: list[dict], *args: object, **options: object) -> Iterator:
        asked.append(sum(unit["stop"] - unit["start"] for unit in work))
        return in_full(work, *args, **options)

    return stream


def in_thread(work: Callable[[], object]) -> Callable[[float], object]:
    """Starts `work` in a thread, since nodes are taken away from the main one; gives a function that waits for its result."""
    done: list[object] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(seconds: float) -> object:
        thread.join(seconds)
        assert done, "it never ended"
        if isinstance(done[0], BaseException):
            raise done[0]
        return done[0]

    return result


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


@pytest.fixture
def nodes(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Makes a Ray of several nodes on this machine, and connects to it."""
    made: list[Cluster] = []
    folder = tempfile.mkdtemp(prefix="d2c-", dir="/tmp")

    def make(*cpus: int) -> Cluster:
        quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "metrics_report_interval_ms": 200}
        options = {"include_dashboard": False, "_system_config": quick}
        running = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "temp_dir": folder, **options})
        made.append(running)
        for count in cpus[1:]:
            running.add_node(num_cpus=count)
        ray.init(address=running.address, log_to_driver=False, logging_level=logging.WARNING)
        running.wait_for_nodes()
        return running

    monkeypatch.setattr(pipeline, "disconnect", lambda: None)
    yield make
    ray.shutdown()
    for running in made:
        running.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


KILLED = pytest.param(False, id="killed", marks=pytest.mark.drill("node of the GPU pool killed without grace and replaced"))
DRAINED = pytest.param(True, id="drained", marks=pytest.mark.drill("node of the GPU pool drained with a deadline and replaced", ci=False))


@pytest.mark.parametrize("drained", [KILLED, DRAINED])
def test_a_gpu_node_that_goes_and_is_replaced_costs_nothing(
    configured, nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drill: Drill, drained: bool
) -> None:
    """One raylet decodes, another one says that it has a GPU and holds the pool; the actors compute on their CPU."""
    running = nodes(2)
    worker = running.add_node(num_cpus=1, num_gpus=1)
    running.wait_for_nodes()
    monkeypatch.setattr(scoring, "Scorer", marked(tmp_path / "actors", 0.7))
    monkeypatch.setattr(cluster.Share, "device", "cpu")
    result = in_thread(lambda: score(configured("resources.actors=1")))
    until(lambda: ledger_files(tmp_path / "debug"))
    if drained:
        reason, deadline = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), time.time() + 5
        assert ray._raylet.GcsClient(address=running.address).drain_node(worker.node_id, reason, "taken back", int(deadline * 1000))[0]
        time.sleep(max(0.0, deadline - time.time()))
    running.remove_node(worker, allow_graceful=False)
    assert len(ledger_files(tmp_path / "debug", "part-*.parquet")) < 4, "it was over before the node was taken"
    running.add_node(num_cpus=1, num_gpus=1)
    folder = result(400)
    assert isinstance(folder, StageDir)
    assert len({node for _, node in actors(tmp_path / "actors")}) == 2
    monkeypatch.setattr(scoring, "Scorer", Scorer)
    measure(drill, folder, expected(configured()), redone(tmp_path / "actors", 240))


def ray_metrics(name: str) -> list[float]:
    """The values of a metric as every node exports them to Prometheus."""
    values = []
    for node in ray.nodes():
        with suppress(OSError), urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as page:
            lines = page.read().decode().splitlines()
            values += [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"(ray_)?{name}(_total)?[ {{]", line)]
    return values


@pytest.mark.drill("pool without room until a node joins late")
def test_a_pool_without_room_says_so_goes_on_with_a_node_that_comes_and_exports_its_numbers(
    configured, nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drill: Drill
) -> None:
    running = nodes(1)
    monkeypatch.setattr(scoring, "Scorer", marked(tmp_path / "actors", 0.5))
    said: list[str] = []
    at = Progress.at
    monkeypatch.setattr(Progress, "at", lambda self, done, note="": (said.append(note), at(self, done, note))[1])
    monkeypatch.setattr(ingest, "QUIET_SEC", 1.0)
    config = configured("resources.actors=1", "resources.autoscaling=true")
    result = in_thread(lambda: score(config))
    until(lambda: any("waiting for capacity" in text for text in said))
    assert "waiting for capacity: 1 actors of 1 CPU leave no CPU to decode on" in said
    running.add_node(num_cpus=1)
    told: list[list[float]] = []

    def some_images() -> bool:
        told[:] = ray_metrics("d2c_images"), ray_metrics("d2c_actor_busy_share")  # both at once: they go with their actor
        return all(told) and max(told[0]) >= 32

    until(some_images)
    (images,), (busy,) = told
    assert 32 <= images <= 240 and images % 16 == 0
    assert 0 < busy < 0.9, "it rests half a second before every unit"
    folder = result(400)
    assert isinstance(folder, StageDir)
    measure(drill, folder, expected(configured()), redone(tmp_path / "actors", 240))


def test_a_driver_killed_while_it_scores_loses_what_had_not_come_back(configured, no_ray: None, teacher: Path, tmp_path: Path) -> None:
    config = configured()
    args = (
        "score", str(DEBUG), f"run.dir={tmp_path}", f"teacher.checkpoint={teacher}", "data.limit_per_class=24", "data.rows_per_shard=64",
        "score.device_batch=16", "resources.rows_per_task=1", "resources.actors=1",
    )  # fmt: skip
    process = start_and_stand_still("unfinished/000002-000??5-*.parquet", tmp_path / "stands-still", *args)
    wait_for((tmp_path / "stands-still").exists, process)
    kill(process)
    assert not ledger_files(tmp_path / "debug", "_SUCCESS.json")
    parts = ledger_files(tmp_path / "debug", "part-*.parquet")
    kept = {path: path.stat().st_mtime_ns for path in parts}
    # A set: killed between a part and the removal of its runs, the disk holds rows twice, and the next run drops the runs.
    there = {row for path in [*parts, *ledger_files(tmp_path / "debug")] for row in tables.read(path).column("sample_id").to_pylist()}
    assert 0 < len(there) < 240
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "stream", watched(asked))
        folder = score(config)
    assert asked == [240 - len(there)], "the last run is asked for what is missing"
    assert len(kept) == 2 and {path: path.stat().st_mtime_ns for path in kept} == kept
    check(folder, expected(config))


def test_kept_latents_change_no_score_and_are_what_attach_would_encode(configured, local_ray: None, cifar10: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4, sample_size=16, **kinds).save_pretrained(
        tmp_path / "vae"
    )
    pack(tmp_path / "source" / "x.tar", colour_members(cifar10, 60))
    options = (
        f"data.path={tmp_path / 'source'}", "data.source=webdataset", "data.limit_per_class=0", "data.image_size=16", "data.channels=3", "data.flip=true",
        f"vae.path={tmp_path / 'vae'}", "attach.text.encoder=none", "attach.vision.encoder=none", "attach.rows_per_part=8", "select.budget=20",
        "resources.rows_per_task=7", "resources.actors=1", f"teacher.checkpoint={tmp_path / 'judge'}",
    )  # fmt: skip
    teacher_folder(tmp_path / "judge", latents.latent_facts(configured(*options[:-1])))
    without = configured(*options, f"run.dir={tmp_path / 'without'}")
    kept = configured(*options, f"run.dir={tmp_path / 'kept'}", "score.cache_latents=true")
    found = {}
    for name, config in (("without", without), ("kept", kept)):
        plan = pipeline.run(config, "attach", say=lambda text: None)
        found[name] = [plan.of(stage)[0].dir for stage in ("score", "attach")]
    (scores, condensed), (scores_kept, condensed_kept) = found["without"], found["kept"]
    assert (scores.path.name, condensed.path.name) == (scores_kept.path.name, condensed_kept.path.name)
    assert tables.read(scores.parts()).equals(tables.read(scores_kept.parts()))
    assert tables.read(condensed.parts()).equals(tables.read(condensed_kept.parts()))
    assert len(tables.read(condensed.parts())) == 20 and "latent_mean" in tables.read(condensed.parts()).column_names
    assert not (scores.path / scoring.LATENTS).exists()
    rows = tables.read(plan.of("manifest")[0].dir.parts())
    everything = latent_cache.read(scores_kept.path / scoring.LATENTS, rows, True)
    assert everything is not None and everything["latent_mean"].shape == (60, 2, 2, 8, 8)


def test_room_is_counted_node_by_node() -> None:
    assert cluster.room([(4.0, 0.0), (2.0, 0.0)], 0) == 6
    assert cluster.room([(8.0, 2.0), (1.0, 4.0), (16.0, 0.0)], 1.0) == 3
    assert cluster.room([(8.0, 1.0)], 0.1) == 8
    assert cluster.room([(16.0, 1.0)], 0.1) == 10, "not nine by rounding"
    assert cluster.room([(8.0, 1.0), (8.0, 1.0)], 2.0) == 0, "no actor is split over two nodes"
    assert cluster.room([], 0) == 0
    assert cluster.decode_cpus([(8.0, 2.0), (1.0, 4.0)], 3, 1.0) == 6
    assert cluster.decode_cpus([(2.0, 0.0)], 2, 0) == 0
    assert cluster.decode_cpus([(2.0, 0.0)], 5, 0) == 0, "what does not fit takes no CPU"


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def make(*nodes: tuple[float, float]) -> None:
        monkeypatch.setattr(cluster, "nodes", lambda: list(nodes))
        monkeypatch.setattr(cluster, "total_gpus", lambda: int(sum(gpus for _, gpus in nodes)))

    return make


@pytest.mark.parametrize(
    ("nodes_there", "options", "words"),
    [
        ([(2.0, 0.0)], {"actors": 2}, r"2 actors of one CPU and one free CPU for decoding want 3 CPUs; Ray has 2 .*resources\.actors=1.*resources\.num_cpus=3"),
        ([(8.0, 1.0)], {"actors": 2}, r"resources\.actors=2 with resources\.gpus_per_actor=1\.0 want 2 GPUs; the cluster has 1.*autoscaling=true"),
        ([(1.0, 2.0), (8.0, 0.0)], {"actors": 2}, r"do not fit on the nodes \(1 CPU 2 GPU, 8 CPU\), which hold 1\. resources\.actors=1 would do"),
        ([(1.0, 1.0)], {"actors": 1}, r"1 actor of one CPU and one free CPU for decoding want 2 CPUs; Ray has 1 \(1 CPU 1 GPU\)\. More logical CPUs \(resources\.num_cpus=2\) would do"),
        ([(1.0, 0.0)], {"actors": 1, "address": "auto"}, r"want 2 CPUs; Ray has 1 \(1 CPU\)\. A cluster with 2 CPUs would do"),
        ([(4.0, 0.0)], {"actors": 1, "train_workers": 5}, r"resources\.train_workers=5 wants 5 CPUs; the cluster has 4\.$"),
        ([(4.0, 0.0)], {"actors": 1, "train_gpus": 1}, r"resources\.train_workers=1 wants 1 GPUs; the cluster has 0\. resources\.train_gpus=0 .*autoscaling=true"),
        ([(8.0, 1.0)], {"actors": 1, "train_gpus": 0, "train_workers": 9}, r"resources\.train_workers=9 wants 9 CPUs; the cluster has 8\.$"),
    ],
)  # fmt: skip
def test_what_the_cluster_cannot_hold_is_refused(alive: Callable[..., None], nodes_there: list, options: dict, words: str) -> None:
    alive(*nodes_there)
    with pytest.raises(UserError, match=words):
        cluster.preflight(ResourcesConfig(**options))
    cluster.preflight(ResourcesConfig(**options, autoscaling=True))


def test_logical_cpus_are_offered_of_a_local_ray_alone(alive: Callable[..., None]) -> None:
    alive((2.0, 0.0))
    with pytest.raises(UserError, match=r"Ray has 2 \(2 CPU\)\. resources\.actors=1 would do\. With nodes that come") as refused:
        cluster.preflight(ResourcesConfig(actors=9, address="auto"))
    assert "num_cpus" not in str(refused.value)


def test_what_fits_is_not_refused(alive: Callable[..., None]) -> None:
    alive((3.0, 0.0))
    cluster.preflight(ResourcesConfig(actors=2))
    alive((2.0, 1.0), (2.0, 1.0))
    cluster.preflight(ResourcesConfig(actors=2))
    cluster.preflight(ResourcesConfig(actors=2, gpus_per_actor=0.5))


def test_a_training_takes_gpus_that_are_still_to_come(alive: Callable[..., None]) -> None:
    """On a cluster that has let its GPU nodes go, the actors' wish is the training's."""
    alive((4.0, 0.0))
    for options, on_gpus in (
        ({}, False), ({"gpus_per_actor": 0.5}, True), ({"gpus_per_actor": 0.0}, False), ({"train_gpus": 1}, True),
        ({"gpus_per_actor": 1.0, "train_gpus": 0}, False),
    ):  # fmt: skip
        resources = ResourcesConfig(actors=2, autoscaling=True, **options)
        cluster.preflight(resources)
        assert cluster.train_on_gpus(resources) == on_gpus, options
    assert cluster.training_waits_for(2, True) == "waiting for capacity: 2 GPUs asked for, the cluster has 0"
    assert cluster.training_waits_for(4, False) == "starting"
    alive((4.0, 2.0))
    assert cluster.training_waits_for(2, True) == "starting"
    for options, on_gpus in (({}, True), ({"gpus_per_actor": 0.0}, True), ({"train_gpus": 0}, False)):
        assert cluster.train_on_gpus(ResourcesConfig(**options)) == on_gpus, options


def test_it_is_said_what_a_silent_pool_waits_for(alive: Callable[..., None]) -> None:
    alive((2.0, 1.0), (4.0, 0.0))
    assert (
        cluster.waiting_for(cluster.Share(3, 1.0, 16, 1))
        == "waiting for capacity: 3 actors of 1 CPU and 1 GPU asked for, the cluster's 2 nodes hold 1"
    )
    assert cluster.waiting_for(cluster.Share(3, 1.0, 16, 1, min_actors=1)) == "waiting for the first results of new actors"
    alive((2.0, 0.0))
    assert cluster.waiting_for(cluster.Share(2, 0.0, 16, 1)) == "waiting for capacity: 2 actors of 1 CPU leave no CPU to decode on"


def test_a_local_ray_of_another_run_is_no_cluster(local_ray: None) -> None:
    """`auto` finds it, and Ray would try for minutes to reach it from outside, where it does not listen."""
    own = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}  # of those that this machine runs, this one
    code = "from ray._private import services; print(services.canonicalize_bootstrap_address('auto'))"
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True, check=True, timeout=120)
    if found.stdout.strip() == own["RAY_ADDRESS"]:
        pytest.skip("this machine has no address but the inner one")
    code = "from d2c_ray.config import ResourcesConfig; from d2c_ray.distributed import cluster; cluster.connect(ResourcesConfig(address='auto'))"
    refused = subprocess.run([sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True, timeout=120)
    assert re.search(r"UserError: resources.address=auto: no Ray cluster answers there \(.*refused, at ", refused.stderr), refused.stderr
