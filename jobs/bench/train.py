"""How fast a training step is: against the published way of doing the same step, waiting for data, on two workers.

    python jobs/bench/train.py            # the full sizes; on a GPU SiT-L/2 at 256 px, on a CPU depth 6, width 384
    python jobs/bench/train.py --quick    # a minute or two
    python jobs/bench/train.py --only step,curves,data,workers,vae

The published way is written down here from how the public training codes of DiT, SiT and REPA do a step: no autocast
(fp32; on a GPU with TF32 matrix products), text pooled by a convolution, the alignment loss in a Python loop over the
samples, AdamW with its defaults, EMA a parameter at a time. It trains the same network on the same images with the same
noise, so that its losses must be ours.

The last line is one JSON object.
"""

import sys

sys.path = sys.path[1:]  # this folder holds files named like modules of Python's own

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2c_ray.config import TrainConfig
from d2c_ray.models import flops
from d2c_ray.models.transformer import TextEmbed, Transformer, TransformerSpec
from d2c_ray.seeding import derive
from d2c_ray.training import batches, loop

TOKENS, TEXT, VISION = 16, 2048, 768  # of Flan-T5-XL's states and DINOv2-B's tokens
NUM_CLASSES = 1000
# Most that losses may differ from the published way's: the diffusion loss relatively, the alignment loss, a mean cosine, absolutely.
APART = {"fp32": (1e-3, 1e-3), "bf16": (2e-2, 5e-3)}


