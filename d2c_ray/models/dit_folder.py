"""A DiT of diffusers as a folder: where its files lie, what they say of it, and loading it.

A pipeline (model_index.json, transformer/, scheduler/), or a bare transformer folder. `key` is the configuration's
field, for messages.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from d2c_ray.errors import UserError
from d2c_ray.models import hub
from d2c_ray.models.frozen import file_hash
from d2c_ray.wording import first_line

FILES = ["model_index.json", "transformer/*", "scheduler/*", "vae/config.json"]  # of a repository, all that is read
# What `diffusion.ddpm` is, in the words of a diffusers scheduler.
_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon",
             "rescale_betas_zero_snr": False}  # fmt: skip


def transformer_folder(key: str, folder: Path) -> Path:
    """Where the transformer's config.json lies: in transformer/, or here."""
    for candidate in (folder / "transformer", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"{key}={folder} holds no model.json (a model folder of this project: train-<hash>/model or teacher-<hash>/model) and no "
        f"transformer/config.json (a diffusers DiT pipeline); it holds {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}."
    )


def labels(key: str, folder: Path) -> dict[str, Any]:
    """id2label of a pipeline."""
    path = folder / "model_index.json"
    return (hub.read_json(key, path) if path.is_file() else {}).get("id2label") or {}


def weight_files(key: str, transformer: Path) -> list[Path]:
    """The weights that diffusers would read."""
    both = [sorted(transformer.glob(f"diffusion_pytorch_model*.{suffix}")) for suffix in ("safetensors", "bin")]
    for found in ([path for path in files if ".fp16" not in path.name] for files in both):
        if found:
            return found
    for found in both:  # half precision is all there is
        if found:
            return found
    raise UserError(f"{key}: '{transformer}' holds no diffusion_pytorch_model.safetensors (or .bin).")


def check_transformer(key: str, folder: Path, config: dict[str, Any]) -> None:
    """Refuses what is no DiT, or says too little of itself."""
    # The published DiT-XL/2 were saved as Transformer2DModel, of which DiTTransformer2DModel is what remains.
    kind = config.get("_class_name")
    if kind != "DiTTransformer2DModel" and not (kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"):
        raise UserError(f"{key}={folder} holds a {kind}; a DiT (DiTTransformer2DModel) would do.")
    unknown = [name for name in ("in_channels", "sample_size", "num_embeds_ada_norm") if not isinstance(config.get(name), int)]
    if unknown:
        raise UserError(f"{key}={folder}: its config.json does not say {', '.join(unknown)}.")
    into, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if out not in (into, 2 * into):
        raise UserError(f"{key}={folder} gives {out} channels for {into}; {into}, or {2 * into} with a learned variance, would do.")


def check_schedule(key: str, folder: Path) -> None:
    """Refuses a pipeline that was trained on another noise schedule."""
    path = folder / "scheduler" / "scheduler_config.json"
    stated = hub.read_json(key, path) if path.is_file() else {}
    other = [f"{name}={stated[name]} (not {wanted})" for name, wanted in _SCHEDULE.items() if stated.get(name, wanted) != wanted]
    if stated.get("trained_betas"):
        other.append("trained_betas")
    if str(stated.get("_class_name")).startswith("FlowMatch"):
        other.append(stated["_class_name"])
    if other:
        raise UserError(
            f"{key}={folder} was trained on another noise schedule: {', '.join(other)}. Difficulty needs eps prediction on DiT's schedule."
        )


def load(key: str, transformer: Path) -> Any:
    """The network with its weights, float32 on the CPU; what it lacks or holds besides is an error."""
    from diffusers import DiTTransformer2DModel
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    files = weight_files(key, transformer)
    safe = files[0].suffix == ".safetensors"
    try:
        # A .bin, which the published DiT-XL/2 come as, goes through torch.load(weights_only=True): tensors and nothing else.
        network, report = DiTTransformer2DModel.from_pretrained(
            transformer, use_safetensors=safe, local_files_only=True, variant="fp16" if ".fp16" in files[0].name else None, torch_dtype=torch.float32,
            low_cpu_mem_usage=False, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # unpickling, safetensors, shapes: each has its own
        raise UserError(f"{key}: the weights in '{transformer}' cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    unknown = set(report["unexpected_keys"]) - {"pos_embed.pos_embed"}  # a fixed table, which some releases saved
    for words, keys in (("lack", report["missing_keys"]), ("hold besides", unknown)):
        if keys:  # diffusers would leave the one random and ignore the other: blocks that config.json does not count
            raise UserError(
                f"{key}: the weights in '{transformer}' {words} {', '.join(sorted(keys)[:3])}, unlike what its config.json says."
            )
    return network


def content_hash(key: str, folder: Path) -> str:
    """A hash of the transformer, and of the labels that the pipeline gives its classes."""
    transformer = transformer_folder(key, folder)
    parts = [file_hash(path)[:8] for path in [transformer / "config.json", *weight_files(key, transformer)]]
    known = labels(key, folder) if transformer != folder else {}  # by them the data's classes are matched
    return "-".join([*parts, *([hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]] if known else [])])
