"""A whole run on images that somebody else named, from a storage with marked credentials: what it writes, shows and listens on."""

import base64
import html.parser
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from conftest import DEBUG, ROOT
from faulty_s3 import FaultyProxy, S3Server
from sklearn.datasets import load_digits

from d2c_ray import cli
from d2c_ray.config import ResourcesConfig
from d2c_ray.data import export, tables
from d2c_ray.data.decode import encode_png
from d2c_ray.distributed import cluster

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

MARK = "-".join(("m4rk3d", "s3cr3t"))  # not in one piece: tests of jobs upload this file into the folder that is searched
SECRETS = {  # what a machine that trains has in its environment
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK}", "AWS_SECRET_ACCESS_KEY": f"{MARK}/aws+key", "AWS_SESSION_TOKEN": f"{MARK}-session", "WANDB_API_KEY": f"{MARK}-wandb",
    "MLFLOW_TRACKING_USERNAME": f"{MARK}-user", "MLFLOW_TRACKING_PASSWORD": f"{MARK}-mlflow", "HF_TOKEN": f"hf_{MARK}",
}  # fmt: skip
SCRIPT = "<script>alert(1)</script>"
NAMES = [
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "../../up",
    "a\\b",
    "$\\frac{",
    "`tick` | bar",
    "[x](javascript:alert(1))",
    "\x1b[2J",
    "{{ 7*7 }}",
    "é" * 300,
]
FILE = "<img src=x onerror=alert(2)>.parquet"