def spec(device: torch.device, small: bool = False) -> TransformerSpec:
    """The shape that steps are compared at."""
    side, depth, width, heads = (32, 24, 1024, 16) if device.type == "cuda" else (16, 6, 384, 6)
    if small:
        side, depth, width, heads = 16, 2, 96, 2
    return TransformerSpec(
        "sit", side, 4, 2, depth, width, heads, NUM_CLASSES, text_tokens=TOKENS, text_width=64 if small else TEXT,
        vision_width=64 if small else VISION, align_depth=min(8, -(-depth // 3)), align_hidden=128 if small else 2048,
    )  # fmt: skip


def dataset(shape: TransformerSpec, rows: int, folder: Path) -> batches.TrainingSet:
    """Random latents, tokens and texts of the sizes of real ones, memory-mapped from files."""
    rng = np.random.default_rng(0)
    tokens = (shape.input_size // shape.patch) ** 2

    def on_disk(name: str, kind: type, *sizes: int) -> np.ndarray:
        path = folder / f"{name}.npy"
        if not path.is_file():
            array = np.lib.format.open_memmap(path, "w+", kind, (rows, 2, *sizes))
            for start in range(0, rows, 256):
                part = array[start : start + 256]
                part[...] = rng.integers(-127, 128, part.shape) if kind is np.int8 else rng.standard_normal(part.shape, np.float32)
            array.flush()
        return np.load(path, mmap_mode="r")

    latent = (shape.channels, shape.input_size, shape.input_size)
    return batches.TrainingSet(
        labels=rng.integers(0, NUM_CLASSES, rows), num_classes=NUM_CLASSES, flip=True,
        latent_mean=on_disk("mean", np.float16, *latent), latent_std=on_disk("std", np.float16, *latent), latent_scale=0.18215,
        vision=on_disk("vision", np.int8, tokens, shape.vision_width), vision_scale=np.ones((rows, 2, tokens), np.float32),
        text_states=torch.from_numpy(rng.standard_normal((NUM_CLASSES, shape.text_tokens, shape.text_width), np.float32)),
        text_mask=torch.ones(NUM_CLASSES, shape.text_tokens, dtype=torch.long),
    )  # fmt: skip


class PublishedText(TextEmbed):
    """Text pooled by a convolution, as the published model does it."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        pooled = self.conv((states * mask[..., None]).transpose(1, 2)).squeeze(2)
        return self.mlp(self.norm(pooled)) + pooled


class Published:
    """The published way of taking the steps of `loop.train`, on the same images and noise."""

    def __init__(self, shape: TransformerSpec, config: TrainConfig, data: batches.TrainingSet, device: torch.device):
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(derive(config.seed, "init") >> 1)
        self.model = Transformer(shape).to(device)
        assert self.model.text_embed is not None
        self.model.text_embed.__class__ = PublishedText
        self.ema = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=0.0)
        self.config, self.data, self.device, self.step = config, data, device, 0
        assert data.text_states is not None and data.text_mask is not None
        self.text, self.mask = data.text_states.to(device), data.text_mask.to(device)
        self.gatherer = batches.Gatherer(device)

    def batch(self) -> tuple[dict[str, Tensor], batches.Draws]:
        """The next step's images and noise. Untimed: published loops load in workers of their own."""
        config, data = self.config, self.data
        first = self.step * config.batch_size
        rows = batches.image_order(config.seed, first, first + config.batch_size, len(data))
        draws = batches.draw(
            config.seed, self.step, 0, config.batch_size, data.latent_shape, config.class_dropout, data.flip, True, self.device
        )
        return dict(batches.gather(data, rows, draws, True, self.gatherer)), draws

    def take(self, batch: dict[str, Tensor], draws: batches.Draws) -> tuple[float, float]:
        """One step; its diffusion and alignment loss."""
        config, data = self.config, self.data
        z, noise, t = batch["z"], draws.noise, draws.uniform_t.to(self.device)
        at = t.view(-1, 1, 1, 1)
        x_t, velocity = (1 - at) * z + at * noise, noise - z
        known = batch["label"].clamp(max=data.num_classes - 1)
        out, projected = self.model(x_t, t, batch["label"], text=self.text[known], text_mask=self.mask[known], features=True)
        loss = ((out - velocity) ** 2).mean(dim=(1, 2, 3)).mean()
        aligned = torch.zeros((), device=self.device)
        for ours, theirs in zip(projected, batch["vision"], strict=True):
            aligned = aligned - (F.normalize(ours, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1).mean()
        aligned = aligned / len(z)
        (loss + config.align_weight * aligned).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.ema[name].mul_(config.ema_decay).add_(parameter.data, alpha=1 - config.ema_decay)
        self.step += 1
        return loss.item(), aligned.item()


def ours(shape: TransformerSpec, config: TrainConfig, data: batches.TrainingSet, device: torch.device, **more: Any) -> list[dict[str, Any]]:
    """Log records of our loop, one a step or as `config.log_every` says."""
    logs: list[dict[str, Any]] = []
    loop.train(shape, config, data, device=device, log=logs.append, checkpoint=lambda step, save: None, **more)
    return logs


def best_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it; a CPU without emulates it many times slower."""
    native = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "fp32"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_time(
    device: torch.device, config: TrainConfig, data: batches.TrainingSet, rounds: int, steps: int, compiled: bool
) -> dict[str, Any]:
    """Median seconds a step of both, turn by turn, the first steps of each left out."""
    shape = spec(device)
    config = replace(config, precision=best_precision(device), compile=compiled)
    published = Published(shape, config, data, device)
    theirs: list[float] = []
    mine: list[float] = []
    records: list[dict[str, Any]] = []
    first: list[tuple[float, float]] = []
    for turn in range(rounds):
        for _ in range(steps + (turn == 0)):
            batch = published.batch()
            wait(device)
            start = time.perf_counter()
            losses = published.take(*batch)
            wait(device)
            theirs.append(time.perf_counter() - start)
            first.append(losses)
        # Our own from its beginning each time, its first step (and compiling) left out. With a log a step, each of them too
        # is timed from a device that has nothing to do to one that has done the step.
        logs = ours(shape, replace(config, num_images=config.batch_size * (steps + 1), log_every=config.batch_size), data, device)
        mine += [config.batch_size / record["images_per_sec"] for record in logs[1:]]
        records += logs[1:]
        if turn == 0:
            pairs = list(zip(logs, first, strict=False))
            apart = max(abs(record["loss"] - loss) / loss for record, (loss, _) in pairs)
            align_apart = max(abs(record["loss_align"] - aligned) for record, (_, aligned) in pairs)
            _same_step(config.precision, apart, align_apart)
    peak = flops.dense_peak(torch.cuda.get_device_name(device), config.precision) if device.type == "cuda" else None
    seconds, published_seconds = statistics.median(mine), statistics.median(theirs[1:])
    macs = flops.forward_macs(shape, features=True)
    achieved = 6 * macs * config.batch_size / seconds
    return {
        "step_speedup": published_seconds / seconds, "step_seconds": seconds, "published_step_seconds": published_seconds,
        "images_per_second": config.batch_size / seconds, "precision": config.precision, "compiled": compiled,
        "published_precision": "tf32" if device.type == "cuda" else "fp32", "tflops": achieved / 1e12,
        "mfu": achieved / peak[1] if peak else None, "mfu_peak": peak[0] if peak else None, "first_losses_apart": apart, "first_align_apart": align_apart,
        "raw_step_seconds": [round(value, 4) for value in mine], "raw_published_seconds": [round(value, 4) for value in theirs],
    }  # fmt: skip


def _same_step(precision: str, *apart: float) -> None:
    """Ends the bench where the losses of both ways, diffusion and alignment, differ by more than rounding."""
    for name, value, most in zip(("diffusion", "alignment"), apart, APART[precision], strict=True):
        if not value <= most:
            raise SystemExit(f"the {name} losses part by {value:.2g} in {precision}, {most:g} at most would do: not the same step")


def curves(device: torch.device, steps: int, folder: Path) -> dict[str, Any]:
    """The loss curves of the published way in fp32, and of ours in fp32 and in bf16, on a small network."""
    shape = spec(device, small=True)
    data = dataset(shape, 512, folder)
    config = TrainConfig(num_images=32 * steps, batch_size=32, lr=1e-3, log_every=32, checkpoint_every=10**9, precision="fp32")
    published = Published(shape, config, data, device)
    theirs = np.array([published.take(*published.batch()) for _ in range(steps)])
    found: dict[str, Any] = {"curve_steps": steps, "curve_loss_first": theirs[0, 0], "curve_loss_last": float(theirs[-10:, 0].mean())}
    for precision in ("fp32", "bf16"):
        logs = ours(shape, replace(config, precision=precision), data, device)
        mine = np.array([[record["loss"], record["loss_align"]] for record in logs])
        found[f"curve_{precision}_apart"] = float((abs(mine[:, 0] - theirs[:, 0]) / theirs[:, 0]).max())
        found[f"curve_{precision}_align_apart"] = float(abs(mine[:, 1] - theirs[:, 1]).max())
        _same_step(precision, found[f"curve_{precision}_apart"], found[f"curve_{precision}_align_apart"])
    return found


def data_wait(device: torch.device, config: TrainConfig, data: batches.TrainingSet, steps: int) -> dict[str, Any]:
    """Share of the steps' time that the loop waits for a batch, gathered from files."""
    config = replace(config, precision=best_precision(device), num_images=config.batch_size * steps, log_every=config.batch_size)
    shares = [record["data_wait_share"] for record in ours(spec(device), config, data, device)[1:]]
    return {"data_wait_share": statistics.median(shares), "raw_data_wait_share": [round(share, 5) for share in shares]}


def _worker(index: int, world: int, folder: str, steps: int, port: int, on_gpu: bool) -> None:
    """One worker of `world`; of one, each of several processes is a training of its own."""
    rank = index if world > 1 else 0
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    if world > 1:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world)
    shape = spec(torch.device("cpu") if not on_gpu else device)
    batch = 64 * world
    config = TrainConfig(
        num_images=batch * steps, batch_size=batch, log_every=batch, checkpoint_every=10**9, precision=best_precision(device)
    )
    logs = ours(shape, config, dataset(shape, 1024, Path(folder)), device, rank=rank, world_size=world)
    (Path(folder) / f"workers-{world}-{index}.json").write_text(json.dumps([record["images_per_sec"] for record in logs[1:]]))
    if world > 1:
        torch.distributed.destroy_process_group()


def workers(device: torch.device, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Images a second of two workers over twice those of one, a thread and 64 images a worker each.

    Two trainings that know nothing of each other show what the machine has for a second process: cores that are threads
    of one core, or share their memory's bandwidth, have less than twice.
    """
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return {"two_worker_scaling": None}
    dataset(spec(device), 1024, folder)
    rates: dict[str, list[float]] = {"one": [], "two": [], "apart": []}
    for _ in range(rounds):
        for name, world, processes in (("one", 1, 1), ("two", 2, 2), ("apart", 1, 2)):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            torch.multiprocessing.spawn(_worker, (world, str(folder), steps, port, device.type == "cuda"), nprocs=processes)
            made = [json.loads((folder / f"workers-{world}-{index}.json").read_text()) for index in range(processes)]
            rates[name] += [sum(pair) for pair in zip(*made, strict=True)] if name == "apart" else made[0]
    one, two, apart = (statistics.median(rates[name]) for name in ("one", "two", "apart"))
    return {
        "two_worker_scaling": two / (2 * one), "two_processes_apart_scaling": apart / (2 * one), "two_workers_over_two_apart": two / apart,
        "one_worker_images_per_second": one, "two_worker_images_per_second": two, "raw_workers": rates,
    }  # fmt: skip


def vae_on_the_fly(device: torch.device, images: int) -> dict[str, Any]:
    """Seconds that encoding a batch's images takes where latents are not kept: Stable Diffusion's VAE, random weights."""
    from diffusers import AutoencoderKL

    network: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    network.to(device)
    side = spec(device).input_size * 8
    pixels = torch.randn(images, 3, side, side, device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            wait(device)
            start = time.perf_counter()
            network.encode(pixels)
            wait(device)
            seconds.append((time.perf_counter() - start) / images)
    return {"vae_seconds_per_image": statistics.median(seconds), "vae_pixels": side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="step,curves,data,workers,vae")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile our model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    only = options.only.split(",")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    batch = 128 if on_gpu else 64
    config = TrainConfig(batch_size=batch, checkpoint_every=10**9)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(), "threads": options.threads,
                             "torch": torch.__version__, "quick": options.quick, "batch": batch}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "large").mkdir()
        (folder / "small").mkdir()
        data = dataset(spec(device), 1024 if options.quick else 8192, folder / "large")
        parts = {
            "step": lambda: step_time(
                device, config, data, 1 if options.quick else 3, 20 if on_gpu else 2 if options.quick else 5, options.compile
            ),
            "curves": lambda: curves(device, 60 if options.quick else 200, folder / "small"),
            "data": lambda: data_wait(device, config, data, 100 if on_gpu else 4 if options.quick else 12),
            "workers": lambda: workers(device, folder / "large", 1 if options.quick else 3, 3 if options.quick else 5),
            "vae": lambda: vae_on_the_fly(device, 16 if on_gpu else 1 if options.quick else 4),
        }
        for name, part in parts.items():
            if name in only:
                found |= part()
                for key, value in found.items():
                    if not key.startswith("raw") and key not in ("device", "torch"):
                        print(f"  {key:32} {value:.4g}" if isinstance(value, float) else f"  {key:32} {value}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
