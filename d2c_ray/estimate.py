"""What a configuration will cost, before anything runs: arithmetic on shapes and counts, and nothing that is measured.

Legend: P parameters, N images a micro-batch, L tokens an image, D model width, A hidden width of the alignment head,
V width of the vision tokens, F sides of an image (2 with its mirror image). Bytes and FLOPs are exact for what they
count; what they leave out is said beside them.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from d2c_ray.config import DINOV2, Config, TrainConfig, VisionConfig, in_training
from d2c_ray.errors import UserError
from d2c_ray.models import latents
from d2c_ray.models.flops import dense_peak, forward_macs
from d2c_ray.models.transformer import TimestepEmbed, Transformer, TransformerSpec
from d2c_ray.selection import rank
from d2c_ray.training import batches, online

IMAGENET = (1_281_167, 1_000)  # images and classes of its training set
PATCH = 14  # DINOv2's
# Depth and width of the encoders by model name; a folder at hand says its own.
DINOV2_SHAPES = {"small": (12, 384), "base": (12, 768), "large": (24, 1024), "giant": (40, 1536)}
T5_WIDTHS = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}
EFFICIENTNETS = {
    "efficientnet-lite0": (407e6, 224),
    "efficientnet-lite2": (869e6, 260),
}  # published multiply-adds, at so many pixels a side
EFFICIENTNET_WIDTH, MINILM_WIDTH = 1280, 384
# The encoder of Stable Diffusion's VAE: multiply-adds a pixel, and a squared pixel for the attention over (pixels / 64) places.
VAE_MACS = (2_064_321.0, 0.25)
ROW_BYTES = 16  # sample_id and label
Assumed = list[str]


@dataclass(frozen=True)
class Data:
    """What is known of the source: its images and classes, and the mean bytes of an encoded image; None: not known."""

    images: int
    classes: int
    image_bytes: float | None = None


@dataclass(frozen=True)
class Gpu:
    """A device by its dense peak, and the share of it that training is assumed to use."""

    name: str
    peak: float  # FLOP/s
    precision: str
    mfu: float

    def hours(self, flops: float) -> float:
        return flops / (self.peak * self.mfu) / 3600

    def at(self, precision: str) -> "Gpu":
        """The same device computing in another precision."""
        return gpu(self.name, precision, self.mfu)


def gpu(name: str, precision: str, mfu: float) -> Gpu:
    """A device by name.

    Raises:
        UserError: an unknown one, or a utilisation that is no share.
    """
    if not 0.0 < mfu <= 1.0:
        raise UserError(f"--mfu {mfu}: the share of the peak that is used; above 0 and up to 1 would do, for example 0.4.")
    found = dense_peak(name, precision)
    if found is None:
        raise UserError(f"--gpu {name}: no peak in {precision} is known of it; H100, H200, A100, L40S, L4, A10G or 'RTX 4090' would do.")
    return Gpu(found[0], found[1], precision, mfu)


def student(config: Config, data: Data, gpu: Gpu | None = None) -> dict[str, Any]:
    """All that `d2c plan` says of one student, as numbers.

    Args:
        config: of its arm.
        data: of the source.
        gpu: for the hours; None: none are given.
    """
    assumed: Assumed = []
    chosen = data.images if config.select.selector == "all" else rank.budget_images(config.select.budget, data.images)
    spec = transformer_spec(config, data.classes, assumed)
    steps = math.ceil(config.train.num_images / config.train.batch_size)
    shown = steps * config.train.batch_size
    return {
        "model": {
            "kind": spec.kind, "size": config.model.size, "depth": spec.depth, "width": spec.width, "patch": spec.patch,
            "named": not (config.model.depth or config.model.width or config.model.heads),  # or the size is only where it began
            "parameters": parameters(spec), "parameters_plain": parameters(replace(spec, text_tokens=0, vision_width=0)), "macs_forward": forward_macs(spec), "macs_training": forward_macs(spec, features=True),
        },
        "images": chosen, "of": data.images, "shown": shown, "steps": steps, "epochs": shown / max(1, chosen), "batch_size": config.train.batch_size,
        "compute": compute(config, spec, shown, gpu, assumed),
        "memory": memory(config, spec),
        "bytes": sizes(config, spec, chosen, data, assumed),
        "in_training": in_training(config),
        "assumed": list(dict.fromkeys(assumed)),
    }  # fmt: skip


# The model


def latent(config: Config, assumed: Assumed) -> dict[str, Any]:
    """Kind, channels and side of what the model is trained on, from the VAE's config.json where it is at hand."""
    size = config.data.image_size
    if not config.vae.path:
        return {"kind": "pixels", "channels": config.data.channels, "side": size}
    said = _read_config(config.vae.path, config.vae.subfolder)
    blocks, channels = said.get("block_out_channels"), said.get("latent_channels")
    if not isinstance(blocks, list) or not isinstance(channels, int):
        assumed.append(f"{config.vae.path} is not at hand: a VAE like Stable Diffusion's, 4 channels, reduction by 8")
        blocks, channels = [0] * 4, 4
    return {"kind": "vae", "channels": channels, "side": size // 2 ** (len(blocks) - 1)}


def transformer_spec(config: Config, classes: int, assumed: Assumed) -> TransformerSpec:
    """The network that will be trained, without loading an encoder."""
    text = (config.attach.text.tokens, text_width(config.attach.text.encoder, assumed)) if config.attach.text.encoder != "none" else None
    aligned = aligned_with(config)
    width = vision_width(aligned.encoder, assumed) if aligned else 0
    return latents.transformer_spec(config.model, latent(config, assumed), classes, text, width)


def aligned_with(config: Config) -> VisionConfig | None:
    """The encoder whose tokens a student is aligned with."""
    return config.attach.encoders().get(online.column(config.train.align_with)) if config.train.align_weight > 0 else None


def text_width(encoder: str, assumed: Assumed) -> int:
    if encoder == "minilm":
        return MINILM_WIDTH
    said = _read_config(encoder)
    width = said.get("d_model", said.get("hidden_size")) or T5_WIDTHS.get(encoder.rsplit("-", 1)[-1] if "t5" in encoder else "")
    if not isinstance(width, int):
        assumed.append(f"the width of {encoder} is not known: that of flan-t5-xl, {T5_WIDTHS['xl']}")
        return T5_WIDTHS["xl"]
    return width


def vision_width(encoder: str, assumed: Assumed) -> int:
    if encoder in EFFICIENTNETS:
        return EFFICIENTNET_WIDTH
    width = _read_config(DINOV2.get(encoder, encoder)).get("hidden_size")
    if isinstance(width, int):
        return width
    shape = _dinov2(encoder)
    if shape is None:
        assumed.append(f"the width of {encoder} is not known: that of dinov2-b, {DINOV2_SHAPES['base'][1]}")
    return (shape or DINOV2_SHAPES["base"])[1]


@lru_cache(maxsize=64)
def parameters(spec: TransformerSpec) -> int:
    """P, of a network that takes no memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(spec).parameters())


def _dinov2(encoder: str) -> tuple[int, int] | None:
    """Depth and width by name."""
    name = DINOV2.get(encoder, encoder).rsplit("/", 1)[-1]
    return next((shape for size, shape in DINOV2_SHAPES.items() if name.startswith("dinov2-") and name.endswith(size)), None)


def _read_config(path: str, subfolder: str = "") -> dict[str, Any]:
    """config.json of a model's folder, or of the hub's cache; empty where it is not at hand. Nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    file: Any = Path(path).expanduser() / subfolder / "config.json"
    try:
        if not file.is_file():
            file = try_to_load_from_cache(path, f"{subfolder}/config.json" if subfolder else "config.json")
        found = json.loads(Path(file).read_bytes()) if isinstance(file, str | Path) else {}
    except (HFValidationError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# Compute


def compute(config: Config, spec: TransformerSpec, shown: int, gpu: Gpu | None, assumed: Assumed) -> dict[str, Any]:
    """FLOPs of training: 2 a multiply-add, and three forwards a step (backward is two); a fourth with recompute.

    Frozen encoders that run while training take one forward. Not counted are elementwise operations, norms, AdamW and EMA.
    """
    forwards = 4 if config.resources.recompute else 3
    until = min(shown, config.train.align_until or shown) if spec.vision_width else 0
    plain, aligned = forward_macs(spec), forward_macs(spec, features=True)
    model = 2 * forwards * (aligned * until + plain * (shown - until))
    encoders: dict[str, float] = {}
    precisions: dict[str, str] = {}  # encoders have their own, fp32 unless told otherwise
    unknown: list[str] = []
    online_names, vision = in_training(config), aligned_with(config)
    if online.LATENT in online_names:
        pixels = config.data.image_size**2
        blocks = _read_config(config.vae.path, config.vae.subfolder).get("block_out_channels", [128, 256, 512, 512])
        if blocks == [128, 256, 512, 512]:
            precisions[config.vae.path] = config.vae.precision
            encoders[config.vae.path] = 2.0 * shown * (VAE_MACS[0] * pixels + VAE_MACS[1] * pixels**2)
        else:
            unknown.append(config.vae.path)
    if vision is not None and online.column(config.train.align_with) in online_names:
        macs = vision_macs(vision, spec.input_size // spec.patch)
        if macs is None:
            unknown.append(vision.encoder)
        else:
            precisions[vision.encoder] = vision.precision
            encoders[vision.encoder] = encoders.get(vision.encoder, 0.0) + 2.0 * until * macs
    total = model + sum(encoders.values())
    hours = None
    if gpu:
        spent = gpu.hours(model) + sum(gpu.at(precisions[name]).hours(flops) for name, flops in encoders.items())
        hours = {"gpu": gpu.name, "peak": gpu.peak, "precision": gpu.precision, "mfu": gpu.mfu, "hours": spent}
    return {"model": model, "forwards": forwards, "encoders": encoders, "unknown": unknown, "total": total, "assumed": hours}


def vision_macs(options: VisionConfig, grid: int) -> float | None:
    """Multiply-adds of an image in a vision encoder; None of those that are not known."""
    if options.encoder in EFFICIENTNETS:
        macs, size = EFFICIENTNETS[options.encoder]
        return macs * ((options.image_size or 128) / size) ** 2
    shape = _dinov2(options.encoder)
    if shape is None:
        return None
    depth, width = shape
    patches = (options.image_size // PATCH) ** 2 if options.image_size else grid**2
    tokens = patches + (5 if "reg" in options.encoder else 1)  # the class token, and four registers
    # qkv, proj and MLP (the giant's gated one of two thirds the width is as large); scores and sums over values.
    return patches * 3 * PATCH**2 * width + depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


# Memory


def memory(config: Config, spec: TransformerSpec) -> dict[str, Any]:
    """Bytes on a device in the largest step: weights, gradients, AdamW's moments and EMAs in float32, and what backward keeps.

    Not counted are the encoders that run while training, buckets of several workers, and the allocator's own.
    """
    train, count = config.train, parameters(spec)
    workers = min(config.resources.train_workers, math.ceil(train.batch_size / batches.BLOCK))
    share = max(stop - first for first, stop in (batches.share(train.batch_size, rank, workers) for rank in range(workers)))
    batch = min(config.resources.micro_batch or share, share)
    found = {
        "weights": 4 * count, "gradients": 4 * count, "moments": 8 * count, "ema": 4 * count * (1 + len(train.ema_also)),
        "activations": activations(spec, batch, train.precision == "bf16", config.resources.recompute),
    }  # fmt: skip
    return {**found, "total": sum(found.values()), "micro_batch": batch}


def activations(spec: TransformerSpec, batch: int, bf16: bool, recompute: bool = False, features: bool = True) -> int:
    """Bytes that a forward keeps for backward, as autograd saves them (a fused attention keeps no scores).

    A block keeps, a token, with hidden width H of the MLP: its input, what the first norm gives, modulated; q, k, v;
    attention's output, projected; the input of the second norm, what it gives, modulated; before and after GELU; the MLP's
    output: 12 D + 2 H numbers; and of each norm a mean and a deviation, of each head a sum. In bf16 (autocast) the four
    about the norms stay float32, and every weight of a Linear is kept as a copy in bf16. An image keeps its modulation.

    Args:
        recompute: blocks keep their inputs alone, and one of them at a time all.
        features: with the alignment head and its loss, as training runs it.
    """
    n, size, width = batch, 2 if bf16 else 4, spec.width
    tokens, hidden, patch = (spec.input_size // spec.patch) ** 2, int(spec.width * spec.mlp_ratio), spec.patch**2
    pixels = spec.channels * spec.input_size**2
    # float32 in both: 4 D about the norms.
    block = n * tokens * (16 * width + (8 * width + 2 * hidden) * size + 16 + 4 * spec.heads)
    block += n * 8 * width * size  # shifts, scales and gates
    weights = 0
    if bf16:
        block += n * width * 2  # the condition in bf16
        weights += 2 * spec.depth * (4 * width**2 + 2 * width * hidden + 6 * width**2)
    kept = spec.depth * 4 * n * tokens * width + block if recompute else spec.depth * block
    # Image, timestep (its frequencies; before and after SiLU), label, condition before and after SiLU.
    embed = n * ((pixels + TimestepEmbed.FREQUENCIES + 2 * width) * size + 8 + 4 * width + width * size)
    final = n * tokens * (8 * width + width * size + 8) + n * width * size
    if bf16:
        weights += 2 * (spec.channels * patch * width + width**2 + 2 * width**2 + width * patch * spec.out_channels)
    text = 0
    if spec.text_tokens:
        # States; before and after the norm, its mean and deviation; before and after SiLU; whether the label is kept.
        text = n * ((spec.text_tokens * spec.text_width + 4 * width + 2) * size + 4)
        weights += 2 * 2 * width**2 if bf16 else 0
    head = 0
    if features and spec.vision_width:
        head = n * tokens * (width + 4 * spec.align_hidden) * size  # its input as a copy; before and after both SiLU
        head += n * tokens * 8 * spec.vision_width  # of the loss: what was projected and what it is compared with, in float32
        weights += 2 * (width * spec.align_hidden + spec.align_hidden**2 + spec.align_hidden * spec.vision_width) if bf16 else 0
    return kept + embed + final + text + head + weights


# Bytes on disks


def sizes(config: Config, spec: TransformerSpec, chosen: int, data: Data, assumed: Assumed) -> dict[str, Any]:
    """Bytes of what a student leaves: condensed dataset, a node's copy of it, checkpoints, and the model folder.

    Parquet's compression is left out, and of the copy what the training of this student opens of the dataset is counted.
    """
    train, count, names = config.train, parameters(spec), in_training(config)
    each = image_bytes(config, spec, assumed)
    mine = online.column(train.align_with) if spec.vision_width else ""
    tokens = {column: values[_stored(config.attach.encoders()[column])] for column, values in each["tokens"].items() if column not in names}
    latent_bytes = each["latents"] if online.LATENT not in names else 0
    pixels = each["pixels"] if names or not config.vae.path else 0
    opened = pixels if online.LATENT in names or mine in names or not config.vae.path else 0
    checkpoint = checkpoint_bytes(count, train)
    kept = train.num_images // train.keep_every if train.keep_every else 0
    source = data.image_bytes * chosen if data.image_bytes else None
    parts = {"pixels": pixels * chosen, "latents": latent_bytes * chosen, "tokens": sum(tokens.values()) * chosen}
    return {
        "an_image": each,
        "dataset": {**parts, "images": source, "total": sum(parts.values()) + (source or 0)},
        "cache": (opened + latent_bytes + tokens.get(mine, 0) + ROW_BYTES) * chosen,
        "checkpoint": checkpoint, "checkpoints": checkpoint * (train.keep_checkpoints + kept), "model": 4 * count * (2 + len(train.ema_also)),
        "either_way": {
            "tokens_bf16_a_flip": sum(values["bf16"] for values in each["tokens"].values()) // each["sides"] * chosen,
            "tokens_bf16": sum(values["bf16"] for values in each["tokens"].values()) * chosen,
            "tokens_int8": sum(values["int8"] for values in each["tokens"].values()) * chosen,
            "latents": each["latents"] * chosen, "pixels": each["pixels"] * chosen,
        },
    }  # fmt: skip


def image_bytes(config: Config, spec: TransformerSpec, assumed: Assumed) -> dict[str, Any]:
    """Bytes of an image's pixels, of its latents (mean and deviation in fp16) and of each encoder's tokens, of all its sides."""
    sides, grid = 1 + config.data.flip, spec.input_size // spec.patch
    tokens = {}
    for column, options in config.attach.encoders().items():
        width = vision_width(options.encoder, assumed)
        tokens[column] = {"int8": sides * grid**2 * (width + 4), "bf16": sides * grid**2 * width * 2}
    return {
        "sides": sides,
        "pixels": config.data.image_size**2 * config.data.channels,
        "latents": sides * 2 * 2 * spec.channels * spec.input_size**2 if config.vae.path else 0,
        "tokens": tokens,
    }


def checkpoint_bytes(count: int, train: TrainConfig) -> int:
    """Weights, AdamW's two moments and EMAs, float32."""
    return 4 * count * (4 + len(train.ema_also))


def _stored(options: VisionConfig) -> str:
    return "bf16" if options.storage == "bf16" else "int8"


def of_gpus(config: Config, name: str, mfu: float) -> Gpu:
    """The device at the precision that a configuration trains in."""
    return gpu(name, config.train.precision, mfu)


def known(images: int, config: Config, facts: dict[str, Any] | None, image_bytes: float | None) -> tuple[Data, Assumed]:
    """What is known of the source, and what had to be assumed.

    Args:
        images: as given by hand; 0: not.
        facts: of its manifest, where that is finished.
    """
    most = config.data.limit_per_class * IMAGENET[1] or IMAGENET[0]
    if facts is not None:
        found = Data(facts["rows"], max(1, len(facts["class_names"])), image_bytes)
        return (replace(found, images=images), []) if images else (found, [])
    if images:
        return Data(images, IMAGENET[1]), [f"{IMAGENET[1]:,} classes"]
    if config.select.selector == "all" or config.select.budget <= 1:
        count = min(most, IMAGENET[0])
        return Data(count, IMAGENET[1]), [
            f"ImageNet's {count:,} images of {IMAGENET[1]:,} classes (d2c manifest counts a source that is at hand, --images N says a number)"
        ]
    return Data(*IMAGENET), [f"{IMAGENET[1]:,} classes"]
