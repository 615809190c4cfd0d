"""Folders of pretrained models, local or snapshots of the hub: where they are, what decides their result, loading them.

No code of a repository is ever run: classes are named here, weights are tensors alone, and remote code stays off.
"""

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from d2c_ray.errors import UserError
from d2c_ray.models.frozen import file_hash
from d2c_ray.models.offline import is_only_local
from d2c_ray.wording import first_line

# What transformers reads; where a repository holds both kinds, the safetensors.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "model-*.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin",
)  # fmt: skip
_import_lock = threading.Lock()  # transformers loads its names lazily, and two threads at once get none


def resolve(key: str, name: str, patterns: Sequence[str], would: str = "") -> Path:
    """The local folder of a model: as given, or a hub name's snapshot, which is fetched where the hub is in reach.

    Args:
        key: of the configuration, for messages. name: a folder, or owner/model.
        patterns: the files that are wanted; .bin weights are fetched only where the repository has no safetensors.
        would: what to propose instead, a sentence.

    Raises:
        UserError: neither a folder nor a hub name that can be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    would = would or (
        "A local folder that holds config.json and model.safetensors, or a hub name (owner/model) with the hub in reach or the model already "
        "in its cache, would do."
    )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{key}={name}: there is no such folder. {would}")
    from huggingface_hub import snapshot_download

    local = is_only_local()
    how: dict[str, Any] = {"local_files_only": True} if local else {}
    try:
        safe = [pattern for pattern in patterns if ".bin" not in pattern]
        snapshot = Path(snapshot_download(name, allow_patterns=safe, **how))
        if len(safe) < len(patterns) and not any(snapshot.glob("*.safetensors")):
            snapshot = Path(snapshot_download(name, allow_patterns=list(patterns), **how))
        return snapshot
    except Exception as error:  # the hub library raises its own, requests' and OSError
        where = "the hub's cache holds" if local else "the hub gives"
        raise UserError(
            f"{key}={name}: there is no such folder, and {where} no such model ({type(error).__name__}: {first_line(error)}). {would}"
        ) from None


def folder_hash(folder: Path, patterns: Sequence[str]) -> str:
    """16 hex digits over names and contents of the files that match; of weights only those that are loaded count."""
    others = [pattern for pattern in patterns if pattern not in WEIGHTS]
    names = {path.relative_to(folder).as_posix() for pattern in others for path in folder.glob(pattern) if path.is_file()}
    if len(others) < len(patterns):
        names.update(_weights(str(folder), folder))
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}|{file_hash(folder / name)}|".encode())
    return digest.hexdigest()[:16]


def read_config(key: str, folder: Path, supported: Sequence[str]) -> dict[str, Any]:
    """config.json of a model folder whose weights are complete.

    Args:
        supported: the values of model_type that would do.

    Raises:
        UserError: no or another model there, or weights missing.
    """
    path = folder / "config.json"
    if not path.is_file():
        held = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) if folder.is_dir() else ""
        raise UserError(
            f"{key}: '{folder}' has no config.json; it holds {held or 'nothing'}. A folder that save_pretrained wrote would do."
        )
    config = read_json(key, path)
    if config.get("model_type") not in supported:
        raise UserError(f"{key}: '{folder}' holds a model of type {config.get('model_type')!r}; one of {', '.join(supported)} would do.")
    _weights(key, folder)
    return config


def read_json(key: str, path: Path) -> dict[str, Any]:
    """A JSON object of a model folder, or a UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: '{path}' cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: '{path}' cannot be read: it holds no JSON object.")
    return content


def transformers_class(name: str) -> Any:
    """A class of transformers, which keeps silent from then on."""
    with _import_lock:
        import transformers
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        return getattr(transformers, name)


def load(key: str, folder: Path, class_name: str, dtype: torch.dtype, unused: Sequence[str] = (), **how: Any) -> Any:
    """A frozen network of transformers.

    Args:
        unused: parameters that may be missing, since no forward of ours reads them.

    Raises:
        UserError: weights that are unreadable, not tensors alone, or other than config.json says.
    """
    safe = _weights(key, folder)[0].startswith("model.")
    try:
        network, report = transformers_class(class_name).from_pretrained(
            # The attention is named, since config.json could name a kernel of another repository.
            folder, local_files_only=True, use_safetensors=safe, dtype=dtype, attn_implementation="sdpa",
            output_loading_info=True, **how,
        )  # fmt: skip
    except Exception as error:  # unpickling, safetensors, shapes: each has its own
        raise UserError(f"{key}: the weights in '{folder}' cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    missing = sorted(set(report["missing_keys"]) - set(unused))
    if missing:  # they would be left random
        raise UserError(f"{key}: the weights in '{folder}' lack {', '.join(missing[:3])}, unlike what its config.json says.")
    return network.eval().requires_grad_(False)


def _weights(key: str, folder: Path) -> list[str]:
    """The names of the weight files that transformers reads, all of which are there: one, or an index and then its shards."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if whole.is_file():
            return [whole.name]
        if index.is_file():
            shards = read_json(key, index).get("weight_map")
            others = (
                [name for name in shards.values() if not isinstance(name, str) or Path(name).name != name]
                if isinstance(shards, dict)
                else []
            )
            if others:
                raise UserError(f"{key}: '{index}' names {others[0]!r}, which is no file beside it.")
            missing = sorted(name for name in set(shards.values()) if not (folder / name).is_file()) if isinstance(shards, dict) else []
            if not shards or missing:
                raise UserError(f"{key}: '{index}' names {len(missing)} files that are not there{f', {missing[0]}' if missing else ''}.")
            return [index.name, *sorted(set(shards.values()))]
    raise UserError(f"{key}: '{folder}' holds no model.safetensors (or pytorch_model.bin), in one file or in shards with their index.")
