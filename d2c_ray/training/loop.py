"""The training loop: plain PyTorch, one process or several, no Ray.

One step, in the order of the code: choose the images and draw their randomness, noise them, predict, L = L_diffusion +
lambda L_align, backward, clip, AdamW, EMA. Several processes average gradients with DistributedDataParallel.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from d2c_ray.config import TrainConfig
from d2c_ray.diffusion import align, ddpm, flow
from d2c_ray.errors import UserError
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.seeding import derive
from d2c_ray.training import batches, state

OBJECTIVES = {"sit": flow, "dit": ddpm}
Log = Callable[[dict], None]
Checkpoint = Callable[[int, Callable[[Path], None]], None]  # (step, function that writes the state into a folder)


class Diverged(UserError):
    """The loss or the gradient stopped being a number."""


def train(
    spec: TransformerSpec,
    config: TrainConfig,
    data: batches.TrainingSet,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    resume: Path | None = None,
    log: Log,
    checkpoint: Checkpoint,
) -> Transformer:
    """Trains a `Transformer` on `data` for `config.num_images` images and returns it with its raw weights.

    Args:
        rank, world_size: this process among those of a default torch.distributed group, if there are several.
        resume: folder of a state saved by `checkpoint`; training goes on at the very next image.
        log: gets a dictionary of metrics (images, loss, loss_align, grad_norm, images_per_sec) on every process.
        checkpoint: called at the same steps on every process; the last time when training has ended.

    Raises:
        ValueError: a batch that does not divide among the processes.
        Diverged: the loss or the gradient norm is not finite.
    """
    if world_size > 1 and config.batch_size % (world_size * batches.BLOCK):
        raise ValueError(f"batch size {config.batch_size} does not divide into {world_size} workers in blocks of {batches.BLOCK} images")
    torch.manual_seed(derive(config.seed, "init") >> 1)
    model = Transformer(spec).to(device)
    with torch.no_grad():
        ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    step = state.load(resume, model, ema, optimizer) if resume is not None else 0
    num_steps = math.ceil(config.num_images / config.batch_size)

    run_model: torch.nn.Module = model
    if world_size > 1:
        run_model = torch.nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=data.vision is not None and bool(config.align_until),
        )
    objective = OBJECTIVES[spec.kind]
    per_worker = config.batch_size // world_size
    aligned = data.vision is not None and config.align_weight > 0
    text = data.text_states.to(device) if data.text_states is not None else None
    text_mask = data.text_mask.to(device) if data.text_mask is not None else None
    parameters: list[Tensor] = list(model.parameters())
    averages = [ema[name] for name, _ in model.named_parameters()]

    def save(folder: Path) -> None:
        facts = {"images": step * config.batch_size, "spec": spec.to_dict()}
        state.save(folder, model, ema, optimizer, step, facts)

    gatherer = batches.Gatherer(device)
    totals: Tensor = torch.zeros(3, device=device)  # loss, alignment loss, gradient norm
    logged_step, logged_time = step, time.perf_counter()
    while step < num_steps:
        images = step * config.batch_size
        first = rank * per_worker
        rows = batches.image_order(config.seed, images + first, images + first + per_worker, len(data))
        draws = batches.draw(
            config.seed, step, first, per_worker, data.latent_shape, config.class_dropout, data.flip, data.latent_mean is not None, device
        )
        align_now = aligned and (not config.align_until or images < config.align_until)
        batch = batches.gather(data, rows, draws, align_now, gatherer)

        t = objective.draw_timesteps(draws.uniform_t)
        x_t = objective.add_noise(batch["z"], draws.noise, t)
        condition = {}
        if text is not None and text_mask is not None:
            known = batch["label"].clamp(max=data.num_classes - 1)  # a dropped label has no text; the model masks it
            condition = {"text": text[known], "text_mask": text_mask[known], "text_strength": config.text_strength}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            out = run_model(x_t, t, batch["label"], features=align_now, **condition)
        prediction, projected = out if align_now else (out, None)
        loss = objective.loss(prediction, batch["z"], draws.noise, x_t, t).mean()
        loss_align = align.loss(projected, batch["vision"]).mean() if projected is not None else torch.zeros((), device=device)
        optimizer.zero_grad(set_to_none=True)
        (loss + config.align_weight * loss_align).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip, foreach=True)
        _set_lr(optimizer, config, images)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1.0 - config.ema_decay)
            totals += torch.stack([loss.detach(), loss_align.detach(), grad_norm.detach()])

        step += 1
        images += config.batch_size
        done = step == num_steps
        if done or _crosses(images, config.batch_size, config.log_every):
            _log(log, totals, images, step - logged_step, logged_time, config, world_size)
            logged_step, logged_time = step, time.perf_counter()
            totals.zero_()
        if done or _crosses(images, config.batch_size, config.checkpoint_every):
            checkpoint(step, save)
    return model


def _log(log: Log, totals: Tensor, images: int, steps: int, since: float, config: TrainConfig, world_size: int) -> None:
    means = totals / steps
    if world_size > 1:
        dist.all_reduce(means)
        means /= world_size
    loss, loss_align, grad_norm = means.tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(
            f"training diverged between images {images - steps * config.batch_size} and {images}: loss {loss}, gradient norm {grad_norm}, "
            f"lr {config.lr}, precision {config.precision}. A lower train.lr, train.warmup_images or train.precision=fp32 would do."
        )
    rate = steps * config.batch_size / (time.perf_counter() - since)
    log({"images": images, "loss": loss, "loss_align": loss_align, "grad_norm": grad_norm, "images_per_sec": rate})


def _set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, images: int) -> None:
    ramp = min(1.0, (images + config.batch_size) / config.warmup_images) if config.warmup_images else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.lr * ramp


def _crosses(images: int, batch: int, every: int) -> bool:
    """Whether the step that ended at `images` passed a multiple of `every`."""
    return images // every > (images - batch) // every
