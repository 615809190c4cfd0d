"""What a configuration will cost, before anything runs: arithmetic on shapes and counts, and nothing that is measured.

Legend: P parameters, N images a micro-batch, L tokens an image, D model width, A hidden width of the alignment head,
V width of the vision tokens, F sides of an image (2 with its mirror image). Bytes and FLOPs are exact for what they
count; what they leave out is said beside them.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from d2c_ray.config import DINOV2, FEATURE_SELECTORS, INCEPTION, MODEL_SIZES, Config, ModelConfig, TrainConfig, VisionConfig, in_training
from d2c_ray.models import latents
from d2c_ray.models.flops import forward_macs
from d2c_ray.models.transformer import TimestepEmbed, Transformer, TransformerSpec
from d2c_ray.selection import rank
from d2c_ray.training import batches, online

IMAGENET = (1_281_167, 1_000)  # images and classes of its training set
DIGITS = (1_797, 10)
PATCH = 14  # DINOv2's
# Depth and width of the encoders by model name; a folder at hand says its own.
DINOV2_SHAPES = {"small": (12, 384), "base": (12, 768), "large": (24, 1024), "giant": (40, 1536)}
# Of T5 (v1.1, so flan-t5 too): blocks, width, that of all heads together, and of the gated MLP.
T5_SHAPES = {"small": (8, 512, 384, 1024), "base": (12, 768, 768, 2048), "large": (24, 1024, 1024, 2816), "xl": (24, 2048, 2048, 5120), "xxl": (24, 4096, 4096, 10240)}  # fmt: skip
T5_VOCABULARY = 32_128
PARAMETERS = {"efficientnet-lite0": 4_652_008, "efficientnet-lite2": 6_092_072, "minilm": 22_713_728}
VAE_PARAMETERS = 83_653_863  # of Stable Diffusion's, encoder and decoder
DINOV2_POSITIONS = 1_370
EFFICIENTNETS = {
    "efficientnet-lite0": (407e6, 224),
    "efficientnet-lite2": (869e6, 260),
}  # published multiply-adds, at so many pixels a side
EFFICIENTNET_WIDTH, MINILM_WIDTH, INCEPTION_WIDTH = 1280, 384, 2048
# The encoder of Stable Diffusion's VAE: multiply-adds a pixel, and a squared pixel for the attention over (pixels / 64) places.
VAE_MACS = (2_064_321.0, 0.25)
VAE_DECODER_MACS = (4_730_528.0, 0.25)
INCEPTION_MACS = 5.73e9  # published, of 299 x 299 pixels
DINOV2_MEASURING = 224 // PATCH  # patches a side that evaluate's DINOv2 networks see
IMAGENET_BYTES = 147_897_477_120 / 1_281_167  # of an image: the published tar of its training set
MOST_SOUGHT = 100_000  # training images that evaluate looks for copies among
ROW_BYTES = 16  # sample_id and label
MANIFEST_BYTES = 10.6  # a row of Parquet, and of a score table but for a number a level: measured of a million and ten million images
SCORE_BYTES = 100 - 4 * 16
PROBABILITIES = 1008  # that Inception gives beside its features
Assumed = list[str]


@dataclass(frozen=True)
class Data:
    """What is known of the source: its images and classes, and the mean bytes of an encoded image; None: not known.

    Attributes:
        imagenet: taken to be ImageNet's training set, or so many of its images.
    """

    images: int
    classes: int
    image_bytes: float | None = None
    imagenet: bool = False

    @property
    def about_bytes(self) -> float | None:
        """Mean bytes of an image: known or, of ImageNet, published."""
        return self.image_bytes or (IMAGENET_BYTES if self.imagenet else None)


def student(config: Config, data: Data) -> dict[str, Any]:
    """All that `d2c plan` says of one student, as numbers.

    Args:
        config: of its arm.
        data: of the source.
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
        "compute": compute(config, spec, shown),
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
    shape = _t5(encoder)
    width = said.get("d_model", said.get("hidden_size")) or (shape[1] if shape else None)
    if not isinstance(width, int):
        assumed.append(f"the width of {encoder} is not known: that of flan-t5-xl, {T5_SHAPES['xl'][1]}")
        return T5_SHAPES["xl"][1]
    return width


