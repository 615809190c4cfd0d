"""The networks whose features generated images are measured in: Inception (of FID), DINOv2 (of FD-DINOv2), EfficientNet-lite.

Each sees batches of one size (`evaluate.device_batch`, the last one padded) in float32, so that an image's features do not
depend on which images came with it.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2c_ray.config import DINOV2, EFFICIENTNETS, INCEPTION, EvaluateConfig, VisionConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, hub, vision
from d2c_ray.models.offline import is_only_local
from d2c_ray.wording import first_line

INCEPTION_WIDTH, INCEPTION_SIZE = 2048, 299
DINOV2_SIZE = 224  # of FD-DINOv2
# SHA-256 of the file that clean-fid downloads, as k-diffusion's evaluation pins it.
PUBLISHED = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_FILE = "inception-2015-12-05.pt"  # as clean-fid names it
_INSTALL = (
    "pip install 'd2c-ray[fid]', or where that would bring another torch or torchvision than the machine's: pip install --no-deps clean-fid"
)

Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Network:
    """A loaded feature network.

    Attributes:
        width: of the features. image_size: pixels a side it sees. device_batch: images a forward, always.
        forward: uint8 N x H x W x 3 on the CPU to features N x width and, of Inception, probabilities N x 1008, float32 there.
            Images that have the network's size already it does not resize, so that it takes what `resize` gives as well.
        resize: forward's resize of one image, uint8 H x W x 3 to image_size x image_size x 3 on the CPU.
    """

    name: str
    width: int
    image_size: int
    device_batch: int
    forward: Forward
    resize: Callable[[Tensor], Tensor]

    def prepare(self, image: np.ndarray) -> Tensor:
        """An image of any size (uint8 H x W x C) as large as the network sees it, for `both_of`."""
        pixels = torch.tensor(image)
        with torch.inference_mode():
            return self.resize(pixels.expand(*pixels.shape[:2], 3))

    def both_of(self, prepared: list[Tensor]) -> tuple[np.ndarray, np.ndarray | None]:
        """As `both`, to the same bits, of images as `prepare` gives them: so those of different sizes share a forward."""
        return self._both(torch.stack(prepared))

    def both(self, images: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features N x width and probabilities N x classes (None of a network that gives none), float32, in one forward.

        Args:
            images: uint8 N x H x W x C, C 1 (which is repeated) or 3.
        """
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
            raise ValueError(f"images are uint8 N x H x W x 1 or 3, got {pixels.dtype} {tuple(pixels.shape)}")
        return self._both(pixels.expand(*pixels.shape[:3], 3))

    def _both(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        def run(batch: Tensor) -> Tensor:
            features, probabilities = self.forward(batch)
            return features if probabilities is None else torch.cat([features, probabilities], 1)

        with torch.inference_mode(), _exact_convolutions():
            found = frozen.in_batches(run, self.device_batch, pixels).numpy()
        return found[:, : self.width], found[:, self.width :] if found.shape[1] > self.width else None

    def features(self, images: Tensor | np.ndarray) -> np.ndarray:
        """As `both`, the features alone."""
        return self.both(images)[0]

    def probabilities(self, images: Tensor | np.ndarray) -> np.ndarray | None:
        """As `both`, the probabilities alone."""
        return self.both(images)[1]


def names(evaluate: EvaluateConfig) -> list[str]:
    """The networks to measure in, the main one first."""
    return list(dict.fromkeys([evaluate.network, *evaluate.more_networks]))


def every(evaluate: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """The `facts` of all networks to measure in, by the names they are given by.

    Raises:
        UserError: as `facts`, or one network in two folders.
    """
    found = {name: facts(name, evaluate) for name in names(evaluate)}
    called: dict[str, str] = {}
    for name, own in found.items():
        if own["network"] in called:
            raise UserError(
                f"evaluate.more_networks names '{name}', which holds the weights of '{called[own['network']]}'; every network is measured in once."
            )
        called[own["network"]] = name
    return found


def facts(name: str, evaluate: EvaluateConfig) -> dict[str, Any]:
    """What decides a network's features, without loading it.

    Returns:
        network (what it is called: its name, and of a local folder what its weights are, wherever it lies), weights (16 hex
        digits), image_size (pixels a side it sees), width.

    Raises:
        UserError: weights or clean-fid missing; says what to install or to give.
    """
    width: Any
    if name in EFFICIENTNETS:
        weights, size, width = frozen.file_hash(frozen.weights_file(name)), evaluate.image_size, frozen.EFFICIENTNETS[name][2]
    elif name == INCEPTION:
        _resizer()
        weights, size, width = frozen.sha256(_inception_file(evaluate))[:16], INCEPTION_SIZE, INCEPTION_WIDTH
    else:
        folder = _dinov2_folder(name, _key(name, evaluate))
        config = hub.read_config(_key(name, evaluate), folder, list(vision.CLASSES))
        vision.normalisation(folder, _key(name, evaluate))
        weights, size, width = hub.folder_hash(folder, vision.FILES), DINOV2_SIZE, config.get("hidden_size")
        patch = config.get("patch_size")
        if not isinstance(patch, int) or not isinstance(width, int) or DINOV2_SIZE % patch:
            raise UserError(
                f"{_key(name, evaluate)}={name}: '{folder}/config.json' says patch_size {patch} and hidden_size {width}; patches of 14 or 16 pixels, "
                f"which tile {DINOV2_SIZE}, would do."
            )
        if Path(name).expanduser().is_dir():
            name = f"dinov2-{weights}"
    return {"network": name, "weights": weights, "image_size": size, "width": width}


def load(name: str, evaluate: EvaluateConfig, device: torch.device) -> Network:
    """The network, frozen, on a device.

    Raises:
        UserError: as `facts`, or weights that cannot be loaded.
    """
    found = facts(name, evaluate)
    if name in EFFICIENTNETS:
        encoder = frozen.VisionEncoder(name, evaluate.image_size, device, evaluate.device_batch)
        forward: Forward = lambda batch: (encoder.pooled(batch), None)  # noqa: E731
        resize = lambda image: frozen.resize(image[None].to(device), evaluate.image_size)[0].permute(1, 2, 0).cpu()  # noqa: E731
    elif name == INCEPTION:
        forward, clean = _inception(_inception_file(evaluate), device), _resizer()
        resize = lambda image: torch.from_numpy(clean(image.numpy()))  # noqa: E731
    else:
        forward, resize = _dinov2(name, evaluate, device), _dinov2_resize
    return Network(name, found["width"], found["image_size"], evaluate.device_batch, forward, resize)


def _key(name: str, evaluate: EvaluateConfig) -> str:
    return "evaluate.network" if name == evaluate.network else "evaluate.more_networks"


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Convolutions in float32 and not in TF32, which torch allows them on GPUs by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


# Inception.


def _resizer() -> Callable[[np.ndarray], np.ndarray]:
    """clean-fid's own resize of one image, H x W x 3, to 299 x 299: Pillow's bicubic in float, which neither rounds nor aliases."""
    try:
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise UserError(f"'{INCEPTION}' is measured in with clean-fid, which is not installed ({error.name}): {_INSTALL}.") from None
    return build_resizer("clean")


def _inception_file(evaluate: EvaluateConfig) -> Path:
    """The TorchScript file: the one given, or clean-fid's own, which is downloaded once and checked."""
    if evaluate.inception:
        path = Path(evaluate.inception).expanduser().absolute()
        if not path.is_file():
            raise UserError(f"evaluate.inception={evaluate.inception}: there is no such file; {_would()}")
        try:
            with zipfile.ZipFile(path) as archive:
                scripted = any("/code/" in name for name in archive.namelist())
        except zipfile.BadZipFile:
            scripted = False
        if not scripted:
            raise UserError(f"evaluate.inception={evaluate.inception} is no TorchScript file (what torch.jit.save writes); {_would()}")
        return path
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "d2c_ray"
    path = folder / _FILE
    if not path.is_file():
        _download(path)
    _check_published(path)
    return path


def _would() -> str:
    return f"clean-fid's {_FILE} would do, or leave it empty to have that downloaded."


def _download(path: Path) -> None:
    """Has clean-fid download its file. It is code, so it gets its name only once it is known to be the published one."""
    import huggingface_hub.constants
    from cleanfid import downloads_helper

    give = f"Give a copy of {_FILE} as evaluate.inception, or put it at '{path}'."
    if is_only_local() or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"the Inception network is not at '{path}', and nothing is downloaded now. {give}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            found = Path(downloads_helper.check_download_inception(folder))
            _check_published(found)
            found.replace(path)
    except OSError as error:  # urllib's are of this kind
        raise UserError(
            f"clean-fid could not download the Inception network from {downloads_helper.inception_url}: {error}. {give}"
        ) from None


def _check_published(path: Path) -> None:
    found = frozen.sha256(path)
    if found != PUBLISHED:
        raise UserError(
            f"'{path}' is not the Inception network that clean-fid publishes: its SHA-256 is {found}, and {PUBLISHED} is expected. "
            "Delete it, so that it is downloaded again, or give another network on purpose as evaluate.inception."
        )


def _inception(path: Path, device: torch.device) -> Forward:
    """clean-fid's features, and the probabilities of the Inception Score.

    As its `InceptionV3W` with the resize outside; that class insists on the file's name. The probabilities are of the logits
    without their bias, as in the original Inception Score and in ADM's evaluator.
    """
    resize = _resizer()
    try:
        network: Any = torch.jit.load(str(path), map_location=device).eval()
        layers, classes = network.layers, network.output.weight.float()  # 1008 x 2048
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"'{path}' cannot be used as an Inception network: {first_line(error)}; {_would()}") from None

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        resized = np.stack([resize(image) for image in batch.numpy()])  # N x 299 x 299 x 3, 0 to 255
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(device)
        # Unoptimised, since TorchScript rewrites a network after its first batches, whose bits then differ from later ones'.
        with torch.jit.optimized_execution(False):
            features = layers((x - 128) / 128)
        if features[0].numel() != INCEPTION_WIDTH or classes.shape[1] != INCEPTION_WIDTH:
            raise UserError(f"'{path}' gives {features[0].numel()} features an image, an Inception network {INCEPTION_WIDTH}; {_would()}")
        features = features.reshape(len(batch), INCEPTION_WIDTH).float()
        return features.cpu(), (features @ classes.T).softmax(1).cpu()

    return forward


# DINOv2.


def _dinov2_folder(name: str, key: str) -> Path:
    return hub.resolve(key, DINOV2.get(name, name), vision.FILES)


def _dinov2(name: str, evaluate: EvaluateConfig, device: torch.device) -> Forward:
    """The class token behind the last layer norm, of images that Pillow makes 224 x 224, bicubic, as dgm-eval has them."""
    key = _key(name, evaluate)
    options = VisionConfig(encoder=name, precision="fp32", device_batch=evaluate.device_batch)
    encoder = vision.Dinov2(_dinov2_folder(name, key), options, DINOV2_SIZE, device, key)

    def forward(batch: Tensor) -> tuple[Tensor, None]:
        return encoder.class_tokens(torch.stack([_dinov2_resize(image) for image in batch])), None

    return forward


def _dinov2_resize(image: Tensor) -> Tensor:
    shape = (DINOV2_SIZE, DINOV2_SIZE)
    return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(shape, Image.Resampling.BICUBIC)))
