"""Exported models, loaded and sampled by diffusers alone: in a process where this project cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from d2c_ray import cli
from d2c_ray.config import VaeConfig
from d2c_ray.diffusion import samplers
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, weights
from d2c_ray.models.export import export_model
from d2c_ray.models.transformer import Transformer, TransformerSpec

NAMES = ["cat", "dog, hound", "owl"]

# What a user of diffusers does, and what it gives, as tensors and one dictionary.
READER = """
import json, socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("d2c_ray", "ray"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
socket.socket.connect = socket.getaddrinfo = None
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from diffusers import AutoencoderKL, DiffusionPipeline

job = json.loads(sys.argv[1])
said, tensors = {}, {}
for name, folder in job["folders"].items():
    given = load_file(job["inputs"] + "/" + name + ".safetensors")
    more = {"vae": AutoencoderKL.from_pretrained(job["vaes"][name])} if name in job["vaes"] else {}
    how = {"custom_pipeline": folder} if job["custom"] else {}
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **how, **more)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["cat", 2], num_inference_steps=4, guidance_scale=1.5, generator=torch.Generator().manual_seed(0)).images
    said[name] = {"images": [[image.size, image.mode] for image in images], "scheduler": type(pipe.scheduler).__name__}
    tensors[name + ".latent"] = pipe(["hound", 0], num_inference_steps=5, guidance_scale=2.0, latents=given["noise"],
        generator=torch.Generator().manual_seed(7), output_type="latent").images
    tensors[name + ".prediction"] = pipe.predict(given["noise"], given["t"], torch.tensor([1, 0]), 2.0)
    tensors[name + ".pt"] = pipe([1], num_inference_steps=1, guidance_scale=1.0, latents=given["noise"][:1], output_type="pt").images
    half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16, **more)
    half.set_progress_bar_config(disable=True)
    tensors[name + ".bf16"] = half.predict(given["noise"], given["t"], torch.tensor([1, 0]), 2.0)
    for wrong in ("zebra", 9):
        try:
            pipe([wrong])
        except ValueError as error:
            said[name][str(wrong)] = str(error)
