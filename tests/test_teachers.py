"""Teachers, ours and diffusers': what they predict, what they are known by, what is refused, whose classes are whose."""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from d2c_ray import plan
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, teachers, weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.selection import difficulty
from d2c_ray.selection.noise import noise

CPU = torch.device("cpu")
NAMES = [
    "tench, Tinca tinca", "goldfish, Carassius auratus",
    "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias", "tiger shark, Galeocerdo cuvieri",
    "hammerhead, hammerhead shark", "crane", "crane", "cock", "maillot", "maillot, tank suit",
]  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*rest: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)


def randomise(network: torch.nn.Module, seed: int, scale: float = 0.15) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as the published ones are, but tiny."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, attention_bias=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    randomise(transformer, 0)
    randomise(vae, 1)
    folder = tmp_path_factory.mktemp("teacher") / "pipe"
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    change(folder / "model_index.json", id2label={str(number): name for number, name in enumerate(NAMES)})
    return folder


@pytest.fixture
def copied(pipe: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Gives copies of the pipeline to be changed."""
    return lambda name: Path(shutil.copytree(pipe, tmp_path / name))


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(path: Path, prefix: str = "") -> None:
    save_file({name: value + 0.5 if name.startswith(prefix) else value for name, value in load_file(path).items()}, path)


def inputs(count: int = 6, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.arange(count) * 997 // count, torch.arange(count) * 3 % 10


def raw(folder: Path) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder / "transformer").eval().requires_grad_(False)


def ours(folder: Path, kind: str, text: bool = False, depth: int = 2, latent: dict | None = None) -> Path:
    side = {"text_tokens": 3, "text_width": 6, "vision_width": 5, "align_depth": 1, "align_hidden": 8} if text else {}
    spec = TransformerSpec(kind, 8, 4, 2, depth, 16, 2, 10, **side)
    both = {}
    for seed, which in enumerate(("ema", "raw")):
        network = Transformer(spec)
        randomise(network, seed)
        both[which] = network.state_dict()
    generator = torch.Generator().manual_seed(5)
    states = {"states": torch.randn(10, 3, 6, generator=generator), "mask": (torch.arange(3) < torch.arange(10)[:, None] % 3 + 1).long()}
    weights.save(folder, spec, both, {"class_names": NAMES, "latent": latent or {}, "text_strength": 0.7}, states if text else None)
    return folder


# What is predicted.


def test_predict_is_the_noise_of_the_diffusers_model(pipe: Path) -> None:
    teacher, (x, t, label) = teachers.load(pipe, CPU), inputs()
    found, network = teacher.predict(x, t, label), raw(pipe)
    for row in range(len(x)):
        one = slice(row, row + 1)
        whole = network(x[one], timestep=t[one], class_labels=label[one]).sample
        assert whole.shape == (1, 8, 8, 8)
        assert torch.allclose(found[one], whole[:, :4], atol=1e-5)
        assert not torch.allclose(whole[:, :4], whole[:, 4:], atol=0.1)
    assert found.dtype == torch.float32 and found.std() > 0.1
    assert (found - teacher.predict(x, t, (label + 1) % 10)).abs().mean() > 0.01
    assert (found - teacher.predict(x, (t + 300) % 1000, label)).abs().mean() > 0.01


def test_facts_of_a_pipeline(pipe: Path) -> None:
    known = teachers.facts(pipe)
    assert (known.kind, known.channels, known.side, known.num_classes, known.source) == ("dit", 4, 8, 10, "diffusers")
    assert known.class_names == NAMES
    assert known.latent == {"encoder": frozen.vae_facts(str(pipe), "vae")["encoder"]}
    assert known.vae_folder == str(pipe / "vae")


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_difficulty_is_what_the_pipeline_says(pipe: Path, scheduler: type) -> None:
    """One image and timestep at a time through diffusers alone."""
    count, t = 3, difficulty.timesteps("dit", 4, 0.0, 1.0)
    z, _, label = inputs(count)
    draws = torch.from_numpy(np.stack([noise(0, f"key{i}", len(t), (4, 8, 8)) for i in range(count)]))
    found = difficulty.errors(teachers.load(pipe, CPU), z, label, draws, t, device_batch=5)
    real = DiTPipeline.from_pretrained(pipe)
    assert real.labels["goldfish"] == 1
    forward = scheduler.from_config(real.scheduler.config)
    for i in range(count):
        for j in range(len(t)):
            eps, at = draws[i, j][None], t[j : j + 1]
            with torch.no_grad():
                out = real.transformer(forward.add_noise(z[i][None], eps, at), timestep=at, class_labels=label[i][None]).sample
            assert found[i, j].item() == pytest.approx((out[:, :4] - eps).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_predict_of_our_own_models(tmp_path: Path, kind: str, text: bool) -> None:
    folder = ours(tmp_path / "model", kind, text)
    (x, t, label), student = inputs(), weights.load(folder)
    t = t if kind == "dit" else t / 1000
    teacher = teachers.load(folder, CPU)
    found, whole = teacher.predict(x, t, label), student.predict(x, t, label)
    assert whole.shape == (6, 8 if kind == "dit" else 4, 8, 8)
    assert torch.equal(found, whole[:, :4])
    assert not torch.equal(found, weights.load(folder, "raw").predict(x, t, label)[:, :4])
    assert found.std() > 0.1
    if text:  # each label's own states and mask, at the model's own strength
        states = load_file(folder / weights.TEXT)
        by_hand = student.network(x, t, label, states["states"][label], states["mask"][label], 0.7)
        assert torch.allclose(found, by_hand[:, :4], atol=1e-6)
        without = student.network(x, t, label, states["states"][label], states["mask"][label], 0.0)
        assert (found - without[:, :4]).abs().mean() > 0.01
    known = teachers.facts(folder)
    assert (known.kind, known.channels, known.side, known.num_classes, known.source) == (kind, 4, 8, 10, "d2c_ray")
    assert known.class_names == NAMES and known.vae_folder == ""


# How it may lie on the disk.


def test_every_form_of_the_weights_predicts_the_same(pipe: Path, copied: Callable[[str], Path]) -> None:
    x, t, label = inputs()
    wanted = teachers.load(pipe, CPU).predict(x, t, label)

    def check(folder: Path, atol: float = 0.0) -> None:
        found = teachers.load(folder, CPU).predict(x, t, label)
        assert (found - wanted).abs().max() <= atol
        assert torch.equal(found, wanted) == (atol == 0)

    def saved_anew(name: str, **how: object) -> Path:
        folder = copied(name)
        (folder / "transformer" / WEIGHTS).unlink()
        network = raw(pipe)
        (network.half() if how.get("variant") else network).save_pretrained(folder / "transformer", **how)
        assert not (folder / "transformer" / WEIGHTS).exists()
        return folder

    published = copied("published")
    change(published / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_zero", num_vector_embeds=None)
    check(published)
    check(saved_anew("bin", safe_serialization=False))
    check(saved_anew("shards", max_shard_size=20_000))
    check(pipe / "transformer")
    bare = teachers.facts(pipe / "transformer")
    assert (bare.class_names, bare.latent, bare.vae_folder, bare.num_classes) == ([], {}, "", 10)
    for name, how in {"half": {}, "half_bin": {"safe_serialization": False}, "half_shards": {"max_shard_size": 20_000}}.items():
        check(saved_anew(name, variant="fp16", **how), atol=0.02)
    both = copied("both")  # the whole weights are read where both are there
    raw(pipe).half().save_pretrained(both / "transformer", variant="fp16")
    assert len(list((both / "transformer").glob("*.safetensors"))) == 2
    check(both)
    no_vae = copied("no_vae")
    shutil.rmtree(no_vae / "vae")
    check(no_vae)
    assert teachers.facts(no_vae).vae_folder == ""


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(copied: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    folder, made = copied("evil"), tmp_path / "made"
    (folder / "transformer" / WEIGHTS).unlink()
    path = folder / "transformer" / "diffusion_pytorch_model.bin"
    content = {"proj_out_1.weight": Evil(made)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="cannot be loaded"):
        teachers.load(folder, CPU)
    assert not made.exists()
    if form == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert made.exists()


# Precision and compilation.


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_keeps_the_ranks(pipe: Path, precision: str) -> None:
    count, t = 40, difficulty.timesteps("dit", 4, 0.0, 1.0)
    z, _, label = inputs(count)
    z = z * torch.linspace(0.3, 2.0, count)[:, None, None, None]
    draws = torch.from_numpy(np.stack([noise(0, f"key{i}", len(t), (4, 8, 8)) for i in range(count)]))
    whole, low = (difficulty.errors(teachers.load(pipe, CPU, p), z, label, draws, t, 16).mean(1) for p in ("fp32", precision))
    assert low.dtype == torch.float32
    assert not torch.equal(whole, low)
    assert spearmanr(whole, low).statistic > 0.99


@pytest.mark.parametrize("kind", ["diffusers", "dit", "sit"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_cast_once_give_the_bits_of_autocast(pipe: Path, tmp_path: Path, precision: str, kind: str) -> None:
    (x, t, label), dtype = inputs(), teachers.DTYPES[precision]
    t = t / 1000 if kind == "sit" else t
    folder = pipe if kind == "diffusers" else ours(tmp_path / "model", kind, text=True)
    teacher = teachers.load(folder, CPU, precision)
    network = raw(pipe) if kind == "diffusers" else weights.load(folder)
    with torch.autocast("cpu", dtype):
        wanted = network(x, timestep=t, class_labels=label).sample if kind == "diffusers" else network.predict(x, t, label)
    assert wanted.dtype == dtype
    found = teacher.predict(x, t, label)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted[:, :4].float())
    kept = [m for m in teacher.network.modules() if isinstance(m, torch.nn.Embedding | torch.nn.LayerNorm)]
    assert kept
    assert all(value.dtype == torch.float32 for module in kept for value in module.parameters())
    assert all(value.dtype == torch.float32 for value in teacher.network.buffers())
    cast = [m for m in teacher.network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv1d)]
    assert cast
    assert all(value.dtype == dtype for module in cast for value in module.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("kind", ["diffusers", "dit"])
def test_compiled_predicts_as_eager(pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from torch._dynamo.testing import CompileCounter  # runs graphs as they are, and counts them

    x, t, label = inputs()
    folder = ours(tmp_path / "model", "dit", depth=1)
    if kind == "diffusers":  # one layer: the fewer kernels, the sooner they are compiled
        folder = tmp_path / "one"
        DiTTransformer2DModel.from_config({**raw(pipe).config, "num_layers": 1}).save_pretrained(folder)
    with torch.inference_mode():
        wanted = teachers.load(folder, CPU).predict(x, t, label)
        found = teachers.load(folder, CPU, compile=True).predict(x, t, label)
        assert (found - wanted).abs().max() < 1e-4
        counter, real = CompileCounter(), torch.compile
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda network, **how: real(network, backend=counter, **how))
        counted = teachers.load(folder, CPU, compile=True)
        for shift in range(3):
            counted.predict(x + shift, t, (label + shift) % 10)
        assert counter.frame_count == 1  # one whole graph, compiled once


# Refusals.


def refused(folder: Path, words: str, load: bool = False) -> None:
    with pytest.raises(UserError, match=words):
        teachers.load(folder, CPU) if load else teachers.facts(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"_class_name": "UNet2DModel"}, r"holds a UNet2DModel; a DiT \(DiTTransformer2DModel\) would do"),
        ({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}, "holds a Transformer2DModel; a DiT"),
        ({"out_channels": 3}, "gives 3 channels for 4; 4, or 8 with a learned variance, would do"),
        ({"sample_size": None}, r"config\.json does not say sample_size"),
    ],
)
def test_other_networks_are_refused(copied: Callable[[str], Path], fields: dict, words: str) -> None:
    folder = copied("other")
    change(folder / "transformer" / "config.json", **fields)
    refused(folder, words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"beta_end": 0.012}, r"another noise schedule: beta_end=0\.012 \(not 0\.02\)"),
        ({"prediction_type": "v_prediction"}, r"prediction_type=v_prediction \(not epsilon\)"),
        ({"beta_schedule": "scaled_linear"}, r"beta_schedule=scaled_linear \(not linear\)"),
        ({"num_train_timesteps": 500}, r"num_train_timesteps=500 \(not 1000\)"),
        ({"trained_betas": [0.1, 0.2]}, "another noise schedule: trained_betas"),
        ({"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr=True \(not False\)"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "another noise schedule: FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_other_schedules_are_refused(copied: Callable[[str], Path], fields: dict, words: str) -> None:
    folder = copied("other")
    change(folder / "scheduler" / "scheduler_config.json", **fields)
    refused(folder, words)
    shutil.rmtree(folder / "scheduler")
    assert teachers.facts(folder).num_classes == 10


def test_broken_folders_are_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("weightless")
    (folder / "transformer" / WEIGHTS).unlink()
    refused(folder, r"holds no diffusion_pytorch_model\.safetensors", load=True)
    with pytest.raises(UserError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        teachers.content_hash(folder)

    folder = copied("corrupt")
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    refused(folder, "the weights in '.*corrupt/transformer' cannot be loaded", load=True)

    folder = copied("short")  # diffusers itself would leave what is missing random
    path = folder / "transformer" / WEIGHTS
    save_file({name: value for name, value in load_file(path).items() if name != "proj_out_2.weight"}, path)
    refused(folder, r"short/transformer' lack proj_out_2\.weight", load=True)

    folder = copied("shapes")
    change(folder / "transformer" / "config.json", num_layers=3)
    refused(folder, r"shapes/transformer' lack transformer_blocks\.2", load=True)
    change(folder / "transformer" / "config.json", num_layers=1)
    refused(folder, r"shapes/transformer' hold besides transformer_blocks\.1", load=True)
    change(folder / "transformer" / "config.json", num_layers=2, patch_size=4)
    refused(folder, "shapes/transformer' cannot be loaded", load=True)

    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        folder = copied(name.replace("/", "-"))
        for content in ('{"a": ', "[]"):
            (folder / name).write_text(content)
            refused(folder, f"'.*{name}' cannot be read")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.txt").touch()
    refused(tmp_path / "other", r"holds no model\.json .* and no transformer/config\.json .*; it holds readme\.txt\.")

    folder = ours(tmp_path / "textless", "sit", text=True)
    (folder / weights.TEXT).unlink()
    refused(folder, r"has no text\.safetensors")


def test_names_are_resolved_to_folders(pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def no_hub(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        raise OSError("the hub is out of reach\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    assert teachers.resolve(str(pipe)) == pipe
    monkeypatch.chdir(pipe.parent)
    assert teachers.resolve("pipe") == pipe
    for nowhere in ("/no/such/folder", "nothing", "a/b/c"):
        with pytest.raises(UserError, match=r"there is no such folder\. A model folder"):
            teachers.resolve(nowhere)
    assert not asked
    with pytest.raises(UserError, match=r"and the hub gives no such model \(OSError: the hub is out of reach\)"):
        teachers.resolve("facebook/DiT-XL-2-256")
    assert [name for name, _ in asked] == ["facebook/DiT-XL-2-256"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(pipe))
    assert teachers.resolve("facebook/DiT-XL-2-256") == pipe


# The data's latents.


def with_vae(debug_config: Callable, teacher: Path, vae: Path, size: int = 16) -> tuple[Path, teachers.Facts]:
    return plan.checked_checkpoint(
        debug_config(f"teacher.checkpoint={teacher}", f"vae.path={vae}", "data.channels=3", f"data.image_size={size}")
    )


def test_pixels_are_not_for_a_diffusers_teacher(debug_config: Callable, pipe: Path) -> None:
    with pytest.raises(UserError, match=f"the data is pixels: set vae.path={pipe} vae.subfolder=vae"):
        plan.make(debug_config(f"teacher.checkpoint={pipe}"))
    with pytest.raises(UserError, match=r"the data is pixels: set vae\.path of its AutoencoderKL"):
        plan.make(debug_config(f"teacher.checkpoint={pipe / 'transformer'}"))


def test_the_proposed_vae_is_accepted(debug_config: Callable, pipe: Path) -> None:
    settings = (f"teacher.checkpoint={pipe}", f"vae.path={pipe}", "vae.subfolder=vae", "data.channels=3", "data.image_size=16")
    made = plan.make(debug_config(*settings))
    (node,) = made.of("teacher")
    assert plan.checked_checkpoint(node.config)[0] == pipe
    with pytest.raises(UserError, match=r"do not fit the data's \(3\): label 2 'dog' is none of them"):
        plan.check_against_data(made, {"rows": 120, "class_names": ["tench", "goldfish", "dog"], "class_counts": [40] * 3})
    plan.check_against_data(made, {"rows": 120, "class_names": ["tench", "goldfish", "cock"], "class_counts": [40] * 3})


def test_other_latents_are_refused(debug_config: Callable, pipe: Path, tmp_path: Path) -> None:
    assert with_vae(debug_config, pipe, pipe / "vae")[0] == pipe
    with pytest.raises(UserError, match=r"works on 4 x 8 x 8 latents; data\.image_size, data\.channels and vae\.path give 4 x 16 x 16"):
        with_vae(debug_config, pipe, pipe / "vae", size=32)
    retuned = Path(shutil.copytree(pipe / "vae", tmp_path / "retuned"))
    change_weights(retuned / WEIGHTS, "decoder.")
    assert frozen.vae_facts(str(retuned), "")["hash"] != frozen.vae_facts(str(pipe / "vae"), "")["hash"]
    assert with_vae(debug_config, pipe, retuned)[0] == pipe
    for half in ("encoder.", "quant_conv."):
        other = Path(shutil.copytree(pipe / "vae", tmp_path / half))
        change_weights(other / WEIGHTS, half)
        with pytest.raises(UserError, match="was trained in the latents of another VAE"):
            with_vae(debug_config, pipe, other)
        assert with_vae(debug_config, pipe / "transformer", other)[0] == pipe / "transformer"  # nothing is known of its VAE


def test_latents_of_our_own_models(debug_config: Callable, pipe: Path, tmp_path: Path) -> None:
    vae = frozen.vae_facts(str(pipe / "vae"), "")
    same = ours(tmp_path / "same", "sit", latent={"kind": "vae", "vae": vae["hash"], "encoder": vae["encoder"]})
    assert with_vae(debug_config, same, pipe / "vae")[0] == same
    for name, latent in {"pixels": {"kind": "pixels"}, "other": {"kind": "vae", "vae": "0" * 16, "encoder": "0" * 16}}.items():
        with pytest.raises(UserError, match="was trained in the latents of another VAE"):
            with_vae(debug_config, ours(tmp_path / name, "sit", latent=latent), pipe / "vae")


# By what it is known.


def test_content_hash_follows_what_scoring_depends_on(pipe: Path, copied: Callable[[str], Path], tmp_path: Path) -> None:
    known = teachers.content_hash(pipe)
    folder = copied("copy")
    assert teachers.content_hash(folder) == known
    change_weights(folder / "vae" / WEIGHTS)
    assert teachers.content_hash(folder) == known
    change_weights(folder / "transformer" / WEIGHTS, "proj_out_1.bias")
    changed = teachers.content_hash(folder)
    change(folder / "model_index.json", id2label={"0": "cat"})
    renamed = teachers.content_hash(folder)
    change(folder / "transformer" / "config.json", norm_eps=1e-3)
    assert len({known, changed, renamed, teachers.content_hash(folder)}) == 4

    own, again = ours(tmp_path / "own", "sit", text=True), ours(tmp_path / "again", "sit", text=True)
    known = teachers.content_hash(own)
    assert teachers.content_hash(again) == known
    change_weights(again / "raw.safetensors")
    assert teachers.content_hash(again) == known
    hashes = {known}
    for name in ("ema.safetensors", weights.TEXT):
        states = load_file(again / name)
        save_file({key: value + 1 for key, value in states.items()}, again / name)
        hashes.add(teachers.content_hash(again))
    assert len(hashes) == 3


def test_blobs_of_the_hub_are_hashed_by_name(copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = copied("snapshot")
    path, plain = folder / "transformer" / WEIGHTS, teachers.content_hash(folder)
    content = path.read_bytes()
    for blobs, digits, by_name in (
        ("blobs", "0123456789abcdef" * 4, True),
        ("blobs", "fedcba9876543210" * 4, True),
        ("blobs", "0123456789abcdef" * 2 + "01234567", False),
        ("elsewhere", "0123456789abcdef" * 4, False),
    ):
        path.unlink()
        (tmp_path / blobs).mkdir(exist_ok=True)
        (tmp_path / blobs / digits).write_bytes(content)
        path.symlink_to(tmp_path / blobs / digits)
        assert (digits[:8] in teachers.content_hash(folder)) == by_name
        assert (teachers.content_hash(folder) == plain) == (not by_name)
    x, t, label = inputs()
    assert teachers.load(folder, CPU).predict(x, t, label).std() > 0.1


# Whose classes are whose.


def facts(names: list[str], count: int = 0) -> teachers.Facts:
    return teachers.Facts("dit", 4, 8, count or len(names), names, "diffusers", {})


WORDNET = [f"n{number:08d}" for number in range(1_440_764, 1_441_764)]
PEOPLE = [f"person {number}" for number in range(1000)]


@pytest.mark.parametrize(
    ("names", "theirs", "wanted"),
    [
        pytest.param([""] * 10, NAMES, list(range(10)), id="nameless data"),
        pytest.param(NAMES, [], list(range(10)), id="nameless teacher"),
        pytest.param(NAMES, NAMES, list(range(10)), id="equal names, one of them twice"),
        pytest.param(["", *NAMES[1:]], NAMES, list(range(10)), id="all names that are there agree"),
        pytest.param([name.split(",")[-1].upper() for name in NAMES], NAMES, list(range(10)), id="the same order by synonyms"),
        pytest.param(["tench", "Tiger-Shark", "great_white_shark"], NAMES, [0, 3, 2], id="synonyms"),
        pytest.param(["maillot, tank suit", "cock", "tench, Tinca tinca", "maillot"], NAMES, [9, 7, 0, 8], id="a permuted subset"),
        pytest.param(["dog", "cat", "owl"], ["owl", "dog", "cat"], [1, 2, 0], id="permuted"),
        pytest.param(["0", "1"], ["1", "0", "2"], [1, 0], id="digits are names"),
        pytest.param(["dog, "], ["cat, ", "dog", "owl"], [1], id="nothing after a comma is no name"),
        pytest.param(
            [*PEOPLE[:38], "laptop computer", "sunglass"], [*PEOPLE[:38], "laptop", "shades"], list(range(40)), id="other spellings"
        ),
        pytest.param(WORDNET, PEOPLE, list(range(1000)), id="WordNet ids"),
        pytest.param(WORDNET, WORDNET[::-1], list(range(1000))[::-1], id="WordNet ids on both sides"),
    ],
)
def test_classes_are_matched(names: list[str], theirs: list[str], wanted: list[int]) -> None:
    assert teachers.class_map(names, [1] * len(names), facts(theirs, 0 if theirs else 10)) == wanted


@pytest.mark.parametrize(
    ("names", "theirs", "words"),
    [
        pytest.param(["tench", "crane"], NAMES, r"label 1 'crane' is several of them \(5, 6\)", id="ambiguous"),
        pytest.param(["tench", "goldfsh"], NAMES, r"label 1 'goldfsh' is none of them \(near: goldfish\)", id="near"),
        pytest.param(["tench", "zzz"], NAMES, r"label 1 'zzz' is none of them\. ", id="nothing near"),
        pytest.param(["tench", ""], NAMES, "label 1 '' is none of them", id="one without a name"),
        pytest.param(["tench", "cock", "Tinca_tinca"], NAMES, "'tench' and 'Tinca_tinca' are both its class 0", id="two to one"),
        pytest.param(["x1", "x2", "x3", "x4", "x5", "x6", "x7"], ["a", "b"], "label 4 'x5' is none of them and 2 more", id="many"),
        pytest.param([""] * 3, NAMES, "knows 10 classes; the data has 3, and without names", id="counts, nameless data"),
        pytest.param(
            ["tench"], [], r"knows 10 classes; the data has 1, .*teacher\.classes takes a text file", id="counts, nameless teacher"
        ),
        pytest.param(WORDNET[::-1], PEOPLE, r"do not fit the data's \(1000\): label 0 'n01441763' is none", id="WordNet ids out of order"),
        pytest.param(WORDNET[:999], PEOPLE, r"do not fit the data's \(999\)", id="too few WordNet ids"),
        pytest.param(
            [*PEOPLE[:37], "x", "y", "z"], PEOPLE[:40], r"label 37 'x' is none of them.*label 39 'z'", id="too many other spellings"
        ),
        pytest.param([*PEOPLE[:38], "x", "person 38"], PEOPLE[:40], "label 38 'x' is none of them", id="moved, not spelt otherwise"),
        pytest.param(["dog", "bat", "owl"], ["owl", "dog", "cat"], "label 1 'bat' is none of them .near: cat.", id="the same count"),
    ],
)
def test_classes_that_do_not_match_are_refused(names: list[str], theirs: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        teachers.class_map(names, [1] * len(names), facts(theirs, 0 if theirs else 10))


def test_labels_without_images_need_no_class() -> None:
    found = teachers.class_map(["banana", "cock", "crane", "Tinca tinca", "tench"], [0, 2, 0, 0, 1], facts(NAMES))
    assert found[1] == 7 and found[4] == 0
    assert len(found) == 5 and all(0 <= number < 10 for number in found)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("9\n0\n", [9, 0]),
        ("maillot\n tench \n\n", [8, 0]),
        ("Great_White_Shark\n6", [2, 6]),
        ("goldfish, Carassius auratus\ngoldfish\n", [1, 1]),
    ],
)
def test_classes_from_a_file(tmp_path: Path, content: str, wanted: list[int]) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(content)
    assert teachers.class_map(["crane", "zzz"], [1, 1], facts(NAMES), str(path)) == wanted


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1\n", "has 1 lines; the data has 2 classes"),
        ("1\n2\n3\n", "has 3 lines; the data has 2 classes"),
        ("1\ndog\n", "line 2: 'dog' is 0 of the teacher's 10 classes"),
        ("crane\n1\n", "line 1: 'crane' is 2 of the teacher's 10 classes"),
        ("1\n10\n", "line 2: '10' is 0 of the teacher's 10 classes"),
        ("-1\n1\n", "line 1: '-1' is 0 of"),
        ("1\n²\n", "line 2: '²' is 0 of"),
        ("\n1\n", "line 1: '' is 0 of"),
    ],
)
def test_files_of_classes_that_do_not_fit_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        teachers.class_map(NAMES[:2], [1, 1], facts(NAMES), str(path))
    with pytest.raises(UserError, match="there is no such file"):
        teachers.class_map(NAMES[:2], [1, 1], facts(NAMES), str(tmp_path / "nothing"))
