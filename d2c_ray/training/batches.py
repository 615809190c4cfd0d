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

from d2c_ray.models.frozen import Vae
from d2c_ray.models.vision import Encoder
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
    pixels: np.ndarray | None = None  # uint8, N x H x W x C: what a model without a VAE is trained on, or what is encoded as it is shown
    latent_mean: np.ndarray | None = None  # float16, N x F x C x H x W, unscaled
    latent_std: np.ndarray | None = None
    latent_scale: float = 1.0  # the VAE's scaling factor
    latent_shift: float = 0.0
    vision: np.ndarray | None = None  # int8, or uint16 that holds bf16 bits; N x F x L x V
    vision_scale: np.ndarray | None = None  # float32, N x F x L, with int8
    text_states: Tensor | None = None  # float32, num_classes x K x E
    text_mask: Tensor | None = None  # num_classes x K
    # Frozen encoders on the device of training, of pixels as they are shown, for what is not stored.
    vae: Vae | None = None
    vision_encoder: Encoder | None = None
    grid: int = 0  # side of the model's token grid, on which the vision encoder's tokens lie

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the model is trained on."""
        if self.latent_mean is not None:
            return self.latent_mean.shape[2:]
        assert self.pixels is not None
        height, width, channels = self.pixels.shape[1:]
        return self.vae.latent_shape(height) if self.vae is not None else (channels, height, width)

    @property
    def posterior(self) -> bool:
        """Whether the model is trained on draws from a VAE's posterior."""
        return self.latent_mean is not None or self.vae is not None

    @property
    def aligned(self) -> bool:
        """Whether there are vision tokens to align with, stored or made as images are shown."""
        return self.vision is not None or self.vision_encoder is not None


