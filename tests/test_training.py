"""The loop: order and randomness, exact resume, several processes, the loss it minimises."""

import json
import math
import threading
import time
import weakref
from contextlib import ExitStack
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2c_ray.config import TrainConfig
from d2c_ray.diffusion import flow
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.seeding import derive
from d2c_ray.training import batches, loop, state
from d2c_ray.training.prefetch import AHEAD, Prefetch

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

    def __init__(
        self, folder: Path, config: TrainConfig, kind: str = "sit", resume: Path | None = None, knobs: dict | None = None, **data: object
    ):
        self.logs: list[dict] = []
        self.states: dict[int, Path] = {}

        def checkpoint(step: int, save: object) -> None:
            self.states[step] = folder / f"{step}"
            self.states[step].mkdir(parents=True)
            save(self.states[step])  # type: ignore[operator]

        self.model = loop.train(
            spec(kind),
            config,
            dataset(**data),
            device=CPU,
            resume=resume,
            log=self.logs.append,
            checkpoint=checkpoint,
            **(knobs or {}),  # type: ignore[arg-type]
        )


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
    zero = flow.Flow().loss(torch.zeros_like(z), z, draws.noise, z, draws.uniform_t).mean()
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


def test_ema_is_the_sum_by_hand(tmp_path: Path) -> None:
    """0.9 of what it was and 0.1 of the weights a step, from the weights that training begins with."""
    config = replace(CONFIG, num_images=32 * 3, checkpoint_every=32, ema_decay=0.9, ema_also=[0.5])
    run = Run(tmp_path, config)
    torch.manual_seed(derive(config.seed, "init") >> 1)
    first = Transformer(spec()).state_dict()
    one, two, three = (state.weights(run.states[step], "model") for step in (1, 2, 3))
    ema, half = state.weights(run.states[3], "ema"), state.weights(run.states[3], "ema-0.5")
    for name, value in ema.items():
        assert torch.allclose(value, 0.729 * first[name] + 0.081 * one[name] + 0.09 * two[name] + 0.1 * three[name], atol=1e-7), name
        assert torch.allclose(half[name], 0.125 * first[name] + 0.125 * one[name] + 0.25 * two[name] + 0.5 * three[name], atol=1e-7), name
    assert (ema["final.linear.bias"] - three["final.linear.bias"]).abs().max() > 1e-3, "which are far enough apart"


def test_published_weights_are_trained_further(tmp_path: Path) -> None:
    """A SiT in the original layout: its first loss is its own, the new text side adds nothing yet, and both losses fall."""
    from test_published import forward, state_dict

    torch.save(state_dict(outputs=4), tmp_path / "SiT-tiny.pt")
    data = dataset()
    rng = np.random.default_rng(0)
    data.pixels, data.labels, data.num_classes = rng.integers(0, 255, (50, 8, 8, 4), dtype=np.uint8), rng.integers(0, 5, 50), 5
    data.text_states, data.text_mask = torch.randn(5, 4, 5), torch.ones(5, 4, dtype=torch.long)
    model = TransformerSpec("sit", 8, 4, 2, 2, 64, 4, 5, text_tokens=4, text_width=5, vision_width=6, align_depth=1, align_hidden=16,
                            timestep_scale=-1.0, timestep_offset=1.0)  # fmt: skip
    config = replace(CONFIG, num_images=32 * 20, start=str(tmp_path / "SiT-tiny.pt"), checkpoint_every=10**9)
    logs: list[dict] = []
    loop.train(model, config, data, device=CPU, log=logs.append, checkpoint=lambda step, save: None)

    draws = batches.draw(0, 0, 0, 32, (4, 8, 8), config.class_dropout, True, False, CPU)
    batch = batches.gather(data, batches.image_order(0, 0, 32, 50), draws, align=False)
    t = draws.uniform_t
    x_t = (1 - t).reshape(-1, 1, 1, 1) * batch["z"] + t.reshape(-1, 1, 1, 1) * draws.noise
    velocity = -forward(state_dict(outputs=4), x_t, 1 - t, batch["label"])  # theirs goes from noise to data
    assert logs[0]["loss"] == pytest.approx((velocity - (draws.noise - batch["z"])).square().mean().item(), rel=1e-4)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"] and logs[-1]["loss_align"] < logs[0]["loss_align"]


def test_divergence_says_what_it_saw(tmp_path: Path) -> None:
    data = dataset()
    data.text_states = torch.full((3, 4, 5), math.nan)
    with pytest.raises(loop.Diverged, match=r"between images 0 and 32: loss nan.*lr 0\.002"):
        loop.train(spec(), CONFIG, data, device=CPU, log=lambda log: None, checkpoint=lambda step, save: None)


