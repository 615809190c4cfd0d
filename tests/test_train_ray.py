"""Training on a real local Ray: workers, drivers and nodes that die, other numbers of workers, storages near and far."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psutil
import pytest
import ray
import torch
import torch.multiprocessing
from conftest import ROOT
from drilling import Drill
from faulty_s3 import ACCESS_KEY, SECRET_KEY, FaultyProxy, S3Server
from pyarrow import fs
from ray.train import TrainingFailedError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2.api.preemption import PreemptionInfo
from test_cache import write

from d2c_ray.config import Config, ResourcesConfig, StorageConfig, TrainConfig
from d2c_ray.data import condensed
from d2c_ray.distributed import checkpoints, process_group, trainer
from d2c_ray.errors import UserError
from d2c_ray.models import weights
from d2c_ray.models.transformer import TransformerSpec
from d2c_ray.training import state

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

BATCH = 32
SPEC = TransformerSpec("sit", 8, 3, 2, 1, 32, 2, 10, vision_width=12, align_depth=1, align_hidden=16)
TRAIN = TrainConfig(
    num_images=BATCH * 300, batch_size=BATCH, lr=2e-3, ema_decay=0.9, ema_also=[0.5], precision="fp32", log_every=BATCH,
    checkpoint_every=BATCH * 30, keep_every=BATCH * 120,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real digits as a condensed dataset, with pictures of themselves as tokens."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.repeat(digits.images[:200, :, :, None] * 15.9, 3, 3).astype(np.float16) / 255
    both = np.stack([pixels, pixels[:, :, ::-1]], 1)  # N x F x H x W x C
    tokens = both.reshape(200, 2, 4, 2, 4, 2, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(200, 2, 16, 12)
    return write(
        tmp_path_factory.mktemp("data") / "condensed",
        {
            "sample_id": np.arange(200), "label": digits.target[:200].astype(np.int64),
            "latent_mean": np.ascontiguousarray(both.transpose(0, 1, 4, 2, 3)), "latent_std": np.full((200, 2, 3, 8, 8), 0.05, np.float16),
            "vision": (tokens * 100 + 1).astype(np.int8), "vision_scale": np.ones((200, 2, 16), np.float32),
        },
        provenance=False,
    )  # fmt: skip


def fit(
    data: Path,
    out: Path,
    train: TrainConfig = TRAIN,
    workers: int = 1,
    storage: StorageConfig | None = None,
    after: Path | None = None,
    **resources: object,
):
    out.mkdir(parents=True, exist_ok=True)
    config = Config(
        storage=storage or StorageConfig(),
        resources=ResourcesConfig(**{"cache_dir": str(data.parent / "cache"), "keep_cache": True, **resources}),  # type: ignore[arg-type]
    )
    return trainer.fit(config, SPEC.to_dict(), train, data, trainer.condensed_facts(data), out, workers, after=after)


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == sorted({record["images"] for record in records}), "every step's metrics once"
    return {record["images"]: record["loss"] for record in records}


def once(condition: Callable[[], object], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)


def train_workers() -> list[psutil.Process]:
    """The training workers of this test's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and "RayTrainWorker" in process.cmdline()[0]:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def saved(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoints/checkpoint_*/state.json"))


def _undisturbed(rank: int, world_size: int, data: Path, out: Path) -> None:
    """A whole training without Ray, as process `rank` of so many: what every disturbed one must equal."""
    from d2c_ray.training import loop

    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world_size)
    opened = replace(condensed.open(data, data.parent / "cache").training_set(), text_states=None, text_mask=None)

    def log(values: dict) -> None:
        if rank == 0:
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")

    def checkpoint(step: int, save: state.Saver) -> None:
        if rank == 0:
            save(out)

    loop.train(SPEC, TRAIN, opened, device=torch.device("cpu"), rank=rank, world_size=world_size, log=log, checkpoint=checkpoint)
    if world_size > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    _undisturbed(0, 1, data, out)
    return out


@pytest.fixture(scope="module")
def two_undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes: other bits than one's, since their gradients are added in another order."""
    out = tmp_path_factory.mktemp("two-undisturbed")
    torch.multiprocessing.spawn(_undisturbed, (2, data, out), nprocs=2)
    return out