def _t5(encoder: str) -> tuple[int, int, int, int] | None:
    return T5_SHAPES.get(encoder.rsplit("-", 1)[-1]) if "t5" in encoder else None


def text_parameters(encoder: str) -> int:
    """About those of a text encoder, biases and norms left out; of one that is not known those of flan-t5-xl."""
    if encoder in PARAMETERS:
        return PARAMETERS[encoder]
    said = _read_config(encoder)
    blocks, width, heads, hidden = _t5(encoder) or T5_SHAPES["xl"]
    if all(isinstance(said.get(name), int) for name in ("num_layers", "d_model", "num_heads", "d_kv", "d_ff")):
        blocks, width, heads, hidden = said["num_layers"], said["d_model"], said["num_heads"] * said["d_kv"], said["d_ff"]
    return blocks * (4 * width * heads + 3 * width * hidden) + T5_VOCABULARY * width


def vision_parameters(encoder: str) -> int:
    """About those of a vision encoder, biases and norms left out; of one that is not known those of dinov2-b."""
    if encoder in PARAMETERS:
        return PARAMETERS[encoder]
    said = _read_config(DINOV2.get(encoder, encoder))
    depth, width = _dinov2(encoder) or DINOV2_SHAPES["base"]
    if all(isinstance(said.get(name), int) for name in ("num_hidden_layers", "hidden_size")):
        depth, width = said["num_hidden_layers"], said["hidden_size"]
    return depth * 12 * width**2 + (3 * PATCH**2 + DINOV2_POSITIONS) * width


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


def network_width(name: str, assumed: Assumed) -> int:
    """Numbers an image in a network that measures."""
    return INCEPTION_WIDTH if name == INCEPTION else vision_width(name, assumed)


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


def compute(config: Config, spec: TransformerSpec, shown: int) -> dict[str, Any]:
    """FLOPs of training: 2 a multiply-add, and three forwards a step (backward is two); a fourth with recompute.

    Frozen encoders that run while training take one forward. Not counted are elementwise operations, norms, AdamW and EMA.
    """
    forwards = 4 if config.resources.recompute else 3
    until = min(shown, config.train.align_until or shown) if spec.vision_width else 0
    plain, aligned = forward_macs(spec), forward_macs(spec, features=True)
    model = 2 * forwards * (aligned * until + plain * (shown - until))
    encoders: dict[str, float] = {}
    unknown: list[str] = []
    for name, macs, images in _in_training(config, spec, shown, until):
        if macs is None:
            unknown.append(name)
        else:
            encoders[name] = encoders.get(name, 0.0) + 2.0 * images * macs
    return {"model": model, "forwards": forwards, "encoders": encoders, "unknown": unknown, "total": model + sum(encoders.values())}


