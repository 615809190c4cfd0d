"""The encoders that a dataset's provenance names, where they are at hand: nothing is downloaded to check a dataset.

Each function gives the hash of the weights here, which may be others than the stated ones, beside what encodes.
Raises one of `ABSENT` where an encoder is not here or cannot be loaded as stated.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c_ray.config import DINOV2, EFFICIENTNETS, TextConfig, VaeConfig, VisionConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen

ABSENT = (UserError, ImportError, OSError, ValueError, KeyError, RuntimeError)


def _local(name: str, subfolder: str = "") -> None:
    """Raises UserError where loading an encoder would have to ask a hub: a dataset from elsewhere must not make us download."""
    name = DINOV2.get(name, name)
    if name in (*EFFICIENTNETS, "minilm") or (name and Path(name).expanduser().is_dir()):
        return
    from huggingface_hub import try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, f"{subfolder}/config.json".lstrip("/")), str):
            return
    except ValueError:
        pass  # a path, no hub name
    raise UserError(f"'{name}' is neither a folder here nor in the hub's cache")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def vision(stated: dict[str, Any], grid: int) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The hash of an encoder's weights at hand, and uint8 N x H x W x C to tokens, N x L x V."""
    _local(stated["encoder"])
    model: Any
    if find_spec("d2c_ray.models.vision") is not None:
        module = import_module("d2c_ray.models.vision")
        options = VisionConfig(**{name: stated[name] for name in ("encoder", "image_size", "storage", "precision", "device_batch")})
        weights, model = module.facts(options, grid)["weights"], module.load(options, grid, _device())
    else:
        weights = frozen.file_hash(frozen.weights_file(stated["encoder"]))
        model = frozen.VisionEncoder(stated["encoder"], stated["image_size"], _device(), stated["device_batch"])
    return weights, lambda pixels: model.tokens(torch.from_numpy(pixels), grid).numpy()


def text(stated: dict[str, Any], prompts: list[str]) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """The hash of a text encoder's weights at hand, and its states and mask of prompts."""
    _local(stated["encoder"])
    if find_spec("d2c_ray.models.text") is not None:
        module = import_module("d2c_ray.models.text")
        options = TextConfig(
            **{name: stated[name] for name in ("encoder", "template", "tokens", "precision", "device_batch") if name in stated}
        )
        weights, (states, mask) = module.facts(options)["weights"], module.encode(options, prompts, _device())
    else:
        weights = frozen.file_hash(frozen.weights_file(stated["encoder"]))
        states, mask = frozen.encode_text(stated["encoder"], prompts, stated["tokens"])
    return weights, (states.float().numpy(), mask.numpy())


def vae(stated: dict[str, Any]) -> tuple[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]:
    """The hash of a VAE's encoder at hand, and uint8 N x H x W x C to posterior mean and standard deviation."""
    given = stated.get("vae")
    if not given:
        raise UserError("the provenance names no VAE")
    _local(given["path"], given["subfolder"])
    weights = frozen.encoder_hash(given["path"], given["subfolder"])
    network = frozen.Vae(VaeConfig(given["path"], given["subfolder"], given["precision"], given["device_batch"]), _device())

    def encode(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = network.encode(torch.from_numpy(pixels))
        return mean.numpy(), std.numpy()

    return weights, encode
