"""A training's state on disk: safetensors and JSON, nothing pickled."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE = "state.safetensors"
META = "state.json"
EMA = "ema"  # the average of train.ema_decay

Averages = Mapping[str, Mapping[str, Tensor]]  # by name ('ema', 'ema-0.999'), then by parameter


def average_name(decay: float) -> str:
    """What the average of a further decay (train.ema_also) is called, here and in a model's folder."""
    return f"{EMA}-{decay}"


@dataclass
class Snapshot:
    """A state in host memory: later steps do not change it, and any thread may write it."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    copied: torch.cuda.Event | None  # a device's copies into it may still be under way

    def write(self, folder: Path) -> None:
        """Writes the state to `folder`, which must exist; what says that it is whole comes last."""
        if self.copied is not None:
            self.copied.synchronize()
        save_file(self.tensors, folder / STATE)
        (folder / META).write_text(json.dumps(self.meta, indent=1))


@dataclass(frozen=True)
class Saver:
    """Saves a training's state of this moment: at once, or as a snapshot that is written later."""

    snapshot: Callable[[], Snapshot]

    def __call__(self, folder: Path) -> None:
        self.snapshot().write(folder)


def snapshot(model: nn.Module, averages: Averages, optimizer: torch.optim.Optimizer, step: int, facts: dict[str, Any]) -> Snapshot:
    """Copies model, averages, AdamW moments and step. From a device into pinned memory, without waiting for it."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for which, values in averages.items():
        tensors |= {f"{which}.{name}": value for name, value in values.items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in moments:
                tensors[f"{key}.{name}"] = moments[key]
    kept, device = {}, None
    for name, value in tensors.items():
        kept[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        kept[name].copy_(value.detach(), non_blocking=True)
        if value.is_cuda:
            device = value.device  # one for all
    copied = torch.cuda.Event() if device is not None else None
    if copied is not None:
        copied.record(torch.cuda.current_stream(device))  # that device may not be the thread's current one
    return Snapshot(kept, {"step": step, **facts}, copied)


def read(folder: Path) -> Snapshot:
    """A saved state, as it was taken."""
    return Snapshot(load_file(folder / STATE), json.loads((folder / META).read_text()), None)


def load(folder: Path, model: nn.Module, averages: Averages, optimizer: torch.optim.Optimizer) -> int:
    """Puts a saved state into `model`, `averages` and `optimizer` and returns the step it was saved after."""
    tensors = load_file(folder / STATE)
    step = json.loads((folder / META).read_text())["step"]
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for which, values in averages.items():
        for name, value in values.items():
            value.copy_(tensors[f"{which}.{name}"])
    for name, parameter in model.named_parameters():
        if f"exp_avg.{name}" in tensors:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    return step


def weights(folder: Path, which: str) -> dict[str, Tensor]:
    """The weights of a saved state, by parameter name: 'model', 'ema', or 'ema-0.999' and the like."""
    prefix = f"{which}."
    with safe_open(folder / STATE, "pt") as file:
        # 'ema-0.' is also how 'ema-0.5.' begins; no parameter's name begins with a digit.
        names = [name for name in file.keys() if name.startswith(prefix) and not name[len(prefix)].isdigit()]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
