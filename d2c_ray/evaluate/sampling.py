"""Generating images: image i depends on (seed, i) alone, whatever batch or process it is made in."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2c_ray.config import SAMPLERS, SampleConfig
from d2c_ray.diffusion import ddpm, samplers
from d2c_ray.models.frozen import Vae, in_batches, to_uint8
from d2c_ray.models.transformer import TransformerSpec
from d2c_ray.models.weights import Student
from d2c_ray.seeding import derive

# Images a forward on a CPU, whatever sample.device_batch is: kernels round otherwise for another shape, and larger ones gain nothing there.
CPU_BATCH = 16
THREE = 3  # channels that the published sampling of DiT and SiT guides


def sampler_name(sample: SampleConfig, spec: TransformerSpec) -> str:
    """The sampler that 'auto' stands for."""
    return SAMPLERS[spec.kind, spec.path][0] if sample.sampler == "auto" else sample.sampler


def guided_channels(sample: SampleConfig, spec: TransformerSpec) -> int:
    """How many channels of an image, the first ones, are guided."""
    return min(THREE, spec.channels) if sample.guidance_channels == "three" else spec.channels


def facts(sample: SampleConfig, spec: TransformerSpec) -> dict[str, Any]:
    """What of the sampling changes the numbers that its images get, as it acts and not as it was asked for.

    guidance_interval and guidance_channels are None where there is no guidance, or where it is not limited.
    """
    guided = sample.guidance > 1.0
    channels, interval = guided_channels(sample, spec), list(sample.guidance_interval)
    return {
        "sampler": sampler_name(sample, spec), "steps": sample.steps, "guidance": sample.guidance,
        "guidance_interval": interval if guided and interval != [0.0, 1.0] else None,
        "guidance_channels": channels if guided and channels < spec.channels else None,
        "class_draw": sample.class_draw, "sample_seed": sample.seed, "sample_precision": sample.precision,
    }  # fmt: skip


def draw_labels(indices: Tensor, classes: Tensor, class_draw: str, seed: int) -> Tensor:
    """The class asked of each image, one of `classes`: in turn (balanced), or drawn by (seed, i)."""
    if class_draw == "balanced":
        return classes[indices % len(classes)]
    return classes[torch.tensor([derive(seed, "class", int(i)) % len(classes) for i in indices], dtype=torch.int64)]


def image_noise(seed: int, indices: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Draw number `draw` of each image's noise, float32 N x shape: 0 is the starting point."""
    rows = [
        np.random.Generator(np.random.Philox(key=derive(seed, "sample", int(i)), counter=[0, 0, 0, draw])).standard_normal(
            shape, np.float32
        )
        for i in indices
    ]
    return torch.from_numpy(np.stack(rows))


def forward_batch(sample: SampleConfig, device_type: str) -> int:
    """Images a forward, always: the last batch is filled up."""
    return CPU_BATCH if device_type == "cpu" else sample.device_batch


def generate(student: Student, sample: SampleConfig, indices: Tensor, vae: Vae | None) -> tuple[Tensor, Tensor]:
    """Images number `indices` of a model.

    Returns:
        The class asked of each, N int64, and the images, uint8 N x H x W x C, on the CPU.
    """
    spec = student.spec
    device = next(student.network.parameters()).device
    shape = (spec.channels, spec.input_size, spec.input_size)
    sampler = samplers.find(sampler_name(sample, spec), spec.kind, spec.path)
    channels, unit = guided_channels(sample, spec), float(ddpm.NUM_STEPS) if spec.kind == "dit" else 1.0
    # Labels may have gaps, and a class that was never trained is not asked for.
    classes = torch.as_tensor(student.meta.get("labels") or range(spec.num_classes))
    labels = draw_labels(indices, classes, sample.class_draw, sample.seed)

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=sample.precision == "bf16"):
            return student.predict(x, t, label)

    def run(batch: Tensor, label: Tensor) -> Tensor:
        predict = samplers.guided(network, label.to(device), spec.num_classes, sample.guidance, channels, sample.guidance_interval, unit)
        noise = image_noise(sample.seed, batch, 0, shape).to(device)
        return sampler(predict, noise, sample.steps, lambda step: image_noise(sample.seed, batch, step + 1, shape).to(device)).cpu()

    with torch.inference_mode():
        z = in_batches(run, forward_batch(sample, device.type), indices, labels)
    return labels, vae.decode(z) if vae is not None else to_uint8(z)
