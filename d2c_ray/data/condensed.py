"""The condensed dataset, opened for training.

Parquet is what ships. Random rows of Parquet are slow, so opening it builds, once a node, an uncompressed copy that is
memory-mapped (`data.node_cache`); batches gather from it.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from d2c_ray.config import StorageConfig
from d2c_ray.data import storage, tables
from d2c_ray.data.node_cache import AGAIN, Kind, NodeCache, Part, kind_of, unreadable
from d2c_ray.errors import UserError
from d2c_ray.rundir import SUCCESS
from d2c_ray.training import online
from d2c_ray.training.batches import Gatherer, TrainingSet
from d2c_ray.training.online import Online

CLASSES = "classes.parquet"
PROVENANCE = "provenance.json"
FORMAT = 1  # of provenance.json
IMAGES = ("pixels", "latent_mean", "latent_std")
VISION, SCALE = "vision", "_scale"
_COLUMN = re.compile(r"pixels|latent_mean|latent_std|vision(_[a-z0-9_]+)?")
FOOTER_BYTES = 64 << 10  # read of a file's end at once; more than most footers
FOOTERS = 64  # at a time

NOTHING = Online()

Text = tuple[Tensor, Tensor]


def read_text(path: Path | pa.Buffer) -> Text | None:
    """Text states, classes x tokens x width float32, and mask, of a class table; None where it has no text."""
    # Without threads: one that lags holds memory of Python's, and ends the process if that is just ending too.
    table = tables.read(path) if isinstance(path, Path) else tables.opened(pa.BufferReader(path), CLASSES).read(use_threads=False)
    if "text_states" not in table.column_names:
        return None
    states = torch.from_numpy(np.array(tables.tensor_values(table, "text_states")).view(np.int16)).view(torch.bfloat16).float()
    return states, torch.from_numpy(np.array(tables.tensor_values(table, "text_mask"))).long()


@dataclass
class Condensed:
    """An opened condensed dataset; row i of every array belongs to the same image. Training on it takes no more than this:

        from d2c_ray import condensed
        data = condensed.open("runs/mine/condensed-1a2b3c4d")  # or s3://bucket/prefix
        for rows in torch.randperm(len(data)).split(128):
            batch = data.batch(rows, flipped=torch.rand(len(rows)) < 0.5)
            loss = my_loss(batch["latent_mean"], data.text[0][batch["label"]], batch["vision"])
            loss.backward(), optimizer.step(), optimizer.zero_grad()

    Attributes:
        facts: what the dataset says of itself: `class_names`, `flip`, `latent`, `fingerprint` and more.
        provenance: how it was made, as its provenance.json says; empty where it has none.
        arrays: memory-mapped, by column: `sample_id` and `label` (int64, N; label -1 for none); `pixels` (uint8,
            N x H x W x C; without a VAE, and where something is encoded while training) and `latent_mean` and `latent_std` (float16, N x F x c x h x w, unscaled); `vision` and
            `vision_NAME` (int8, or uint16 that holds bf16 bits; N x F x L x V) with `..._scale` (float32, N x F x L) where int8.
            F is 2 where flips are on: the plain image, then its mirror image.
        text: states, classes x K x E float32, and mask, classes x K; None where the dataset has no text.
    """

    facts: dict[str, Any]
    provenance: dict[str, Any]
    arrays: dict[str, np.ndarray]
    text: Text | None
    _gatherers: dict[str, Gatherer] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> np.ndarray:
        """int64, N; -1 for none."""
        return self.arrays["label"]

    @property
    def class_names(self) -> list[str]:
        """Line i for label i; empty where the dataset has no labels."""
        return self.facts["class_names"]

    def batch(
        self, rows: Tensor | np.ndarray | Sequence[int], flipped: Tensor | np.ndarray | Sequence[bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:  # fmt: skip
        """The images `rows`, each as its mirror image where `flipped`. For one thread at a time.

        Args:
            rows: B integers in 0..N-1, in any order.
            flipped: B booleans; None: no image is mirrored.

        Returns:
            By column, on `device`, and the caller's own: `sample_id` and `label` (int64, B); `pixels` (uint8, B x H x W x C)
            and `latent_mean` and `latent_std` (float32, B x c x h x w, unscaled), as far as they are stored; every vision column (float32, B x L x V).

        Raises:
            IndexError: a row that is not there.
            UserError: mirror images are asked of a dataset that was made without.
        """
        rows = np.asarray(rows, np.int64)
        mirrored = np.zeros(len(rows), bool) if flipped is None else np.asarray(flipped, bool)
        if rows.ndim != 1 or mirrored.shape != rows.shape:
            raise ValueError(f"rows and flipped are one number an image, got {rows.shape} and {mirrored.shape}")
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        if mirrored.any() and not self.facts["flip"]:
            raise UserError("this dataset holds no mirror images (data.flip=false); leave out flipped.")
        gatherer = self._gatherers.setdefault(str(device), Gatherer(torch.device(device)))
        found: dict[str, Tensor] = {}
        for name, array in self.arrays.items():
            if name in ("sample_id", "label", "pixels"):
                found[name] = gatherer.take(name, array, rows, None, None)
            elif not _is_scale(name):
                found[name] = gatherer.take(name, array, rows, mirrored)
        if "pixels" in found and mirrored.any():
            chosen = torch.from_numpy(mirrored).to(device)
            found["pixels"] = torch.where(chosen[:, None, None, None], found["pixels"].flip(2), found["pixels"])
        for name in filter(_is_scale, self.arrays):
            found[name.removesuffix(SCALE)] *= gatherer.take(name, self.arrays[name], rows, mirrored)[..., None]
        return found

    def training_set(
        self, align_with: str | None = "", encoders: Online = NOTHING, device: torch.device | str = "cpu"
    ) -> TrainingSet:  # fmt: skip
        """The arrays as the training loop takes them, with the encoders of what they do not hold.

        Args:
            align_with: whose vision tokens: empty, the main encoder's, if there are any; a name of attach.also; None: no tokens.
            encoders: what is encoded while training, as `training.online.of` says. device: where they run, that of training.

        Raises:
            UserError: there are no such tokens, or encoders are missing or differ from those planned with.
        """
        latent, missing = self.facts["latent"], self.facts.get("in_training", [])
        if online.LATENT in missing and encoders.vae is None:
            raise UserError(
                "the condensed dataset holds no latents: its pixels are encoded while training, which takes the VAE (vae.path)."
            )
        column = None
        if align_with is not None and online.column(align_with) not in missing:
            column = vision_column(align_with, self.arrays)
        elif align_with is not None and encoders.vision is None:
            raise UserError(
                f"the condensed dataset holds no tokens '{online.column(align_with)}': they are encoded while training, which takes the vision encoder."
            )
        vae, encoder = encoders.load(torch.device(device))
        return TrainingSet(
            labels=np.maximum(self.labels, 0),
            num_classes=max(1, len(self.class_names)),
            flip=self.facts["flip"],
            pixels=self.arrays.get("pixels"),
            latent_mean=self.arrays.get("latent_mean"),
            latent_std=self.arrays.get("latent_std"),
            latent_scale=latent.get("scale", 1.0),
            latent_shift=latent.get("shift", 0.0),
            vision=self.arrays[column] if column else None,
            vision_scale=self.arrays.get(column + SCALE) if column else None,
            text_states=self.text[0] if self.text else None,
            text_mask=self.text[1] if self.text else None,
            vae=vae,
            vision_encoder=encoder,
            grid=encoders.grid,
        )


def open(
    path: str | Path, cache_dir: str | Path | None = None, columns: Sequence[str] | None = None, storage: StorageConfig | None = None
) -> Condensed:
    """Opens a finished condensed dataset for random access.

    The first opening on a node copies the dataset, uncompressed, to `cache_dir`, and checks every part on the way: bytes
    and sha256 where the dataset has a provenance.json, rows, dtypes and shapes. Later ones, in any process, map the copy.
    An opening that was killed is gone on with by the next one.

    Args:
        path: a `condensed-<hash>` folder, local or s3://bucket/prefix.
        cache_dir: where the node's copies lie; empty: a folder of this user's in the system's temporary folder.
        columns: tensors to open; None: all. A vision column brings its scale; `sample_id` and `label` are always there.
        storage: how s3:// is reached.

    Raises:
        UserError: the dataset is not whole, a part is damaged or differs from the others, or the disk has no room.
    """
    source = _Source.read(path, storage or StorageConfig())
    arrays = source.cache(cache_dir).open(source.kinds(columns))
    return Condensed(source.facts, source.provenance, arrays, source.text())


def drop_cache(path: str | Path, cache_dir: str | Path | None = None, storage: StorageConfig | None = None) -> None:
    """Removes this node's copy of the dataset at `path`. Processes that have it open keep reading it."""
    _Source.read(path, storage or StorageConfig()).cache(cache_dir).drop()


