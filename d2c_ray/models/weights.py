"""A trained model as a folder: model.json, ema.safetensors, raw.safetensors and further EMAs (ema-0.999.safetensors), and the text states
it was trained with."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2c_ray.errors import UserError
from d2c_ray.models.frozen import file_hash
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.wording import first_line

META = "model.json"
TEXT = "text.safetensors"


@dataclass
class Student:
    """A loaded model and what sampling or scoring with it needs."""

    network: Transformer
    meta: dict[str, Any]  # spec, class names, latent space, training facts
    text_states: Tensor | None  # num_classes x K x E
    text_mask: Tensor | None
    text_strength: float

    @property
    def spec(self) -> TransformerSpec:
        return self.network.spec

    def predict(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The network's output with each label's own text; `num_classes` is the null label."""
        condition: dict[str, Any] = {}
        if self.text_states is not None and self.text_mask is not None:
            known = label.clamp(max=self.spec.num_classes - 1)
            condition = {"text": self.text_states[known], "text_mask": self.text_mask[known], "text_strength": self.text_strength}
        return self.network(x, t, label, **condition)


def save(
    folder: Path, spec: TransformerSpec, weights: dict[str, dict[str, Tensor]], meta: dict[str, Any], text: dict[str, Tensor] | None
) -> None:
    """Writes a model folder.

    Args:
        weights: 'ema', 'raw' and 'ema-DECAY' of further decays, each by parameter name.
        meta: class_names, labels (those that were trained), latent (image_size, channels, vae), text_strength and anything worth knowing later.
        text: 'states' and 'mask' by class, where the model has a text side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for which, tensors in weights.items():
        save_file(tensors, folder / f"{which}.safetensors")
    if text is not None:
        save_file(text, folder / TEXT)
    (folder / META).write_text(json.dumps({"spec": spec.to_dict(), **meta}, indent=1))


def read_meta(folder: Path) -> dict[str, Any]:
    """model.json of a model folder.

    Raises:
        UserError: no model folder of this project, or one whose fields this version does not know.
    """
    path = folder / META
    if not path.is_file():
        raise UserError(
            f"'{folder}' holds no {META}: a model folder is what training leaves in train-<hash>/model or teacher-<hash>/model."
        )
    try:
        meta = json.loads(path.read_text())
        known = {field.name for field in fields(TransformerSpec)}
        if not set(meta["spec"]) <= known:
            raise UserError(f"'{path}' was written by another version: unknown {', '.join(sorted(set(meta['spec']) - known))}.")
        TransformerSpec(**meta["spec"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read: {error!r}.") from error
    return meta


def load(folder: Path, which: str = "ema", device: torch.device | str = "cpu") -> Student:
    """A model folder's network with its `ema`, `raw` or `ema-DECAY` weights, frozen.

    Raises:
        UserError: weights missing, unreadable or of other shapes than model.json says.
    """
    meta = read_meta(folder)
    network = Transformer(TransformerSpec(**meta["spec"]))
    path = folder / f"{which}.safetensors"
    if not path.is_file():
        raise UserError(f"'{folder}' has no {path.name}; it holds {', '.join(sorted(p.name for p in folder.iterdir()))}.")
    try:
        network.load_state_dict(load_file(path))
        text = load_file(folder / TEXT) if (folder / TEXT).is_file() else None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"'{path}' cannot be loaded: {first_line(error)}") from error
    network.eval().requires_grad_(False).to(device)
    return Student(
        network=network,
        meta=meta,
        text_states=text["states"].to(device) if text else None,
        text_mask=text["mask"].to(device) if text else None,
        text_strength=float(meta.get("text_strength", 1.0)),
    )


def decay(which: str, main: float | None) -> float | None:
    """The EMA decay of `ema` (the main one), `ema-DECAY` or `raw` (none)."""
    return main if which == "ema" else float(which.removeprefix("ema-")) if which.startswith("ema-") else None


def content_hash(folder: Path) -> str:
    """A hash of all that scoring with this model depends on."""
    parts = [file_hash(folder / name) for name in (META, "ema.safetensors", TEXT) if (folder / name).is_file()]
    return "-".join(part[:8] for part in parts)
