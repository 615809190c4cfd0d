"""provenance.json of a condensed dataset: what it is, what made it, and every file that ships with its hash."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2c_ray.data import storage
from d2c_ray.errors import UserError
from d2c_ray.rundir import write_json

NAME = "provenance.json"
SELECTION = "selection.parquet"
FORMAT = 1
INTERNAL = ("rows.parquet", "rejected.parquet")  # of the run; they do not ship
HUB = b"huggingface"
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what reading a damaged Parquet file raises
_BLOCK_BYTES = 1 << 22
_THREADS = 4

# What must be there, by type, for the dataset to be described and checked at all; there may be more.
_TEXT = {"encoder": str, "weights": str, "width": int, "tokens": int}
_VISION = {
    "encoder": str, "weights": str, "width": int, "image_size": int, "precision": str, "device_batch": int, "storage": str, "cosine_min": float,
}  # fmt: skip
_VAE = {"path": str, "subfolder": str, "precision": str, "device_batch": int}
_FORM: dict[str, Any] = {
    "format": int, "fingerprint": str, "rows": int, "class_names": list, "data": {"image_size": int, "channels": int}, "flip": bool,
    "latent": {"kind": str, "channels": int, "side": int}, "grid": int, "vision": dict, "selection": dict, "cost_seconds": dict,
    "versions": dict, "files": dict,
}  # fmt: skip


def shipped(folder: Path) -> list[Path]:
    """The Parquet files of a condensed dataset that ship, by name."""
    found = (path for path in folder.glob("*.parquet") if path.name not in INTERNAL and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def inventory(folder: str | Path) -> dict[str, dict[str, Any]]:
    """bytes, sha256 and rows of every Parquet file that ships, by name; rows is null where the file cannot be read."""
    paths = shipped(Path(folder))
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing lets go of the interpreter
        return dict(zip((path.name for path in paths), pool.map(_describe, paths), strict=True))


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest(), "rows": rows_of(path)}


def rows_of(path: Path) -> int | None:
    """Rows of a Parquet file; None where it cannot be read."""
    try:
        return pq.read_metadata(path).num_rows
    except UNREADABLE:
        return None


def in_training(stated: dict[str, Any]) -> list[str]:
    """What a dataset holds as pixels alone, to be encoded while training: 'latent', and columns that vision tokens would have."""
    return stated.get("in_training", [])


def write(folder: str | Path, **fields: Any) -> dict[str, Any]:
    """Writes provenance.json and gives what it says; `format` is added, and `files` where it is not given.

    Raises:
        ValueError: a field that `read` would miss.
    """
    folder = Path(folder)
    found = {"format": FORMAT, **fields}
    if "files" not in found:
        found["files"] = inventory(folder)
    wrong = _wrong(found)
    if wrong:
        raise ValueError(f"{NAME}: {wrong}")
    write_json(folder / NAME, found)
    return found


def read(folder: str | Path) -> dict[str, Any]:
    """provenance.json of a condensed dataset.

    Raises:
        UserError: no such folder, no provenance in it, or one that this version cannot read.
    """
    if storage.is_remote(str(folder)):
        raise UserError(f"'{folder}': a condensed dataset is checked and exported from a local folder. Copy it there first.")
    path = Path(folder) / NAME
    if not Path(folder).is_dir():
        raise UserError(f"'{folder}': there is no such folder. A condensed dataset is the folder condensed-<hash> of a run.")
    if not path.is_file():
        raise UserError(
            f"'{folder}' holds no {NAME}, which d2c attach leaves in a condensed-<hash> folder: it is no condensed dataset, or an unfinished one."
        )
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"'{path}' is no JSON: {error}.") from None
    wrong = _wrong(found)
    if wrong:
        raise UserError(f"'{path}': {wrong}.")
    return found


def hub_features(fields: pa.Schema, class_names: Sequence[str]) -> bytes:
    """Schema metadata (key `HUB`) by which `datasets` and dataset hubs show images and class names.

    Args:
        fields: of the table. An `image` of struct<bytes, path> is an Image, an int64 `label` a ClassLabel where there are
            classes; what is not named here is shown as its Arrow type.
        class_names: by label. Names that occur twice get their label added: a ClassLabel refuses them otherwise.
    """
    features: dict[str, Any] = {}
    if "image" in fields.names and pa.types.is_struct(fields.field("image").type):
        features["image"] = {"_type": "Image"}
    if "label" in fields.names and fields.field("label").type == pa.int64() and class_names:
        features["label"] = {"names": unique_names(class_names), "_type": "ClassLabel"}
    return json.dumps({"info": {"features": features}}).encode()


def unique_names(names: Sequence[str]) -> list[str]:
    """Class names of which none is empty or occurs twice (ImageNet has two cranes): those get their label added."""
    counts = Counter(names)
    kept = {name for name in names if name and counts[name] == 1}
    found = []
    for label, name in enumerate(names):
        if name not in kept:
            name = f"{name} (label {label})".strip()
            while name in kept:
                name += "'"
            kept.add(name)
        found.append(name)
    return found


def _wrong(found: Any) -> str:
    """What a provenance lacks, in words; empty where it is all there."""
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
        return f"format {found['format']} is newer than this version reads ({FORMAT}); a newer d2c-ray would do"
    wrong = _missing(found, _FORM, "") or (
        not all(isinstance(name, str) for name in found["class_names"]) and "'class_names' holds more than text"
    )
    online = found.get("in_training", []) if isinstance(found, dict) else []
    if not wrong and not (isinstance(online, list) and all(isinstance(name, str) for name in online)):
        wrong = f"'in_training' is {online!r}, a list of names would do"
    optional = {"text": _TEXT, "vae": _VAE}
    for name, form in optional.items():
        wrong = wrong or (found.get(name) is not None and _missing(found[name], form, f"{name}."))
    for name, entry in [] if wrong else found["vision"].items():
        wrong = wrong or _missing(entry, _VISION, f"vision.{name}.")
    for name, entry in [] if wrong else found["files"].items():
        wrong = wrong or _missing(entry, {"bytes": int, "sha256": str}, f"files.{name}.")
    return wrong or ""


def _missing(found: Any, form: dict[str, Any], prefix: str) -> str:
    if not isinstance(found, dict):
        return f"'{prefix.rstrip('.') or 'it'}' is {type(found).__name__}, an object would do"
    for name, kind in form.items():
        if name not in found:
            return f"'{prefix}{name}' is missing"
        if isinstance(kind, dict):
            wrong = _missing(found[name], kind, f"{prefix}{name}.")
            if wrong:
                return wrong
        elif not isinstance(found[name], (int, float) if kind is float else kind):
            return f"'{prefix}{name}' is {found[name]!r}, {kind.__name__} would do"
    return ""