said["modules"] = sorted(name for name in sys.modules if name.startswith("d2c_ray"))
save_file({name: value.contiguous() for name, value in tensors.items()}, job["out"])
print(json.dumps(said))
"""


def model(folder: Path, kind: str, path: str = "linear", text: bool = False, channels: int = 3, latent: dict | None = None) -> Path:
    side = {"text_tokens": 3, "text_width": 6, "vision_width": 5, "align_depth": 1, "align_hidden": 8} if text else {}
    spec = TransformerSpec(kind, 8, channels, 2, 2, 32, 2, len(NAMES), path=path, **side)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) * 0.15 for name, value in Transformer(spec).state_dict().items()}
    other = {name: value * 0.9 for name, value in state.items()}
    states = {"states": torch.randn(3, 3, 6, generator=generator), "mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])}
    meta = {"class_names": NAMES, "labels": [0, 1, 2], "latent": latent or {"kind": "pixels"}, "text_strength": 0.7, "images": 640}
    weights.save(
        folder,
        spec,
        {"ema": state, "raw": other, "ema-0.999": {name: -value for name, value in state.items()}},
        meta,
        states if text else None,
    )
    return folder


def small_vae(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, layers_per_block=1, sample_size=16,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_vae(tmp_path_factory.mktemp("vae") / "vae", 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, vae: Path) -> dict:
    """Every kind of model, exported, read by diffusers alone, and what that process said and gave."""
    base = tmp_path_factory.mktemp("exported")
    facts = frozen.vae_facts(str(vae), "")
    latent = {"kind": "vae", "vae": facts["hash"], "encoder": facts["encoder"]}
    made = {
        "sit": model(base / "a", "sit", text=True), "cosine": model(base / "b", "sit", "cosine"), "dit": model(base / "c", "dit", text=True),
        "latents": model(base / "d", "sit", channels=4, latent=latent), "apart": model(base / "e", "dit", channels=4, latent=latent),
    }  # fmt: skip
    folders, inputs = {}, {}
    for name, folder in made.items():
        out = base / f"out-{name}"
        notes = export_model(folder, out, vae=VaeConfig(path=str(vae)) if name == "latents" else None)
        assert bool(notes) == (name == "apart")
        spec = weights.read_meta(folder)["spec"]
        inputs[name] = {"noise": torch.randn(2, spec["channels"], 8, 8, generator=torch.Generator().manual_seed(5)),
                        "t": torch.tensor([700, 30]) if spec["kind"] == "dit" else torch.tensor([0.7, 0.03])}  # fmt: skip
        save_file(inputs[name], base / f"{name}.safetensors")
        folders[name] = str(out)
    job = {"folders": folders, "inputs": str(base), "vaes": {"apart": str(vae)}, "custom": False, "out": str(base / "found.safetensors")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(job)], capture_output=True, text=True, cwd=base,
        env={**environment, "HF_HOME": str(base / "hub"), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(base / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        "said": json.loads(done.stdout.splitlines()[-1]),
        "found": load_file(base / "found.safetensors"),
        "models": made,
        "inputs": inputs,
        "folders": folders,
    }


def ours(exported: dict, name: str, guidance: float = 2.0, label: tuple[int, ...] = (1, 0)) -> samplers.Predict:
    student = weights.load(exported["models"][name])
    return samplers.guided(student.predict, torch.tensor(label), 3, guidance, student.spec.channels)


@pytest.mark.parametrize("name", ["sit", "cosine", "latents", "dit", "apart"])
def test_diffusers_alone_predicts_what_we_predict(exported: dict, name: str) -> None:
    assert exported["said"]["modules"] == []
    noise, t = exported["inputs"][name]["noise"], exported["inputs"][name]["t"]
    wanted, found = ours(exported, name)(noise, t), exported["found"][f"{name}.prediction"]
    assert wanted.std() > 0.1
    assert torch.allclose(found, wanted, atol=1e-5)
    half = exported["found"][f"{name}.bf16"]
    assert half.dtype == torch.float32 and not torch.equal(half, wanted)
    assert (half - wanted).square().mean().sqrt() < 0.03 * wanted.std()


@pytest.mark.parametrize("name", ["sit", "cosine", "latents"])
def test_eulers_steps_end_where_ours_end(exported: dict, name: str) -> None:
    noise = exported["inputs"][name]["noise"]
    wanted = samplers.euler(ours(exported, name), noise, 5, lambda i: noise)
    assert torch.allclose(exported["found"][f"{name}.latent"], wanted, atol=1e-5)
    assert (wanted - noise).std() > 0.1


@pytest.mark.parametrize("name", ["dit", "apart"])
def test_the_steps_of_a_dit_end_where_ours_end(exported: dict, name: str) -> None:
    """With the noise that diffusers draws, a step at a time, from the generator it was given."""
    noise = exported["inputs"][name]["noise"]
    generator = torch.Generator().manual_seed(7)
    wanted = samplers.ancestral(ours(exported, name), noise, 5, lambda i: torch.randn(noise.shape, generator=generator))
    assert torch.allclose(exported["found"][f"{name}.latent"], wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


def test_images_are_pictures(exported: dict, vae: Path) -> None:
    said = exported["said"]
    for name in ("sit", "cosine", "dit"):
        assert said[name]["images"] == [[[8, 8], "RGB"]] * 2
    for name in ("latents", "apart"):
        assert said[name]["images"] == [[[16, 16], "RGB"]] * 2
    assert [said[name]["scheduler"] for name in ("sit", "cosine", "dit")] == [
        "FlowMatchEulerDiscreteScheduler",
        "NoneType",
        "DDPMScheduler",
    ]
    assert "'zebra' is no class: a number from 0 to 2, or one of cat, dog, hound" in said["sit"]["zebra"]
    assert "9 is no class" in said["sit"]["9"]
    noise = exported["inputs"]["latents"]["noise"][:1]
    z = samplers.euler(ours(exported, "latents", 1.0, (1,)), noise, 1, lambda i: noise)
    decoded = frozen.Vae(VaeConfig(path=str(vae)), torch.device("cpu")).decode(z)
    found = (exported["found"]["latents.pt"] * 255).round().permute(0, 2, 3, 1)
    assert (found - decoded.float()).abs().max() <= 1


def test_a_folder_says_what_it_holds(exported: dict) -> None:
    for name, folder in exported["folders"].items():
        card = (Path(folder) / "README.md").read_text()
        assert 'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True' in card
        assert ("pass vae=AutoencoderKL.from_pretrained" in card) == (name == "apart")
        assert "align_head" not in " ".join(load_file(Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors"))
        assert (
            "d2c_ray" not in (Path(folder) / "pipeline.py").read_text() + (Path(folder) / "transformer" / "d2c_transformer.py").read_text()
        )
    assert "cosine path, so the pipeline takes Euler's steps" in (Path(exported["folders"]["cosine"]) / "README.md").read_text()


def test_the_weights_that_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = model(tmp_path / "model", "sit")
    for which, factor in (("ema", 1.0), ("raw", 0.9), ("ema-0.999", -1.0)):
        cli.app(["export-model", str(folder), str(tmp_path / which), "--weights", which], standalone_mode=False)
        found = load_file(tmp_path / which / "transformer" / "diffusion_pytorch_model.safetensors")
        wanted = load_file(folder / "ema.safetensors")
        assert torch.allclose(found["network.final.linear.weight"], factor * wanted["final.linear.weight"])
    assert "a diffusers pipeline" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no ema-0\.99\.safetensors; it holds ema-0\.999\.safetensors"):
        export_model(folder, tmp_path / "none", "ema-0.99")
    with pytest.raises(UserError, match="is there already"):
        export_model(folder, tmp_path / "ema")


def test_another_vae_is_refused(vae: Path, tmp_path: Path) -> None:
    facts = frozen.vae_facts(str(vae), "")
    folder = model(tmp_path / "model", "sit", channels=4, latent={"kind": "vae", "vae": facts["hash"], "encoder": facts["encoder"]})
    other = small_vae(tmp_path / "other", 1)
    with pytest.raises(UserError, match="was trained in the latents of another VAE"):
        export_model(folder, tmp_path / "out", vae=VaeConfig(path=str(other)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has latents of 4 channels; the model's have 5"):
        export_model(model(tmp_path / "five", "sit", channels=5, latent={"kind": "vae"}), tmp_path / "out", vae=VaeConfig(path=str(vae)))