def digits() -> bytes:
    """Twelve of each, in the layout of dataset hubs, with classes of hostile names."""
    found = load_digits()
    rows = np.concatenate([np.flatnonzero(found.target == label)[:12] for label in range(10)])
    images = [encode_png(np.round(found.images[row] * 15.9375).astype(np.uint8)[..., None]) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        tables.write(Path(folder) / "x.parquet", pa.table({"image": images, "label": found.target[rows]}), {"classes": NAMES})
        return (Path(folder) / "x.parquet").read_bytes()


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """Addresses on which a process or a child of it listens, each with the process's name."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            name = (one.cmdline() or [one.name()])[0]
            found |= {(which.laddr.ip, name) for which in one.net_connections() if which.status == psutil.CONN_LISTEN}
    return found


def outside(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(address, who) for address, who in found if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}


def command(*args: str, heard: set[tuple[str, str]]) -> tuple[int, str]:
    """Exit status and output of a command; while it runs, notes who listens."""
    line = [sys.executable, "-m", "d2c_ray.cli", *args]
    with (
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen(line, cwd=ROOT, env={**os.environ, **SECRETS}, stdout=out, stderr=subprocess.STDOUT) as running,
    ):
        until = time.monotonic() + 500
        while running.poll() is None:
            with suppress(psutil.NoSuchProcess):
                heard |= listening(psutil.Process(running.pid))
            time.sleep(0.2)
            if time.monotonic() > until:
                running.terminate()
        out.seek(0)
        return running.returncode, out.read()


@pytest.fixture(scope="module")
def heard() -> set[tuple[str, str]]:
    """Who listened while the run was going on."""
    return set()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: S3Server, heard: set[tuple[str, str]]) -> tuple[Path, str]:
    """Folder and output of the run, one student."""
    server.put("marked", f"digits/{FILE}", digits())
    root = tmp_path_factory.mktemp("runs")
    status, out = command(
        "run", str(DEBUG), f"run.dir={root}", "data.source=parquet", "data.path=s3://marked/digits", f"storage.endpoint={server.endpoint}",
        f"resources.cache_dir={root / 'cache'}", "resources.keep_cache=true", "tracking.tensorboard=true", "attach.text.encoder=none",
        "attach.vision.encoder=none", "train.align_weight=0", "train.num_images=256", "teacher.train.num_images=256", "train.preview_every=0",
        "sample.steps=2", "score.num_timesteps=2", heard=heard,
    )  # fmt: skip
    assert status == 0, out[-4000:]
    return root, out


def holding(folder: Path, needles: list[bytes]) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes() + str(path).encode()
            found += [str(path) for needle in needles if needle in content]
    return found


def test_no_credential_is_written_down_or_shown(made: tuple[Path, str]) -> None:
    """Not in the run folder, the node's copy, the output, or Ray's own logs; plain or in base64."""
    root, out = made
    needles = [MARK.encode(), *(base64.b64encode((" " * pad + MARK).encode())[4:-4] for pad in range(3))]
    assert len(list(root.rglob("*.json"))) > 10
    assert holding(root, needles) == []
    logs = Path(os.environ["D2C_RAY_TMPDIR"])
    assert list(logs.rglob("raylet.*")), "Ray's logs lie elsewhere: this looks at nothing"
    assert holding(logs, needles) == []
    assert MARK not in out


def test_refused_credentials_are_not_shown_either(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("marked", "other/x.parquet", b"PAR1")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)

    def refused(endpoint: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(
                [
                    "manifest",
                    str(DEBUG),
                    f"run.dir={tmp_path}",
                    "data.source=parquet",
                    "data.path=s3://marked/other",
                    f"storage.endpoint={endpoint}",
                ]
            )
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert MARK not in out + err
        return err

    with FaultyProxy(server.endpoint, ["403"], only=lambda path: True) as proxy:
        assert "credentials refused (AccessDenied, HTTP 403)" in refused(proxy.endpoint)
    assert "storage.endpoint holds a user name or a password" in refused(server.endpoint.replace("://", f"://user:{MARK}@"))
    assert holding(tmp_path, [MARK.encode()]) == []


class Acting(html.parser.HTMLParser):
    """Collects what of a page would act."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "base", "link", "form"):
            self.found.append(tag)
        for name, value in attrs:
            if name.startswith("xmlns"):
                continue
            if name.startswith("on") or (value or "").strip().lower().startswith(("javascript:", "http:", "https:", "//")):
                self.found.append(f"{tag} {name}={value}")
        if tag == "img" and not str(dict(attrs).get("src")).startswith("data:image/png;base64,"):
            self.found.append(f"img {attrs}")


def test_names_that_others_chose_do_not_act(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    from markdown_it import MarkdownIt

    root, out = made
    page = (root / "debug" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    cards = [path for path in root.rglob("README.md") if path.parent.name.startswith("condensed-")]
    assert cards
    shown = [page, *(MarkdownIt("commonmark").enable("table").render(path.read_text().split("\n---\n", 1)[1]) for path in cards)]
    for text in shown:
        acting = Acting()
        acting.feed(text)
        links = [link for link in acting.found if link.startswith("img") and "examples.png" in link]
        assert acting.found == links
        assert "{{ 7*7 }}" in text
    assert "\x1b" not in out
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", str(root / "debug" / "config.yaml"), "#000000085"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert FILE in told
    assert "\x1b" not in told


def test_names_that_others_chose_stay_inside(made: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = made
    (condensed,) = (root / "debug").glob("condensed-*")
    (tmp_path / "in").mkdir()
    for form in ("folders", "webdataset"):
        assert export.export(condensed, form, tmp_path / "in" / form) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["folders", "webdataset"]
    assert sorted(path.name for path in root.iterdir()) == ["cache", "debug"]


def test_files_of_others_data_are_the_users_alone(made: tuple[Path, str]) -> None:
    """The node's copy lies in a place that many use; what lies in the run folder is as open as the user's umask says."""
    root, _ = made
    assert list((root / "cache").rglob("*.npy"))
    assert (root / "cache").stat().st_mode & 0o077 == 0


def test_a_local_ray_listens_to_this_machine_alone(no_ray: None) -> None:
    cluster.connect(ResourcesConfig(num_cpus=2), dashboard=True)
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    found = listening(psutil.Process())
    assert len(found) > 3
    assert outside(found) == set()


def test_a_whole_local_run_listens_to_this_machine_alone(made: tuple[Path, str], heard: set[tuple[str, str]]) -> None:
    """Its trainings too: torch's own meeting point would listen on every address."""
    assert any("RayTrainWorker" in who for _, who in heard), "no training was looked at"
    assert outside(heard) == set()