def test_a_divergence_is_logged_and_spoils_no_checkpoint(tmp_path: Path) -> None:
    """The record is valid JSON, and a checkpoint that is due before the next log is not written of a broken state."""
    data, logs, saved = dataset(), [], []
    config = replace(CONFIG, log_every=32 * 12, checkpoint_every=32 * 2, lr=1e30, warmup_images=32)
    with pytest.raises(loop.Diverged, match="lr 1e\\+30"):
        loop.train(spec(), config, data, device=CPU, log=logs.append, checkpoint=lambda step, save: saved.append(step))
    (record,) = logs
    assert record["loss"] in ("nan", "inf") or record["grad_norm"] in ("nan", "inf")
    assert json.loads(json.dumps(record, allow_nan=False))["images"] == record["images"] == 32 * 2 * (len(saved) + 1)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    config = replace(CONFIG, num_images=32 * 4, checkpoint_every=10**9)
    whole = Run(tmp_path / "whole", config)
    for micro_batch in (16, 10):  # 10: the last one is smaller
        parts = Run(tmp_path / str(micro_batch), config, knobs={"micro_batch": micro_batch})
        for name in ("loss", "loss_align", "grad_norm"):
            assert [log[name] for log in parts.logs] == pytest.approx([log[name] for log in whole.logs], rel=1e-6, abs=1e-6), name
        assert parts.logs[0]["loss"] == pytest.approx(whole.logs[0]["loss"], rel=1e-6)


def test_computing_activations_again_changes_no_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, num_images=32 * 4, checkpoint_every=10**9)
    kept, again = (Run(tmp_path / str(recompute), config, knobs={"recompute": recompute}) for recompute in (False, True))
    assert [log["grad_norm"] for log in again.logs] == [log["grad_norm"] for log in kept.logs]
    found = state.weights(again.states[4], "model")
    assert all(torch.equal(value, found[key]) for key, value in state.weights(kept.states[4], "model").items())
    assert again.model.recompute and not kept.model.recompute


def test_several_averages_follow_at_once_and_resume(tmp_path: Path) -> None:
    """Each is the average that a training with its decay alone would keep."""
    config = replace(CONFIG, ema_also=[0.5, 0.0])
    run = Run(tmp_path / "both", config)
    alone = Run(tmp_path / "alone", replace(CONFIG, ema_decay=0.5))
    half = state.weights(run.states[12], "ema-0.5")
    assert all(torch.equal(value, half[key]) for key, value in state.weights(alone.states[12], "ema").items())
    raw = state.weights(run.states[12], "model")
    assert all(torch.allclose(value, raw[key], atol=1e-7) for key, value in state.weights(run.states[12], "ema-0").items())
    again = Run(tmp_path / "again", config, resume=run.states[5])
    for which in ("ema", "ema-0.5", "ema-0"):
        found = state.weights(again.states[12], which)
        assert all(torch.equal(value, found[key]) for key, value in state.weights(run.states[12], which).items())


def test_a_compiled_model_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and differentiated as for any backend; making C++ of it takes a minute, and is not this project's."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    config = replace(CONFIG, num_images=32 * 3, checkpoint_every=10**9)
    plain, compiled = Run(tmp_path / "plain", config), Run(tmp_path / "compiled", replace(config, compile=True))
    assert compiled.model.blocks[0]._compiled_call_impl is not None
    assert [log["loss"] for log in compiled.logs] == pytest.approx([log["loss"] for log in plain.logs], rel=1e-4)
    assert state.weights(compiled.states[3], "ema").keys() == state.weights(plain.states[3], "ema").keys()


def test_previews_are_of_the_averaged_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, torch.Tensor]] = []

    def preview(images: int, model: torch.nn.Module) -> None:
        seen.append((images, any(p.requires_grad for p in model.parameters()), model.get_parameter("final.linear.bias").clone()))

    run = Run(tmp_path, replace(CONFIG, preview_every=32 * 6, checkpoint_every=32 * 6), knobs={"preview": preview})
    assert [(images, grad) for images, grad, _ in seen] == [(192, False), (384, False)]
    for (_, _, bias), step in zip(seen, (6, 12), strict=True):
        assert torch.equal(bias, state.weights(run.states[step], "ema")["final.linear.bias"])


def test_no_images_make_a_state_to_export(tmp_path: Path) -> None:
    run = Run(tmp_path / "none", replace(CONFIG, num_images=0))
    assert run.logs == [] and list(run.states) == [0]
    assert json.loads((run.states[0] / "state.json").read_text())["images"] == 0
    assert Run(tmp_path / "again", replace(CONFIG, num_images=0), resume=run.states[0]).states == {}


