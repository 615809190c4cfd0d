"""A model folder as a diffusers pipeline, which loads and samples where this project is not installed.

The pipeline and its transformer are code of the exported folder, which diffusers runs with trust_remote_code=True:
diffusers_pipeline.py as it is, and transformer.py with diffusers_model.py behind it in one file.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from d2c_ray.config import VaeConfig
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, weights
from d2c_ray.wording import in_markdown

MODULE = "d2c_transformer"  # no name of diffusers' own
_IMPORT = "from d2c_ray.models.transformer import "


def export_model(model: Path, out: Path, which: str = "ema", vae: VaeConfig | None = None) -> list[str]:
    """Writes the folder `out` of a pipeline; gives what a reader should know, as sentences.

    Args:
        model: a model folder. which: ema, raw or ema-DECAY.
        vae: of the model's latents; None or without a path: the pipeline takes it as an argument.

    Raises:
        UserError: no such model or weights, a folder that holds something, another VAE than the model was trained with.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is there already; a new folder would do.")
    student = weights.load(model, which)
    spec, meta = student.spec, student.meta
    latent = meta.get("latent") or {}
    of_latents = latent.get("kind", "pixels" if spec.channels in (1, 3) else "vae") == "vae"
    decoder = _decoder(vae, latent, spec.channels) if of_latents and vae is not None and vae.path else None

    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, __version__

    from d2c_ray.models.diffusers_model import D2CTransformer2DModel

    text = student.text_states is not None
    network = D2CTransformer2DModel(
        # The alignment head is training's alone.
        spec=replace(spec, vision_width=0, align_depth=0).to_dict(), text_strength=student.text_strength,
        num_text_classes=len(student.text_states) if student.text_states is not None else 0, class_names=list(meta.get("class_names") or []),
        labels=meta.get("labels"), latent_kind="vae" if of_latents else "pixels",
    )  # fmt: skip
    state = {f"network.{name}": value for name, value in student.network.state_dict().items() if not name.startswith("align_head.")}
    if student.text_states is not None and student.text_mask is not None:
        state |= {"text_states": student.text_states.float(), "text_mask": student.text_mask.long()}
    network.load_state_dict(state)
    scheduler: Any = None
    if spec.kind == "dit":
        # linspace is how `samplers.ancestral` spaces its timesteps.
        scheduler = DDPMScheduler(
            num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="learned_range", clip_sample=False,
            prediction_type="epsilon", timestep_spacing="linspace",
        )  # fmt: skip
    elif spec.path == "linear":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)

    network.save_pretrained(out / "transformer")
    (out / "transformer" / f"{MODULE}.py").write_text(_model_code())
    (out / "pipeline.py").write_text(_source("diffusers_pipeline.py"))
    index: dict[str, Any] = {"_class_name": ["pipeline", "D2CPipeline"], "_diffusers_version": __version__,
                             "transformer": [MODULE, type(network).__name__]}  # fmt: skip
    for name, part in (("scheduler", scheduler), ("vae", decoder)):
        index[name] = ["diffusers", type(part).__name__] if part is not None else [None, None]
        if part is not None:
            part.save_pretrained(out / name)
    card = _card(student, which, text, decoder is not None, of_latents)
    (out / "README.md").write_text(card)
    (out / "model_index.json").write_text(json.dumps(index, indent=1))  # last: with it the folder is whole
    return [_vae_note(latent)] if of_latents and decoder is None else []


def _decoder(vae: VaeConfig, latent: dict[str, Any], channels: int) -> Any:
    given = Path(vae.path).expanduser()
    if not vae.subfolder and (given / "vae" / "config.json").is_file():
        vae = replace(vae, subfolder="vae")
    known = frozen.vae_facts(vae.path, vae.subfolder)
    if known["channels"] != channels:
        raise UserError(f"the VAE at {vae.path} has latents of {known['channels']} channels; the model's have {channels}.")
    if latent.get("encoder") and latent["encoder"] != known["encoder"]:
        raise UserError(
            f"the model was trained in the latents of another VAE (encoder {latent['encoder']}) than that at {vae.path} ({known['encoder']})."
        )
    return frozen.Vae(replace(vae, precision="fp32"), torch.device("cpu")).network


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _model_code() -> str:
    """One file that needs torch, numpy and diffusers: the backbone, then its wrapper."""
    wrapper = "".join(line for line in _source("diffusers_model.py").splitlines(keepends=True) if not line.startswith(_IMPORT))
    return f"{_source('transformer.py')}\n\n# Below: the same as a component of a diffusers pipeline.\n\n{wrapper}"