def same_state(one: Path, other: Path) -> None:
    for which in ("model", "ema", "ema-0.5"):
        found = state.weights(other, which)
        assert found and all(torch.equal(value, found[key]) for key, value in state.weights(one, which).items()), which


@pytest.mark.drill("training worker killed, one of two")
def test_a_killed_worker_of_two_costs_no_bit(local_ray: None, data: Path, two_undisturbed: Path, tmp_path: Path, drill: Drill) -> None:
    """The other one fails in the middle of a step. And on the way: what is kept, what is dropped, and that nothing is left behind."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    killed: list[int] = []
    back: list[int] = []
    copies: list[tuple[int, int]] = []

    def copy() -> tuple[int, int]:
        (labels,) = cache.glob("condensed-*/label.npy")
        return labels.stat().st_ino, labels.stat().st_mtime_ns

    def kill() -> None:
        once(lambda: len(losses_so_far(out)) > 60 and saved(out))
        # Rank 0 writes the metrics. The other one is killed, so that the first of the node fails and is still there.
        before = {worker: worker.io_counters().write_chars for worker in train_workers()}
        time.sleep(0.5)
        written = {worker: worker.io_counters().write_chars - count for worker, count in before.items()}
        assert len(written) == 2
        copies.append(copy())
        file = (out / "metrics.jsonl").stat().st_ino
        os.kill(min(written, key=lambda worker: written[worker]).pid, signal.SIGKILL)
        killed.append(len(losses_so_far(out)))
        once(lambda: (out / "metrics.jsonl").stat().st_ino != file)  # what goes on writes it anew, and is soon as far as it was
        back.append(min(killed[0], len(losses_so_far(out))))
        once(lambda: len(losses_so_far(out)) > killed[0])
        copies.append(copy())

    thread = threading.Thread(target=kill)
    thread.start()
    result = fit(data, out, workers=2, cache_dir=str(cache), keep_cache=False)
    thread.join()
    assert killed and killed[0] < 300, "it was killed on the way"
    assert losses(out) == losses(two_undisturbed)
    same_state(two_undisturbed, Path(result.path))
    assert len(saved(out)) == TRAIN.keep_checkpoints
    kept = sorted(path.name for path in (out / "kept").iterdir())
    assert kept == ["images-000003840", "images-000007680"], "and no temporary name"
    assert json.loads((out / "kept" / kept[0] / "state.json").read_text())["step"] == 120
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "kept", "metrics.jsonl"]
    assert len(set(copies)) == 1 and len(copies) == 2, "the second attempt trained from the first one's copy"
    assert not list(cache.glob("condensed-*/")), "which went when training had ended"
    drill.measured(losses(out), losses(two_undisturbed), (killed[0] - back[0]) / 300)


def test_a_training_that_fails_for_good_leaves_no_copy(local_ray: None, data: Path, tmp_path: Path) -> None:
    """Its workers leave it to the next attempt; the driver knows that there is none."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    (out / "metrics.jsonl").mkdir(parents=True)  # which no worker can write to
    with pytest.raises(TrainingFailedError, match="Is a directory"):
        fit(data, out, cache_dir=str(cache), keep_cache=False, max_failures=0)
    assert list(cache.iterdir()) and not list(cache.glob("condensed-*/")), "nothing but the lock"


