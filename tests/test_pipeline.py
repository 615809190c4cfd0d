"""Whole runs on a real local Ray, on real images, killed and resumed."""

import base64
import errno
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import DEBUG, ROOT
from drilling import Drill, contents

from d2c_ray import cli, forecast, pipeline, schema
from d2c_ray.config import StorageConfig, load
from d2c_ray.data import tables
from d2c_ray.data.decode import decode
from d2c_ray.distributed import cluster
from d2c_ray.errors import UserError
from d2c_ray.job import Job
from d2c_ray.models import weights
from d2c_ray.report import estimate as printed
from d2c_ray.report import numbers, status
from d2c_ray.selection import difficulty
from d2c_ray.stages import teacher

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time

ARMS = ("arms.D2C.train.align_weight=0.5", "arms.Random+Attach.select.selector=random", "evaluate.more_networks=[efficientnet-lite0]")
UNGUIDED = "evaluate.unguided=true"
SILENT = {"say": lambda text: None}


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "d2c_ray.cli", *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_and_stand_still(at: str, marker: Path, *args: str) -> subprocess.Popen:
    """The same, and the driver stands still before a file gets a name that fits `at`, with `marker` made: there it is to be killed."""
    words = [str(ROOT / "tests" / "drills" / "watched.py"), os.devnull, "--pause", at, str(marker), "--", *args]
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out[-4000:]
    return out


def kill(process: subprocess.Popen) -> None:
    """SIGKILL of the driver, then of what it left behind, by pid."""
    os.kill(process.pid, signal.SIGSTOP)  # it gets no further while its children are looked for
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=30)


def wait_for(condition, process: subprocess.Popen, seconds: float = 500) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended first:\n{process.stdout.read()[-3000:]}"
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.1)


