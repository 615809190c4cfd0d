"""Shared by the tests: small real runs on a private local Ray, and the real images where they are at hand."""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from faulty_s3 import S3Server
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from d2c_ray import pipeline
from d2c_ray.config import Config, ResourcesConfig, load
from d2c_ray.distributed import cluster

ROOT = Path(__file__).resolve().parents[1]
DEBUG = ROOT / "configs" / "debug.yaml"
SHARED = ROOT.parent / "shared" / "data"

pytest_plugins = ["drilling"]

torch.set_num_threads(1)
os.environ.setdefault("RAY_worker_niceness", "0")  # its workers give way to everything at 15: tests in the other process would starve them


class OneRay(LoadScopeScheduling):
    """Tests by file, those with a Ray all in one process: two Rays at once are more than a small machine bears.

    The groups of xdist's own `loadgroup` do not reach its scheduler under pytest 9.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "ray" if _starts_ray(ROOT / path) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneRay:
    config.option.loadscopereorder = False  # in the order of the collection, below
    return OneRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Ray come first: they take longest, and the other process works off the rest meanwhile."""
    items.sort(key=lambda item: not _starts_ray(item.path))


@functools.cache
def _starts_ray(path: Path) -> bool:
    return 'xdist_group("ray")' in path.read_text()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before fixtures too: networks of random weights are the same ones whatever ran before, and in whatever process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def private_ray_folder() -> Iterator[None]:
    """Ray's own files in a folder of these tests; a short name, since sockets live in it."""
    folder = tempfile.mkdtemp(prefix="d2c-", dir="/tmp")
    os.environ["D2C_RAY_TMPDIR"] = os.environ["RAY_TMPDIR"] = folder  # the second is Ray's own
    Path(folder, "ray").mkdir()  # where a cluster of several nodes notes its address, and does not make the folder for it
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def debug_config(tmp_path: Path):
    """Gives configs/debug.yaml with a run folder of the test's own and `key=value` changes."""

    def make(*overrides: str) -> Config:
        return load(DEBUG, [f"run.dir={tmp_path}", *overrides])

    return make


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """Folder of real CIFAR-10 Parquet files."""
    folder = SHARED / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"the real CIFAR-10 images are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def gadc_case() -> Callable[[str], dict[str, np.ndarray]]:
    """Reads a reference case of the GADC selector by name: real features of one class, and what a long search found."""

    def read(name: str) -> dict[str, np.ndarray]:
        path = SHARED / "gadc" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"the reference case is not at {path}")
        with np.load(path) as case:
            return dict(case)

    return read


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def local_ray(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One Ray for all tests that ask for it; it starts after the service, whose credentials its workers inherit."""
    if not ray.is_initialized():
        cluster.connect(ResourcesConfig(num_cpus=6))
    monkeypatch.setattr(pipeline, "disconnect", lambda: None)


@pytest.fixture
def no_ray() -> Iterator[None]:
    ray.shutdown()
    yield
    ray.shutdown()
