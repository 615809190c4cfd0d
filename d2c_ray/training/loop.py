"""The training loop: plain PyTorch, one process or several, no Ray.

One step, in the order of the code: take the batch (images, flips, noise and the rest are drawn ahead, in a thread), noise
it, predict, L = L_diffusion + lambda L_align, backward, clip, AdamW, EMA. Several processes average gradients with
DistributedDataParallel. Between two logs the host never waits for the device.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2c_ray import diffusion
from d2c_ray.config import TrainConfig
from d2c_ray.diffusion import align
from d2c_ray.errors import UserError
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.seeding import derive
from d2c_ray.training import batches, state
from d2c_ray.training.prefetch import Prefetch

Log = Callable[[dict], None]
Checkpoint = Callable[[int, state.Saver], None]  # (step, what writes the state into a folder, or takes a snapshot of it)
Preview = Callable[[int, Transformer], None]  # (images, a frozen model with the averaged weights)
Urgent = Callable[[int], bool]  # whether to save the state after this step, whatever the interval


# Buffers are constants. Newer versions of torch have another name for it, and warn of the old one.
_DDP = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
_NO_SYNC: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in _DDP else "broadcast_buffers": False}


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
    micro_batch: int = 0,
    recompute: bool = False,
    log: Log,
    checkpoint: Checkpoint,
    preview: Preview | None = None,
    urgent: Urgent | None = None,
) -> Transformer:
    """Trains a `Transformer` on `data` for `config.num_images` images and returns it with its raw weights.

    Args:
        rank, world_size: this process among those of a default torch.distributed group, if there are several. Any number
            up to the batch's blocks of 16 images: the loss of an image weighs the same whoever computes it.
        resume: folder of a state saved by `checkpoint`; training goes on at the very next image.
        micro_batch: images a forward and backward, whose gradients add up to the step's; 0: the process's whole share.
        recompute: compute the activations inside blocks again for the backward pass instead of keeping them.
        log: gets a dictionary of metrics on every process: images, loss, loss_align, grad_norm, images_per_sec, data_wait_share
            (share of the time spent waiting for the batch), lr, workers, and on a known GPU mfu (share of its dense peak that
            the model's multiply-adds alone used) with mfu_peak (that peak's name). Its time is no training's.
        checkpoint: called at the same steps on every process; the last time when training has ended.
        preview: called on rank 0 every `config.preview_every` images; its time is no training's either.
        urgent: asked after every step, on every process; all must say the same.

    Raises:
        ValueError: a batch of fewer blocks than processes.
        Diverged: the loss or the gradient norm is not finite; the log has got the record that shows it.
    """
    first, stop = batches.share(config.batch_size, rank, world_size)
    torch.manual_seed(derive(config.seed, "init") >> 1)
    model = Transformer(spec)
    if config.start and resume is None:
        from d2c_ray.models import published

        model.load_state_dict(published.start(config.start, spec, model.state_dict()))
    model = model.to(device)
    model.recompute = recompute
    decays = {state.EMA: config.ema_decay, **{state.average_name(decay): decay for decay in config.ema_also}}
    with torch.no_grad():
        averages = {which: {name: value.detach().clone() for name, value in model.named_parameters()} for which in decays}
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    step = state.load(resume, model, averages, optimizer) if resume is not None else 0
    num_steps = math.ceil(config.num_images / config.batch_size)

    aligned = data.aligned and config.align_weight > 0
    if config.compile:
        for block in model.blocks:
            block.compile()  # one graph for all blocks; DDP still sees each block's gradients as they come
    text = data.text_states.to(device) if data.text_states is not None else None
    text_mask = data.text_mask.to(device) if data.text_mask is not None else None
    objective = diffusion.objective(spec.kind, spec.path)
    parameters: list[Tensor] = list(model.parameters())
    followed = [(1.0 - decay, list(averages[which].values())) for which, decay in decays.items()]
    shown: Transformer | None = None

    def images_at(step: int) -> int:
        return step * config.batch_size

    def aligns(step: int) -> bool:
        return aligned and (not config.align_until or images_at(step) < config.align_until)

    def facts() -> dict[str, Any]:
        return {"images": images_at(step), "spec": spec.to_dict()}

    def wrapped(align_now: bool) -> torch.nn.Module:
        """The model as steps run it. The alignment head takes part in all of them, or is frozen: no process asks which parameters were used."""
        if model.align_head is not None:
            model.align_head.requires_grad_(align_now)
        if world_size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # one copy of the gradients less
            **_NO_SYNC,
        )

    save = state.Saver(lambda: state.snapshot(model, averages, optimizer, step, facts()))
    gatherer = batches.Gatherer(device)

    def make(step: int) -> Mapping[str, Tensor]:
        images = images_at(step)
        rows = batches.image_order(config.seed, images + first, images + stop, len(data))
        draws = batches.draw(
            config.seed, step, first, stop - first, data.latent_shape, config.class_dropout, data.flip, data.posterior, device
        )
        batch = batches.gather(data, rows, draws, aligns(step), gatherer)
        return {**batch, "noise": draws.noise, "uniform_t": draws.uniform_t.to(device)}

    def forward_backward(batch: Mapping[str, Tensor], align_now: bool) -> Tensor:
        """Adds the gradients of a (micro-)batch; gives its part of loss and alignment loss of the global batch."""
        t = objective.draw_timesteps(batch["uniform_t"])
        x_t = objective.add_noise(batch["z"], batch["noise"], t)
        condition = {}
        if text is not None and text_mask is not None:
            known = batch["label"].clamp(max=data.num_classes - 1)  # a dropped label has no text; the model masks it
            condition = {"text": text[known], "text_mask": text_mask[known], "text_strength": config.text_strength}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            out = run_model(x_t, t, batch["label"], features=align_now, **condition)
        prediction, projected = out if align_now else (out, None)
        loss = objective.loss(prediction, batch["z"], batch["noise"], x_t, t).mean()
        loss_align = align.loss(projected, batch["vision"]).mean() if projected is not None else torch.zeros((), device=device)
        # DDP takes the mean over processes, whatever their shares: so scaled, it is the mean over the global batch.
        weight = world_size * len(t) / config.batch_size
        ((loss + config.align_weight * loss_align) * weight).backward()
        return torch.stack([loss.detach(), loss_align.detach()]) * weight

    if num_steps == 0 and resume is None:
        checkpoint(0, save)
    run_model, wrapped_aligned = wrapped(aligns(step)), aligns(step)
    since = _Since(device, rank, world_size, step)
    with _precision(config.precision), Prefetch(make, range(step, num_steps), device) as ahead:
        while step < num_steps:
            images, align_now = images_at(step), aligns(step)
            batch = ahead.take()
            optimizer.zero_grad(set_to_none=True)
            if align_now != wrapped_aligned:
                run_model = model  # its wrapper goes before there is another, with its buckets and hooks
                run_model, wrapped_aligned = wrapped(align_now), align_now
            count = stop - first
            chunks = range(0, count, micro_batch or count)
            losses = torch.zeros(2, device=device)
            for start in chunks:
                part = {name: value[start : start + chunks.step] for name, value in batch.items()} if len(chunks) > 1 else batch
                # Gradients travel once a step, with the last part's.
                quiet = world_size > 1 and start != chunks[-1]
                with run_model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
                    losses += forward_backward(part, align_now)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip, foreach=True)
            lr = _set_lr(optimizer, config, images)
            optimizer.step()
            with torch.no_grad():
                for weight, average in followed:
                    torch._foreach_lerp_(average, parameters, weight)
                since.totals += torch.cat([losses, grad_norm.detach()[None]])

            step += 1
            since.images_aligned += config.batch_size * align_now
            images += config.batch_size
            done = step == num_steps
            if done or crosses(images, config.batch_size, config.log_every):
                _log(log, since, spec, config, step, ahead.waited_sec, lr)
                since = _Since(device, rank, world_size, step, ahead.waited_sec)
            saves = done or crosses(images, config.batch_size, config.checkpoint_every)
            saves = saves or (bool(config.keep_every) and crosses(images, config.batch_size, config.keep_every))
            if (urgent is not None and urgent(step)) or saves:
                if since.step < step and not _finite(since.means(step)):
                    # A state that is not good must not take the place of one that is.
                    _log(log, since, spec, config, step, ahead.waited_sec, lr)
                checkpoint(step, save)
            if preview is not None and rank == 0 and config.preview_every and crosses(images, config.batch_size, config.preview_every):
                _wait(device)
                paused = time.perf_counter()
                shown = shown or _shown(spec, averages[state.EMA], device)
                preview(images, shown)
                _wait(device)
                since.time += time.perf_counter() - paused
    return model


@dataclass
class _Since:
    """What adds up between two logs."""

    device: torch.device
    rank: int
    world_size: int
    step: int
    waited_sec: float = 0.0  # for batches, until then
    images_aligned: int = 0
    time: float = field(default_factory=time.perf_counter)
    totals: Tensor = field(init=False)  # loss, alignment loss, gradient norm; on the device

    def __post_init__(self) -> None:
        self.totals = torch.zeros(3, device=self.device)

    def means(self, step: int, *more: float) -> list[float]:
        """Loss, alignment loss and gradient norm a step up to `step`, then `more`: the processes' mean, the same on all of them."""
        means = torch.cat([self.totals / (step - self.step), torch.tensor(more, device=self.device)])
        if self.world_size > 1:
            dist.all_reduce(means)
            means /= self.world_size
        return means.tolist()