def vision_width(path: str | Path, align_with: str = "") -> int:
    """Width of the stored vision tokens that `align_with` chooses (as in `Condensed.training_set`), 0 where the dataset has none."""
    options, folder = StorageConfig(), os.path.expanduser(path)
    for name, _ in _listed(folder, options):
        with storage.open_file(storage.join(folder, name), options) as file:
            found = tables.opened(file, name)
            if found.metadata.num_rows:
                column = vision_column(align_with, found.schema_arrow.names)
                return kind_of(found.schema_arrow, column, name).shape[-1] if column else 0
    return 0


def training_columns(facts: dict[str, Any], align_with: str | None) -> list[str]:
    """What `Condensed.training_set(align_with)` needs of a dataset that says `facts` of itself; `align_with` is known to be there."""
    missing = facts.get("in_training", [])
    images = ["pixels"] if facts["latent"]["kind"] == "pixels" or online.LATENT in missing else ["latent_mean", "latent_std"]
    if align_with is None:
        return images
    column = online.column(align_with)
    return list(dict.fromkeys([*images, "pixels" if column in missing else column]))


def vision_column(align_with: str, columns: Sequence[str] | dict[str, Any]) -> str | None:
    """The column of the tokens that `train.align_with` chooses among `columns`; None where there are none and none are named.

    Raises:
        UserError: the ones named are not there, or only others are.
    """
    known = [name for name in columns if _is_vision(name) and not _is_scale(name)]
    wanted = f"{VISION}_{align_with}" if align_with else VISION
    if wanted in known:
        return wanted
    if not known and not align_with:
        return None
    ways = [f"train.align_with={name.removeprefix(VISION).removeprefix('_') or repr('')}" for name in known]
    raise UserError(
        f"train.align_with={align_with!r}: the condensed dataset has no vision tokens of that encoder. "
        + (f"It has those of {', '.join(ways)}." if ways else "It has none at all; train.align_weight=0 trains without.")
    )