@dataclass
class Draws:
    """Randomness of a run of batch positions. All from one seed a block of `BLOCK` positions.

    What the host decides by lies on the host, so that nobody waits for the device to hear of it.
    """

    uniform_t: Tensor  # B, on the host
    flip: Tensor  # B, bool, on the host
    dropped: Tensor  # B, bool, on the host
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
    host = torch.Generator()
    generator = host if device.type == "cpu" else torch.Generator(device=device)
    for block_start in range(first, first + count, BLOCK):
        block_seed = derive(seed, "step", step, block_start // BLOCK) >> 1
        host.manual_seed(block_seed)
        if generator is not host:
            generator.manual_seed(block_seed)
        # A whole block is always drawn, so that a batch's last, shorter block equals the head of a full one.
        uniform = torch.rand(3, BLOCK, generator=host)
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


def share(batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Positions (first, stop) of a global batch that a worker takes: whole blocks, as evenly as they divide.

    Only a batch's last block may be short, and it is the last worker's.

    Raises:
        ValueError: fewer blocks than workers.
    """
    blocks = -(-batch // BLOCK)
    if blocks < world_size:
        raise ValueError(f"a batch of {batch} is {blocks} blocks of {BLOCK} images, too few for {world_size} workers")
    return rank * blocks // world_size * BLOCK, min(batch, (rank + 1) * blocks // world_size * BLOCK)


class Gatherer:
    """Rows of memory-mapped arrays, on a device. Buffers of a batch are kept and filled again, so that the only new memory
    is the result's own, and on CUDA they are pinned. One thread at a time.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._sent: dict[str, torch.cuda.Event] = {}

    def take(
        self, name: str, array: np.ndarray, rows: np.ndarray, side: np.ndarray | None = None, dtype: torch.dtype | None = torch.float32
    ) -> Tensor:
        """`array[rows, side]`, or `array[rows]` where `side` is None, as a tensor of its own on the device.

        Args:
            name: whose buffer; two arrays in one batch have two.
            array: C-contiguous, N x F x ..., or N x ...; uint16 holds bf16 bits.
            rows, side: B integers each (side: 0 or 1, also as booleans), in range.
            dtype: to convert to, on the device; None: as stored.
        """
        moved = self.fill(name, array, rows, side).to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            self._sent[name] = torch.cuda.Event()
            self._sent[name].record(torch.cuda.current_stream(self._device))
        # To the CPU nothing has moved yet: without a copy the result would change with the next batch.
        return moved.to(dtype or moved.dtype, copy=self._device.type == "cpu")

    def fill(self, name: str, array: np.ndarray, rows: np.ndarray, side: np.ndarray | None = None) -> Tensor:
        """As `take`, but the buffer itself, as stored (uint16 as bfloat16): the next call for `name` overwrites it."""
        if not array.flags.c_contiguous:
            raise ValueError(f"'{name}' is not contiguous: taking rows of it would copy all of it first")
        values, index = np.asarray(array), np.asarray(rows, np.int64)
        if side is not None:
            sides = array.shape[1]
            # A dataset without mirror images has one side, which is every image's.
            index = index * sides + (np.asarray(side, np.int64) if sides > 1 else 0)
            values = values.reshape(-1, *array.shape[2:])
        buffer = self._buffer(name, values, len(index))
        # Into the buffer itself only with mode='clip': otherwise NumPy gathers elsewhere first, so as to leave `out` whole on an error.
        np.take(values, index, axis=0, out=buffer.numpy().view(values.dtype), mode="clip")
        return buffer.view(torch.bfloat16) if values.dtype == np.uint16 else buffer

    def _buffer(self, name: str, values: np.ndarray, rows: int) -> Tensor:
        if name in self._sent:
            self._sent[name].synchronize()  # the last batch has left the buffer
        wanted = torch.int16 if values.dtype == np.uint16 else torch.from_numpy(np.empty(0, values.dtype)).dtype
        kept = self._buffers.get(name)
        if kept is None or len(kept) < rows or kept.shape[1:] != values.shape[1:] or kept.dtype != wanted:
            kept = torch.empty((rows, *values.shape[1:]), dtype=wanted, pin_memory=self._device.type == "cuda")
            self._buffers[name] = kept
        return kept[:rows]


def gather(data: TrainingSet, rows: np.ndarray, draws: Draws, align: bool, gatherer: Gatherer | None = None) -> Mapping[str, Tensor]:
    """The images of `rows` as tensors on the device of `draws`. `gatherer` is kept from batch to batch, for its buffers.

    What is not stored is encoded here, of the image as it is shown (mirrored or not), by encoders that see batches of one
    size: how a step's images are spread over workers changes no bit of it.

    Returns:
        z: B x C x H x W, float32: pixels in [-1, 1], or scaled latents drawn from their posterior. label: B, the null
        class where dropped. vision: B x L x V float32 up to a scale a token, where `align`.
    """
    device = draws.noise.device
    gatherer = gatherer or Gatherer(device)
    side = draws.flip.numpy()
    shown: Tensor | None = None
    if data.vae is not None or (align and data.vision_encoder is not None):
        assert data.pixels is not None
        pixels = gatherer.take("pixels", data.pixels, rows, None, None)  # B x H x W x C
        shown = torch.where(draws.flip.to(device)[:, None, None, None], pixels.flip(2), pixels)
    if data.latent_mean is not None or data.vae is not None:
        assert draws.posterior is not None
        if data.vae is not None:
            assert shown is not None
            mean, std = data.vae.encode(shown, stay=True)
        else:
            assert data.latent_mean is not None and data.latent_std is not None
            mean = gatherer.take("latent_mean", data.latent_mean, rows, side)
            std = gatherer.take("latent_std", data.latent_std, rows, side)
        z = (mean + std * draws.posterior - data.latent_shift) * data.latent_scale
    elif shown is not None:
        z = shown.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    else:
        assert data.pixels is not None
        z = gatherer.take("pixels", data.pixels, rows).permute(0, 3, 1, 2) / 127.5 - 1.0
        z = torch.where(draws.flip.to(device)[:, None, None, None], z.flip(-1), z)
    label = torch.where(draws.dropped, data.num_classes, torch.from_numpy(data.labels[rows]))
    batch = {"z": z, "label": label.to(device)}
    if align and data.vision_encoder is not None:
        assert shown is not None
        batch["vision"] = data.vision_encoder.tokens(shown, data.grid, stay=True)
    elif align:
        assert data.vision is not None
        # The loss is a cosine, which a positive scale a token does not change: int8 tokens need none here.
        batch["vision"] = gatherer.take("vision", data.vision, rows, side)
    return batch


def dequantise(tokens: np.ndarray, scale: np.ndarray | None) -> Tensor:
    """Stored tokens as float32: int8 times its scale a token, or bf16 bits held as uint16."""
    if tokens.dtype == np.uint16:
        return torch.from_numpy(tokens.view(np.int16)).view(torch.bfloat16).float()
    assert scale is not None
    return torch.from_numpy(tokens).float() * torch.from_numpy(np.ascontiguousarray(scale))[..., None]
