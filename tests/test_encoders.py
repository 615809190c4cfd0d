"""Encoders to attach with: what they give equals a plain forward, and what is refused, from folders and from the hub."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from test_frozen import Payload

from d2c_ray.config import TextConfig, VisionConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, hub, offline, text, vision

CPU = torch.device("cpu")
WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
PROMPTS = ["a photo of a tench", "a crane", "a photo of a great white shark, white shark, man-eater", "", "a goldfish"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forbidden(*rest: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def randomise(network: torch.nn.Module, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole T5 with its tokenizer, as the published ones are, but tiny."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("text") / "t5"
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    learned.train_from_iterator(PROMPTS * 5, trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>"))
    vocab = [tuple(entry) for entry in json.loads(learned.to_str())["model"]["vocab"]]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.save_pretrained(folder)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    network = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, tie_word_embeddings=False, **shape)
    )
    randomise(network, 0, 0.2)
    network.save_pretrained(folder)
    (folder / "README.md").write_text("a model")
    return folder


@pytest.fixture(scope="module", params=["plain", "registers"])
def dinov2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of 4 x 4 patches of 14 pixels, with and without registers."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    if request.param == "plain":
        network = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    else:
        network = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **shape))
    randomise(network, 1, 0.1)
    folder = tmp_path_factory.mktemp("vision") / request.param
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 256}}))
    return folder


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Squares of 64 pixels from two photographs."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return torch.stack([torch.from_numpy(np.array(photos[i % 2][40 * i : 40 * i + 64, 50 * i : 50 * i + 64])) for i in range(7)])


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def as_bin(folder: Path, **more: object) -> Path:
    """The folder's weights as a .bin alone, as older repositories hold them."""
    if (folder / WEIGHTS).is_file():
        torch.save(load_file(folder / WEIGHTS), folder / BIN)
        (folder / WEIGHTS).unlink()
    torch.save({**torch.load(folder / BIN, weights_only=True), **more}, folder / BIN)
    return folder


def of_text(folder: Path | str, **fields: object) -> TextConfig:
    return TextConfig(encoder=str(folder), **{"tokens": 24, "device_batch": 3, **fields})  # type: ignore[arg-type]


def of_vision(folder: Path | str, **fields: object) -> VisionConfig:
    return VisionConfig(encoder=str(folder), **{"device_batch": 3, **fields})  # type: ignore[arg-type]


def tokens(folder: Path | str, pixels: torch.Tensor, side: int = 4, **fields: object) -> torch.Tensor:
    return vision.load(of_vision(folder, **fields), side, CPU).tokens(pixels, side)


# Text.


def test_text_states_are_those_of_the_plain_encoder(t5: Path) -> None:
    """One prompt at a time, without padding, through the whole T5's own encoder."""
    states, mask = text.encode(of_text(t5), PROMPTS, CPU)
    assert states.shape == (5, 24, 32) and states.dtype == torch.float32
    assert mask.shape == (5, 24) and mask.dtype == torch.int64
    network = transformers.T5ForConditionalGeneration.from_pretrained(t5).eval()
    tokenizer = transformers.T5Tokenizer.from_pretrained(t5)
    lengths = []
    for prompt, found, kept in zip(PROMPTS, states, mask, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, :24]
        with torch.no_grad():
            wanted = network.encoder(input_ids=ids).last_hidden_state[0]
        if tokenizer(prompt).input_ids[24:]:  # cut, and closed by the end token
            ids[0, -1] = tokenizer.eos_token_id
            with torch.no_grad():
                wanted = network.encoder(input_ids=ids).last_hidden_state[0]
        assert kept.tolist() == [1] * len(wanted) + [0] * (24 - len(wanted))
        assert (found[: len(wanted)] - wanted).abs().max() < 1e-5
        lengths.append(len(wanted))
    assert len(set(lengths)) > 2 and max(lengths) == 24
    assert (states[0, :4] - states[4, :4]).abs().max() > 0.1


def test_text_states_do_not_depend_on_the_other_prompts(t5: Path) -> None:
    many = [f"{prompt} {number}" for number in range(3) for prompt in PROMPTS]
    states, mask = text.encode(of_text(t5, device_batch=4), many, CPU)
    for count in (1, 4, 7):
        some, its_mask = text.encode(of_text(t5, device_batch=4), many[:count], CPU)
        assert torch.equal(some, states[:count]) and torch.equal(its_mask, mask[:count])