def losses_so_far(out: Path) -> list[str]:
    try:
        return (out / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []


def test_a_killed_driver_costs_no_bit(local_ray: None, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The driver is another process, with a Ray of its own; the second attempt runs on this one's."""
    out = tmp_path / "out"
    script = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from d2c_ray.config import ResourcesConfig
        from d2c_ray.distributed import cluster
        from test_train_ray import fit
        if __name__ == "__main__":
            cluster.connect(ResourcesConfig(num_cpus=4))
            fit(Path({str(data)!r}), Path({str(out)!r}))
    """)
    (tmp_path / "driver.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], env=environment)
    once(lambda: (len(losses_so_far(out)) > 60 and saved(out)) or driver.poll() is not None)
    assert driver.poll() is None
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=30)
    assert len(losses_so_far(out)) < 300
    left = out / "checkpoints" / "checkpoint_that_was_on_its_way"
    left.mkdir()
    result = fit(data, out)
    assert losses(out) == losses(undisturbed)
    assert not left.exists() and len(saved(out)) == TRAIN.keep_checkpoints
    same_state(undisturbed, Path(result.path))


@pytest.mark.drill("training node joins late, another is drained with a deadline")
def test_workers_come_and_go_with_their_nodes(data: Path, undisturbed: Path, tmp_path: Path, drill: Drill) -> None:
    """One of up to three workers starts, since there is room for one. A node comes and brings another; it is drained, and the first goes on.

    Both times the training goes on from where the node's coming or the notice of its going was seen: there is no other checkpoint.
    """
    out = tmp_path / "out"
    (tmp_path / "driver.py").write_text(
        textwrap.dedent(f"""
        import json, os, sys, threading, time
        from dataclasses import replace
        from pathlib import Path
        import ray
        from ray.cluster_utils import Cluster
        from ray.core.generated import autoscaler_pb2
        from d2c_ray.distributed import trainer
        from test_train_ray import BATCH, TRAIN, fit, once, workers_of

        def come_and_go(cluster):
            out = Path({str(out)!r})
            once(lambda: workers_of(out).count(1) > 15)
            node = cluster.add_node(num_cpus=1)
            once(lambda: workers_of(out).count(2) > 10)
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            deadline = int(time.time() * 1000) + 9000
            print(ray._raylet.GcsClient(address=cluster.address).drain_node(node.node_id, reason, "taken back", deadline), flush=True)

        if __name__ == "__main__":
            trainer.GROW_SEC = 6.0
            cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False}})
            cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False)
            train = replace(TRAIN, num_images=BATCH * 10_000, checkpoint_every=10**9, keep_every=0)
            args = Path({str(data)!r}), Path({str(out)!r}), train, 3
            training = threading.Thread(target=fit, args=args, kwargs=dict(train_workers_min=1, micro_batch=1), daemon=True)
            training.start()
            come_and_go(cluster)  # in the main thread, where alone nodes can be started
            training.join()
        """)
    )
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "RAY_TMPDIR": os.environ["D2C_RAY_TMPDIR"], "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    }  # fmt: skip
    driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], env=environment)

    lengths = [0]

    def turns() -> list[tuple[int, int]]:
        """Numbers of workers in the order they took steps, and how many steps each took."""
        steps_of = workers_of(out)
        if steps_of:  # none: a line is being written
            lengths.append(len(steps_of))
        return [(workers, len(list(steps))) for workers, steps in itertools.groupby(steps_of)]

    try:
        once(lambda: (len(turns()) == 3 and turns()[2][1] >= 20) or driver.poll() is not None, 250)
        seen, lines = turns(), losses_so_far(out)
    finally:
        family = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        driver.kill()
        driver.wait()
        for child in family:
            if child.is_running():
                child.kill()
    assert [workers for workers, _ in seen] == [1, 2, 1] and all(steps > 10 for _, steps in seen), seen
    expected = losses(undisturbed)
    for record in map(json.loads, lines[: len(expected)]):
        assert record["loss"] == pytest.approx(expected[record["images"]], rel=1e-5)
    assert sum(steps for _, steps in seen[:2]) < len(expected), "each turn is among what was compared"
    images = [json.loads(line)["images"] for line in lines]
    again = sum(max(0, before - after) for before, after in itertools.pairwise(lengths))
    drill.measured(images, range(BATCH, BATCH * len(lines) + 1, BATCH), again / len(lines))


def workers_of(out: Path) -> list[int]:
    """How many workers took each step so far."""
    try:
        return [json.loads(line)["workers"] for line in losses_so_far(out)]
    except json.JSONDecodeError:  # a line that is being written
        return []


def test_other_numbers_of_workers_go_on_with_the_same_run_on_s3(
    local_ray: None, server: S3Server, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two workers, then one, then two again; every checkpoint lies in a bucket alone."""
    server.put("states", "made", b"")
    storage = StorageConfig(endpoint=server.endpoint)
    expected = losses(undisturbed)
    for part, workers in enumerate((2, 1, 2), start=1):
        options = replace(TRAIN, num_images=BATCH * 30 * part, keep_every=BATCH * 60)
        result = fit(data, tmp_path / "run" / "stage", options, workers, storage, checkpoint_storage="s3://states/all")
        found = losses(tmp_path / "run" / "stage")
        assert len(found) == 30 * part
        for images in sorted(found)[-30:][:20]:
            assert found[images] == pytest.approx(expected[images], rel=1e-5)
    assert isinstance(result.filesystem, fs.S3FileSystem) and result.path.startswith("states/all/run/stage/checkpoints/checkpoint_")
    with result.as_directory() as folder:
        assert json.loads((Path(folder) / "state.json").read_text())["step"] == 90
    place = checkpoints.place("s3://states/all/run/stage", storage)
    folder = "states/all/run/stage/kept"
    kept = {info.path for info in place.filesystem.get_file_info(fs.FileSelector(folder, recursive=True)) if info.is_file}
    assert kept == {f"{folder}/images-000001920/{name}" for name in (state.STATE, state.META)}
    assert [path.name for path in (tmp_path / "run" / "stage").iterdir()] == ["metrics.jsonl"]
    shown = repr(place) + json.dumps(asdict(storage))
    assert ACCESS_KEY not in shown and SECRET_KEY not in shown


