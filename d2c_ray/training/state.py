"""A training's state on disk: safetensors and JSON, nothing pickled."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE = "state.safetensors"
META = "state.json"


def save(folder: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int, facts: dict) -> None:
    """Writes model, EMA, AdamW moments and step to `folder`, which must exist."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in moments:
                tensors[f"{key}.{name}"] = moments[key]
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / STATE)
    (folder / META).write_text(json.dumps({"step": step, **facts}, indent=1))


def load(folder: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Puts a saved state into `model`, `ema` and `optimizer` and returns the step it was saved after."""
    tensors = load_file(folder / STATE)
    step = json.loads((folder / META).read_text())["step"]
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for name, value in ema.items():
        value.copy_(tensors[f"ema.{name}"])
    for name, parameter in model.named_parameters():
        if f"exp_avg.{name}" in tensors:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    return step


def weights(folder: Path, which: str) -> dict[str, Tensor]:
    """The `model` or `ema` weights of a saved state, by parameter name."""
    prefix = f"{which}."
    return {name[len(prefix) :]: value for name, value in load_file(folder / STATE).items() if name.startswith(prefix)}
