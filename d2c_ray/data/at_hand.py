"""The encoders that a dataset's provenance names, where they are at hand: nothing is downloaded to check a dataset.

Each function gives the hash of the weights here, which may be others than the stated ones, beside what encodes.
Raises one of `ABSENT` where an encoder is not here or cannot be loaded as stated.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from d2c_ray.config import TextConfig, VaeConfig, VisionConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, offline
from d2c_ray.models import text as encoders_of_text
from d2c_ray.models import vision as encoders_of_images

ABSENT = (UserError, ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError)
_MOST_AT_ONCE = 1024  # rows of a forward
_MOST_SIDE, _MOST_PIXELS = 2048, 1 << 26  # of an image, and of a forward


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_batch(stated: dict[str, Any], side: int = 1) -> int:
    """The batch of every forward, of images of so many pixels a side, within what a stranger may ask of this machine's memory.

    Raises:
        UserError: one image takes too much.
    """
    if side > _MOST_SIDE:
        raise UserError(f"the provenance says images of {side:,} pixels a side; up to {_MOST_SIDE:,} are encoded")
    return max(1, min(stated.get("device_batch", TextConfig.device_batch), _MOST_AT_ONCE, _MOST_PIXELS // max(1, side) ** 2))


def vision(stated: dict[str, Any], grid: int) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The hash of an encoder's weights at hand, and uint8 N x H x W x C to tokens, N x L x V."""
    known = ("encoder", "image_size", "storage", "precision")
    options = VisionConfig(**{name: stated[name] for name in known}, device_batch=_device_batch(stated, stated["image_size"]))
    with offline.only_local():
        weights, model = encoders_of_images.facts(options, grid)["weights"], encoders_of_images.load(options, grid, _device())
    return weights, lambda pixels: model.tokens(torch.from_numpy(pixels), grid).numpy()


def text(stated: dict[str, Any], prompts: list[str]) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """The hash of a text encoder's weights at hand, and its states and mask of prompts."""
    known = ("encoder", "template", "tokens", "precision")
    options = TextConfig(**{name: stated[name] for name in known if name in stated}, device_batch=_device_batch(stated))
    with offline.only_local():
        weights, (states, mask) = encoders_of_text.facts(options)["weights"], encoders_of_text.encode(options, prompts, _device())
    return weights, (states.numpy(), mask.numpy())


def vae(stated: dict[str, Any]) -> tuple[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]:
    """The hash of a VAE's encoder at hand, and uint8 N x H x W x C to posterior mean and standard deviation."""
    given = stated.get("vae")
    if not given:
        raise UserError("the provenance names no VAE")
    options = VaeConfig(
        given["path"], given["subfolder"], given["precision"], _device_batch(given, stated.get("data", {}).get("image_size", 1))
    )
    with offline.only_local():
        weights, network = frozen.encoder_hash(options.path, options.subfolder), frozen.Vae(options, _device())

    def encode(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = network.encode(torch.from_numpy(pixels))
        return mean.numpy(), std.numpy()

    return weights, encode