def test_a_storage_that_cannot_be_written_to_is_refused_at_once(server: S3Server, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"resources\.checkpoint_storage: checkpoints cannot be written to"):
        fit(data, tmp_path / "run" / "stage", checkpoint_storage=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to 's3://no-such-bucket/run/stage'.*The bucket must be there") as refused:
        fit(
            data,
            tmp_path / "run" / "stage",
            storage=StorageConfig(endpoint=server.endpoint, attempts=1),
            checkpoint_storage="s3://no-such-bucket",
        )
    assert SECRET_KEY not in str(refused.value)


def test_what_would_only_come_again_is_raised_and_not_tried_again(local_ray: None, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training diverged between images 0 and 64") as raised:
        fit(data, tmp_path, replace(TRAIN, lr=1e30, log_every=64, checkpoint_every=BATCH))
    assert type(raised.value) is UserError
    (record,) = losses_so_far(tmp_path)
    assert json.loads(record)["images"] == 64, "one attempt"


def test_a_model_that_is_not_trained_comes_out_as_it_went_in(local_ray: None, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    started = {name: state.weights(undisturbed, name) for name in ("ema", "model")}
    weights.save(tmp_path / "given", SPEC, {"ema": started["ema"], "raw": started["model"]}, {}, None)
    options = replace(TRAIN, num_images=0, start=str(tmp_path / "given"))
    result = fit(data, tmp_path / "out", options)
    for name in ("ema", "model"):
        found = state.weights(Path(result.path), name)
        assert all(torch.equal(value, found[key]) for key, value in started["ema"].items()), name
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"], "nothing is kept for good, and no metrics"


def test_a_model_says_how_many_images_it_was_shown(tmp_path: Path) -> None:
    """Whole steps: 50 images in batches of 32 are 64."""
    from test_training import CONFIG, Run, spec

    options = replace(CONFIG, num_images=50)
    run = Run(tmp_path / "run", options)
    job: Any = SimpleNamespace(out=tmp_path, config=Config(), fingerprint="0")
    trainer._export(job, run.states[2], spec(), options, {"class_names": [], "labels": [], "latent": {}}, None)
    assert weights.read_meta(tmp_path / trainer.MODEL)["images"] == 64


def test_a_growing_file_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = trainer.Tail(file)
    assert tail.new() == []
    with file.open("a") as growing:
        for text, lines in (("one\ntw", ["one"]), ("o\n", ["two"]), ("", []), ("three\nfour\n", ["three", "four"])):
            growing.write(text)
            growing.flush()
            assert tail.new() == lines
    assert tail.read == file.stat().st_size
    (tmp_path / "other").write_text("one\ntwo\nfive\nsix and more than there was\n")
    (tmp_path / "other").replace(file)
    assert tail.new() == ["one", "two", "five", "six and more than there was"]


class Reports:
    """Stands for Ray's report: each upload in a thread of its own, by Ray's own method, which tries again what it takes for passing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.threads: list[threading.Thread] = []
        self.reported: list[checkpoints.Checkpoint] = []
        self.failed: list[Exception] = []
        storage = SimpleNamespace(storage_filesystem=fs.LocalFileSystem())
        monkeypatch.setattr(ray.train, "report", self._report)
        monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))

    def _report(self, metrics: dict, checkpoint: object, checkpoint_upload_fn: Callable, **_: object) -> None:
        context: Any = SimpleNamespace(execution_context=SimpleNamespace(train_context_callbacks=[]))

        def upload(checkpoint_upload_fn: Callable = checkpoint_upload_fn) -> None:
            try:
                report = TrainContext._upload_checkpoint(
                    context, f"checkpoint_{metrics['step']}", metrics, checkpoint, checkpoint_upload_fn=checkpoint_upload_fn
                )
                self.reported.append(report.checkpoint)
            except Exception as error:
                self.failed.append(error)

        self.threads.append(threading.Thread(target=upload))
        self.threads[-1].start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)


def test_steps_go_on_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a storage that hangs until it is told: one state on its way, and the next one waits for it."""
    go, writing, reports = threading.Event(), threading.Event(), Reports(monkeypatch)
    uploads = checkpoints.Uploads(checkpoints.place(str(tmp_path), StorageConfig()), 0, 0, BATCH)
    write_now = checkpoints._write

    def slowly(*args: object) -> None:
        writing.set()
        assert go.wait(60)
        write_now(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "_write", slowly)
    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weight.parameters())
    before = weight.weight.detach().clone()
    taken: list[weakref.ref] = []
    others: list[int] = []

    def snapshot() -> state.Snapshot:
        others.append(sum(ref() is not None for ref in taken))
        made = state.snapshot(weight, {}, optimizer, 1, {})
        taken.append(weakref.ref(made))
        return made

    save = state.Saver(snapshot)
    uploads(1, save)
    assert writing.wait(60), "and the training's thread is here, not in the storage"
    with torch.no_grad():
        weight.weight.add_(1.0)  # a step
    second = threading.Thread(target=uploads, args=(2, save))
    second.start()
    second.join(0.2)
    assert second.is_alive() and len(reports.threads) == 1, "a second copy of the state waits for the first to leave"
    go.set()
    second.join(60)
    reports.join()
    assert others == [0, 0] and len(reports.reported) == 2
    assert torch.equal(state.weights(tmp_path / "checkpoints" / "checkpoint_1", "model")["weight"], before), "later steps changed nothing"
    assert torch.equal(state.weights(tmp_path / "checkpoints" / "checkpoint_2", "model")["weight"], before + 1)


def test_what_is_kept_on_s3_is_written_and_not_copied(monkeypatch: pytest.MonkeyPatch, server: S3Server, tmp_path: Path) -> None:
    """In parts like the checkpoint: S3 copies no object of more than 5 GiB."""
    server.put("states", "made", b"")
    place = checkpoints.place("s3://states/keep/stage", StorageConfig(endpoint=server.endpoint))
    write_now, written = checkpoints._write, []

    def write_and_note(place: checkpoints.Place, path: str, taken: state.Snapshot) -> None:
        written.append(path.removeprefix("states/keep/stage/"))
        write_now(place, path, taken)

    monkeypatch.setattr(checkpoints, "_write", write_and_note)
    reports, weight = Reports(monkeypatch), torch.nn.Linear(2, 2)
    checkpoints.Uploads(place, 0, BATCH, BATCH)(3, saver(weight, 3))
    reports.join()
    assert written == ["checkpoints/checkpoint_3", "kept/images-000000096"]
    for name in (state.STATE, state.META):
        one, other = (place.filesystem.open_input_file(f"{place.path}/{folder}/{name}").read() for folder in written)
        assert one == other and one


@pytest.mark.parametrize("remote", [False, True], ids=["local", "s3"])
@pytest.mark.parametrize("name", ["/tmp/victim", "../../victim", "checkpoint_1/../../../victim", "victim", "checkpoint_", "", 5, None])
@pytest.mark.parametrize("where", ["checkpoint_results", "latest_checkpoint_result", "pending_training_results"])
def test_an_index_that_names_other_folders_is_refused(remote: bool, name: object, where: str, server: S3Server, tmp_path: Path) -> None:
    """Ray removes what its index names, wherever that lies."""
    whole = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2026-11-28_10-00-00.123", "metrics": {}}]}
    theirs = {"checkpoint_dir_name": name, "metrics": {}}
    given = {**whole, where: theirs if where.startswith("latest") else [*whole["checkpoint_results"], theirs]}
    if remote:
        place = checkpoints.place("s3://states/handed/stage", StorageConfig(endpoint=server.endpoint))
    else:
        place = checkpoints.place(str(tmp_path), StorageConfig())
        (tmp_path / checkpoints.NAME).mkdir()

    def write(found: dict) -> None:
        content = json.dumps(found).encode()
        if remote:
            server.put("states", f"handed/stage/{checkpoints.NAME}/{checkpoints.INDEX}", content)
        else:
            (tmp_path / checkpoints.NAME / checkpoints.INDEX).write_bytes(content)

    write(given)
    for read in (checkpoints.mend, checkpoints.newest, checkpoints.tidy):
        with pytest.raises(UserError, match=r"names the checkpoint .*, which is no folder beside it"):
            read(place)
    write(whole)
    assert checkpoints.mend(place) is None
    assert checkpoints.newest(place) == ""
    checkpoints.tidy(place)


@pytest.mark.parametrize(("addresses", "here"), [(["127.0.0.1"], True), (["10.0.0.1"], False), (["127.0.0.1", "10.0.0.2"], False)])
def test_workers_meet_on_a_cluster_as_ray_has_it(monkeypatch: pytest.MonkeyPatch, addresses: list[str], here: bool) -> None:
    nodes = [{"Alive": True, "NodeManagerAddress": address} for address in addresses]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "NodeManagerAddress": "10.0.0.9"}])
    assert (type(process_group.config()) is TorchConfig) == (not here)