def _in_training(config: Config, spec: TransformerSpec, shown: int, until: int) -> list[tuple[str, float | None, int]]:
    """What encodes while training: its name, multiply-adds an image (None: not known) and images."""
    names, vision = in_training(config), aligned_with(config)
    found: list[tuple[str, float | None, int]] = []
    if online.LATENT in names:
        found.append((config.vae.path, vae_macs(config, VAE_MACS), shown))
    if vision is not None and online.column(config.train.align_with) in names:
        found.append((vision.encoder, vision_macs(vision, spec.input_size // spec.patch), until))
    return found


def vae_macs(config: Config, each: tuple[float, float]) -> float | None:
    """Multiply-adds of an image in the VAE's encoder (VAE_MACS) or decoder (VAE_DECODER_MACS); None of other shapes than Stable Diffusion's."""
    if _read_config(config.vae.path, config.vae.subfolder).get("block_out_channels", [128, 256, 512, 512]) != [128, 256, 512, 512]:
        return None
    pixels = config.data.image_size**2
    return each[0] * pixels + each[1] * pixels**2


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

    An elastic training's largest step is that of the fewest workers. Of encoders that run while training the weights are counted; not
    counted are what these hold beside, buckets of several workers, and the allocator's own.
    """
    train, count, resources = config.train, parameters(spec), config.resources
    fewest = min(resources.train_workers, resources.train_workers_min or resources.train_workers)
    workers = min(fewest, math.ceil(train.batch_size / batches.BLOCK))
    share = max(stop - first for first, stop in (batches.share(train.batch_size, rank, workers) for rank in range(workers)))
    batch = min(config.resources.micro_batch or share, share)
    found = {
        "weights": 4 * count, "gradients": 4 * count, "moments": 8 * count, "ema": 4 * count * (1 + len(train.ema_also)),
        "activations": activations(spec, batch, train.precision == "bf16", config.resources.recompute), "encoders": _online_bytes(config),
    }  # fmt: skip
    return {**found, "total": sum(found.values()), "micro_batch": batch}


def _online_bytes(config: Config) -> int:
    """Weights of the encoders that run while training."""
    names, vision = in_training(config), aligned_with(config)
    found = vae_weights(config) if online.LATENT in names else 0
    return found + (vision_weights(vision) if vision is not None and online.column(config.train.align_with) in names else 0)


def vae_weights(config: Config) -> int:
    """Bytes of the VAE, in its own precision; 0 without one."""
    return _BYTES[config.vae.precision] * VAE_PARAMETERS if config.vae.path else 0


def vision_weights(options: VisionConfig) -> int:
    return _BYTES[options.precision] * vision_parameters(options.encoder)


_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a number


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


def teacher_training(config: Config) -> Config:
    """The configuration that trains the teacher as a student."""
    attach = replace(
        config.attach, text=replace(config.attach.text, encoder="none"), vision=replace(config.attach.vision, encoder="none"), also={}
    )
    resources = replace(config.resources, train_workers=config.resources.teacher_workers)
    return replace(config, model=config.teacher.model, train=config.teacher.train, attach=attach, resources=resources)


def forward_weights(spec: TransformerSpec, bf16: bool) -> int:
    """Bytes of frozen weights, float32; autocast keeps them in bf16 too."""
    return (6 if bf16 else 4) * parameters(spec)


def forward_bytes(spec: TransformerSpec, batch: int, bf16: bool) -> int:
    """About the bytes that a forward of `batch` images holds at once beside the weights, in its widest place: an MLP.

    Not counted is the allocator's own.
    """
    n, width, hidden = batch * (spec.input_size // spec.patch) ** 2, spec.width, int(spec.width * spec.mlp_ratio)
    return n * (8 * width + (width + 2 * hidden) * (2 if bf16 else 4)) + 12 * batch * spec.channels * spec.input_size**2


def vae_bytes(config: Config, decode: bool) -> int:
    """About the bytes that a forward of the VAE holds: three tensors of its widest layer, at the images' full size."""
    each = 2 if config.vae.precision in ("bf16", "fp16") else 4
    return 3 * (256 if decode else 128) * config.data.image_size**2 * each * config.vae.device_batch


def forwards(config: Config, classes: int, assumed: Assumed) -> dict[str, dict[str, Any]]:
    """Memory of processes that train nothing, the weights of all that each holds and its largest forward: bytes, and the field that decides it with its value.

    What encoders of tokens and networks that measure hold beside their weights is left out: a batch of 32 takes them less than the
    transformers here.
    """
    found: dict[str, dict[str, Any]] = {}
    teacher, student = teacher_spec(config, classes, assumed), transformer_spec(config, classes, assumed)
    score, sample, vae = config.score, config.sample, vae_weights(config)
    encoding, decoding = (vae_bytes(config, decode) if vae else 0 for decode in (False, True))

    def take(what: str, weights: int, own: int, knob: str, value: int, of_vae: int = 0) -> None:
        decides = ("vae.device_batch", config.vae.device_batch) if of_vae > own else (knob, value)
        found[what] = {"bytes": weights + max(own, of_vae), "knob": decides[0], "value": decides[1]}

    if config.select.selector not in ("all", *FEATURE_SELECTORS):
        bf16 = score.precision != "fp32"
        own = forward_bytes(teacher, score.device_batch, bf16)
        take("score", forward_weights(teacher, bf16) + vae, own, "score.device_batch", score.device_batch, encoding)
    bf16, batch = sample.precision == "bf16", sample.device_batch * (2 if sample.guidance > 1 else 1)
    weights = forward_weights(student, bf16) + vae
    take("sample", weights, forward_bytes(student, batch, bf16), "sample.device_batch", sample.device_batch)
    if vae:
        take("decode", weights, decoding, "vae.device_batch", config.vae.device_batch)
    online_names, encoders = in_training(config), config.attach.encoders()
    mine = [vision_weights(options) for column, options in encoders.items() if column not in online_names]
    mine += [vae] if vae and online.LATENT not in online_names else []
    if mine:
        weights, knob = max(mine) if config.resources.encoders_apart else sum(mine), "attach.vision.device_batch"
        encodes = encoding if online.LATENT not in online_names else 0
        take("attach", weights, 0, knob, config.attach.vision.device_batch, encodes)
    text = config.attach.text
    if text.encoder != "none":
        take("text", _BYTES[text.precision] * text_parameters(text.encoder), 0, "attach.text.device_batch", text.device_batch)
    return found


# Work, stage by stage


@dataclass(frozen=True)
class Piece:
    """Work of one kind that a stage does `times` an image.

    Attributes:
        what: train | forward | sample | encode | decode | vision | network.
        shape: in words, all that its pace depends on besides the device.
        flops: of it once; None: not known. precision: that they are computed in.
        of: which encoder's column or network; of train and forward whose, teacher or student.
    """

    what: str
    shape: str
    times: float
    flops: float | None
    precision: str
    of: str = ""


def images(stage: str, config: Config, data: Data) -> int:
    """Images that a stage works on, of a training those it shows."""
    if stage == "teacher":
        return 0 if config.teacher.checkpoint else config.teacher.train.num_images
    if stage in ("manifest", "score", "embed", "select"):
        return data.images
    chosen = data.images if config.select.selector == "all" else rank.budget_images(config.select.budget, data.images)
    held = min(config.sample.num_images, data.images // 2)
    real = held + min(data.images - held, config.evaluate.max_reference or data.images)
    if stage == "reference":
        return real
    if stage == "evaluate":
        # Beside what was generated: the training images where the reference lacks them, and mirrored where students saw that.
        trained = min(chosen, real) if config.select.selector == "all" else chosen
        made = (
            0
            if config.sample.keep == "none"
            else config.sample.num_images * (2 if config.evaluate.unguided and config.sample.guidance != 1 else 1)
        )
        return made + (0 if real >= data.images else trained) + (min(trained, MOST_SOUGHT) if config.data.flip else 0)
    return {"attach": chosen, "train": config.train.num_images}.get(stage, config.sample.num_images)


def pieces(stage: str, config: Config, data: Data, assumed: Assumed) -> list[Piece]:
    """What a stage does with each image on its device; empty of stages that work on tables alone."""
    if stage == "teacher":
        return [_training("teacher", teacher_training(config), data.classes, assumed)]
    if stage == "train":
        own = [_training("student", config, data.classes, assumed)] if config.train.num_images else []
        spec = transformer_spec(config, data.classes, assumed)
        shown = config.train.num_images
        until = min(shown, config.train.align_until or shown) if spec.vision_width else 0
        if own and online.LATENT in in_training(config):
            own.append(_encode(config))
        column = online.column(config.train.align_with)
        if own and aligned_with(config) is not None and column in in_training(config):
            own.append(_vision(config, column, spec.input_size // spec.patch, until / shown))
        return own
    sides = 1 + config.data.flip
    if stage == "score":
        spec, score = teacher_spec(config, data.classes, assumed), config.score
        shape = f"{words(spec)}, {score.device_batch} at a time in {score.precision}{', compiled' if score.compile else ''}"
        forward = Piece("forward", shape, score.num_timesteps, 2.0 * forward_macs(spec), score.precision, "teacher")
        return [forward, *([_encode(config, sides if score.cache_latents else 1)] if config.vae.path else [])]
    if stage == "embed":
        return [_efficientnet(config.embed.encoder, config.embed.image_size, config.embed.device_batch, "embed")]
    if stage == "attach":
        grid, online_names = latents_grid(config, assumed), in_training(config)
        kept = config.score.cache_latents and config.select.selector not in ("all", *FEATURE_SELECTORS)
        found = [_encode(config, sides)] if config.vae.path and online.LATENT not in online_names and not kept else []
        return found + [_vision(config, column, grid, sides) for column in config.attach.encoders() if column not in online_names]
    if stage in ("sample", "unguided"):
        spec, sample = transformer_spec(config, data.classes, assumed), config.sample
        low, high = sample.guidance_interval
        guided = 1 + (high - low if sample.guidance > 1 and stage == "sample" else 0)
        each = guided * (2 if sample.sampler == "heun" else 1)
        shape = f"{words(spec)}, {sample.sampler}, {'guided' if guided > 1 else 'unguided'}, {sample.device_batch} at a time in {sample.precision}"
        found = [Piece("sample", shape, sample.steps, 2.0 * each * forward_macs(spec), sample.precision, "student")]
        if config.vae.path:
            macs = vae_macs(config, VAE_DECODER_MACS)
            found.append(Piece("decode", _vae(config), 1, None if macs is None else 2 * macs, config.vae.precision))
        return found + (networks(config) if sample.keep == "none" else [])
    return networks(config) if stage in ("reference", "evaluate") else []


def networks(config: Config) -> list[Piece]:
    """The networks that measure."""
    evaluate = config.evaluate
    found = []
    for name in dict.fromkeys([evaluate.network, *evaluate.more_networks]):
        if name in EFFICIENTNETS:
            found.append(_efficientnet(name, evaluate.image_size, evaluate.device_batch, name))
            continue
        macs = INCEPTION_MACS if name == INCEPTION else vision_macs(VisionConfig(encoder=name), DINOV2_MEASURING)
        found.append(Piece("network", f"{name}, {evaluate.device_batch} at a time", 1, None if macs is None else 2 * macs, "fp32", name))
    return found


def _training(of: str, config: Config, classes: int, assumed: Assumed) -> Piece:
    train, spec = config.train, transformer_spec(config, classes, assumed)
    steps = math.ceil(train.num_images / train.batch_size)
    found = compute(config, spec, steps * train.batch_size)
    more = [
        f"{1 + len(train.ema_also)} EMAs",
        *(["compiled"] if train.compile else []),
        *(["recomputing"] if config.resources.recompute else []),
    ]
    shape = f"{words(spec)}, batch {train.batch_size} in {train.precision}, {', '.join(more)}{'' if train.align_weight > 0 and spec.vision_width else ', not aligned'}"
    return Piece("train", shape, 1, found["model"] / max(1, steps * train.batch_size), train.precision, of)


def _encode(config: Config, times: float = 1) -> Piece:
    macs = vae_macs(config, VAE_MACS)
    return Piece("encode", _vae(config), times, None if macs is None else 2 * macs, config.vae.precision)


def _vae(config: Config) -> str:
    vae = config.vae
    return f"{vae.path}{f'/{vae.subfolder}' if vae.subfolder else ''} at {config.data.image_size} px, {vae.device_batch} at a time in {vae.precision}"


def _vision(config: Config, column: str, grid: int, times: float) -> Piece:
    own = config.attach.encoders()[column]
    macs = vision_macs(own, grid)
    shape = f"{own.encoder} at {own.image_size or 'its own'} px for {grid} x {grid} tokens of {config.data.image_size} px, {own.device_batch} at a time in {own.precision}"
    return Piece("vision", shape, times, None if macs is None else 2 * macs, own.precision, column)


def _efficientnet(name: str, size: int, batch: int, of: str) -> Piece:
    macs, native = EFFICIENTNETS[name]
    return Piece("network", f"{name} at {size} px, {batch} at a time", 1, 2 * macs * (size / native) ** 2, "fp32", of)


def words(spec: TransformerSpec) -> str:
    """A network's shape."""
    text = f", text {spec.text_tokens} x {spec.text_width}" if spec.text_tokens else ""
    vision = f", vision {spec.vision_width} by {spec.align_hidden}" if spec.vision_width else ""
    return f"{spec.kind} of {spec.depth} x {spec.width}, {spec.heads} heads, on {spec.channels} x {spec.input_size} x {spec.input_size} by {spec.patch}{text}{vision}"


def latents_grid(config: Config, assumed: Assumed) -> int:
    """Tokens a side of a student."""
    side: int = latent(config, assumed)["side"]
    return side // config.model.patch


def teacher_spec(config: Config, classes: int, assumed: Assumed) -> TransformerSpec:
    """The network that scores: the teacher that is trained, or as far as a checkpoint is at hand or its name says it."""
    given, model = config.teacher.checkpoint, config.teacher.model
    if not given:
        return latents.transformer_spec(model, latent(config, assumed), classes, None, 0)
    folder = Path(given).expanduser()
    if (folder / "model.json").is_file():
        return TransformerSpec(**json.loads((folder / "model.json").read_text())["spec"])
    said = _read_config(given, "transformer") or _read_config(given)
    named = re.search(r"(DiT|SiT)-(S|B|L|XL)-(\d)", given, re.IGNORECASE)
    if "num_attention_heads" in said:
        heads = said["num_attention_heads"]
        model = ModelConfig(
            "dit", depth=said["num_layers"], width=heads * said["attention_head_dim"], heads=heads, patch=said["patch_size"]
        )
    elif named:
        depth, width, heads = MODEL_SIZES[named[2].upper()]
        model = ModelConfig(named[1].lower(), depth=depth, width=width, heads=heads, patch=int(named[3]))
    else:
        assumed.append(f"the shape of teacher.checkpoint={given} is not known: that of a DiT-XL/2")
        model = ModelConfig("dit", size="XL")
    return latents.transformer_spec(model, latent(config, assumed), classes, None, 0)


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
    source = data.about_bytes * chosen if data.about_bytes else None
    parts = {"pixels": pixels * chosen, "latents": latent_bytes * chosen, "tokens": sum(tokens.values()) * chosen}
    return {
        "an_image": each,
        "dataset": {**parts, "images": source, "total": sum(parts.values()) + (source or 0)},
        "cache": (opened + latent_bytes + tokens.get(mine, 0) + ROW_BYTES) * chosen,
        # What other stages leave; generated images are PNG, which is smaller than their pixels.
        "kept_latents": each["latents"] * data.images if config.score.cache_latents else 0,
        "samples": config.sample.num_images * each["pixels"] * {"none": 0, "parquet": 1}.get(config.sample.keep, 2),
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


def feature_bytes(config: Config, assumed: Assumed) -> int:
    """Bytes of an image in all networks that measure, float32."""
    names = dict.fromkeys([config.evaluate.network, *config.evaluate.more_networks])
    return 4 * sum(network_width(name, assumed) + (PROBABILITIES if name == INCEPTION else 0) for name in names)


def checkpoint_bytes(count: int, train: TrainConfig) -> int:
    """Weights, AdamW's two moments and EMAs, float32."""
    return 4 * count * (4 + len(train.ema_also))


def _stored(options: VisionConfig) -> str:
    return "bf16" if options.storage == "bf16" else "int8"


def known(images: int, config: Config, facts: dict[str, Any] | None, image_bytes: float | None) -> tuple[Data, Assumed]:
    """What is known of the source, and what had to be assumed.

    Args:
        images: as given by hand; 0: not.
        facts: of its manifest, where that is finished.
    """
    most = config.data.limit_per_class * IMAGENET[1] or IMAGENET[0]
    if facts is not None:
        found = Data(facts["rows"], max(1, len(facts["class_names"])), image_bytes, image_bytes is None and facts["rows"] == IMAGENET[0])
        return (replace(found, images=images, imagenet=False), []) if images else (found, [])
    if config.data.source == "digits":
        count = min(DIGITS[0], config.data.limit_per_class * DIGITS[1] or DIGITS[0])
        return Data(images or count, DIGITS[1]), []
    if images:
        return Data(images, IMAGENET[1]), [f"{IMAGENET[1]:,} classes"]
    count = min(most, IMAGENET[0])
    said = f"ImageNet's {count:,} images of {IMAGENET[1]:,} classes, {IMAGENET_BYTES * count / 1e9:,.1f} GB"
    return Data(count, IMAGENET[1], None, True), [f"{said} (d2c manifest counts a source that is at hand, --images N says a number)"]
