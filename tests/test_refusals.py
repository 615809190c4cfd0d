"""What only the data can show to be wrong is refused before a cluster is asked for anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEBUG, ROOT

from d2c_ray import pipeline, plan
from d2c_ray.errors import UserError
from d2c_ray.models import weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.rundir import Lock


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*given: object) -> None:
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(pipeline, "connected", forbidden)


def model_folder(path: Path, classes: int = 10, size: int = 8, names: list[str] | None = None) -> Path:
    spec = TransformerSpec("sit", size, 1, 2, 1, 32, 1, classes)
    state = Transformer(spec).state_dict()
    weights.save(path, spec, {"ema": state, "raw": state}, {"class_names": names or []}, None)
    return path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["select.budget=121"], "asks for 121 images; there are 120"),
        (["select.budget=9"], "9 images of 10 classes, under one a class"),
        (["arms.small.select.budget=3", "arms.fine.select.budget=20"], "arm 'small': select.budget asks for 3"),
        (["sample.num_images=3"], "too few to evaluate with evaluate.neighbours=3"),
        (["resources.train_workers=3"], "train.batch_size=32 is 2 blocks of 16 images, too few for 3 workers.*48 would do"),
        (
            ["resources.train_workers=2", "arms.a.train.batch_size=16"],
            "train.batch_size=16 is 1 blocks of 16 images, too few for 2 workers",
        ),
        (
            ["resources.teacher_workers=4", "teacher.train.batch_size=40"],
            "teacher.train.batch_size=40 is 3 blocks .* too few for 4 workers",
        ),
    ],
)
def test_the_data_does_not_allow_it(debug_config, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pipeline.run(debug_config(*overrides), say=lambda text: None)


def test_text_without_class_names_is_refused(debug_config, tmp_path: Path) -> None:
    from test_manifest import parquet

    parquet(tmp_path / "unnamed.parquet", [0, 1, 2] * 20)
    config = debug_config("data.source=parquet", f"data.path={tmp_path}", "data.limit_per_class=0")
    with pytest.raises(UserError, match=r"attach\.text\.encoder=minilm needs a name for every class; 3 of 3 have none.*data\.classes"):
        pipeline.run(config, say=lambda text: None)


def test_teachers_that_do_not_fit_are_refused(debug_config, tmp_path: Path) -> None:
    def refused(words: str, folder: Path) -> None:
        with pytest.raises(UserError, match=words):
            pipeline.run(debug_config(f"teacher.checkpoint={folder}"), say=lambda text: None)

    refused("there is no such folder", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refused(r"holds no model\.json", tmp_path / "empty")
    model_folder(tmp_path / "headless").joinpath("ema.safetensors").unlink()
    refused(r"has no ema\.safetensors", tmp_path / "headless")
    refused("works on 1 x 16 x 16 latents.*give 1 x 8 x 8", model_folder(tmp_path / "large", size=16))
    refused("knows 7 classes; the data has 10", model_folder(tmp_path / "few", classes=7))
    refused("do not fit the data's .10.: label 0 'zero' is none of them", model_folder(tmp_path / "other", names=["cat"] * 10))


def test_missing_encoders_are_refused_before_anything(debug_config, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2c_ray.models import frozen

    def absent(name: str) -> object:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(frozen, "import_module", absent)
    config = debug_config()
    with pytest.raises(UserError, match="pip install"):
        pipeline.run(config, say=lambda text: None)
    assert not plan.run_folder(config).exists()


def test_a_run_folder_belongs_to_one_process(debug_config, tmp_path: Path) -> None:
    config = debug_config()
    with Lock(plan.run_folder(config)):
        done = subprocess.run(
            [sys.executable, "-m", "d2c_ray.cli", "manifest", str(DEBUG), f"run.dir={tmp_path}"], capture_output=True, text=True, cwd=ROOT
        )
    assert done.returncode == 2
    assert "is being written by process" in done.stderr
    assert not (plan.run_folder(config) / "plan.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "d2c_ray.cli", "manifest", str(DEBUG), f"run.dir={tmp_path}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "debug").glob("manifest-*")
    assert json.loads((folder / "_SUCCESS.json").read_text())["rows_done"] == 120


@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/nope"])
def test_a_run_folder_that_cannot_be_made_is_refused_in_words(debug_config, tmp_path: Path, place: str) -> None:
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("this system has no folder in which nobody makes one")
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*\); another run.dir would do"):
        pipeline.run(debug_config(f"run.dir={tmp_path / place}"), "manifest", say=lambda text: None)