def whole_states(path: str) -> bool:
    return urlsplit(path).path.endswith(state.STATE)


@pytest.mark.drill("S3 with 503s, resets and stalls while checkpoints are written")
@pytest.mark.parametrize("attempts", [1, 8])
@pytest.mark.parametrize(
    ("fault", "count", "parts"),  # as many at first; parts that a state goes in
    [("503", 2, 2), ("reset", 2, 2), ("lost", 2, 2), ("stall", 1, 1)],
)
def test_an_upload_that_s3_fails_for_a_while_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, server: S3Server, tmp_path: Path, drill: Drill, fault: str, count: int, parts: int, attempts: int
) -> None:
    """Of the same state, though training is further meanwhile; and the next one waits for it."""
    server.put("states", "made", b"")
    monkeypatch.setattr(checkpoints, "PAUSE_SEC", 0.1)
    reports, weight = Reports(monkeypatch), torch.nn.Linear(1024, {1: 64, 2: 3000}[parts])
    folder, wanted = f"{fault}-{attempts}/stage/", {}
    beside = server.begin_upload("states", f"{fault}-{attempts}/stage-of-others/state.safetensors")

    def kept_too(step: int) -> state.Saver:
        where = tmp_path / f"checkpoint_{step}"
        where.mkdir()
        saver(weight, step)(where)
        wanted.update({f"checkpoints/{where.name}/{path.name}": path.read_bytes() for path in where.iterdir()})
        return saver(weight, step)

    def failing(number: int, *_: object) -> str:
        return fault if number < count else "ok"

    with FaultyProxy(server.endpoint, failing, whole_states, methods=("PUT",), stall_sec=120.0) as proxy:
        options = StorageConfig(endpoint=proxy.endpoint, attempts=attempts, timeout_sec=1.0)  # of silence; it is noticed some 6 s later
        place = checkpoints.place(f"s3://states/{folder}", options)
        uploads = checkpoints.Uploads(place, 0, 0, BATCH)
        uploads(1, kept_too(1))
        with torch.no_grad():
            weight.weight.add_(1.0)
        uploads(2, kept_too(2))
        reports.join()
        assert bool(server.unfinished("states", folder)) == (attempts == 1), "where requests are not tried again, the whole upload is"
        checkpoints.tidy(place)
    assert server.unfinished("states", folder) == [], "parts of what never came to be are stored like anything else"
    assert server.unfinished("states", beside) == [beside]
    assert reports.failed == [] and len(reports.reported) == 2
    assert proxy.counts[fault] == count and set(proxy.counts) == {fault, "ok"}
    assert all("/checkpoint_1/" in path for path, _ in proxy.gets[:count])
    found = server.contents("states", folder)
    assert found == wanted and len(wanted) == 4
    assert len({path for path, _ in proxy.gets if "/checkpoint_2/" in path}) == parts
    drill.measured(found, wanted, len(proxy.gets) / (2 * parts) - 1, f"{drill.name}: {fault}, storage.attempts={attempts}")


