"""The encoders that a dataset's provenance names, where they are at hand: nothing is downloaded to check a dataset.

Each function gives the hash of the weights here, which may be others than the stated ones, beside what encodes.
Raises one of `ABSENT` where an encoder is not here or cannot be loaded as stated.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c_ray.config import TextConfig, VaeConfig, VisionConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, hub
from d2c_ray.models import text as encoders_of_text
from d2c_ray.models import vision as encoders_of_images

ABSENT = (UserError, ImportError, OSError, ValueError, KeyError, RuntimeError)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def vision(stated: dict[str, Any], grid: int) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The hash of an encoder's weights at hand, and uint8 N x H x W x C to tokens, N x L x V."""
    options = VisionConfig(**{name: stated[name] for name in ("encoder", "image_size", "storage", "precision", "device_batch")})
    with hub.only_local():
        weights, model = encoders_of_images.facts(options, grid)["weights"], encoders_of_images.load(options, grid, _device())
    return weights, lambda pixels: model.tokens(torch.from_numpy(pixels), grid).numpy()


def text(stated: dict[str, Any], prompts: list[str]) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """The hash of a text encoder's weights at hand, and its states and mask of prompts."""
    known = ("encoder", "template", "tokens", "precision", "device_batch")
    options = TextConfig(**{name: stated[name] for name in known if name in stated})
    with hub.only_local():
        weights, (states, mask) = encoders_of_text.facts(options)["weights"], encoders_of_text.encode(options, prompts, _device())
    return weights, (states.numpy(), mask.numpy())


def _in_cache(name: str, subfolder: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, f"{subfolder}/config.json".lstrip("/")), str)
    except ValueError:  # a path, no hub name
        return False


def vae(stated: dict[str, Any]) -> tuple[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]:
    """The hash of a VAE's encoder at hand, and uint8 N x H x W x C to posterior mean and standard deviation."""
    given = stated.get("vae")
    if not given:
        raise UserError("the provenance names no VAE")
    if not Path(given["path"]).expanduser().is_dir() and not _in_cache(given["path"], given["subfolder"]):
        raise UserError(f"'{given['path']}' is neither a folder here nor in the hub's cache")
    weights = frozen.encoder_hash(given["path"], given["subfolder"])
    network = frozen.Vae(VaeConfig(given["path"], given["subfolder"], given["precision"], given["device_batch"]), _device())

    def encode(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = network.encode(torch.from_numpy(pixels))
        return mean.numpy(), std.numpy()

    return weights, encode
