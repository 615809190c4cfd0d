"""Writing the condensed dataset: what a student trains on, attached to decoded images."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from d2c_ray import schema
from d2c_ray.data import tables
from d2c_ray.data.latent_cache import Latents
from d2c_ray.models.frozen import Vae, VisionEncoder, quantise
from d2c_ray.training.batches import dequantise


def model_input(pixels: Tensor, vae: Vae | None) -> Tensor:
    """What a model sees of uint8 N x H x W x C: pixels in [-1, 1], or the scaled posterior mean; N x c x h x w float32."""
    if vae is None:
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return scaled(vae.encode(pixels)[0], vae)


def scaled(mean: Tensor, vae: Vae) -> Tensor:
    """Latents as a model sees them."""
    return (mean - vae.shift) * vae.scale


def posterior(pixels: Tensor, vae: Vae, flip: bool) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of each image, and of its mirror image where `flip`: N x F x c x h x w float32."""
    both = [vae.encode(side) for side in ([pixels, pixels.flip(2)] if flip else [pixels])]
    return torch.stack([mean for mean, _ in both], 1), torch.stack([std for _, std in both], 1)


def write_part(
    path: Path, rows: pa.Table, pixels: Tensor, rejected: list[dict[str, str]], *,
    vae: Vae | None, vision: VisionEncoder | None, grid: int, flip: bool, storage: str, keep_images: bool,
    latents: Latents | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Attaches to decoded images what a student trains on, and writes them as one Parquet file.

    Args:
        rows: manifest rows, and their encoded `image` where `keep_images`.
        pixels: uint8 N x H x W x C, of the same rows.
        grid: side of the student's token grid, on which the vision tokens lie.
        flip: attach to the mirrored image too; tensors then have two rows a flip, the plain one first.
        storage: 'int8' or 'bf16', of the vision tokens.
        latents: of these rows, as scoring kept them; None: encode.

    Returns:
        Facts of the part: rows, rejected rows, and the smallest cosine of a stored token to the encoder's own.
    """
    sides = [pixels, pixels.flip(2)] if flip else [pixels]
    tensors: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {"rows": len(rows), "rejected": rejected, "vision_cosine_min": None}
    if vae is None:
        tensors["pixels"] = pixels.numpy()
    elif latents is not None:
        tensors |= latents
    else:
        mean, std = posterior(pixels, vae, flip)
        tensors["latent_mean"], tensors["latent_std"] = mean.half().numpy(), std.half().numpy()
    if vision is not None and len(rows):
        tokens = torch.stack([vision.tokens(side, grid) for side in sides], 1)  # N x F x L x V
        if storage == "int8":
            tensors["vision"], tensors["vision_scale"] = quantise(tokens.numpy())
        else:
            tensors["vision"] = tokens.bfloat16().view(torch.int16).numpy().view(np.uint16)
        stored = dequantise(tensors["vision"], tensors.get("vision_scale"))
        facts["vision_cosine_min"] = float(F.cosine_similarity(stored, tokens, dim=-1).min())
    kinds = {name: (str(values.dtype), values.shape[1:]) for name, values in tensors.items()}
    wanted = {name: kind for name, kind in schema.CONDENSED.items() if kind == "tensor" or name in rows.column_names}
    if not keep_images:
        wanted.pop("image", None)
    fields = tables.arrow_schema(wanted, kinds)
    columns = [
        tables.tensor_column(tensors[name]) if name in tensors else rows.column(name).cast(fields.field(name).type) for name in fields.names
    ]
    tables.write(path, pa.table(columns, schema=fields), facts)
    return facts


def write_classes(path: Path, names: list[str], prompts: list[str], text: tuple[Tensor, Tensor] | None) -> None:
    """The class table: label, name, prompt, and the text states (bf16 bits as uint16) and mask of each class."""
    columns: dict[str, Any] = {
        "label": pa.array(range(len(names)), pa.int32()),
        "name": pa.array(names),
        "prompt": pa.array(prompts, pa.string()),
    }
    kinds = {}
    if text is not None:
        states, mask = text[0].bfloat16().view(torch.int16).numpy().view(np.uint16), text[1].numpy().astype(np.int8)
        kinds = {"text_states": ("uint16", states.shape[1:]), "text_mask": ("int8", mask.shape[1:])}
        columns |= {"text_states": tables.tensor_column(states), "text_mask": tables.tensor_column(mask)}
    fields = tables.arrow_schema(schema.CLASSES, kinds)
    tables.write(path, pa.table([columns[name] for name in fields.names], schema=fields), {})
