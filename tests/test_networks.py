"""The networks that are measured in: equal to the packages they stand for, and refused with what would do."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_encoders import randomise

from d2c_ray.config import EvaluateConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, networks, offline

CPU = torch.device("cpu")


class Layers(torch.nn.Module):
    """Stands for the convolutions: 2,048 features of a 299 x 299 image."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 2048, 23, stride=23)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolution(x)).mean((2, 3))


class Inception(torch.nn.Module):
    """The signature of the TorchScript network that clean-fid downloads, resize and normalisation included, but small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        features = self.layers((img - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return torch.nn.functional.linear(features, self.output.weight, bias).softmax(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file of that signature, under the name that clean-fid's class insists on."""
    network = Inception()
    randomise(network, 0, 0.05)
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.jit.script(network).save(str(path))
    return path


@pytest.fixture(scope="module", params=["plain", "registers"])
def dinov2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 for 224 pixels with patches of 56."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    if request.param == "plain":
        network = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    else:
        network = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **shape))
    randomise(network, 1, 0.1)
    folder = tmp_path_factory.mktemp("vision") / request.param
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Squares of 48 pixels from two photographs."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return np.stack([photos[i % 2][40 * i : 40 * i + 48, 50 * i : 50 * i + 48] for i in range(5)])


def measured_in(name: object, **fields: object) -> EvaluateConfig:
    return EvaluateConfig(network=str(name), **{"device_batch": 3, **fields})  # type: ignore[arg-type]


def test_inception_equals_clean_fid_bit_for_bit(inception: Path, images: np.ndarray) -> None:
    pytest.importorskip("cleanfid", reason="clean-fid is not installed (pip install --no-deps clean-fid==0.1.35)")
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    theirs, resize = InceptionV3W(str(inception.parent), download=False), build_resizer("clean")
    # The last batch is padded; theirs gets the same padded batch, since bits depend on a batch's size.
    resized = torch.from_numpy(np.stack([resize(image) for image in [*images, images[3]]]).transpose(0, 3, 1, 2))
    with torch.no_grad():
        wanted = torch.cat([theirs(resized[start : start + 3]) for start in (0, 3)])[:5]
        chances = torch.cat([theirs.base(resized[start : start + 3], no_output_bias=True) for start in (0, 3)])[:5]
    network = networks.load("inception", measured_in("inception", inception=str(inception)), CPU)
    features, probabilities = network.both(images)
    assert features.dtype == np.float32 and features.shape == (5, 2048) == (5, network.width)
    np.testing.assert_array_equal(features, wanted.numpy())
    np.testing.assert_allclose(probabilities, chances.numpy(), rtol=1e-5)
    assert probabilities is not None and probabilities.shape == (5, 1008)
    np.testing.assert_array_equal(network.features(images), features)
    np.testing.assert_array_equal(network.probabilities(images), probabilities)


def test_features_depend_on_no_other_image(inception: Path, images: np.ndarray) -> None:
    pytest.importorskip("cleanfid", reason="clean-fid is not installed")
    network = networks.load("inception", measured_in("inception", inception=str(inception)), CPU)
    whole = network.features(images)
    for rows in ([4], [2, 0], [3, 1, 4, 0]):
        np.testing.assert_array_equal(network.features(images[rows]), whole[rows])
    assert network.features(images[:0]).shape == (0, 2048)
    grey = images[..., :1]
    np.testing.assert_array_equal(network.features(grey), network.features(grey.repeat(3, 3)))
    with pytest.raises(ValueError, match="uint8 N x H x W"):
        network.features(images.astype(np.float32))