@dataclass(frozen=True)
class _Source:
    """A finished dataset as it lies on its storage."""

    path: str
    options: StorageConfig
    facts: dict[str, Any]
    provenance: dict[str, Any]
    parts: list[Part]

    @classmethod
    def read(cls, path: str | Path, options: StorageConfig) -> "_Source":
        path = os.path.expanduser(path)
        storage.check(path)
        success = _json(path, SUCCESS, options)
        if success is None:
            raise UserError(f"'{path}' is no finished condensed dataset: it has no {SUCCESS}.")
        facts: dict[str, Any] = success["facts"] if isinstance(success.get("facts"), dict) else {}
        for name, kind in {"class_names": list, "flip": bool, "latent": dict, "fingerprint": str}.items():
            if not isinstance(facts.get(name), kind):
                raise UserError(f"'{storage.join(path, SUCCESS)}' does not say {name} of a condensed dataset. {AGAIN}")
        provenance = _json(path, PROVENANCE, options)
        if provenance is not None and provenance.get("format") != FORMAT:
            raise UserError(
                f"'{path}/{PROVENANCE}' is of format {provenance.get('format')!r}; this version reads {FORMAT}. A newer one may read it."
            )
        if provenance is not None:
            _check_files(storage.join(path, PROVENANCE), provenance.get("files"))
        found = _listed(path, options)
        parts = _inventoried(path, found, provenance["files"]) if provenance else _counted(path, found, options)
        if not sum(part.rows for part in parts):
            raise UserError(f"'{path}' holds no images.")
        return cls(path, options, facts, provenance or {}, parts)

    def kinds(self, columns: Sequence[str] | None) -> dict[str, Kind]:
        """The kinds of the columns to open, of the first part that has rows."""
        uri = next(part.uri for part in self.parts if part.rows)
        with storage.open_file(uri, self.options) as file:
            try:
                fields = tables.opened(file, uri).schema_arrow
            except (pa.ArrowException, OSError) as error:
                raise unreadable(uri, error) from None
        tensors = [name for name in fields.names if name in IMAGES or _is_vision(name)]
        foreign = [name for name in tensors if not _COLUMN.fullmatch(name)]
        if foreign:  # a column's name becomes a file's
            raise UserError(
                f"'{uri}' has a column {foreign[0]!r}, which is no name of vision tokens: vision, or vision_ and small letters, digits and _."
            )
        known = [name for name in tensors if not _is_scale(name)]
        unknown = [name for name in columns or () if name not in known]
        if unknown:
            raise UserError(f"'{self.path}' has no column '{unknown[0]}' to open; it has {', '.join(known)}.")
        wanted = [name for name in tensors if columns is None or name in columns or name.removesuffix(SCALE) in columns]
        kinds = {name: kind_of(fields, name, uri) for name in ("sample_id", "label", *wanted)}
        sides = 2 if self.facts["flip"] else 1
        for name in wanted:
            if name != "pixels" and kinds[name].shape[:1] != (sides,):
                raise UserError(
                    f"'{uri}': column '{name}' is of shape {list(kinds[name].shape)}, and the dataset says flip={self.facts['flip']}, which "
                    f"makes {sides} the first number: the image, and its mirror image where flips are on. {AGAIN}"
                )
        return kinds

    def cache(self, cache_dir: str | Path | None) -> NodeCache:
        # A temporary folder is everyone's: what lies there under a known name is used only where it is this user's alone.
        root = Path(cache_dir).expanduser() if cache_dir else Path(tempfile.gettempdir()) / f"d2c_ray-condensed-{os.getuid()}"
        return NodeCache(root, self.path, self.facts["fingerprint"], self.parts, self.options, private=not cache_dir)

    def text(self) -> Text | None:
        """The text of the class table, if there is one."""
        uri, listed = storage.join(self.path, CLASSES), self.provenance.get("files", {}).get(CLASSES)
        try:
            content = storage.read_all(uri, self.options)
        except FileNotFoundError:
            if listed:
                raise UserError(f"'{self.path}' is not whole: {CLASSES}, which {PROVENANCE} lists, is missing. {AGAIN}") from None
            return None
        if listed and hashlib.sha256(content).hexdigest() != listed["sha256"]:
            raise UserError(f"'{uri}' is damaged: its sha256 is not the one that {PROVENANCE} says. {AGAIN}")
        return read_text(pa.py_buffer(content))