def _log(log: Log, since: _Since, spec: TransformerSpec, config: TrainConfig, step: int, waited_sec: float, lr: float) -> None:
    # What the device has not done yet is of these steps: the next ones' time begins behind it.
    _wait(since.device)
    seconds = time.perf_counter() - since.time
    # The seconds are those of rank 0, which alone makes previews and leaves their time out. What processes decide by these
    # numbers is the same everywhere, since the numbers are.
    mine = [seconds * since.world_size if since.rank == 0 else 0.0, waited_sec - since.waited_sec]
    loss, loss_align, grad_norm, seconds, waited = since.means(step, *mine)
    images, shown = step * config.batch_size, (step - since.step) * config.batch_size
    record = {
        "images": images, "loss": loss, "loss_align": loss_align, "grad_norm": grad_norm, "images_per_sec": shown / seconds,
        "data_wait_share": waited / seconds, **_mfu(since, spec, config, shown, seconds), "lr": lr, "workers": since.world_size,
    }  # fmt: skip
    if _finite([loss, loss_align, grad_norm]):
        log(record)
        return
    # JSON has no word for them.
    log({name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()})
    raise Diverged(
        f"training diverged between images {images - shown} and {images}: loss {loss}, gradient norm {grad_norm}, "
        f"lr {config.lr}, precision {config.precision}. A lower train.lr, train.warmup_images or train.precision=fp32 would do."
    )