def test_parts_that_s3_does_not_let_go_of_are_said_to_stay(server: S3Server, capsys: pytest.CaptureFixture) -> None:
    """The training has ended well, and does not fail for them."""
    server.put("states", "made", b"")
    key = server.begin_upload("states", "held/stage/checkpoints/checkpoint_1/state.safetensors")
    with FaultyProxy(server.endpoint, ["403"], lambda path: "uploads" in parse_qs(urlsplit(path).query, True)) as proxy:
        checkpoints.tidy(checkpoints.place("s3://states/held/stage", StorageConfig(endpoint=proxy.endpoint)))
        assert proxy.counts == {"403": 1}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("d2c: uploads below 's3://states/held/stage' that were cut off, if there are any, stay stored; ")
    assert "AccessDenied" in line and server.unfinished("states", "held/") == [key]


def test_an_upload_that_fails_for_good_says_why_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    """Ray calls again what S3 refuses in this way: the state is gone by then, its error is not, and the next state has its turn."""
    server.put("states", "made", b"")
    monkeypatch.setattr(checkpoints, "PAUSE_SEC", 0.1)
    reports, weight, taken = Reports(monkeypatch), torch.nn.Linear(2, 2), []

    def snapshot() -> state.Snapshot:
        assert not any(ref() for ref in taken), "one state in memory at most"
        made = state.snapshot(weight, {}, torch.optim.AdamW(weight.parameters()), 1, {})
        taken.append(weakref.ref(made))
        return made

    with FaultyProxy(server.endpoint, ["503"], whole_states, methods=("PUT",)) as proxy:
        place = checkpoints.place("s3://states/never/stage", StorageConfig(endpoint=proxy.endpoint, attempts=1))
        uploads = checkpoints.Uploads(place, 0, 0, BATCH)
        uploads(1, state.Saver(snapshot))
        uploads(2, state.Saver(snapshot))
        reports.join()
        assert proxy.counts["503"] == 2 * checkpoints.TRIES and reports.reported == []
        assert len(reports.failed) == 2 and all("AWS Error SLOW_DOWN" in str(error) for error in reports.failed)
        proxy.reset()
        uploads(3, state.Saver(snapshot))
        reports.join()
    assert len(reports.reported) == 1


