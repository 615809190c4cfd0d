"""Pictures of a student while it trains, and a training whose pictures fail."""

import io
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import CONFIG, Run

from d2c_ray import progress
from d2c_ray.config import ReportConfig, SampleConfig, VaeConfig
from d2c_ray.distributed import trainer
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.report.contact_sheet import PREVIEW_ROWS
from d2c_ray.report.preview import Preview

LABELS = [1, 2]  # two of the model's three: the first class was never trained
TEXT = (torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4, dtype=torch.long))


def preview(out: Path, vae: str = "", sampler: str = "auto") -> Preview:
    sample = SampleConfig(steps=3, guidance=1.5, sampler=sampler)
    return Preview(sample, ReportConfig(classes=5), VaeConfig(path=vae), LABELS, text=TEXT, text_strength=0.5, out=out)


def test_a_preview_is_a_grid_of_the_trained_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerSpec("sit", 8, 3, 2, 1, 32, 2, 3, text_tokens=4, text_width=5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # it starts at zero, and what it predicts then is the same for all
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    show = preview(tmp_path)
    for images in (64, 128):
        show(images, model)
    first, again = ((tmp_path / "previews" / f"images-{images:012d}.png").read_bytes() for images in (64, 128))
    assert first == again, "the same weights, the same noise"
    with torch.no_grad():
        model.final.linear.bias.add_(0.5)
    show(192, model)
    assert (tmp_path / "previews" / "images-000000000192.png").read_bytes() != first
    picture = np.asarray(Image.open(io.BytesIO(first)))
    side = 8 * 7  # enlarged to 56 pixels, with gaps of 2
    assert picture.shape == (PREVIEW_ROWS * (side + 2) - 2, len(LABELS) * (side + 2) - 2, 3)
    assert (picture[:, side : side + 2] == 255).all() and (picture[:, :side].std() > 10)


def test_a_teacher_of_another_kind_is_shown_with_its_own_sampler(tmp_path: Path) -> None:
    """The configuration's sampler is the students'."""
    torch.manual_seed(0)
    model = Transformer(TransformerSpec("dit", 8, 3, 2, 1, 32, 2, 3, text_tokens=4, text_width=5)).eval()
    for sampler in ("heun", "ddpm"):
        preview(tmp_path / sampler, sampler=sampler)(64, model)
    shown = [(tmp_path / sampler / "previews" / "images-000000000064.png").read_bytes() for sampler in ("heun", "ddpm")]
    assert shown[0] == shown[1]


def test_a_preview_that_fails_costs_the_training_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its VAE has no weights."""
    config = replace(CONFIG, preview_every=32 * 3, checkpoint_every=10**9)
    (tmp_path / "no-vae").mkdir()
    failing = trainer._while_it_works(preview(tmp_path, vae=str(tmp_path / "no-vae")))
    plain, shown = Run(tmp_path / "plain", CONFIG), Run(tmp_path / "shown", config, knobs={"preview": failing})
    assert [log["loss"] for log in shown.logs] == [log["loss"] for log in plain.logs]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("d2c: no more previews after 96 images: ") and "no-vae" in line
    assert not (tmp_path / "previews").exists()


def test_what_shows_a_training_neither_hides_its_error_nor_leaves_trackers_open(tmp_path: Path) -> None:
    closed: list[bool] = []
    trackers = SimpleNamespace(follow=lambda records: None, close=lambda whole: closed.append(whole))

    def broken(*told: object) -> None:
        raise OSError("cannot show")

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"images": 8, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="diverged"), trainer._followed(metrics, SimpleNamespace(at=broken), trackers, lambda: ""):
        raise ValueError("diverged")
    with trainer._followed(metrics, SimpleNamespace(at=broken), trackers, lambda: ""):
        pass
    assert closed == [False, True]


def test_a_trainings_rate_is_that_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Workers take a quarter of a minute to start; the report's rate leaves that out as well."""
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.seconds, strftime=lambda _: "12:00:00"))
    metrics, trackers = tmp_path / "metrics.jsonl", SimpleNamespace(follow=lambda records: None, close=lambda whole: None)
    monkeypatch.setattr(trainer, "repeating", lambda *_: nullcontext())  # shown once, at the end

    def say(at: float, records: list[tuple[int, float]]) -> None:
        with metrics.open("a") as file:
            for images, rate in records:
                file.write(json.dumps({"images": images, "loss": 1.0, "images_per_sec": rate}) + "\n")
        clock.seconds = at
        with trainer._followed(metrics, bar, trackers, lambda: ""):
            pass

    with progress.Progress("train", 512, "images", tmp_path, interval_sec=0.0) as bar:
        say(118.0, [(256, 128.0)])  # begun at 116
        say(120.0, [(512, 64.0)])
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "12:00:00 train: 256 of 512 images (128.0 images/s, 2 s left) loss 1.000"
    assert said[-1] == "12:00:00 train: 512 of 512 images (128.0 images/s) loss 1.000"
    written = json.loads((tmp_path / "_progress.json").read_text())
    assert (written["rate"], written["seconds"]) == (128.0, 20.0), "what it took is all of it"
    clock.seconds = 200.0
    with progress.Progress("train", 1024, "images", tmp_path, done=512, interval_sec=0.0) as bar:
        say(210.0, [])  # what an earlier attempt wrote
        say(214.0, [(768, 64.0)])
        say(216.0, [(640, 64.0)])  # a worker was lost, and steps are taken again
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "12:00:00 train: 512 of 1,024 images loss 1.000"
    assert said[2] == "12:00:00 train: 768 of 1,024 images (64.0 images/s, 4 s left) loss 1.000"
    assert "640 of 1,024 images (21.3 images/s, 18 s left)" in said[3]


def test_work_that_says_no_rate_is_timed_from_its_beginning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.seconds, strftime=lambda _: "12:00:00"))
    with progress.Progress("score", 120, "images", interval_sec=0.0) as bar:
        clock.seconds = 110.0
        bar.advance(60)
    assert "60 of 120 images (6.0 images/s, 10 s left)" in capsys.readouterr().err