def stamps(folder: Path) -> dict[str, int]:
    """Every finished stage's mark with its time of writing."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/_SUCCESS.json")}


def test_what_a_killed_process_was_writing_goes_when_its_stage_is_made(debug_config) -> None:
    """It would lie there for ever, in a dataset too, which ships as it is."""
    config = debug_config()
    (stage,) = pipeline.plans.make(config, "manifest").of("manifest")
    stale = [stage.folder / ".part-000000.parquet.k3j_x8a1", stage.folder / "below" / "._SUCCESS.json.abcdefgh"]
    theirs = [stage.folder / ".hidden", stage.folder / ".DS_Store.old", stage.folder / "below" / "notes.20261128"]
    for path in (*stale, *theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half of it")
    pipeline.run(config, "manifest", **SILENT)
    assert stage.dir.done and [path.exists() for path in (*stale, *theirs)] == [False] * 2 + [True] * 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one whole run with two students, through the command line."""
    root = tmp_path_factory.mktemp("runs")
    return root / "debug", finish(start("run", str(DEBUG), f"run.dir={root}", UNGUIDED, *ARMS))


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_every_stage_leaves_a_whole_folder(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    counts = {
        name: len(list(folder.glob(f"{name}-*")))
        for name in ("manifest", "teacher", "scores", "reference", "selection", "condensed", "train", "samples", "eval")
    }
    assert counts == {
        "manifest": 1,
        "teacher": 1,
        "scores": 1,
        "reference": 1,
        "selection": 2,
        "condensed": 2,
        "train": 2,
        "samples": 4,  # guided and unguided
        "eval": 2,
    }
    for path in folder.glob("*/_SUCCESS.json"):
        record = json.loads(path.read_text())
        assert record["rows_done"] + record["rows_rejected"] == record["rows_in"]
        assert record["seconds"] > 0
        assert record["versions"]["torch"] == torch.__version__
    assert not [path for path in folder.rglob(".*") if path.name.startswith((".part", "._", ".status", ".plan", ".report"))], (
        "temporary files were left"
    )
    assert {stage["state"] for stage in json.loads((folder / "status.json").read_text())["stages"].values()} == {"done"}
    assert load(folder / "config.yaml").arms.keys() == {"D2C", "Random+Attach"}


def test_tables_have_the_columns_that_are_promised(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for pattern, columns in (("manifest", schema.MANIFEST), ("scores", schema.SCORES), ("selection", schema.SELECTION)):
        for path in folder.glob(f"{pattern}-*/part-*.parquet"):
            assert pq.read_schema(path).names == list(columns)
    condensed = pq.read_schema(next(folder.glob("condensed-*/part-000000.parquet"))).names
    assert condensed == ["sample_id", "key", "label", "image", "pixels", "vision", "vision_scale"]


def test_every_network_has_its_own_numbers_of_the_same_images(finished: tuple[Path, str]) -> None:
    folder, out = finished
    for path in folder.glob("eval-*/metrics.json"):
        metrics = json.loads(path.read_text())
        (name, more), record = metrics["more"].popitem(), metrics["record"]
        assert (name, record["network"]) == ("efficientnet-lite0", "efficientnet-lite2")
        assert more["counts"] == metrics["counts"] and more["generated"]["frechet"] != metrics["generated"]["frechet"]
        assert more["network"]["weights"] != record["network_weights"]
        assert more["unguided"]["counts"] == more["counts"] and more["unguided"]["generated"] != more["generated"]
        assert metrics["notices"] == [more["notice"]] and "students are aligned with (attach.vision.encoder)" in more["notice"]
        assert more["notice"] in out


def test_scores_are_the_formula_on_the_stored_teacher(finished: tuple[Path, str]) -> None:
    """Recomputed from the tables and the model folder alone, one image and one timestep at a time."""
    from sklearn.datasets import load_digits

    from d2c_ray.selection.noise import noise

    folder, _ = finished
    path = only(folder, "scores-*/part-*.parquet")
    table, meta = tables.read(path), tables.metadata(path)
    teacher = weights.load(only(folder, "teacher-*/model"))
    assert meta["convention"] == "velocity"
    pictures = np.round(load_digits().images * 15.9375) / 127.5 - 1
    for row in (0, 57, 119):
        key, label = table.column("key")[row].as_py(), table.column("label")[row].as_py()
        z = torch.from_numpy(pictures[int(key.rsplit("#")[1])]).float()[None, None]
        draws = torch.from_numpy(noise(meta["seed"], key, 4, (1, 8, 8)))
        found = []
        for eps, t in zip(draws, meta["timesteps"], strict=True):
            out = teacher.predict((1 - t) * z + t * eps[None], torch.tensor([t]), torch.tensor([label]))
            found.append((out - (eps[None] - z)).square().mean().item())
        assert table.column("errors")[row].as_py() == pytest.approx(found, rel=1e-4)
        weighed = [(1 - t) ** 2 * error for t, error in zip(meta["timesteps"], found, strict=True)]
        assert table.column("score")[row].as_py() == pytest.approx(np.mean(weighed), rel=1e-4)


def test_the_subset_is_interval_sampling_of_the_scores(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    scores = tables.read(only(folder, "scores-*/part-*.parquet")).to_pylist()
    by_selector = {tables.metadata(path)["selector"]: tables.read(path) for path in folder.glob("selection-*/part-*.parquet")}
    expected = []
    for label in range(10):
        mine = sorted((row for row in scores if row["label"] == label), key=lambda row: (row["score"], row["key"]))
        expected += [mine[i * 9 // 4]["key"] for i in range(4)]  # 4 of 12 at f = 0.75: floor(i 0.75 12 / 4)
    assert sorted(by_selector["interval"].column("key").to_pylist()) == sorted(expected)
    assert len(set(by_selector["random"].column("key").to_pylist())) == 40
    assert by_selector["random"].column("label").to_pylist().count(3) == 4


def test_the_report_is_one_page_with_the_measured_numbers(finished: tuple[Path, str]) -> None:
    folder, out = finished
    page = (folder / "report.html").read_text()
    for path in folder.glob("eval-*/metrics.json"):
        metrics = json.loads(path.read_text())
        assert set(metrics["record"]) >= {
            "sampler",
            "steps",
            "guidance",
            "weights",
            "class_draw",
            "generated",
            "sample_seed",
            "network",
            "reference_images",
        }
        assert metrics["unguided"]["record"]["guidance"] == 1.0 and metrics["unguided"]["generated"] != metrics["generated"]
        for values in (metrics["generated"], metrics["real"], metrics["subset"], metrics["unguided"]["generated"]):
            assert numbers.distance(values["frechet"]) in page
            assert numbers.distance(values["frechet"]) in out
            assert f'<td>{values["kid"]:.4f}<span class="error">± {values["kid_error"]:.4f}</span></td>' in page
            for key in ("precision", "recall", "density", "coverage"):
                assert f"<td>{values[key]:.3f}</td>" in page
        for own in (metrics, metrics["unguided"]):
            copying = own["copying"]
            assert f"<td>{copying['median_generated']:.4g}</td>" in page and f"<td>{copying['share_closer']:.2%}</td>" in page
            for pair in copying["pairs"]:
                assert f'alt="generated image {pair["index"]} beside training image {pair["sample_id"]}"' in page
        assert metrics["too_few"] in html.unescape(page)
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)|@import""", page), "the page needs another file"
    assert page.count("data:image/png") >= 40
    assert page.count("<svg") == 2
    cells = re.findall(r'<div class="tiles" role="img" aria-label="([^"]*)">(.*?)</div>', page)
    assert len(cells) == 10 * (1 + 4) + 10 * 3, "real images and four samplings, then kept, skipped and hardest ones"
    for words, shown in cells:
        pictures = [base64.b64decode(png) for png in re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="">', shown)]
        assert {(png[19], png[23]) for png in pictures} == {(8, 8)}, f"{words}: one size of file, and of the page's table"
        assert len(pictures) == (2 if "generated" in words else 4 if words.startswith(("kept", "hardest")) else 8), words
    assert re.findall(r'class="pictures" style="--full: (\d+)px; --wide', page) == ["40", "56"]
    for train in folder.glob("train-*"):  # 40 samples every 256 of 512 images, and the last of them on the page
        assert [path.name for path in sorted((train / "previews").iterdir())] == ["images-000000000256.png", "images-000000000512.png"]
    assert page.count('alt="samples after 512 images"') == 2
    assert page.count("<figure>") == 4 * 16, "the closest pairs of both students, guided and unguided"
    assert page.count(", without guidance</th>") == 2, "pictures of both"
    assert "Trained on equal images: 512 each." in page
    assert "decides nothing" in page
    assert "decides nothing" in " ".join(out.split())
    assert str(folder / "report.html") in out


def test_planned_stands_beside_actual(finished: tuple[Path, str]) -> None:
    """What was expected of every stage before it began is kept, and shown by the report and by a plan of the finished run."""
    folder, _ = finished
    planned = json.loads((folder / "plan.json").read_text())["planned"]
    stages = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/_SUCCESS.json")}
    assert {name for name, record in stages.items() if record["stage"] != "manifest"} == set(planned), "the manifest is there before Ray is"
    page = (folder / "report.html").read_text()
    assert page.count("<th>planned</th>") == 2 and page.count("<td>planned stages</td>") == 1 and page.count("<td>not planned</td>") == 2
    for name, own in planned.items():
        assert (
            own["seconds"] > 0 and own["source"] in ("assumed", "published", "measured here") and f"<td>{own['seconds']:.1f}</td>" in page
        )
        assert own["made"] <= stages[name]["finished"]
    found = forecast.collect(load(DEBUG, [f"run.dir={folder.parent}", UNGUIDED, *ARMS]))
    assert {row["folder"]: row["planned"] for row in found["stages"] if row["planned"]} == {
        name: own["seconds"] for name, own in planned.items()
    }
    assert {row["folder"]: row["actual"] for row in found["stages"]} == {name: record["seconds"] for name, record in stages.items()}
    assert found["total"]["seconds"] == 0.0 and "took" in "\n".join(printed.lines(found))


def test_running_again_redoes_nothing_and_starts_no_ray(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before, page = stamps(folder), (folder / "report.html").stat().st_mtime_ns
    out = finish(start("run", str(DEBUG), f"run.dir={folder.parent}", UNGUIDED, *ARMS))
    assert stamps(folder) == before
    assert (folder / "report.html").stat().st_mtime_ns == page
    assert "starting Ray" not in out
    assert "Fréchet distance" in out


def test_a_finished_run_is_compared(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    out = finish(start("compare", str(folder)))
    assert "Trained on equal images: 512 each." in out and "one seed each" in out
    main, other = out.split("\nmeasured in ")[1:]
    assert main.startswith("efficientnet-lite2\n") and other.startswith("efficientnet-lite0\n")
    for name, arm in json.loads((folder / "plan.json").read_text())["arms"].items():
        metrics = json.loads((folder / arm["evaluate"] / "metrics.json").read_text())
        (line,) = [line for line in main.splitlines() if line.startswith(f"debug: {name}, without guidance")]
        assert numbers.cell(metrics["unguided"]["generated"], "frechet") in line
        (line,) = [line for line in main.splitlines() if line.startswith(f"debug: {name}  ")]
        assert numbers.cell(metrics["generated"], "kid") in line
    bills = [line.split() for line in out.splitlines()[1:3]]
    assert [line[2:4] for line in bills] == [["40", "512"], ["40", "512"]], "images kept and seen"


def test_a_single_stage_says_where_it_left_what(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    out = finish(start("select", str(DEBUG), f"run.dir={folder.parent}", UNGUIDED, *ARMS))
    assert "select (D2C): " in out
    assert "select (Random+Attach): " in out
    assert out.count("nominal f") == 2
    assert len(re.findall(r"│ +12 │ +4 │ +0\.750 │", out)) == 10, "f of each class, for the interval selector"
    assert len(re.findall(r"│ +12 │ +4 │ +- │", out)) == 10, "and none for random"


def test_select_asks_for_ray_only_beyond_a_partition_and_chooses_the_same(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "debug")

    def select(*overrides: str) -> tuple[bool, list[dict]]:
        said: list[str] = []
        plan = pipeline.run(load(DEBUG, [f"run.dir={tmp_path}", "select.budget=30", *overrides]), "select", said.append)
        (node,) = plan.of("select")
        found = tables.read(node.dir.parts()).to_pylist()
        shutil.rmtree(node.folder)
        return "starting Ray" in said, found

    alone, expected = select()
    on_ray, found = select("resources.rows_per_partition=50")
    assert (alone, on_ray) == (False, True)
    assert found == expected and len(found) == 30


def test_a_changed_knob_changes_no_folder_and_a_changed_setting_does(finished: tuple[Path, str]) -> None:
    from d2c_ray import plan

    def names(*overrides: str) -> dict[str, str]:
        made = plan.make(load(DEBUG, [f"run.dir={finished[0].parent}", *overrides]))
        return {stage: node.hash for stage, node in made.arms["student"].items()}

    base = names()
    for knob in (
        "resources.actors=7",
        "resources.rows_per_task=3",
        "resources.rows_per_partition=9",
        "resources.train_workers=2",
        "train.log_every=5",
        "data.max_rejected=0.5",
        "report.classes=3",
        "log.format=json",
        "resources.watchdog_sec=7",
        "run.name=other",
    ):
        assert names(knob) == base, knob
    first_changed = {
        "data.limit_per_class=11": "manifest", "teacher.train.lr=1e-4": "teacher", "score.seed=1": "score", "select.budget=30": "select",
        "attach.vision.storage=bf16": "attach", "model.depth=1": "train", "train.align_weight=0.1": "train", "sample.guidance=3": "sample", "evaluate.neighbours=2": "evaluate",
    }  # fmt: skip
    for setting, stage in first_changed.items():
        changed = [name for name, value in names(setting).items() if value != base[name]]
        assert changed[0] == stage, (setting, changed)


@pytest.mark.parametrize(
    "knobs",
    [("resources.actors=1", "resources.rows_per_task=7", "resources.threads=2"), ("resources.actors=2", "resources.rows_per_task=64")],
)
def test_scores_do_not_depend_on_actors_or_batches(finished: tuple[Path, str], tmp_path: Path, knobs: tuple[str, ...]) -> None:
    """To the bit, with the finished run's teacher given as a checkpoint."""
    folder, _ = finished
    teacher = only(folder, "teacher-*/model")
    plan = pipeline.run(
        load(DEBUG, [f"run.dir={tmp_path}", f"teacher.checkpoint={teacher}", "data.rows_per_shard=50", *knobs]), upto="score", **SILENT
    )
    (node,) = plan.of("score")
    assert len(node.dir.parts()) == 3
    again, whole = tables.read(node.dir.parts()), tables.read(only(folder, "scores-*/part-*.parquet"))
    for column in ("sample_id", "key", "label", "score", "errors"):
        assert again.column(column).to_pylist() == whole.column(column).to_pylist(), column
    assert not plan.of("teacher")[0].dir.success()["facts"]["trained_here"]


def test_killed_at_every_turn_it_ends_as_if_undisturbed(finished: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL of the driver while the teacher trains, shards are scored, the student trains and its images are measured."""
    folder = tmp_path / "debug"
    args = (
        "run",
        str(DEBUG),
        f"run.dir={tmp_path}",
        UNGUIDED,
        ARMS[2],
        "data.rows_per_shard=10",
        "resources.rows_per_task=5",
        "resources.actors=1",
    )
    turns = {
        "teacher-*/checkpoints/checkpoint_*/state.json": 1,
        "scores-*/part-*.parquet": 2,
        "train-*/checkpoints/checkpoint_*/state.json": 1,
        "samples-*/part-*.parquet": 1,
    }
    kept: dict[Path, int] = {}
    for pattern, count in turns.items():
        process = start(*args)
        wait_for(lambda pattern=pattern, count=count: len(list(folder.glob(pattern))) >= count, process)
        kill(process)
        kept |= {
            path: path.stat().st_mtime_ns
            for part in ("teacher-*/data/part-*", "scores-*/part-*", "*/_SUCCESS.json")
            for path in folder.glob(part)
        }
    assert len(list(folder.glob("scores-*/_SUCCESS.json"))) == 1
    out = finish(start(*args))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished work was done again"
    assert "score: scores-" in out, "finished stages are named"

    table, undisturbed = (
        tables.read(sorted(folder.glob("scores-*/part-*.parquet"))),
        tables.read(only(finished[0], "scores-*/part-*.parquet")),
    )
    for column in ("key", "errors"):
        assert table.column(column).to_pylist() == undisturbed.column(column).to_pylist()
    curve = [json.loads(line)["images"] for line in only(folder, "train-*/metrics.jsonl").read_text().splitlines()]
    assert curve == [128, 256, 384, 512], "every step's metrics once"
    d2c = json.loads((finished[0] / "plan.json").read_text())["arms"]["D2C"]
    undisturbed = json.loads((finished[0] / d2c["evaluate"] / "metrics.json").read_text())
    measured = json.loads(only(folder, "eval-*/metrics.json").read_text())
    assert measured == undisturbed


def test_checkpoints_with_half_an_index_are_set_aside_and_still_used(tmp_path: Path) -> None:
    from pyarrow.fs import LocalFileSystem
    from safetensors.torch import save_file

    from d2c_ray.distributed import checkpoints

    def mend_checkpoints(folder: Path) -> Path | None:
        return checkpoints.mend(checkpoints.Place(str(folder.parent), LocalFileSystem()))

    folder = tmp_path / "checkpoints"
    for name, step in (("checkpoint_1", 3), ("checkpoint_2", 7), ("checkpoint_3", 9)):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text(json.dumps({"step": step}))
        save_file({"x": torch.zeros(2)}, folder / name / "state.safetensors")
    (folder / "checkpoint_3" / "state.safetensors").write_bytes(b"half")
    index = folder / "checkpoint_manager_snapshot.json"
    index.write_text("{}")
    assert mend_checkpoints(folder) is None
    index.write_text('{"half')
    assert mend_checkpoints(folder) == tmp_path / "checkpoints-set-aside-0" / "checkpoint_2"
    assert not folder.exists()
    assert mend_checkpoints(folder) == tmp_path / "checkpoints-set-aside-0" / "checkpoint_2", "killed again before the first new one"
    folder.mkdir()
    index.write_text('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_4"}]}')
    assert mend_checkpoints(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"], "no longer needed"


@pytest.fixture
def colour_folder(cifar10: Path, tmp_path: Path) -> Path:
    """Class folders of real colour images, one of them cut off and one grey."""
    from PIL import Image

    names = (cifar10 / "classes.txt").read_text().split()
    taken: dict[str, int] = {}
    for row in pq.read_table(cifar10 / "train-000.parquet").slice(0, 400).to_pylist():
        name = names[row["label"]]
        if name in ("cat", "ship", "frog") and taken.get(name, 0) < 16:
            folder = tmp_path / "images" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{taken.get(name, 0):02d}.jpg").write_bytes(row["image"]["bytes"])
            taken[name] = taken.get(name, 0) + 1
    broken = tmp_path / "images" / "cat" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    grey = tmp_path / "images" / "ship" / "05.jpg"
    Image.open(grey).convert("L").save(grey)
    return tmp_path / "images"


def vae_folder(path: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, **kinds).save_pretrained(path)
    return path


def test_class_folders_through_a_vae_into_a_dit(colour_folder: Path, tmp_path: Path) -> None:
    """Latents, DDPM, learned variance, flips, bf16 tokens, two workers, one image that cannot be decoded."""
    config = load(
        DEBUG,
        [
            f"run.dir={tmp_path}", "data.source=folder", f"data.path={colour_folder}", "data.image_size=32", "data.channels=3", "data.flip=true",
            "data.limit_per_class=0", "data.max_rejected=0.05", f"vae.path={vae_folder(tmp_path / 'vae')}", "teacher.model.kind=dit", "model.kind=dit",
            "select.budget=15", "attach.vision.storage=bf16", "sample.steps=5", "sample.num_images=12", "resources.train_workers=2", "train.num_images=256",
            "teacher.train.num_images=256", "evaluate.neighbours=2",
        ],
    )  # fmt: skip
    plan = pipeline.run(config, **SILENT)
    (score,), (attach,), (train,) = plan.of("score"), plan.of("attach"), plan.of("train")
    assert score.dir.success()["rows_rejected"] == 1
    (rejected,) = pq.read_table(score.folder / "rejected.parquet").to_pylist()
    assert rejected["key"] == "cat/03.jpg"
    assert rejected["stage"] == "score"
    assert "runcated" in rejected["reason"]
    assert tables.metadata(score.dir.parts()[0])["convention"] == "noise"
    assert difficulty.timesteps("dit", 4, 0.0, 1.0).tolist() == tables.metadata(score.dir.parts()[0])["timesteps"]
    found = pq.read_schema(attach.dir.parts()[0])
    assert found.names == ["sample_id", "key", "label", "image", "latent_mean", "latent_std", "vision"]
    assert json.loads(found.field("latent_mean").metadata[b"shape"]) == [2, 4, 16, 16]
    assert json.loads(found.field("vision").metadata[b"shape"]) == [2, 64, 1280]
    assert weights.read_meta(train.folder / "model")["spec"]["kind"] == "dit"
    assert plan.of("sample")[0].dir.success()["facts"]["record"]["sampler"] == "ddpm"
    assert (plan.folder / "report.html").is_file()


def test_too_many_broken_images_stop_the_stage_and_name_them(colour_folder: Path, tmp_path: Path) -> None:
    config = load(
        DEBUG,
        [
            f"run.dir={tmp_path}",
            "data.source=folder",
            f"data.path={colour_folder}",
            "data.image_size=32",
            "data.channels=3",
            "data.limit_per_class=0",
            "select.budget=15",
        ],
    )
    with pytest.raises(UserError, match=r"1 of 48 images cannot be used, more than data\.max_rejected=0\.01.*\n +cat/03\.jpg: "):
        pipeline.run(config, upto="teacher", **SILENT)


def test_cifar10_preset_on_a_cut(cifar10: Path, tmp_path: Path) -> None:
    """The preset as it is, on a few hundred images and for a few steps."""
    config = load(
        ROOT / "configs" / "cifar10.yaml",
        [
            f"run.dir={tmp_path}", f"data.path={cifar10}", "data.pattern=train-000.parquet", "data.limit_per_class=30", "select.budget=50",
            "teacher.train.num_images=640", "train.num_images=640", "train.log_every=320", "sample.num_images=30", "sample.steps=5", "sample.device_batch=15",
            "evaluate.max_reference=100",
        ],
    )  # fmt: skip
    plan = pipeline.run(config, **SILENT)
    assert plan.of("manifest")[0].dir.success()["facts"]["class_names"][3] == "cat"
    assert plan.of("score")[0].dir.success()["rows_done"] == 300
    for arm in ("D2C", "Random+Attach"):
        metrics = json.loads((plan.arms[arm]["evaluate"].folder / "metrics.json").read_text())
        assert metrics["counts"] == {"generated": 30, "sampled": 30, "real": 30, "subset": 50, "reference": 100, "width": 1280}
        assert metrics["real"]["frechet"] < metrics["generated"]["frechet"], "a student of ten steps beats real images?"
        curve = (plan.arms[arm]["train"].folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(curve[-1])["loss"] < json.loads(curve[0])["loss"]


def test_a_few_photographs_are_learned(cifar10: Path, tmp_path: Path) -> None:
    """Half of the preset: the loss falls below 0.32, and the samples are no noise and have their class's colours."""
    knobs = (f"run.dir={tmp_path}", f"data.path={cifar10}", "train.num_images=20480")
    plan = pipeline.run(load(ROOT / "configs" / "cifar10_small.yaml", knobs), **SILENT)
    stages = plan.arms["student"]
    losses = [json.loads(line)["loss"] for line in (stages["train"].folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 0.6
    assert losses[-1] < 0.32
    real, made = stages["attach"].dir.parts(), stages["sample"].dir.parts()
    pixels = np.concatenate([tables.tensor_values(tables.read(path), "pixels") for path in real]).astype(float)
    labels = np.concatenate([tables.read(path, ["label"]).column("label").to_numpy() for path in real])
    samples = np.stack([decode(image, 16, 3, 10**6) for path in made for image in tables.read(path).column("image").to_pylist()]).astype(
        float
    )
    asked = np.concatenate([tables.read(path, ["label"]).column("label").to_numpy() for path in made])
    assert len(pixels) == 200
    assert abs(np.diff(samples, axis=2)).mean() < 2 * abs(np.diff(pixels, axis=2)).mean(), "neighbouring pixels have nothing in common"
    colours = [np.stack([some[of == label].mean((0, 1, 2)) for label in range(10)]) for some, of in ((pixels, labels), (samples, asked))]
    assert np.corrcoef(*((mean - mean.mean(0)).ravel() for mean in colours))[0, 1] > 0.8, "classes have other colours than their images"
    metrics = json.loads((stages["evaluate"].folder / "metrics.json").read_text())
    assert metrics["generated"]["frechet"] < 1.5 * metrics["real"]["frechet"]
    page = (plan.folder / "report.html").read_text()
    assert 'alt="samples after 20480 images"' in page
    assert 'aria-label="generated images of frog"' in page


def test_stopped_while_ray_starts_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    process = start("run", str(DEBUG), f"run.dir={tmp_path}")
    family: set[psutil.Process] = set()

    def starting() -> bool:
        family.update(psutil.Process(process.pid).children(recursive=True))
        return any("gcs_server" in child.name() for child in family if child.is_running())

    wait_for(starting, process)
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == cli.STOPPED and "stopped; the same command goes on" in out and "Traceback" not in out, out[-4000:]
    assert status.read(str(tmp_path / "debug"), StorageConfig())["state"] == "stopped"
    assert not psutil.wait_procs(family, timeout=60)[1]


DROPPING = """
import sys, threading
from contextlib import suppress
from d2c_ray.config import Config
from d2c_ray.distributed import cluster
import ray

cluster.connect(Config().resources)
name, at_work = ray.put(0).binary(), threading.Event()

def drop():
    while True:
        with suppress(Exception):
            ray.ObjectRef(name)
            at_work.set()

threading.Thread(target=drop, daemon=True).start()
at_work.wait()
cluster.disconnect()
sys.exit(7)
"""


def test_a_thread_that_drops_objects_while_ray_ends_does_not_end_the_process() -> None:
    """As Ray Data's do after an error that ended their reader: the run could not say why it failed, nor with which status."""
    done = subprocess.run([sys.executable, "-c", DROPPING], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7 and "Exception" not in done.stderr, (done.returncode, done.stdout, done.stderr)


INTERRUPTED = """
import sys
from contextlib import suppress
import psutil, ray
from ray._private import worker
from d2c_ray.config import Config
from d2c_ray.distributed import cluster

cluster.connect(Config().resources)
family = psutil.Process().children(recursive=True)

class Interrupted:
    def __init__(self, core_worker):
        self.core_worker = core_worker

    def shutdown_driver(self):
        self.core_worker.shutdown_driver()
        raise KeyboardInterrupt

    def __getattr__(self, name):
        return getattr(self.core_worker, name)

worker.global_worker.core_worker = Interrupted(worker.global_worker.core_worker)
try:
    cluster.disconnect()
except KeyboardInterrupt:
    cluster.disconnect()
    print("gone", ray.is_initialized(), len(family) > 2, psutil.wait_procs(family, timeout=60)[1])
    cluster.disconnect()
"""


def test_ray_is_let_go_of_again_after_that_was_interrupted() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["gone False True []"]), (done.returncode, done.stdout, done.stderr)


def test_why_a_run_failed_is_written_before_ray_is_let_go_of(debug_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may not survive it."""
    said = []

    def disconnect() -> None:
        said.append(status.read(str(pipeline.plans.run_folder(debug_config())), StorageConfig()))
        cluster.disconnect()

    def fail(job: Job) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(job.out))

    monkeypatch.setattr(pipeline, "disconnect", disconnect)
    monkeypatch.setattr(teacher, "run", fail)
    with pytest.raises(OSError, match="No space left"):
        pipeline.run(debug_config(), upto="teacher", **SILENT)
    with pytest.raises(UserError, match="64 actors"):
        pipeline.run(debug_config("resources.actors=64"), upto="teacher", **SILENT)
    assert [found["state"] for found in said] == ["failed", "failed"]
    assert "no room is left" in said[0]["error"] and "64 actors" in said[1]["error"]


@pytest.mark.drill("cluster too small")
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (("resources.actors=9", "resources.num_cpus=4"), "9 actors of one CPU and one free CPU for decoding want 10 CPUs; Ray has 4"),
        (("resources.gpus_per_actor=1", "resources.actors=2"), "want 2 GPUs; the cluster has 0"),
        (
            ("resources.teacher_workers=16", "teacher.train.batch_size=256", "resources.num_cpus=4"),
            "resources.teacher_workers=16 wants 16 CPUs",
        ),
        (("resources.address=127.0.0.1:1",), "no Ray cluster answers"),
        (("resources.address=http://127.0.0.1:8265",), "HEAD:6379 would do"),
    ],
)
def test_work_that_the_cluster_cannot_hold_is_refused(
    debug_config, monkeypatch: pytest.MonkeyPatch, knobs: tuple[str, ...], words: str, drill: Drill
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a machine with GPUs has none either
    before = contents(pipeline.run(debug_config(), upto="manifest", **SILENT).folder)
    with pytest.raises(UserError, match=words):
        pipeline.run(debug_config(*knobs), upto="teacher", **SILENT)
    drill.refused(before, contents(pipeline.plans.run_folder(debug_config())), f"cluster too small: {knobs[0]}")