def test_logs_say_what_they_are_of(tmp_path: Path) -> None:
    logs = Run(tmp_path, replace(CONFIG, num_images=64, warmup_images=128)).logs
    assert [log["lr"] for log in logs] == [CONFIG.lr / 4, CONFIG.lr / 2]
    assert all(log["workers"] == 1 and 0 <= log["data_wait_share"] <= 1 and log["images_per_sec"] > 0 for log in logs)


def test_time_is_taken_when_the_device_has_done_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's device is 30 ms behind its host, which waits for it at logs and before and after previews alone."""
    behind, queued, waits = 0.03, 0, 0
    step = torch.optim.AdamW.step

    def step_behind(*args: object, **kwargs: object) -> object:
        nonlocal queued
        queued += 1
        return step(*args, **kwargs)  # type: ignore[arg-type]

    def wait(device: torch.device) -> None:
        nonlocal queued, waits
        time.sleep(behind * queued)
        queued, waits = 0, waits + 1

    def preview(images: int, model: torch.nn.Module) -> None:
        nonlocal queued
        assert queued == 0, "what training had under way is training's time"
        queued = 150  # and what the preview leaves, 4.5 s, is not

    monkeypatch.setattr(torch.optim.AdamW, "step", step_behind)
    monkeypatch.setattr(loop, "_wait", wait)
    config = replace(CONFIG, log_every=32 * 4, preview_every=32 * 7, checkpoint_every=10**9)
    logs = Run(tmp_path, config, knobs={"preview": preview}).logs
    seconds = [32 * 4 / log["images_per_sec"] for log in logs]
    assert len(seconds) == 3 and all(4 * behind <= each < 4 * behind + 4 for each in seconds), seconds
    assert waits == 3 + 2


def test_batches_come_in_order_ahead_and_bounded() -> None:
    made, allowed = [], threading.Semaphore(0)

    def make(step: int) -> dict[str, torch.Tensor]:
        made.append(step)
        allowed.release()
        return {"step": torch.tensor(step)}

    with Prefetch(make, range(3, 9), CPU) as ahead:
        for _ in range(AHEAD):
            assert allowed.acquire(timeout=30), "batches are made before they are asked for"
        assert not allowed.acquire(timeout=0.2) and made == [3, 4], "and no more than that"
        assert [int(ahead.take()["step"]) for _ in range(6)] == list(range(3, 9))
    assert not ahead._thread.is_alive()


def test_a_batch_that_fails_fails_in_its_turn_and_the_thread_ends() -> None:
    def make(step: int) -> dict[str, torch.Tensor]:
        if step == 2:
            raise OSError("the disk is gone")
        return {"step": torch.tensor(step)}

    threads, taken = torch.get_num_threads(), []
    with Prefetch(make, range(9), CPU) as ahead:
        taken += [int(ahead.take()["step"]) for _ in range(2)]
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take()
    assert taken == [0, 1] and not ahead._thread.is_alive() and torch.get_num_threads() == threads
    with pytest.raises(RuntimeError, match="mine"), Prefetch(make, range(2), CPU) as ahead:
        raise RuntimeError("mine")
    assert not ahead._thread.is_alive()


class Refuse(TorchFunctionMode):
    """Fails on all that would have the host wait for a device, in the thread that enters it."""

    WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal")

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert getattr(func, "__name__", "") not in self.WAITS, f"the host waits: {func}"
        return func(*args, **(kwargs or {}))