@pytest.mark.parametrize("raises", [False, True])
def test_a_report_that_comes_to_nothing_holds_up_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raises: bool) -> None:
    """Ray skips a report where the workers' barrier was reset, and drops the function without a call."""

    def report(*args: object, **kwargs: object) -> None:
        if raises:
            raise RuntimeError("a worker is gone")

    reports, weight = Reports(monkeypatch), torch.nn.Linear(2, 2)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError) if raises else nullcontext():
        patch.setattr(ray.train, "report", report)
        uploads = checkpoints.Uploads(checkpoints.place(str(tmp_path), StorageConfig()), 0, 0, BATCH)
        uploads(1, saver(weight, 1))
    second = threading.Thread(target=uploads, args=(2, saver(weight, 2)), daemon=True)
    second.start()
    second.join(30)
    assert not second.is_alive(), "it waits for nothing"
    reports.join()
    assert [Path(found.path).name for found in reports.reported] == ["checkpoint_2"]


def saver(weight: torch.nn.Linear, step: int) -> state.Saver:
    return state.Saver(lambda: state.snapshot(weight, {}, torch.optim.AdamW(weight.parameters()), step, {}))


def test_a_model_that_is_not_trained_is_no_checkpoint_to_keep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reports = Reports(monkeypatch)
    checkpoints.Uploads(checkpoints.place(str(tmp_path), StorageConfig()), 0, BATCH, BATCH)(0, saver(torch.nn.Linear(2, 2), 0))
    reports.join()
    assert [Path(found.path).name for found in reports.reported] == ["checkpoint_0"] and not (tmp_path / "kept").exists()


