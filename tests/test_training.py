"""The loop: order and randomness, exact resume, several processes, the loss it minimises."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from d2c_ray.config import TrainConfig
from d2c_ray.diffusion import flow
from d2c_ray.models.transformer import TransformerSpec
from d2c_ray.training import batches, loop, state

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    num_images=32 * 12, batch_size=32, lr=2e-3, ema_decay=0.9, precision="fp32", log_every=32, checkpoint_every=32 * 5, align_weight=0.5
)


def dataset(flip: bool = True, latent: bool = False, count: int = 50) -> batches.TrainingSet:
    rng = np.random.default_rng(0)
    sides = 2 if flip else 1
    spaces = (
        {
            "latent_mean": rng.normal(size=(count, sides, 2, 8, 8)).astype(np.float16),
            "latent_std": np.full((count, sides, 2, 8, 8), 0.1, np.float16),
            "latent_scale": 0.5,
        }
        if latent
        else {"pixels": rng.integers(0, 255, (count, 8, 8, 2), dtype=np.uint8)}
    )
    return batches.TrainingSet(
        labels=rng.integers(0, 3, count), num_classes=3, flip=flip, vision=rng.integers(-27, 127, (count, sides, 16, 6), dtype=np.int8),
        vision_scale=np.ones((count, sides, 16), np.float32), text_states=torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)),
        text_mask=torch.ones(3, 4, dtype=torch.long), **spaces,
    )  # fmt: skip


def spec(kind: str = "sit") -> TransformerSpec:
    return TransformerSpec(kind, 8, 2, 2, 2, 32, 2, 3, text_tokens=4, text_width=5, vision_width=6, align_depth=1, align_hidden=16)


class Run:
    """A training whose logs and states are kept."""

    def __init__(self, folder: Path, config: TrainConfig, kind: str = "sit", resume: Path | None = None, **data: object):
        self.logs: list[dict] = []
        self.states: dict[int, Path] = {}

        def checkpoint(step: int, save: object) -> None:
            self.states[step] = folder / f"{step}"
            self.states[step].mkdir(parents=True)
            save(self.states[step])  # type: ignore[operator]

        self.model = loop.train(spec(kind), config, dataset(**data), device=CPU, resume=resume, log=self.logs.append, checkpoint=checkpoint)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "latent"), [("sit", False), ("dit", False), ("sit", True)])
def test_resume_is_exact_to_the_bit(tmp_path: Path, kind: str, latent: bool) -> None:
    whole = Run(tmp_path / "whole", CONFIG, kind, latent=latent)
    assert sorted(whole.states) == [5, 10, 12]
    again = Run(tmp_path / "again", CONFIG, kind, latent=latent, resume=whole.states[5])
    assert [log["loss"] for log in again.logs] == [log["loss"] for log in whole.logs[5:]]
    for name in ("model", "ema"):
        for key, value in state.weights(whole.states[12], name).items():
            assert torch.equal(value, state.weights(again.states[12], name)[key]), key


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", CONFIG)
    again = Run(tmp_path / "again", CONFIG, resume=whole.states[12])
    assert again.logs == []
    assert again.states == {}


def test_each_epoch_shows_every_image_once() -> None:
    rows = batches.image_order(0, 0, 150, 50)
    for epoch in range(3):
        assert sorted(rows[50 * epoch : 50 * epoch + 50]) == list(range(50))
    assert not np.array_equal(rows[:50], rows[50:100])
    assert np.array_equal(batches.image_order(0, 37, 111, 50), rows[37:111])


def test_draws_depend_on_seed_step_and_position_alone() -> None:
    args = {"shape": (2, 4, 4), "dropout": 0.3, "flip": True, "posterior": True, "device": CPU}
    whole = batches.draw(0, 7, 0, 64, **args)
    halves = [batches.draw(0, 7, first, 32, **args) for first in (0, 32)]
    for name in ("uniform_t", "flip", "dropped", "noise", "posterior"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name
    assert torch.equal(batches.draw(0, 7, 48, 9, **args).noise, whole.noise[48:57])
    assert not torch.equal(batches.draw(0, 8, 0, 64, **args).noise, whole.noise)
    many = batches.draw(0, 0, 0, 16_000, **args)
    assert abs(many.dropped.float().mean() - 0.3) < 0.02
    assert abs(many.flip.float().mean() - 0.5) < 0.02
    assert abs(many.noise.std() - 1) < 0.01


def test_a_flip_takes_the_mirrored_pixels_and_their_own_tokens() -> None:
    data = dataset()
    draws = batches.draw(0, 0, 0, 16, (2, 8, 8), 0.0, True, False, CPU)
    rows = np.arange(16)
    batch = batches.gather(data, rows, draws, align=True)
    assert draws.flip.any()
    assert not draws.flip.all()
    for i in range(16):
        pixels = data.pixels[i, :, ::-1] if draws.flip[i] else data.pixels[i]
        assert np.allclose(batch["z"][i].permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-6)
        assert np.array_equal(batch["vision"][i].numpy(), data.vision[i, int(draws.flip[i])])


def test_latents_are_drawn_from_their_posterior_and_scaled() -> None:
    data = dataset(latent=True)
    draws = batches.draw(0, 0, 0, 16, (2, 8, 8), 0.0, True, True, CPU)
    z = batches.gather(data, np.arange(16), draws, align=False)["z"]
    side = draws.flip.long().numpy()
    expected = (
        data.latent_mean[np.arange(16), side].astype(np.float32)
        + data.latent_std[np.arange(16), side].astype(np.float32) * draws.posterior.numpy()
    ) * 0.5
    assert np.allclose(z.numpy(), expected, atol=1e-5)


def test_first_loss_is_the_formula(tmp_path: Path) -> None:
    """The output starts at zero, so the first diffusion loss is the mean square of the velocity itself."""
    run = Run(tmp_path, replace(CONFIG, num_images=32))
    data = dataset()
    draws = batches.draw(0, 0, 0, 32, (2, 8, 8), CONFIG.class_dropout, True, False, CPU)
    z = batches.gather(data, batches.image_order(0, 0, 32, 50), draws, align=False)["z"]
    assert run.logs[0]["loss"] == pytest.approx((draws.noise - z).square().mean().item(), rel=1e-5)
    zero = flow.loss(torch.zeros_like(z), z, draws.noise, z, draws.uniform_t).mean()
    assert run.logs[0]["loss"] == pytest.approx(zero.item(), rel=1e-5)


def test_loss_falls_and_alignment_can_end(tmp_path: Path) -> None:
    config = replace(CONFIG, num_images=32 * 80, checkpoint_every=10**9, align_until=32 * 40)
    logs = Run(tmp_path, config).logs
    assert np.mean([log["loss"] for log in logs[-10:]]) < 0.8 * logs[0]["loss"]
    assert logs[39]["loss_align"] < -0.2
    assert all(log["loss_align"] == 0 for log in logs[40:])


def test_ema_follows_the_weights(tmp_path: Path) -> None:
    """decay 0 is the weights themselves; decay 1 stays where training began."""
    config = replace(CONFIG, num_images=64)
    follows, stays = Run(tmp_path / "0", replace(config, ema_decay=0.0)), Run(tmp_path / "1", replace(config, ema_decay=1.0))
    raw, ema = state.weights(follows.states[2], "model"), state.weights(follows.states[2], "ema")
    assert all(torch.allclose(raw[key], ema[key], atol=1e-7) for key in ema)
    assert not any(value.any() for key, value in state.weights(stays.states[2], "ema").items() if key == "final.linear.weight")


def test_divergence_says_what_it_saw(tmp_path: Path) -> None:
    data = dataset()
    data.text_states = torch.full((3, 4, 5), math.nan)
    with pytest.raises(loop.Diverged, match=r"between images 0 and 32: loss nan.*lr 0\.002"):
        loop.train(spec(), CONFIG, data, device=CPU, log=lambda log: None, checkpoint=lambda step, save: None)


def _process(rank: int, folder: str, config: TrainConfig) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(Path(folder) / "port").read_text(), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    logs: list[dict] = []
    loop.train(spec(), config, dataset(), device=CPU, rank=rank, world_size=2, log=logs.append, checkpoint=lambda step, save: None)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(logs))
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_same_run(tmp_path: Path) -> None:
    config = replace(CONFIG, num_images=32 * 20, checkpoint_every=10**9)
    one = Run(tmp_path / "one", config).logs
    (tmp_path / "port").write_text("0")
    torch.multiprocessing.spawn(_process, (str(tmp_path), config), nprocs=2)
    two = json.loads((tmp_path / "0.json").read_text())
    assert [log["loss"] for log in two] == pytest.approx([log["loss"] for log in one], rel=1e-5)
    assert [log["loss_align"] for log in two] == pytest.approx([log["loss_align"] for log in one], rel=1e-4)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into 2 workers"):
        loop.train(spec(), replace(CONFIG, batch_size=40), dataset(), device=CPU, world_size=2, log=print, checkpoint=print)  # type: ignore[arg-type]