def test_dinov2_gives_the_normalised_class_token_of_224_pixels(dinov2: Path, images: np.ndarray) -> None:
    found = networks.load(str(dinov2), measured_in(dinov2), CPU).both(images)
    assert found[1] is None
    plain = transformers.AutoModel.from_pretrained(dinov2).eval()
    x = torch.stack(
        [
            torch.from_numpy(np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)
            for image in images
        ]
    )
    x = (x / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        wanted = plain(pixel_values=x).pooler_output  # the class token after the last norm
    np.testing.assert_allclose(found[0], wanted.numpy(), rtol=1e-4, atol=1e-5)
    facts = networks.facts(str(dinov2), measured_in(dinov2))
    assert facts == {"network": f"dinov2-{facts['weights']}", "weights": facts["weights"], "image_size": 224, "width": 24}


def test_a_folder_of_weights_is_known_by_them_wherever_it_lies(dinov2: Path, images: np.ndarray, tmp_path: Path) -> None:
    from d2c_ray import config as configuration
    from d2c_ray import plan
    from d2c_ray.distributed.actors import Measurers

    moved = tmp_path / "moved"
    shutil.copytree(dinov2, moved)

    def of(folder: Path) -> tuple[list[dict[str, object]], set[str]]:
        own = configuration.load(None, [f"evaluate.network={folder}", "evaluate.device_batch=3", "sample.keep=none"])
        planned = {name: facts["weights"] for name, facts in networks.every(own.evaluate).items()}
        return [plan._reference(own), plan._sample(own)], set(Measurers(planned, own.evaluate, CPU).see(images[:1]))

    assert of(dinov2) == of(moved)
    with pytest.raises(UserError, match=r"evaluate\.more_networks names .*moved', which holds the weights of"):
        networks.every(measured_in(dinov2, more_networks=[str(moved)]))
    (moved / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    assert of(dinov2)[0] != of(moved)[0] and of(dinov2)[1] != of(moved)[1]


def test_an_efficientnet_is_the_packaged_one(images: np.ndarray) -> None:
    evaluate = measured_in("efficientnet-lite0", image_size=64)
    network = networks.load("efficientnet-lite0", evaluate, CPU)
    wanted = frozen.VisionEncoder("efficientnet-lite0", 64, CPU, 3).pooled(torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(network.features(images), wanted)
    facts = networks.facts("efficientnet-lite0", evaluate)
    assert (facts["image_size"], facts["width"], network.probabilities(images)) == (64, wanted.shape[1], None)


def test_every_network_is_named_once() -> None:
    evaluate = EvaluateConfig(network="inception", more_networks=["dinov2-l", "efficientnet-lite2"])
    assert networks.names(evaluate) == ["inception", "dinov2-l", "efficientnet-lite2"]


def test_clean_fid_downloads_its_network_once_and_only_the_published_one(
    inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = pytest.importorskip("cleanfid.downloads_helper", reason="clean-fid is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "inception_url", inception.as_uri())
    evaluate = measured_in("inception")
    with pytest.raises(UserError, match="is not the Inception network that clean-fid publishes"):
        networks.facts("inception", evaluate)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "code that is not known is not kept"
    monkeypatch.setattr(networks, "PUBLISHED", hashlib.sha256(inception.read_bytes()).hexdigest())
    with offline.only_local(), pytest.raises(UserError, match=r"as evaluate\.inception"):
        networks.facts("inception", evaluate)
    found = networks.facts("inception", evaluate)
    assert found["weights"] == networks.PUBLISHED[:16]
    monkeypatch.setattr(downloads, "inception_url", (tmp_path / "gone.pt").as_uri())
    with offline.only_local():
        assert networks.facts("inception", evaluate) == found
    next(tmp_path.rglob("*.pt")).unlink()
    with pytest.raises(UserError, match=r"could not download .* Give a copy of inception-2015-12-05.pt as evaluate.inception"):
        networks.facts("inception", evaluate)


def test_what_is_no_inception_network_is_refused(tmp_path: Path, inception: Path, images: np.ndarray) -> None:
    pytest.importorskip("cleanfid", reason="clean-fid is not installed")

    def given(path: Path) -> EvaluateConfig:
        return measured_in("inception", inception=str(path))

    with pytest.raises(UserError, match="no such file"):
        networks.facts("inception", given(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pickle.pt")
    for name in ("text.pt", "pickle.pt"):
        with pytest.raises(UserError, match="is no TorchScript file"):
            networks.facts("inception", given(tmp_path / name))
    torch.jit.script(Layers()).save(str(tmp_path / "layers.pt"))
    with pytest.raises(UserError, match="cannot be used as an Inception network"):
        networks.load("inception", given(tmp_path / "layers.pt"), CPU)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(inception.read_bytes()[: os.path.getsize(inception) // 2])
    with pytest.raises(UserError, match="is no TorchScript file"):
        networks.facts("inception", given(cut))
    # A file is not the published one for bearing its hash as a name, not even where the hub's cache would keep it.
    (tmp_path / "blobs").mkdir()
    claims, link = tmp_path / "blobs" / networks.PUBLISHED, tmp_path / "inception.pt"
    claims.write_bytes(inception.read_bytes())
    link.symlink_to(claims)
    for path in (claims, link):
        assert networks.facts("inception", given(path))["weights"] == hashlib.sha256(inception.read_bytes()).hexdigest()[:16]


def test_a_file_that_stays_is_read_once(inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(inception.read_bytes())
    found, reads = frozen.sha256(path), []
    monkeypatch.setattr(frozen, "open", lambda *args: reads.append(args) or open(*args), raising=False)  # noqa: SIM115
    assert frozen.sha256(path) == found == hashlib.sha256(inception.read_bytes()).hexdigest() and not reads
    path.write_bytes(b"other")
    assert frozen.sha256(path) == hashlib.sha256(b"other").hexdigest() and len(reads) == 1


def test_without_clean_fid_the_message_says_what_to_install(inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cleanfid.resize", None)
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    with pytest.raises(UserError, match=r"d2c-ray\[fid\].*pip install --no-deps clean-fid"):
        networks.facts("inception", measured_in("inception", inception=str(inception)))


def test_a_dinov2_that_does_not_fit_is_refused(dinov2: Path, tmp_path: Path) -> None:
    config = json.loads((dinov2 / "config.json").read_text())
    for path in dinov2.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "patch_size": 15}))
    with pytest.raises(UserError, match=r"evaluate\.more_networks=.*patch_size 15"):
        networks.facts(str(tmp_path), EvaluateConfig(more_networks=[str(tmp_path)]))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"evaluate\.network: .*holds no model\.safetensors"):
        networks.facts(str(tmp_path), measured_in(tmp_path))


def test_features_are_read_back_by_the_name_of_their_network(tmp_path: Path) -> None:
    """A folder's name is a column's name too, dots and all; probabilities are Inception's alone."""
    from d2c_ray.data import measured, tables

    folder, rng = "/models/dinov2.v1/a b", np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=(5, width)).astype(np.float32) for name, width in (("inception", 6), (folder, 3), ("probabilities", 4))
    }
    tables.write(tmp_path / "features.parquet", measured.table(np.arange(5), np.arange(5) % 2, tensors), {})
    found = {name: measured.read(tmp_path / "features.parquet", name) for name in ("inception", folder)}
    for name, own in found.items():
        np.testing.assert_array_equal(own.features, tensors[name])
        assert own.ids.tolist() == [0, 1, 2, 3, 4] and own.labels.tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(found["inception"].probabilities, tensors["probabilities"])
    assert found[folder].probabilities is None
