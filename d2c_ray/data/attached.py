"""Writing the condensed dataset: what a student trains on, attached to decoded images.

Encoders add tensor columns to a table of decoded rows, in one process or one after the other in several; `write` makes
a Parquet part of the result. Legend: N images, F flips kept, L tokens, V vision width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from d2c_ray import schema
from d2c_ray.config import encoder_key
from d2c_ray.data import tables
from d2c_ray.data.latent_cache import Latents
from d2c_ray.data.provenance import hub_features
from d2c_ray.errors import UserError
from d2c_ray.models.frozen import Vae, quantise
from d2c_ray.models.vision import Encoder
from d2c_ray.training.batches import dequantise

FAITHFUL = 0.999  # least cosine to bf16 of a token that is stored in int8, where storage is 'auto'
ROW_GROUP_BYTES = 256 << 20
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as dataset hubs hold and show images


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
    both = [vae.encode(side) for side in _sides(pixels, flip)]
    return torch.stack([mean for mean, _ in both], 1), torch.stack([std for _, std in both], 1)


def latents(pixels: Tensor, vae: Vae, flip: bool) -> Latents:
    """`posterior` as it is stored: 'latent_mean' and 'latent_std', float16.

    Raises:
        UserError: numbers that are not finite, or become so in float16.
    """
    mean, std = posterior(pixels, vae, flip)
    return halved(mean, std)


def halved(mean: Tensor, std: Tensor) -> Latents:
    """Posteriors as they are stored; raises as `latents` does."""
    found = {"latent_mean": mean.half(), "latent_std": std.half()}
    for name, values in found.items():
        _check_finite(values, f"the VAE's posterior ({name})", "vae.precision=fp32 would do, or another VAE")
    return {name: values.numpy() for name, values in found.items()}


def tokens(
    pixels: Tensor, encoder: Encoder, grid: int, flip: bool, int8: bool, column: str, at_once: int
) -> tuple[dict[str, np.ndarray], float | None]:
    """Patch tokens of images, and of their mirror images where `flip`, as they are stored.

    Args:
        pixels: uint8 N x H x W x C.
        grid: side of the student's token grid, on which the tokens lie.
        int8: one scale a token; otherwise bf16.
        column: the tokens' name; their scales are `<column>_scale`.
        at_once: images encoded before the next are, which bounds the memory; a multiple of the encoder's batch.

    Returns:
        The columns, N x F x L x V int8 (or uint16 that holds bf16) and N x F float32 scales a token; and the smallest
        cosine of a stored token to the encoder's own in bf16, None for no image.

    Raises:
        UserError: tokens that are not finite.
    """
    stored: dict[str, list[np.ndarray]] = {}
    least = None
    for chunk in torch.split(pixels, at_once) if len(pixels) else [pixels]:
        fresh = torch.stack([encoder.tokens(side, grid) for side in _sides(chunk, flip)], 1)  # n x F x L x V
        key = encoder_key(column)
        _check_finite(fresh, f"the tokens of {key}", f"{key}.precision=fp32 would do, or another encoder")
        if int8:
            found = dict(zip((column, f"{column}_scale"), quantise(fresh.numpy()), strict=True))
        else:
            found = {column: fresh.bfloat16().view(torch.int16).numpy().view(np.uint16)}
        for name, values in found.items():
            stored.setdefault(name, []).append(values)
        if len(chunk):
            kept = dequantise(found[column], found.get(f"{column}_scale"))
            same = (kept == fresh).all(-1)  # a token of zeros has no direction, and none to lose
            cosine = float(torch.where(same, 1.0, F.cosine_similarity(kept, fresh.bfloat16().float(), dim=-1)).min())
            least = cosine if least is None else min(least, cosine)
    return {name: np.concatenate(values) for name, values in stored.items()}, least


def add(
    table: pa.Table, tensors: dict[str, np.ndarray], cosine: dict[str, float | None] | None = None, devices: Sequence[str] = ()
) -> pa.Table:
    """The table with tensor columns appended; their cosines, and what they were made on, travel in its metadata until it is written."""
    kinds = {name: (str(values.dtype), values.shape[1:]) for name, values in tensors.items()}
    fields = tables.arrow_schema(dict.fromkeys(tensors, "tensor"), kinds)
    for name, values in tensors.items():
        table = table.append_column(fields.field(name), tables.tensor_column(values))
    known = {"cosine": {**_told(table)["cosine"], **(cosine or {})}, "devices": sorted({*_told(table)["devices"], *devices})}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), b"attached": json.dumps(known).encode()})


def write(path: Path, table: pa.Table, facts: dict[str, Any], class_names: list[str] | None = None) -> dict[str, Any]:
    """Writes decoded rows with what was attached to them as one part.

    Args:
        table: manifest rows with `pixels` where they are to be kept, their encoded `image` where it is, and tensors.
        facts: of the part, for its metadata.
        class_names: of a part that ships, which then says what dataset hubs read.

    Returns:
        `facts` with the rows, the smallest cosine of every token column, and the `device` that made it, several joined.
    """
    facts = {"rows": len(table), **facts, "cosine": _told(table)["cosine"], "device": " + ".join(_told(table)["devices"])}
    names = [name for name in schema.CONDENSED if name in table.column_names]
    names += [name for name in table.column_names if name.startswith("vision")]
    columns, fields = [], []
    for name in names:
        field, column = table.schema.field(name), table.column(name)
        if name == "image":
            keys = table.column("key").combine_chunks()
            column = pa.StructArray.from_arrays([column.combine_chunks().cast(pa.binary()), keys], fields=list(IMAGE))
            field = pa.field(name, IMAGE)
        elif schema.CONDENSED.get(name, "tensor") != "tensor":
            field = tables.arrow_schema({name: schema.CONDENSED[name]}).field(name)
            column = column.cast(field.type)
        columns.append(column)
        fields.append(field)
    made = pa.table(columns, schema=pa.schema(fields))
    if class_names is not None:
        made = made.replace_schema_metadata({b"huggingface": hub_features(made.schema, class_names)})
    tables.write(path, made, facts, row_group_rows(made))
    return facts


def row_group_rows(table: pa.Table) -> int:
    """Rows of a part's row groups."""
    return max(1, ROW_GROUP_BYTES // max(1, table.nbytes // max(1, len(table))))


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


def _check_finite(values: Tensor, what: str, would: str) -> None:
    bad = int((~torch.isfinite(values.flatten(1)).all(1)).sum())
    if bad:
        raise UserError(f"attach: {what} are not finite for {bad} of {len(values)} images; {would}.")


def _sides(pixels: Tensor, flip: bool) -> list[Tensor]:
    return [pixels, pixels.flip(2)] if flip else [pixels]


def _told(table: pa.Table) -> dict[str, Any]:
    return json.loads((table.schema.metadata or {}).get(b"attached", b'{"cosine": {}, "devices": []}'))