def _wait(device: torch.device) -> None:
    """Until the device has taken the steps it was given. Batches that are made ahead, on a stream of their own, are none."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))


def _mfu(since: _Since, spec: TransformerSpec, config: TrainConfig, images: int, seconds: float) -> dict[str, Any]:
    """Model FLOPs utilisation: two operations a multiply-add, the backward pass twice the forward (PaLM, arXiv 2204.02311)."""
    if since.device.type != "cuda":
        return {}
    from d2c_ray.models import flops

    peak = flops.dense_peak(torch.cuda.get_device_name(since.device), config.precision)
    if peak is None:
        return {}
    aligned = since.images_aligned
    macs = (images - aligned) * flops.forward_macs(spec) + (aligned * flops.forward_macs(spec, features=True) if aligned else 0)
    return {"mfu": 2 * 3 * macs / seconds / (peak[1] * since.world_size), "mfu_peak": peak[0]}


def _shown(spec: TransformerSpec, average: Mapping[str, Tensor], device: torch.device) -> Transformer:
    """A frozen model whose weights are the average itself: it costs no memory, and stays up to date."""
    model = Transformer(spec)
    model.load_state_dict(dict(average), assign=True)
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def _precision(precision: str) -> Iterator[None]:
    """How float32 products are computed: exactly, or with 'tf32' on tensor cores with 10 bits of mantissa.

    Nothing is changed for 'bf16', whose products are bf16.
    """
    # The switches are the whole process's, so encoders that run while training (in the prefetch thread) go by them too. Under
    # 'bf16' they compute as they do ahead of training, by PyTorch's own settings: float32 convolutions on a GPU may take TF32,
    # matrix products do not. Under 'fp32' and 'tf32' a float32 encoder's outputs may differ from those by TF32's rounding.
    if precision == "bf16":
        yield
        return
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def _set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, images: int) -> float:
    ramp = min(1.0, (images + config.batch_size) / config.warmup_images) if config.warmup_images else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.lr * ramp
    return config.lr * ramp


def crosses(images: int, batch: int, every: int) -> bool:
    """Whether the step that ended at `images` passed a multiple of `every`; none ends at 0."""
    return images // every > max(0, images - batch) // every
