"""Grids of a student's samples while it trains."""

from dataclasses import replace
from pathlib import Path

import torch

from d2c_ray.config import SAMPLERS, ReportConfig, SampleConfig, VaeConfig
from d2c_ray.evaluate import sampling
from d2c_ray.models.frozen import Vae
from d2c_ray.models.transformer import Transformer
from d2c_ray.models.weights import Student
from d2c_ray.report import contact_sheet
from d2c_ray.rundir import write_bytes
from d2c_ray.tracking import PREVIEWS

MOST_STEPS = 50  # of the sampler: a preview is to be looked at, not measured


class Preview:
    """Writes `<out>/previews/images-<count>.png`: a column a class, the same noise every time.

    Args:
        sample: guidance, sampler, seed and at most `MOST_STEPS` of the steps are taken from it.
        report: how many classes are shown.
        vae: of a model of latents.
        labels: those that were trained.
        text: states and mask by class, where the model has a text side.
    """

    def __init__(
        self, sample: SampleConfig, report: ReportConfig, vae: VaeConfig, labels: list[int], text: tuple[torch.Tensor, torch.Tensor] | None,
        text_strength: float, out: Path,
    ):  # fmt: skip
        self._labels = [labels[index] for index in contact_sheet.evenly(len(labels), report.classes)]
        count = contact_sheet.PREVIEW_ROWS * len(self._labels)
        self._sample = replace(
            sample,
            num_images=count,
            steps=min(sample.steps, MOST_STEPS),
            class_draw="balanced",
            device_batch=min(sample.device_batch, count),
        )
        self._vae, self._text, self._strength, self._out = vae, text, text_strength, out / PREVIEWS

    def __call__(self, images: int, network: Transformer) -> None:
        """Samples with `network`, which has seen `images` images, and writes the grid."""
        device = next(network.parameters()).device
        states, mask = (part.to(device) for part in self._text) if self._text is not None else (None, None)
        student = Student(network, {"labels": self._labels}, states, mask, self._strength)
        # Loaded for each preview: between them its memory is the training's.
        vae = Vae(self._vae, device) if self._vae.path else None
        # A teacher of another kind than the student may not know the student's sampler.
        fits = self._sample.sampler in SAMPLERS[network.spec.kind, network.spec.path]
        sample = self._sample if fits else replace(self._sample, sampler="auto")
        _, pixels = sampling.generate(student, sample, torch.arange(sample.num_images), vae)
        across = len(self._labels)
        rows = [list(pixels[start : start + across].numpy()) for start in range(0, len(pixels), across)]
        write_bytes(self._out / f"images-{images:012d}.png", contact_sheet.sheet(rows))