class RefuseScalars(TorchDispatchMode):
    """The same, deeper: what asks a tensor for a value without saying so."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), f"the host waits: {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "latent"), [("sit", False), ("dit", True)])
def test_between_logs_the_host_never_waits(monkeypatch: pytest.MonkeyPatch, kind: str, latent: bool) -> None:
    """From one log to the next no step asks a tensor for its value, and neither does the making of batches."""
    seen: list[int] = []
    make_log, gather = loop._log, batches.gather
    with ExitStack() as modes:

        def refuse() -> None:
            modes.enter_context(Refuse())
            modes.enter_context(RefuseScalars())

        def log_freely(*args: object) -> None:
            modes.pop_all().close()
            make_log(*args)  # type: ignore[arg-type]
            refuse()

        def gather_in_the_thread(*args: object) -> object:
            with RefuseScalars():
                return gather(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "_log", log_freely)
        monkeypatch.setattr(batches, "gather", gather_in_the_thread)
        config = replace(CONFIG, log_every=32 * 4, checkpoint_every=10**9, ema_also=[0.5], warmup_images=1000)
        loop.train(
            spec(kind), config, dataset(latent=latent), device=CPU, log=lambda values: seen.append(values["images"]),
            checkpoint=lambda step, save: modes.pop_all().close(),
        )  # fmt: skip
    assert seen == [128, 256, 384]
    with Refuse(), pytest.raises(AssertionError, match="the host waits"):
        torch.ones(1).item()


def test_shares_are_whole_blocks_that_cover_the_batch() -> None:
    assert [batches.share(128, rank, 3) for rank in range(3)] == [(0, 32), (32, 80), (80, 128)]
    assert [batches.share(40, rank, 3) for rank in range(3)] == [(0, 16), (16, 32), (32, 40)]
    assert [batches.share(128, rank, 2) for rank in range(2)] == [(0, 64), (64, 128)]


class Wrapped(torch.nn.parallel.DistributedDataParallel):
    """The real one, which holds what each step would wait for or carry along."""

    made: ClassVar[list[weakref.ref]] = []

    def __init__(self, *args: object, **kwargs: object):
        assert not kwargs.get("find_unused_parameters"), "the host would wait to hear what every process used"
        assert not any(ref() for ref in self.made), "an earlier one's buckets and hooks"
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.made.append(weakref.ref(self))


def _process(rank: int, folder: str, config: TrainConfig, world_size: int, resumes: tuple[Path | None, ...] = (None,)) -> None:
    torch.set_num_threads(1)
    torch.nn.parallel.DistributedDataParallel = Wrapped  # type: ignore[misc]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    for number, resume in enumerate(resumes):
        logs: list[dict] = []
        model = loop.train(
            spec(), config, dataset(), device=CPU, rank=rank, world_size=world_size, micro_batch=20, log=logs.append,
            checkpoint=lambda step, save: None, resume=resume,
        )  # fmt: skip
        (Path(folder) / f"{number}-{rank}.json").write_text(json.dumps(logs))
        torch.save(model.state_dict(), Path(folder) / f"{number}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_train_the_same_run_whatever_their_shares(tmp_path: Path) -> None:
    """Three of 32, 48 and 48 images, in micro-batches of up to 20."""
    world_size, batch = 3, 128
    config = replace(CONFIG, num_images=batch * 12, batch_size=batch, log_every=batch, checkpoint_every=10**9)
    one = Run(tmp_path / "one", config).logs
    torch.multiprocessing.spawn(_process, (str(tmp_path), config, world_size), nprocs=world_size)
    several = [json.loads((tmp_path / f"0-{rank}.json").read_text()) for rank in range(world_size)]
    for logs in several:
        assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in one], rel=1e-5)
        assert [log["loss_align"] for log in logs] == pytest.approx([log["loss_align"] for log in one], rel=1e-4)
        assert [log["grad_norm"] for log in logs] == pytest.approx([log["grad_norm"] for log in one], rel=1e-4)
        assert [log["images_per_sec"] for log in logs] == [log["images_per_sec"] for log in several[0]], "by which they decide alike"


def test_alignment_ends_for_several_processes_as_for_one(tmp_path: Path) -> None:
    """In the middle of a run and before a resumed one begins. The head stays what it was, without decay and moments."""
    batch = 64
    config = replace(
        CONFIG,
        num_images=batch * 10,
        batch_size=batch,
        log_every=batch,
        checkpoint_every=batch * 4,
        align_until=batch * 6,
        weight_decay=0.1,
    )
    one = Run(tmp_path / "one", config)
    aligned, ended = (state.weights(one.states[step], "model") for step in (4, 8))
    last = one.model.state_dict()
    assert [log["loss_align"] != 0 for log in one.logs] == [True] * 6 + [False] * 4
    for name, value in last.items():
        assert torch.equal(value, ended[name]) == name.startswith("align_head"), name
        assert not torch.equal(value, aligned[name]), name
    torch.multiprocessing.spawn(_process, (str(tmp_path), config, 2, (None, one.states[4], one.states[8])), nprocs=2)
    for number, begin in enumerate((0, 4, 8)):
        for rank in range(2):
            logs = json.loads((tmp_path / f"{number}-{rank}.json").read_text())
            for name in ("loss", "loss_align", "grad_norm"):
                assert [log[name] for log in logs] == pytest.approx([log[name] for log in one.logs[begin:]], rel=1e-5), name
            found = torch.load(tmp_path / f"{number}-{rank}.pt")
            # A bias of the keys changes no attention: its gradient is rounding, of which AdamW makes steps.
            apart = {name: float((value - found[name]).abs().max()) for name, value in last.items() if "qkv.bias" not in name}
            assert max(apart.values()) < 1e-6, apart


def test_a_batch_of_fewer_blocks_than_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="3 blocks of 16 images, too few for 4 workers"):
        loop.train(spec(), replace(CONFIG, batch_size=40), dataset(), device=CPU, world_size=4, log=print, checkpoint=print)  # type: ignore[arg-type]