def _is_vision(name: str) -> bool:
    return name == VISION or name.startswith(f"{VISION}_")


def _is_scale(name: str) -> bool:
    return _is_vision(name) and name.endswith(SCALE)


def _json(path: str, name: str, options: StorageConfig) -> dict[str, Any] | None:
    try:
        found = json.loads(storage.read_all(storage.join(path, name), options))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"'{storage.join(path, name)}' is no JSON: {error}. {AGAIN}") from None
    if not isinstance(found, dict):
        raise UserError(f"'{storage.join(path, name)}' is a JSON {type(found).__name__}, an object would do. {AGAIN}")
    return found


def _check_files(uri: str, files: Any) -> None:
    """Refuses a list of files that does not say what opening reads of it."""
    if not isinstance(files, dict):
        raise UserError(f"'{uri}' lists no files: {files!r}. {AGAIN}")
    for name, entry in files.items():
        wanted = {"bytes": int, "sha256": str, **({"rows": int} if name.startswith("part-") else {})}
        for key, kind in wanted.items():
            if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
                raise UserError(f"'{uri}' does not say {key} of {name} ({entry!r}). {AGAIN}")


def _listed(path: str, options: StorageConfig) -> list[tuple[str, int]]:
    """Names and bytes of the parts that lie there, in order."""
    found = ((entry.name, entry.size) for entry in storage.walk(path, options))
    return sorted(item for item in found if "/" not in item[0] and item[0].startswith("part-") and item[0].endswith(".parquet"))


def _inventoried(path: str, found: list[tuple[str, int]], files: dict[str, dict[str, Any]]) -> list[Part]:
    """The parts of a dataset that lists its files."""
    listed, there = sorted(name for name in files if name.startswith("part-")), dict(found)
    for names, what in (
        ([name for name in listed if name not in there], f"missing, though {PROVENANCE} lists it"),
        ([name for name in there if name not in files], f"there, though {PROVENANCE} does not list it"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"'{path}' is not as it was made: {names[0]}{more} is {what}. {AGAIN}")
    for name in listed:
        if there[name] != files[name]["bytes"]:
            raise UserError(
                f"'{storage.join(path, name)}' is damaged: it has {there[name]} bytes, {PROVENANCE} says {files[name]['bytes']}. {AGAIN}"
            )
    return [Part(name, storage.join(path, name), there[name], files[name]["rows"], files[name]["sha256"], True) for name in listed]


def _counted(path: str, found: list[tuple[str, int]], options: StorageConfig) -> list[Part]:
    """The parts of a dataset that lists no files: rows and a digest of each from its footer, which holds sizes and statistics."""
    parts = []
    for first in range(0, len(found), FOOTERS):
        some = found[first : first + FOOTERS]
        ranges = [(storage.join(path, name), max(0, size - FOOTER_BYTES), FOOTER_BYTES) for name, size in some]
        for (name, size), (uri, _, _), end in zip(some, ranges, storage.read_ranges(ranges, options), strict=True):
            if isinstance(end, OSError):
                raise UserError(f"'{uri}' cannot be read: {end.strerror or end}.")
            length = int.from_bytes(end[-8:-4], "little") + 8
            if len(end) < length <= size:
                end = storage.read(uri, size - length, length, options)
            try:
                rows = pq.read_metadata(pa.BufferReader(end)).num_rows
            except (pa.ArrowException, OSError) as error:
                raise unreadable(uri, error) from None
            parts.append(Part(name, uri, size, rows, hashlib.sha256(end[-length:]).hexdigest(), False))
    return parts
