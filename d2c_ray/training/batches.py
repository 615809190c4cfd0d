"""What the student sees at each step: a pure function of (seed, step, position in the global batch).

Order of images, flips, timesteps, noise, guidance drop and posterior draw depend on neither the number of workers nor
on where a run was interrupted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from d2c_ray.seeding import derive

BLOCK = 16  # positions that share one generator; a worker takes whole blocks


@dataclass
class TrainingSet:
    """Arrays of a condensed dataset, memory-mapped or in memory; row i of each belongs to the same image.

    Shapes: N images, F flips kept (2 where flips are on), L tokens, V vision width, K text tokens, E text width.
    """

    labels: np.ndarray  # int64, N; in 0..num_classes-1
    num_classes: int
    flip: bool
    pixels: np.ndarray | None = None  # uint8, N x H x W x C
    latent_mean: np.ndarray | None = None  # float16, N x F x C x H x W, unscaled
    latent_std: np.ndarray | None = None
    latent_scale: float = 1.0  # the VAE's scaling factor
    latent_shift: float = 0.0
    vision: np.ndarray | None = None  # int8, or uint16 that holds bf16 bits; N x F x L x V
    vision_scale: np.ndarray | None = None  # float32, N x F x L, with int8
    text_states: Tensor | None = None  # float32, num_classes x K x E
    text_mask: Tensor | None = None  # num_classes x K

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the model is trained on."""
        if self.pixels is not None:
            height, width, channels = self.pixels.shape[1:]
            return channels, height, width
        assert self.latent_mean is not None
        return self.latent_mean.shape[2:]


@dataclass
class Draws:
    """Randomness of a run of batch positions. All from one generator a block of `BLOCK` positions."""

    uniform_t: Tensor  # B
    flip: Tensor  # B, bool
    dropped: Tensor  # B, bool
    noise: Tensor  # B x C x H x W
    posterior: Tensor | None  # B x C x H x W


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(derive(seed, "order", epoch))).permutation(count)


def image_order(seed: int, start: int, stop: int, count: int) -> np.ndarray:
    """Rows of the images number `start` to `stop` that a run shows: each epoch its own permutation of 0..count-1."""
    rows = np.empty(stop - start, np.int64)
    position = start
    while position < stop:
        epoch, offset = divmod(position, count)
        taken = min(stop - position, count - offset)
        rows[position - start : position - start + taken] = _epoch_order(seed, epoch, count)[offset : offset + taken]
        position += taken
    return rows


def draw(
    seed: int,
    step: int,
    first: int,
    count: int,
    shape: tuple[int, int, int],
    dropout: float,
    flip: bool,
    posterior: bool,
    device: torch.device,
) -> Draws:
    """Randomness of positions `first` to `first + count` of a step's global batch; `first` is a multiple of BLOCK."""
    parts: list[tuple[Tensor, ...]] = []
    generator = torch.Generator(device=device)
    for block_start in range(first, first + count, BLOCK):
        generator.manual_seed(derive(seed, "step", step, block_start // BLOCK) >> 1)
        # A whole block is always drawn, so that a batch's last, shorter block equals the head of a full one.
        uniform = torch.rand(3, BLOCK, generator=generator, device=device)
        noise = torch.randn(BLOCK, *shape, generator=generator, device=device)
        extra = torch.randn(BLOCK, *shape, generator=generator, device=device) if posterior else noise
        kept = min(BLOCK, first + count - block_start)
        parts.append((uniform[:, :kept], noise[:kept], extra[:kept]))
    uniform = torch.cat([part[0] for part in parts], dim=1)
    return Draws(
        uniform_t=uniform[0],
        flip=(uniform[1] < 0.5) if flip else torch.zeros_like(uniform[1], dtype=torch.bool),
        dropped=uniform[2] < dropout,
        noise=torch.cat([part[1] for part in parts]),
        posterior=torch.cat([part[2] for part in parts]) if posterior else None,
    )


def gather(data: TrainingSet, rows: np.ndarray, draws: Draws, align: bool) -> Mapping[str, Tensor]:
    """The images of `rows` as tensors on the device of `draws`.

    Returns:
        z: B x C x H x W, float32: pixels in [-1, 1], or scaled latents drawn from their posterior. label: B, the null
        class where dropped. vision: B x L x V float32 up to a scale a token, where `align`.
    """
    device = draws.noise.device
    flipped = draws.flip.cpu().numpy()
    if data.pixels is not None:
        pixels = torch.from_numpy(data.pixels[rows]).to(device)  # B x H x W x C
        z = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        z = torch.where(draws.flip[:, None, None, None], z.flip(-1), z)
    else:
        assert data.latent_mean is not None and data.latent_std is not None and draws.posterior is not None
        side = flipped.astype(np.int64) if data.flip else np.zeros(len(rows), np.int64)
        mean = torch.from_numpy(data.latent_mean[rows, side]).to(device).float()
        std = torch.from_numpy(data.latent_std[rows, side]).to(device).float()
        z = (mean + std * draws.posterior - data.latent_shift) * data.latent_scale
    label = torch.from_numpy(data.labels[rows]).to(device)
    batch = {"z": z, "label": torch.where(draws.dropped, data.num_classes, label)}
    if align:
        batch["vision"] = _vision(data, rows, flipped).to(device)
    return batch


def _vision(data: TrainingSet, rows: np.ndarray, flipped: np.ndarray) -> Tensor:
    assert data.vision is not None
    side = flipped.astype(np.int64) if data.flip else np.zeros(len(rows), np.int64)
    tokens = data.vision[rows, side]
    # The loss is a cosine, which a positive scale a token does not change: int8 tokens need none here.
    return dequantise(tokens, None) if tokens.dtype == np.uint16 else torch.from_numpy(tokens).float()


def dequantise(tokens: np.ndarray, scale: np.ndarray | None) -> Tensor:
    """Stored tokens as float32: int8 times its scale a token, or bf16 bits held as uint16."""
    if tokens.dtype == np.uint16:
        return torch.from_numpy(tokens.view(np.int16)).view(torch.bfloat16).float()
    assert scale is not None
    return torch.from_numpy(tokens).float() * torch.from_numpy(np.ascontiguousarray(scale))[..., None]