def test_prompts_that_are_cut_are_named(t5: Path) -> None:
    tokenizer = transformers.T5Tokenizer.from_pretrained(t5)
    counts = sorted(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    assert text.cut(of_text(t5, tokens=counts[-1]), PROMPTS) == []
    assert text.cut(of_text(t5, tokens=counts[-1] - 1), PROMPTS) == [PROMPTS[2]]
    assert text.cut(of_text(t5, tokens=counts[0]), PROMPTS) == [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[4]]


def test_minilm_gives_what_its_package_holds() -> None:
    folder = frozen.weights_file("minilm").parent
    options = TextConfig(encoder="minilm", device_batch=4)
    states, mask = text.encode(options, PROMPTS, CPU)
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(
        PROMPTS[:4], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.inference_mode():
        wanted = transformers.AutoModel.from_pretrained(folder).eval()(**encoded).last_hidden_state
    assert torch.equal(states[:4], wanted)
    assert torch.equal(mask[:4], encoded["attention_mask"])
    assert text.facts(options) == {
        "encoder": "minilm", "weights": text.facts(options)["weights"], "width": 384, "tokens": 16,
        "template": "a photo of a {name}", "precision": "fp32", "device_batch": 4,
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), [("MT5", "MT5Config"), ("UMT5", "UMT5Config")])
def test_multilingual_t5(t5: Path, tmp_path: Path, kind: str, config: str) -> None:
    folder = Path(shutil.copytree(t5, tmp_path / kind))
    shape = {"vocab_size": 90, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    network = getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, config)(**shape)).eval()
    network.save_pretrained(folder)
    states, _ = text.encode(of_text(folder), PROMPTS[:1], CPU)
    ids = transformers.T5Tokenizer.from_pretrained(t5)(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = network(input_ids=ids).last_hidden_state[0]
    assert (states[0, : len(wanted)] - wanted).abs().max() < 1e-5
    assert text.facts(of_text(folder))["width"] == 16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_close(t5: Path, dinov2: Path, pixels: torch.Tensor, precision: str) -> None:
    whole, low = (text.encode(of_text(t5, precision=p), PROMPTS, CPU)[0] for p in ("fp32", precision))
    assert low.dtype == torch.float32 and not torch.equal(whole, low)
    assert F.cosine_similarity(whole, low, dim=-1).min() > 0.995
    for encoder in (dinov2, "efficientnet-lite0") if precision == "fp16" else (dinov2,):
        whole, low = (tokens(encoder, pixels, precision=p) for p in ("fp32", precision))
        assert low.dtype == torch.float32 and not torch.equal(whole, low)
        assert F.cosine_similarity(whole, low, dim=-1).min() > 0.995
    assert text.facts(of_text(t5, precision=precision))["precision"] == precision


def test_prompts_are_filled_in() -> None:
    assert text.prompt("a photo of a {name}", "tench, Tinca tinca") == "a photo of a tench, Tinca tinca"
    assert text.prompt("a {first}: {name}", "tench, Tinca tinca") == "a tench: tench, Tinca tinca"
    assert text.prompt("{first}", "dog") == "dog"


# Vision.


def plain(folder: Path, image: torch.Tensor, size: int, mean: tuple = MEAN, std: tuple = STD) -> torch.Tensor:
    """The normalised patch tokens of one image: Pillow's resize, and the layer norm written out."""
    image = image.expand(-1, -1, 3)
    channels = [np.asarray(Image.fromarray(c.float().numpy()).resize((size, size), Image.Resampling.BICUBIC)) for c in image.unbind(-1)]
    x = (np.stack(channels).clip(0, 255) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    network = transformers.AutoModel.from_pretrained(folder).eval()
    assert isinstance(network, transformers.Dinov2Model | transformers.Dinov2WithRegistersModel)
    with torch.no_grad():
        hidden = network(torch.from_numpy(x[None]).float(), output_hidden_states=True).hidden_states[-1][0]
    count = (size // 14) ** 2
    assert len(hidden) == count + (4 if isinstance(network, transformers.Dinov2WithRegistersModel) else 1)
    patches = hidden[-count:]  # behind the class token and the registers
    norm = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, correction=0, keepdim=True) + network.config.layer_norm_eps).sqrt()
    return norm * network.layernorm.weight.detach() + network.layernorm.bias.detach()


@pytest.mark.parametrize("grid", [3, 4, 6])  # the positions are of 4 x 4 patches
def test_patch_tokens_are_those_of_the_plain_network(dinov2: Path, pixels: torch.Tensor, grid: int) -> None:
    encoder = vision.load(of_vision(dinov2), grid, CPU)
    found = encoder.tokens(pixels, grid)
    assert found.shape == (7, grid * grid, 24) and found.dtype == torch.float32 and encoder.width == 24
    for image, its in zip(pixels, found, strict=True):
        assert (its - plain(dinov2, image, 14 * grid)).abs().max() < 2e-4
    mirrored = encoder.tokens(pixels.flip(2), grid)
    for image, its in zip(pixels, mirrored, strict=True):
        assert (its - plain(dinov2, image.flip(1), 14 * grid)).abs().max() < 2e-4
    assert (mirrored - found).abs().mean() > 0.01
    assert (found[0] - found[1]).abs().mean() > 0.01


def test_grey_images_are_repeated(dinov2: Path, pixels: torch.Tensor) -> None:
    grey = pixels[..., :1]
    found = tokens(dinov2, grey)
    for image, its in zip(grey, found, strict=True):
        assert (its - plain(dinov2, image, 56)).abs().max() < 2e-4
    assert (found - tokens(dinov2, pixels)).abs().max() > 0.01


def test_imagenets_normalisation_where_none_is_stated(dinov2: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dinov2, tmp_path / "unstated"))
    (folder / "preprocessor_config.json").unlink()
    found = tokens(folder, pixels[:1])[0]
    assert (found - plain(folder, pixels[0], 56, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).abs().max() < 2e-4
    assert (found - tokens(dinov2, pixels[:1])[0]).abs().max() > 0.01
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": STD}))
    with pytest.raises(UserError, match=r"attach\.vision\.encoder: image_mean and image_std of .* three numbers each would do"):
        vision.facts(of_vision(folder), 4)


def test_tokens_do_not_depend_on_how_images_arrive(dinov2: Path, pixels: torch.Tensor) -> None:
    encoder = vision.load(of_vision(dinov2), 4, CPU)
    whole = encoder.tokens(pixels, 4)
    for size in (1, 2, 5):
        assert torch.equal(torch.cat([encoder.tokens(pixels[i : i + size], 4) for i in range(0, 7, size)]), whole)
    assert encoder.tokens(pixels[:0], 4).shape == (0, 16, 24)


@pytest.mark.parametrize("side", [2, 6])
def test_tokens_of_another_grid_are_resampled(dinov2: Path, pixels: torch.Tensor, side: int) -> None:
    encoder = vision.load(of_vision(dinov2, image_size=56), side, CPU)
    maps = encoder.tokens(pixels, 4).reshape(7, 4, 4, 24).permute(0, 3, 1, 2)
    found = encoder.tokens(pixels, side).reshape(7, side, side, 24)
    # Bilinear weights on one axis; the half-pixel centres of 4 on 2 (a tent over four, antialiased) and on 6.
    at = (torch.arange(side) + 0.5) * 4 / side - 0.5
    weights = (1 - (at[:, None] - torch.arange(4)).abs() / max(1.0, 4 / side)).clamp(min=0)
    if side == 6:
        weights[0, 0] = weights[-1, -1] = 1.0  # beyond the outermost centre
    weights = weights / weights.sum(1, keepdim=True)
    assert (found - torch.einsum("ih,jw,nchw->nijc", weights, weights, maps)).abs().max() < 1e-4


def test_image_size_of_an_encoder(dinov2: Path) -> None:
    assert vision.facts(of_vision(dinov2), 16)["image_size"] == 224
    assert vision.facts(of_vision(dinov2), 32)["image_size"] == 448
    assert vision.facts(of_vision(dinov2, image_size=70), 16)["image_size"] == 70
    assert vision.facts(VisionConfig(encoder="efficientnet-lite0"), 16)["image_size"] == 128
    assert vision.facts(VisionConfig(encoder="efficientnet-lite0", image_size=100), 16)["image_size"] == 100
    with pytest.raises(UserError, match=r"attach\.also\.large\.image_size=224.* patch of 15 pixels; 210 or 225 would do, or 0 .*, 240"):
        vision._image_size(VisionConfig(image_size=224), {"patch_size": 15, "hidden_size": 8}, dinov2, 16, "attach.also.large")
    with pytest.raises(UserError, match=r"attach\.vision\.image_size=100 is no multiple of .* 98 or 112 would do, or 0 .*, 224"):
        vision.load(of_vision(dinov2, image_size=100), 16, CPU)


def test_facts_of_a_vision_encoder(dinov2: Path) -> None:
    known = vision.facts(of_vision(dinov2), 4)
    assert known == {
        "encoder": str(dinov2), "weights": known["weights"], "width": 24, "image_size": 56, "precision": "fp32", "device_batch": 3,
    }  # fmt: skip
    assert len(known["weights"]) == 16 and set(known["weights"]) <= set("0123456789abcdef")


def test_efficientnets_are_those_of_the_package(pixels: torch.Tensor) -> None:
    encoder = vision.load(VisionConfig(encoder="efficientnet-lite0", image_size=64, device_batch=3), 2, CPU)
    assert torch.equal(encoder.tokens(pixels, 2), frozen.VisionEncoder("efficientnet-lite0", 64, CPU, 3).tokens(pixels, 2))
    with pytest.raises(UserError, match=r"attach\.vision\.precision=bf16: tokens of efficientnet-lite0 .* fp32 or fp16 would do"):
        vision.facts(VisionConfig(encoder="efficientnet-lite0", precision="bf16"), 2)


# How a model may lie on the disk, and what is refused.


def copied(folder: Path, tmp_path: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(folder, tmp_path / name))


def test_every_form_of_the_weights_gives_the_same(t5: Path, dinov2: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    states, patches = text.encode(of_text(t5), PROMPTS, CPU)[0], tokens(dinov2, pixels)

    def check(a_text: Path, a_vision: Path) -> None:
        assert torch.equal(text.encode(of_text(a_text), PROMPTS, CPU)[0], states)
        assert torch.equal(tokens(a_vision, pixels), patches)

    check(as_bin(copied(t5, tmp_path, "a")), as_bin(copied(dinov2, tmp_path, "b")))
    shards = [copied(t5, tmp_path, "c"), copied(dinov2, tmp_path, "d")]
    for folder, name in zip(shards, ("T5EncoderModel", type(transformers.AutoModel.from_pretrained(dinov2)).__name__), strict=True):
        (folder / WEIGHTS).unlink()
        getattr(transformers, name).from_pretrained(t5 if name[0] == "T" else dinov2).save_pretrained(folder, max_shard_size=20_000)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    check(*shards)
    both = [copied(t5, tmp_path, "e"), copied(dinov2, tmp_path, "f")]
    known = [text.facts(of_text(t5))["weights"], vision.facts(of_vision(dinov2), 4)["weights"]]
    for folder in both:  # of both kinds the safetensors are read and count
        (folder / BIN).write_bytes(b"no weights")
    check(*both)
    assert [text.facts(of_text(both[0]))["weights"], vision.facts(of_vision(both[1]), 4)["weights"]] == known
    for folder in shards:
        next(iter(folder.glob("model-00002*"))).unlink()
    with pytest.raises(UserError, match=r"attach\.text\.encoder: .*index\.json' names 1 files that are not there, model-00002"):
        text.facts(of_text(shards[0]))
    with pytest.raises(UserError, match=r"attach\.vision\.encoder: .*names 1 files that are not there"):
        vision.facts(of_vision(shards[1]), 4)


def test_weights_count_and_a_readme_does_not(t5: Path, dinov2: Path, tmp_path: Path) -> None:
    def known(folder: Path) -> str:
        return (text.facts(of_text(folder)) if "t5" in str(folder) else vision.facts(of_vision(folder), 4))["weights"]

    for source, files in ((t5, ["config.json", "tokenizer_config.json"]), (dinov2, ["config.json", "preprocessor_config.json"])):
        folder = copied(source, tmp_path, f"moved-{source.name}")
        assert known(folder) == known(source)
        (folder / "README.md").write_text("changed")
        (folder / "generation_config.json").write_text('{"top_k": 3}')
        (folder / "onnx").mkdir()
        (folder / "onnx" / WEIGHTS).write_bytes(b"other")
        assert known(folder) == known(source)
        hashes = {known(source)}
        states = load_file(folder / WEIGHTS)
        save_file({name: value + 1e-3 for name, value in states.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        hashes.add(known(folder))
        for name in files:
            change(folder / name, something=1)
            hashes.add(known(folder))
        assert len(hashes) == 4


def test_exactly_the_weights_that_are_loaded_count(t5: Path, tmp_path: Path) -> None:
    """A stray shard does not; nor do safetensors without an index beside a .bin, which is then what is read and counts."""
    known = text.facts(of_text(t5))["weights"]
    stray = copied(t5, tmp_path, "stray")
    (stray / "model-00001-of-00002.safetensors").write_bytes(b"of another download")
    (stray / "model.safetensors.index.json").write_text("{}")
    assert text.facts(of_text(stray))["weights"] == known
    old = as_bin(copied(t5, tmp_path, "old"))
    only_bin = text.facts(of_text(old))["weights"]
    (old / "model-00001-of-00002.safetensors").write_bytes(b"of another download")
    assert text.facts(of_text(old))["weights"] == only_bin != known
    as_bin(old, **{"shared.weight": torch.zeros_like(torch.load(old / BIN, weights_only=True)["shared.weight"])})
    assert text.facts(of_text(old))["weights"] != only_bin


def test_code_in_a_bin_is_refused_and_not_run(t5: Path, dinov2: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = as_bin(copied(t5, tmp_path, "t5"), extra=Payload(ran))
    with pytest.raises(UserError, match=r"attach\.text\.encoder: the weights in .* cannot be loaded"):
        text.encode(of_text(folder), PROMPTS, CPU)
    seen = as_bin(copied(dinov2, tmp_path, "dino"), extra=Payload(ran))
    with pytest.raises(UserError, match=r"attach\.vision\.encoder: the weights in .* cannot be loaded"):
        tokens(seen, pixels)
    assert not ran.exists()
    torch.load(folder / BIN, weights_only=False)
    assert ran.exists(), "the payload works where it may"


@pytest.mark.parametrize("known_class", [True, False])
def test_code_of_a_repository_is_not_run(
    t5: Path, dinov2: Path, pixels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_class: bool
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *rest: "y")
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nimport transformers\nclass Own(transformers.T5Tokenizer): pass\nclass Config(transformers.T5Config): pass\n"
    both = [copied(t5, tmp_path, "t5"), copied(dinov2, tmp_path, "dino")]
    for folder in both:
        (folder / "own.py").write_text(code)
        change(folder / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    settings = both[0] / "tokenizer_config.json"
    change(settings, auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, **({} if known_class else {"tokenizer_class": "Own"}))
    assert tokens(both[1], pixels).shape == (7, 16, 24)
    states, _ = text.encode(of_text(both[0]), PROMPTS, CPU)
    assert states.shape == (5, 24, 32)
    if known_class:
        assert torch.equal(states, text.encode(of_text(t5), PROMPTS, CPU)[0])
    assert not ran.exists()
    transformers.AutoTokenizer.from_pretrained(both[0], trust_remote_code=True)
    assert ran.exists(), "the code works where it may"


def test_an_attention_of_another_repository_is_not_used(dinov2: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    folder = copied(dinov2, tmp_path)
    change(folder / "config.json", attn_implementation="owner/kernel", _attn_implementation="owner/kernel")
    assert torch.equal(tokens(folder, pixels), tokens(dinov2, pixels))


def refused(words: str, folder: Path, of: Callable = text.facts) -> None:
    with pytest.raises(UserError, match=words):
        of(of_text(folder)) if of is text.facts else vision.facts(of_vision(folder), 4)


def test_folders_that_are_no_encoder_are_refused(
    t5: Path, dinov2: Path, pixels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, of, key in ((t5, text.facts, "text"), (dinov2, vision.facts, "vision")):
        folder = copied(folder, tmp_path, key)
        known = "t5, mt5, umt5, bert" if key == "text" else "dinov2, dinov2_with_registers"
        change(folder / "config.json", model_type="gpt2")
        refused(rf"attach\.{key}\.encoder: .* holds a model of type 'gpt2'; one of {known} would do", folder, of)
        (folder / "config.json").write_text("{")
        refused(rf"attach\.{key}\.encoder: .*config\.json' cannot be read", folder, of)
        (folder / "config.json").unlink()
        refused(rf"attach\.{key}\.encoder: .* has no config\.json; it holds .*model\.safetensors", folder, of)
        folder = copied(t5 if key == "text" else dinov2, tmp_path, f"{key}-weightless")
        (folder / WEIGHTS).unlink()
        refused(rf"attach\.{key}\.encoder: .* holds no model\.safetensors \(or pytorch_model\.bin\)", folder, of)
    folder = copied(t5, tmp_path, "mute")
    (folder / "tokenizer.json").unlink()
    refused(r"has no tokenizer; tokenizer\.json or spiece\.model", folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer in '.*mute' does not work"):
        text.encode(of_text(folder), PROMPTS, CPU)
    folder = copied(t5, tmp_path, "pieces")
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    refused(r"has its tokenizer as spiece\.model alone, .*pip install sentencepiece protobuf", folder)
    monkeypatch.setattr(text, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"the tokenizer in '.*pieces' does not work"):
        text.encode(of_text(folder), PROMPTS, CPU)
    folder = copied(dinov2, tmp_path, "short")
    change(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"weights in '.*short' lack encoder\.layer\.2"):  # transformers itself would leave it random
        tokens(folder, pixels)
    folder = copied(t5, tmp_path, "corrupt")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])
    with pytest.raises(UserError, match=r"the weights in '.*corrupt' cannot be loaded"):
        text.encode(of_text(folder), PROMPTS, CPU)


# The hub.


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"attach\.text\.encoder=google/flan-t5-xl: there is no such folder, and the hub gives no such model .* would do"
    ):
        text.facts(TextConfig())
    with pytest.raises(UserError, match=r"attach\.also\.big\.encoder=facebook/dinov2-large: .*config\.json and model\.safetensors"):
        vision.facts(VisionConfig(encoder="dinov2-l"), 16, "attach.also.big")
    with pytest.raises(UserError, match=r"attach\.vision\.encoder=/no/such/folder: there is no such folder\. A local folder"):
        vision.facts(VisionConfig(encoder="/no/such/folder"), 16)


def test_only_the_cache_is_looked_at(t5: Path, tmp_path: Path) -> None:
    with (
        offline.only_local(),
        pytest.raises(UserError, match=r"owner/t5: there is no such folder, and the hub's cache holds no such model"),
    ):
        text.facts(of_text("owner/t5"))
    revision = "0123456789" * 4
    cached = tmp_path / "cache" / "models--owner--t5"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(t5, cached / "snapshots" / revision)
    with offline.only_local():
        assert hub.resolve("key", "owner/t5", ["*"]) == cached / "snapshots" / revision
        assert text.facts(of_text("owner/t5"))["weights"] == text.facts(of_text(t5))["weights"]
        assert torch.equal(text.encode(of_text("owner/t5"), PROMPTS, CPU)[0], text.encode(of_text(t5), PROMPTS, CPU)[0])
        as_bin(cached / "snapshots" / revision)
        assert torch.equal(text.encode(of_text("owner/t5"), PROMPTS, CPU)[0], text.encode(of_text(t5), PROMPTS, CPU)[0])


def test_what_is_asked_of_the_hub(t5: Path, dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool, bool]] = []
    folder = dinov2

    def give(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert not {"*", "README.md", "*.msgpack"} & set(allow_patterns)
        asked.append((name, BIN in allow_patterns, local_files_only))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", give)
    vision.facts(VisionConfig(encoder="dinov2-b"), 16)
    vision.facts(VisionConfig(encoder="dinov2-g-reg"), 16)
    assert asked == [("facebook/dinov2-base", False, False), ("facebook/dinov2-with-registers-giant", False, False)]
    asked.clear()
    folder = as_bin(copied(t5, tmp_path))  # a .bin is fetched where there is nothing else
    with offline.only_local():
        text.facts(TextConfig())
    text.facts(TextConfig())
    name = "google/flan-t5-xl"
    assert asked == [(name, False, True), (name, True, True), (name, False, False), (name, True, False)]


def test_a_local_folder_goes_before_the_hub(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(t5.parent.parent)
    assert hub.resolve("key", f"{t5.parent.name}/t5", ["*"]) == t5
    monkeypatch.setenv("HOME", str(t5.parent))
    assert hub.resolve("key", "~/t5", ["*"]) == t5