def test_a_checkpoint_that_cannot_be_kept_is_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "kept").write_text("a file where the folder would be")
    reports, weight = Reports(monkeypatch), torch.nn.Linear(2, 2)
    checkpoints.Uploads(checkpoints.place(str(tmp_path), StorageConfig()), 0, BATCH, BATCH)(1, saver(weight, 1))
    reports.join()
    (reported,) = reports.reported
    assert torch.equal(state.weights(Path(reported.path), "model")["weight"], weight.weight)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"d2c: the checkpoint is not kept at '{tmp_path}/kept/images-000000032', and training goes on: ")


def test_runs_that_share_a_storage_do_not_share_checkpoints(tmp_path: Path) -> None:
    """Stages of the same name are of the same configuration, and still another run's."""
    one, other = tmp_path / "one" / "train-0", tmp_path / "other" / "train-0"
    for root in ("s3://states/all/", str(tmp_path / "far")):
        assert checkpoints.where(root, one) == f"{root.rstrip('/')}/one/train-0"
        assert checkpoints.where(root, one) != checkpoints.where(root, other)
    assert checkpoints.where("", one) == str(one)


def test_a_notice_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[PreemptionInfo | None] = [None]
    asked = []

    def ask() -> PreemptionInfo | None:
        asked.append(step)
        return answers[-1]

    monkeypatch.setattr(ray.train, "get_preemption_info", ask)
    notice = trainer._Notice(BATCH)
    saves = []
    for step in range(1, 101):
        if step == 15:
            answers.append(PreemptionInfo(1000, {"a": [0]}))
        elif step == 45:
            answers.append(PreemptionInfo(900, {"a": [0], "b": [1]}))
        elif step == 65:
            answers.append(PreemptionInfo(1000, {"b": [1]}))
        if notice(step):
            saves.append(step)
        if step == 80:
            notice.paced(BATCH * 3 / trainer.ASK_SEC)  # three steps a question
    assert saves == [20, 50]
    assert asked == [10, 20, 30, 40, 50, 60, 70, 80, 83, 86, 89, 92, 95, 98]


def test_a_finished_training_with_half_an_index_is_still_finished(local_ray: None, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The driver was killed while Ray named the last checkpoint: no step is left, and that one is what training gives."""
    aside = tmp_path / "checkpoints" / "checkpoint_last"
    aside.mkdir(parents=True)
    for name in (state.STATE, state.META):
        shutil.copyfile(undisturbed / name, aside / name)
    index = tmp_path / "checkpoints" / checkpoints.INDEX
    index.write_text('{"checkpoint_results": [{"half')
    result = fit(data, tmp_path)
    same_state(undisturbed, Path(result.path))
    assert losses_so_far(tmp_path) == [], "no step again"
    assert json.loads(index.read_text())["checkpoint_results"], "what a later start finds"


def test_a_training_goes_on_where_a_shorter_one_ended(local_ray: None, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """To the bit what a training of the same length is that nothing came before; the shorter one stays as it was."""
    short, long = tmp_path / "train-short", tmp_path / "train-long"
    fit(data, short, replace(TRAIN, num_images=BATCH * 200))
    before = {path: path.stat().st_mtime_ns for path in short.rglob("*") if path.is_file()}
    with fit(data, long, after=short).as_directory() as folder:
        same_state(Path(folder), undisturbed)
    assert losses(long) == losses(undisturbed)
    assert min(json.loads(path.read_text())["step"] for path in saved(long)) > 200, "it did not begin anew"
    assert {path: path.stat().st_mtime_ns for path in short.rglob("*") if path.is_file()} == before
