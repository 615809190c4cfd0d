"""Vision encoders to align a student with: DINOv2 through transformers, or a packaged EfficientNet."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from d2c_ray.config import DINOV2, EFFICIENTNETS, VisionConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, hub

KEY = "attach.vision"
CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}  # by model_type
_PREPROCESSOR = "preprocessor_config.json"
FILES = ("config.json", _PREPROCESSOR, *hub.WEIGHTS)  # that decide what a DINOv2 gives
_EFFICIENTNET_SIZE = 128  # pixels a side, where none is given
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of the channels in [0, 1]


class Encoder(Protocol):
    """A loaded vision encoder."""

    width: int

    def tokens(self, pixels: Tensor, side: int, stay: bool = False) -> Tensor:
        """Row-major tokens on a side x side grid: N x side^2 x width float32, for uint8 N x H x W x C.

        On the CPU; where `stay`, on the encoder's device, and fit to be part of a loss.
        """
        ...


class Dinov2:
    """A frozen DINOv2, with or without registers: its normalised patch tokens."""

    def __init__(self, folder: Path, options: VisionConfig, image_size: int, device: torch.device, key: str):
        config = hub.read_config(key, folder, list(CLASSES))
        mean, std = normalisation(folder, key)
        self.width: int = config["hidden_size"]
        self.image_size, self.device, self.device_batch = image_size, device, options.device_batch
        self.dtype = frozen.DTYPES[options.precision]
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
        # The mask token stands for hidden patches in training alone.
        kind, unused = CLASSES[config["model_type"]], ("embeddings.mask_token",)
        self.network = hub.load(key, folder, kind, self.dtype, unused).to(device)
        self.grid = image_size // self.network.config.patch_size
        self.skip = 1 + getattr(self.network.config, "num_register_tokens", 0)  # the class token and the registers come first

    def tokens(self, pixels: Tensor, side: int, stay: bool = False) -> Tensor:
        """The patch tokens after the last layer norm, resampled to side x side where the own grid is another.

        Returns:
            N x side^2 x width float32 on the CPU (or where they are made, if they `stay`), for uint8 N x H x W x C.
        """

        def run(batch: Tensor) -> Tensor:
            patches = self._all_tokens(batch)[:, self.skip :].float()
            maps = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # N x width x h x w
            return frozen.placed(frozen.resample(maps, side).flatten(2).transpose(1, 2), stay)

        with frozen.without_gradients(stay):
            return frozen.in_batches(run, self.device_batch, pixels)

    def class_tokens(self, pixels: Tensor) -> Tensor:
        """The class tokens after the last layer norm: N x width float32 on the CPU, for uint8 N x H x W x C."""

        def run(batch: Tensor) -> Tensor:
            return self._all_tokens(batch)[:, 0].float().cpu()

        with torch.inference_mode():
            return frozen.in_batches(run, self.device_batch, pixels)

    def _all_tokens(self, batch: Tensor) -> Tensor:
        x = (frozen.resize(batch.to(self.device), self.image_size) / 255.0 - self.mean) / self.std
        return self.network(pixel_values=x.to(self.dtype)).last_hidden_state


def facts(options: VisionConfig, grid: int, key: str = KEY) -> dict[str, Any]:
    """What decides the tokens, read from the folder's small files: no weights are loaded.

    Args:
        grid: side of the student's token grid.
        key: of the configuration, for messages.

    Returns:
        encoder, weights (16 hex digits over all files that matter), width, image_size (pixels a side the encoder sees),
        precision, device_batch.

    Raises:
        UserError: no such model, another kind of it, one without its weights, or an image size or precision that it cannot take.
    """
    if options.encoder in EFFICIENTNETS:
        weights, width = frozen.file_hash(frozen.weights_file(options.encoder)), frozen.EFFICIENTNETS[options.encoder][2]
        image_size = options.image_size or _EFFICIENTNET_SIZE
        if options.precision == "bf16":  # measured on photographs; fp16 keeps 0.999
            raise UserError(
                f"{key}.precision=bf16: tokens of {options.encoder} then have a cosine of only 0.9 to those of fp32; fp32 or fp16 would do."
            )
    else:
        folder = _folder(options, key)
        config = hub.read_config(f"{key}.encoder", folder, list(CLASSES))
        weights, image_size = hub.folder_hash(folder, FILES), _image_size(options, config, folder, grid, key)
        normalisation(folder, f"{key}.encoder")
        width = config["hidden_size"]
    return {
        "encoder": options.encoder, "weights": weights, "width": width, "image_size": image_size,
        "precision": options.precision, "device_batch": options.device_batch,
    }  # fmt: skip


def load(options: VisionConfig, grid: int, device: torch.device, key: str = KEY) -> Encoder:
    """The encoder, frozen, on a device.

    Raises:
        UserError: as `facts`, or weights that cannot be loaded.
    """
    image_size = facts(options, grid, key)["image_size"]
    if options.encoder in EFFICIENTNETS:
        return frozen.VisionEncoder(options.encoder, image_size, device, options.device_batch, options.precision)
    return Dinov2(_folder(options, key), options, image_size, device, f"{key}.encoder")


def _folder(options: VisionConfig, key: str) -> Path:
    return hub.resolve(f"{key}.encoder", DINOV2.get(options.encoder, options.encoder), FILES)


def _image_size(options: VisionConfig, config: dict[str, Any], folder: Path, grid: int, key: str) -> int:
    patch = config.get("patch_size")
    if not isinstance(patch, int) or not isinstance(config.get("hidden_size"), int):
        raise UserError(f"{key}.encoder: '{folder}/config.json' does not say patch_size and hidden_size.")
    if options.image_size % patch:
        below = options.image_size // patch * patch
        raise UserError(
            f"{key}.image_size={options.image_size} is no multiple of the encoder's patch of {patch} pixels; {max(below, patch)} or {below + patch} would do, "
            f"or 0 for a patch a token of the student, {patch * grid}."
        )
    return options.image_size or patch * grid


def normalisation(folder: Path, key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels in [0, 1] that the network was trained with."""
    path = folder / _PREPROCESSOR
    stated = hub.read_json(key, path) if path.is_file() else {}
    mean, std = (stated.get(name) or default for name, default in zip(("image_mean", "image_std"), _IMAGENET, strict=True))
    for values in (mean, std):
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{key}: image_mean and image_std of '{path}' are {mean} and {std}; three numbers each would do.")
    return tuple(mean), tuple(std)