def _vae_note(latent: dict[str, Any]) -> str:
    known = f" It is the one whose weights hash to {in_markdown(latent['vae'])}." if latent.get("vae") else ""
    return f"The model works on the latents of a VAE, which is not in this folder: pass vae=AutoencoderKL.from_pretrained(...).{known}"


def _card(student: weights.Student, which: str, text: bool, has_vae: bool, of_latents: bool) -> str:
    spec, meta = student.spec, student.meta
    names = [name for name in meta.get("class_names") or [] if name]
    labels = meta.get("labels")
    first = json.dumps(names[0].split(",")[0].strip()) if names else str((labels or [0])[0])
    other = (labels or range(spec.num_classes))[-1]
    vae = ', vae=AutoencoderKL.from_pretrained("...")' if of_latents and not has_vae else ""
    parameters = sum(value.numel() for value in student.network.parameters()) / 1e6
    path = f" on the {spec.path} path" if spec.kind == "sit" else ""
    steps = {
        "dit": "`scheduler`: diffusers' DDPMScheduler, linear betas, learned variance, timesteps spaced evenly from 0 to 999.",
        "linear": "`scheduler`: diffusers' FlowMatchEulerDiscreteScheduler without shift, which takes Euler's steps from noise to image.",
        "cosine": "no scheduler: diffusers has none for the cosine path, so the pipeline takes Euler's steps on the ODE itself.",
    }["dit" if spec.kind == "dit" else spec.path]
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [diffusion-transformer, class-conditional, dataset-condensation]",
        "---",
        "",
        f"# {'DiT' if spec.kind == 'dit' else 'SiT'}, {parameters:.1f}M parameters, {spec.num_classes} classes",
        "",
        f"A class-conditional {'diffusion' if spec.kind == 'dit' else 'flow'} transformer{path}: depth {spec.depth}, width {spec.width}, {spec.heads} heads, patch "
        f"{spec.patch}, {'latents' if of_latents else 'pixels'} of {spec.channels} x {spec.input_size} x {spec.input_size}. Its weights are `{which}` of a training on "
        f"{in_markdown(meta.get('images') or 'an unknown number of')} images shown.",
        "",
        "    from diffusers import " + ("AutoencoderKL, " if vae else "") + "DiffusionPipeline",
        f'    pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True{vae})',
        f"    images = pipe([{first}, {other}], num_inference_steps=50, guidance_scale=1.5).images",
        '    images[0].save("image.png")',
        "",
        "Classes are names or numbers; `generator`, `latents` and `output_type` (pil, np, pt, latent) are as in other pipelines.",
        "",
        "## What is in it",
        "",
        "`trust_remote_code=True` runs the two Python files of this folder, since neither class is diffusers' own; both are short and need torch, numpy and diffusers.",
        "",
        "* `pipeline.py`: D2CPipeline. Guidance mixes the conditional and the null half; a learned variance stays the conditional one.",
        f"* `transformer/{MODULE}.py`: the transformer, its weights beside it{' with the text states of its classes, which join the class condition' if text else ''}.",
        f"* {steps}",
        *(["* `vae`: the AutoencoderKL of its latents."] if has_vae else []),
    ]
    if of_latents and not has_vae:
        lines += ["", _vae_note(meta.get("latent") or {})]
    if names:
        lines += ["", "## Classes", "", *(f"{number}. {in_markdown(name)}" for number, name in enumerate(meta["class_names"]))]
    if labels and len(labels) < spec.num_classes:
        lines += ["", f"It was trained on {len(labels)} of them: {in_markdown(', '.join(map(str, labels)))}."]
    return "\n".join(lines) + "\n"
