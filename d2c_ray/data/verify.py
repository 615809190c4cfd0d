"""Whether a condensed dataset is what its provenance says: files, tables, images, flips, and that the encoders give it again.

Everything is named by file, column and row. Nothing is downloaded: what needs an encoder that is not at hand is noted
as not checked.

N rows, F sides (the image, and its mirror image where flips are on), L tokens, V their width, g side of the token grid.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2c_ray import schema
from d2c_ray.config import DataConfig, TextConfig
from d2c_ray.data import at_hand, attached, provenance, tables
from d2c_ray.data.decode import Undecodable, decode
from d2c_ray.errors import UserError
from d2c_ray.models.text import prompt
from d2c_ray.rundir import SUCCESS
from d2c_ray.wording import first_line

CLASSES = "classes.parquet"
COSINE = 0.99  # of a stored token to its new encoding, at least: other hardware and library versions stay above
SIZE = 0.1  # by which its length may differ
LATENT_ERROR = 0.05  # of stored latents to new ones, relative
OTHER_DECODER = 3  # grey levels by which another build of the JPEG library may differ
_BATCH_ROWS, _BATCH_BYTES = 256, 64 << 20  # at a time, at most: checks make several arrays as large
_LATENTS = ("latent_mean", "latent_std")
_FLIP_ROWS = 32  # as float32 at a time
_JUDGED_ROWS = 32  # from which on flips are judged without an encoder: fewer vary too much
_HELD_ROWS, _HELD_BYTES = 64, 128 << 20  # encoded at a time


@dataclass
class Findings:
    """What is wrong, what could not be checked, and how much was."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    rows: int = 0
    decoded: int = 0
    encoded: int = 0
    encoders: list[str] = field(default_factory=list)

    def fault(self, where: str, what: str) -> None:
        self.faults.append(f"{where}: {what}")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def rows_wrong(self, part: str, column: str, wrong: np.ndarray, start: int, keys: list[str], what: str) -> None:
        """One line for all rows of a column that are wrong in one way, the first of them by name."""
        if wrong.any():
            first = int(wrong.argmax())
            count = int(wrong.sum())
            which = f"row {start + first} (key '{keys[first]}')"
            more = f", and {count - 1} more" if count > 1 else ""
            self.fault(part, f"column '{column}': {which}{more}: {what}")

    def summary(self) -> str:
        """What was checked, in a line."""
        encoded = f", {self.encoded:,} encoded anew with {', '.join(self.encoders)}" if self.encoded else ""
        return f"{self.rows:,} rows in {self.files:,} files, {self.decoded:,} images decoded{encoded}"


def verify(folder: str | Path, images: int = 32, say: Callable[[str], None] = print) -> list[str]:
    """What is wrong with a condensed dataset, a line each; empty: all right. Says what could not be checked.

    Args:
        images: rows, spread evenly, whose image is decoded and encoded anew; 0: all.

    Raises:
        UserError: no such folder.
    """
    found = check(folder, images)
    for note in found.notes:
        say(note)
    return found.faults


def check(folder: str | Path, images: int = 32) -> Findings:
    """As `verify`, with the notes and counts."""
    found = Findings()
    try:
        stated = provenance.read(folder)
    except UserError as error:
        if not Path(folder).is_dir():
            raise
        found.faults.append(str(error))
        return found
    folder = Path(folder)
    for name in provenance.in_training(stated):
        what = f"the latents (VAE encoder {stated['latent'].get('encoder')})" if name == "latent" else f"the vision tokens '{name}'"
        found.note(f"{what} are not stored: they are encoded while training, from the pixels, which were checked")
    _record(folder, stated, found)
    _inventory(folder, stated, found)
    _classes(folder, stated, found, images)
    _selection(folder, stated, _parts(folder, stated, found, images), found)
    return found


def _record(folder: Path, stated: dict[str, Any], found: Findings) -> None:
    """_SUCCESS.json says the same as the provenance."""
    path = folder / SUCCESS
    try:
        success = json.loads(path.read_bytes())
        facts = success["facts"]
        pairs = {"fingerprint": success["fingerprint"], "rows": success["rows_done"]}
        pairs |= {name: facts[name] for name in ("class_names", "flip", "latent")}
    except FileNotFoundError:
        found.fault(SUCCESS, "is missing: the dataset is not finished")
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.fault(SUCCESS, f"cannot be read ({error!r})")
    else:
        for name, value in pairs.items():
            if value != stated[name]:
                found.fault(SUCCESS, f"says {name} {_short(value)}, {provenance.NAME} {_short(stated[name])}")


def _inventory(folder: Path, stated: dict[str, Any], found: Findings) -> None:
    """The files that ship are those that the provenance lists, byte by byte."""
    there, listed = provenance.inventory(folder), stated["files"]
    found.files = len(there)
    for name in sorted(listed.keys() - there.keys()):
        found.fault(name, "is missing")
    for name in sorted(there.keys() - listed.keys()):
        found.fault(name, f"is not in the inventory of {provenance.NAME}")
    for name in sorted(there.keys() & listed.keys()):
        for what in ("bytes", "sha256", "rows"):
            if there[name][what] != listed[name].get(what):
                found.fault(name, f"{what} is {there[name][what]}, the inventory says {listed[name].get(what)}")
                break


def _classes(folder: Path, stated: dict[str, Any], found: Findings, images: int) -> None:
    """classes.parquet: one row a class, with the text that the provenance says."""
    names, text, path, before = stated["class_names"], stated.get("text"), folder / CLASSES, len(found.faults)
    wanted: dict[str, Any] = {"label": pa.int32(), "name": pa.string(), "prompt": pa.string()}
    if text:
        wanted |= {"text_states": ("uint16", [text["tokens"], text["width"]]), "text_mask": ("int8", [text["tokens"]])}
    table = _whole_table(path, wanted, found)
    if table is None:
        return
    if table.column("label").to_pylist() != list(range(len(names))):
        found.fault(CLASSES, f"column 'label': {len(table)} rows, which are not 0 to {len(names) - 1}, one a class")
        return
    for label, (name, stored) in enumerate(zip(names, table.column("name").to_pylist(), strict=True)):
        if name != stored:
            found.fault(CLASSES, f"column 'name': row {label} is {stored!r}, {provenance.NAME} says {name!r}")
            return
    wrong = np.asarray(
        [stored != _prompt(text, name) for stored, name in zip(table.column("prompt").to_pylist(), names, strict=True)], bool
    )
    made = (
        f"is not the template {text.get('template', TextConfig.template)!r}, filled in" if text else "is not empty, where there is no text"
    )
    found.rows_wrong(CLASSES, "prompt", wrong, 0, names, made)
    if not text or not len(table):
        return
    states, mask = _bf16(tables.tensor_values(table, "text_states")), tables.tensor_values(table, "text_mask")
    found.rows_wrong(CLASSES, "text_mask", ((mask != 0) & (mask != 1)).any(1), 0, names, "values other than 0 and 1")
    found.rows_wrong(CLASSES, "text_mask", (mask > 0).sum(1) == 0, 0, names, "no token is left")
    found.rows_wrong(CLASSES, "text_states", ~np.isfinite(states).all((1, 2)), 0, names, "values that are not finite")
    if len(found.faults) > before:
        return
    some = _evenly(len(table), images)
    prompts = [table.column("prompt")[int(row)].as_py() for row in some]
    fresh = _at_hand(lambda: at_hand.text(text, prompts), f"the text states ({text['encoder']})", found)
    if fresh is not None:
        weights, (new_states, new_mask) = fresh
        if weights != text["weights"]:
            found.note(_other_weights("text_states", text, weights))
        elif new_states.shape[1:] != states.shape[1:]:
            found.fault(CLASSES, f"column 'text_states': {text['encoder']} gives {new_states.shape[1:]}, stored are {states.shape[1:]}")
        else:
            seen = mask[some] > 0
            cosine = np.where(seen, _cosine(states[some], new_states), 1.0).min(1)
            low, cut = np.zeros((2, len(table)), bool)
            low[some], cut[some] = cosine < COSINE, (seen != (new_mask > 0)).any(1)
            found.rows_wrong(CLASSES, "text_mask", cut, 0, names, f"is not that of the prompt, read by {text['encoder']}")
            apart = f"states are not what {text['encoder']} makes of the prompt (cosine {cosine.min():.3f})"
            found.rows_wrong(CLASSES, "text_states", low, 0, names, apart)
            found.encoders.append(text["encoder"])


def _prompt(text: dict[str, Any] | None, name: str) -> str | None:
    """A class's prompt; None where the template that is stated cannot be filled in."""
    try:
        return prompt(text.get("template", TextConfig.template), name) if text else ""
    except (LookupError, ValueError, AttributeError, TypeError):
        return None


def _parts(folder: Path, stated: dict[str, Any], found: Findings, images: int) -> pa.Table:
    """Checks the parts and gives sample_id, key and label of all their rows."""
    paths = sorted(folder.glob("part-*.parquet"))
    kept = [pa.table({"sample_id": pa.array([], pa.int64()), "key": pa.array([], pa.string()), "label": pa.array([], pa.int64())})]
    total = sum(provenance.rows_of(path) or 0 for path in paths)
    if not paths:
        found.fault(str(folder), "holds no part-*.parquet")
    if total != stated["rows"]:
        found.fault("part-*.parquet", f"{total} rows in all, {provenance.NAME} says {stated['rows']}")
    sample = _Sample(stated, found, set(_evenly(total, images).tolist()))
    flips = _Flips(stated, found)
    start = 0
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                readable = _fields(path.name, file.schema_arrow, stated, found)
                flips.part(path.name)
                within = 0
                for batch in file.iter_batches(_batch_rows(file), columns=readable):
                    batch.validate(full=True)
                    table = _without_nulls(path.name, pa.Table.from_batches([batch], batch.schema), within, found)
                    _values(path.name, table, within, stated, found)
                    flips.add(table, within)
                    sample.add(path.name, table, start + within, within)
                    if {"sample_id", "key", "label"} <= set(table.column_names):
                        kept.append(table.select(["sample_id", "key", "label"]).replace_schema_metadata())
                    within += len(batch)
                start += within
        except provenance.UNREADABLE as error:
            found.fault(path.name, f"cannot be read ({first_line(error)})")
            start += provenance.rows_of(path) or 0
    flips.part("")
    flips.judge_all()
    sample.encode()
    sample.say()
    found.rows = start
    rows = pa.concat_tables(kept)
    _order(rows, found)
    return rows


def _batch_rows(file: pq.ParquetFile) -> int:
    """Rows of a part that are about `_BATCH_BYTES` once decoded."""
    tensors = sum(field.type.byte_width for field in file.schema_arrow if pa.types.is_fixed_size_binary(field.type))
    stored = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
    row = max(1, tensors, stored // max(1, file.metadata.num_rows))  # images count in the second alone
    return tables.rows_at_once(file, file.schema_arrow.names, max(1, min(_BATCH_ROWS, _BATCH_BYTES // row)))


def _columns(stated: dict[str, Any]) -> dict[str, Any]:
    """The columns of a part: an Arrow type, or the dtype and shape of a row of a tensor."""
    sides, size, channels = 1 + stated["flip"], stated["data"]["image_size"], stated["data"]["channels"]
    wanted: dict[str, Any] = {"sample_id": pa.int64(), "key": pa.string(), "label": pa.int64(), "image": attached.IMAGE}
    latent, online = stated["latent"], provenance.in_training(stated)
    if latent["kind"] == "pixels" or online:
        wanted["pixels"] = ("uint8", [size, size, channels])
    if latent["kind"] != "pixels" and "latent" not in online:
        shape = [sides, latent["channels"], latent["side"], latent["side"]]
        wanted |= {"latent_mean": ("float16", shape), "latent_std": ("float16", shape)}
    for name, vision in stated["vision"].items():
        shape = [sides, stated["grid"] ** 2]
        wanted[name] = ("int8" if vision["storage"] == "int8" else "uint16", [*shape, vision["width"]])
        if vision["storage"] == "int8":
            wanted[f"{name}_scale"] = ("float32", shape)
    return wanted


def _fields(where: str, fields: pa.Schema, stated: dict[str, Any], found: Findings) -> list[str]:
    """The columns of a part that are as the provenance says; the others are faults."""
    readable = _matching(where, fields, _columns(stated), found)
    hub = json.loads(provenance.hub_features(fields, stated["class_names"]))["info"]["features"]
    stored = (fields.metadata or {}).get(provenance.HUB)
    try:
        features = json.loads(stored)["info"]["features"] if stored else {}
        for name in sorted(hub):
            if features.get(name) != hub[name]:
                found.fault(
                    where,
                    f"schema metadata '{provenance.HUB.decode()}' says {_short(features.get(name))} of '{name}', not {_short(hub[name])}",
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found.fault(where, f"schema metadata '{provenance.HUB.decode()}' cannot be read ({error!r})")
    return readable


def _matching(where: str, fields: pa.Schema, wanted: dict[str, Any], found: Findings) -> list[str]:
    """Names of the wanted columns that are there in the wanted type and shape; the others are faults."""
    for name in fields.names:
        if name not in wanted:
            found.fault(where, f"column '{name}' is not one that {provenance.NAME} describes")
    matching = []
    for name, kind in wanted.items():
        if fields.names.count(name) != 1:
            found.fault(where, f"column '{name}' is {'there twice' if name in fields.names else 'missing'}")
            continue
        stored = fields.field(name)
        foreign = tables.extension(stored)
        if foreign is not None:
            found.fault(where, f"column '{name}' is of the extension type '{foreign}', to which code may belong")
            continue
        if not isinstance(kind, tuple):
            if stored.type == kind:
                matching.append(name)
            else:
                found.fault(where, f"column '{name}' is {stored.type}, {kind} would do")
            continue
        width = pa.binary(np.dtype(kind[0]).itemsize * int(np.prod(kind[1])))
        metadata = stored.metadata or {}
        try:
            said = (metadata[b"dtype"].decode(), json.loads(metadata[b"shape"]))
        except (KeyError, ValueError):
            found.fault(where, f"column '{name}' does not say its dtype and shape")
            continue
        if said != kind:
            found.fault(where, f"column '{name}' says {said[0]} of shape {said[1]}, {provenance.NAME} {kind[0]} of {kind[1]}")
        elif stored.type != width:
            found.fault(where, f"column '{name}' is {stored.type}, its shape takes {width}")
        else:
            matching.append(name)
    return matching


def _without_nulls(where: str, table: pa.Table, start: int, found: Findings) -> pa.Table:
    """The columns of a batch without nulls; the others are faults. The path of an image may be null."""
    full = []
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        empty = pc.is_null(column)
        if name == "image":
            empty = pc.or_(empty, pc.is_null(pc.struct_field(column, "bytes")))
        if pc.any(empty).as_py():
            row = pc.index(empty, True).as_py()
            found.fault(where, f"column '{name}': row {start + row} is null, of {pc.sum(empty).as_py()} in {len(table)} rows")
        else:
            full.append(name)
    return table.select(full)


def _values(where: str, table: pa.Table, start: int, stated: dict[str, Any], found: Findings) -> None:
    """Numbers that can be nothing else than wrong, without looking at the images."""
    names = table.column_names
    keys = table.column("key").to_pylist() if "key" in names else [""] * len(table)

    def wrong(column: str, rows: Any, what: str) -> None:
        found.rows_wrong(where, column, rows.reshape(len(table), -1).any(1), start, keys, what)

    if "label" in names:
        labels, classes = table.column("label").to_numpy(), len(stated["class_names"])
        allowed = f"0 to {classes - 1}" if classes else "-1, as there are no classes"
        wrong("label", (labels < 0) | (labels >= classes) if classes else labels != -1, f"a label that is not {allowed}")
    for column in ("latent_mean", "latent_std"):
        if column in names:
            values = tables.tensor_values(table, column)
            wrong(column, ~np.isfinite(values), "values that are not finite")
            if column == "latent_std":
                wrong(column, values <= 0, "a standard deviation that is not above 0")
    for column in stated["vision"]:
        if f"{column}_scale" in names:
            scale = tables.tensor_values(table, f"{column}_scale")
            wrong(f"{column}_scale", ~np.isfinite(scale) | (scale < 0), "a scale that is not finite or below 0")
        if column in names:
            tokens = tables.tensor_values(table, column)
            if tokens.dtype == np.int8:
                wrong(column, tokens == -128, "-128, where int8 goes from -127 to 127")
            else:
                wrong(column, (tokens & 0x7F80) == 0x7F80, "values that are not finite")  # the exponent of bf16, all ones
            wrong(column, ~tokens.reshape(len(table), -1).any(1), "no token but zeros")


class _Flips:
    """Whether the second side looks like the mirror image of the first, over the rows of a part and of all.

    No encoder is needed: tokens and latents lie where the image shows what they stand for, so mirroring the first
    side's must bring them nearer to the second's. What is the same in all images (positions, borders) is left out:
    sum |d - mean d|^2 = sum |d|^2 - |sum d|^2 / N of the differences d.
    """

    def __init__(self, stated: dict[str, Any], found: Findings):
        self.stated, self.where, self.found = stated, "", found
        self.spreads: dict[str, tuple[_Spread, _Spread]] = {}  # of a part, by column: the sides as they are, and one mirrored
        self.all: dict[str, tuple[_Spread, _Spread]] = {}

    def part(self, where: str) -> None:
        """Judges the part before, where it has rows enough, and starts one."""
        for column, pair in self.spreads.items():
            both = self.all.setdefault(column, (_Spread(), _Spread()))
            for whole, some in zip(both, pair, strict=True):
                whole.join(some)
            if pair[0].rows >= _JUDGED_ROWS:
                self._judge(self.where, column, pair)
        self.where, self.spreads = where, {}

    def add(self, table: pa.Table, start: int) -> None:
        if not self.stated["flip"]:
            return
        grid = self.stated["grid"]
        for column in (*_LATENTS, *self.stated["vision"]):
            needed = [column, f"{column}_scale"] if f"{column}_scale" in _columns(self.stated) else [column]
            if not set(needed) <= set(table.column_names):
                continue
            if grid == 1 and column not in _LATENTS:
                self.found.note(f"column '{column}': a grid of one token has no left and right, so its flips were not looked at")
                continue
            same = []
            for first in range(0, len(table), _FLIP_ROWS):
                some = table.slice(first, _FLIP_ROWS)
                values = _floats(some, column)  # N x 2 x ...
                if column not in _LATENTS:
                    values = values.reshape(len(some), 2, grid, grid, -1).transpose(0, 1, 4, 2, 3)
                apart, turned = values[:, 0] - values[:, 1], values[:, 0, ..., ::-1] - values[:, 1]
                plain, mirrored = self.spreads.setdefault(column, (_Spread(), _Spread()))
                plain.add(apart)
                mirrored.add(turned)
                apart, turned = (differences.reshape(len(some), -1).any(1) for differences in (apart, turned))
                # A deviation may be the same all over, and so its own mirror image though the image is not.
                same += (~apart & turned if column == "latent_std" else ~apart).tolist()
            self._not_their_own_mirror(table, column, np.asarray(same), start)

    def _not_their_own_mirror(self, table: pa.Table, column: str, same: np.ndarray, start: int) -> None:
        """Names rows of two equal sides, except for images that are their own mirror image."""
        data = self.stated["data"]
        if not {"image", "key"} <= set(table.column_names):
            return
        for row in np.flatnonzero(same).tolist():
            try:
                pixels = _decode(table.column("image")[row].as_py()["bytes"], data)
            except Undecodable:
                continue  # named where it is decoded
            same[row] = not np.array_equal(pixels, pixels[:, ::-1])
        what = "both sides are the same, the mirrored image was not encoded"
        self.found.rows_wrong(self.where, column, same, start, table.column("key").to_pylist(), what)

    def judge_all(self) -> None:
        for column, pair in self.all.items():
            if pair[0].rows < _JUDGED_ROWS:
                self.found.note(f"'{column}': {pair[0].rows} images are too few to see by themselves whether their flips are right")
            else:
                self._judge("part-*.parquet", column, pair)

    def _judge(self, where: str, column: str, pair: tuple["_Spread", "_Spread"]) -> None:
        plain, mirrored = pair[0].total(), pair[1].total()
        # Deviations may be little more than the rounding of fp16, which has no mirror image: then both are about alike.
        if 0 < plain <= mirrored * (0.9 if column == "latent_std" else 1.0):  # sides that are equal have been named row by row
            self.found.fault(where, f"column '{column}': the second side does not look like the mirror image of the first")


@dataclass
class _Spread:
    """Squared differences about their mean, summed over rows as they come."""

    rows: int = 0
    squares: float = 0.0
    sums: Any = 0.0

    def add(self, differences: np.ndarray) -> None:
        self.rows += len(differences)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite has been named
            self.squares += float((differences**2).sum(dtype=np.float64))
            self.sums = self.sums + differences.sum(0, dtype=np.float64)

    def join(self, other: "_Spread") -> None:
        self.rows, self.squares, self.sums = self.rows + other.rows, self.squares + other.squares, self.sums + other.sums

    def total(self) -> float:
        return self.squares - float((self.sums**2).sum()) / self.rows


class _Sample:
    """Rows whose image is decoded, and encoded anew where the encoders are at hand."""

    def __init__(self, stated: dict[str, Any], found: Findings, rows: set[int]):
        self.stated, self.found, self.rows = stated, found, rows
        self.held: list[tuple[str, int, str, np.ndarray, pa.Table]] = []  # part, row in it, key, pixels, the row
        self.encoders: dict[str, tuple[str, Callable[[np.ndarray], Any]] | None] = {}  # by column: weights, and what encodes
        self.foreign: dict[str, bool] = {}  # columns of other weights than those at hand: whether these give them all the same

    def add(self, where: str, table: pa.Table, first: int, start: int) -> None:
        """Takes the wanted rows of a batch, whose first is row `first` of all and `start` of its part."""
        data = self.stated["data"]
        exact = self.stated["versions"].get("pillow") == _pillow()
        for row in [row for row in range(len(table)) if first + row in self.rows]:
            if not {"image", "key"} <= set(table.column_names):
                continue
            key = table.column("key")[row].as_py()
            at = f"row {start + row} (key '{key}')"
            try:
                pixels = _decode(table.column("image")[row].as_py()["bytes"], data)
            except Undecodable as error:
                self.found.fault(where, f"column 'image': {at}: {error}")
                continue
            self.found.decoded += 1
            if "pixels" in table.column_names:
                stored = tables.tensor_values(table.slice(row, 1), "pixels")[0]
                apart = int(np.abs(stored.astype(int) - pixels).max())
                if apart > (0 if exact else OTHER_DECODER):
                    self.found.fault(where, f"column 'pixels': {at}: not the pixels of its image, {apart} grey levels apart")
                elif apart:
                    self.found.note(
                        f"pixels differ by up to {OTHER_DECODER} grey levels from those that this Pillow decodes; another version made them"
                    )
            alone = table.drop_columns(["image"]).take([row])  # copied: a slice would keep the whole batch in memory
            self.held.append((where, start + row, key, pixels, alone))
            if len(self.held) >= min(_HELD_ROWS, max(1, _HELD_BYTES // max(1, alone.nbytes))):
                self.encode()

    def encode(self) -> None:
        """Compares the rows held with new encodings of their pixels."""
        held, self.held = self.held, []
        for column in [*(["latent_mean"] if "latent_mean" in _columns(self.stated) else []), *self.stated["vision"]]:
            needed = {name for name in _columns(self.stated) if name in (column, f"{column}_scale", column.replace("mean", "std"))}
            rows = [row for row in held if needed <= set(row[4].column_names)]
            encoder = self._encoder(column) if rows else None
            if encoder is None:
                continue
            pixels = np.stack([row[3] for row in rows])
            sides = [pixels, pixels[:, :, ::-1]] if self.stated["flip"] else [pixels]
            fresh = [encoder[1](np.ascontiguousarray(side)) for side in sides]
            if column == "latent_mean":
                self._compare_latents(rows, fresh)
            else:
                self._compare_tokens(column, rows, np.stack(fresh, 1))
            self.found.encoded = max(self.found.encoded, self.found.decoded)

    def say(self) -> None:
        """What can be said only at the end: whether other weights than the stated ones give the tokens after all."""
        for column, alike in self.foreign.items():
            vision, weights = self.stated["vision"][column], (self.encoders[column] or ("",))[0]
            if alike:
                self.found.fault(
                    provenance.NAME,
                    f"vision.{column} says weights {vision['weights']}; the tokens are those of {vision['encoder']} with weights {weights}",
                )
            else:
                self.found.note(_other_weights(column, vision, weights))

    def _encoder(self, column: str) -> tuple[str, Callable[[np.ndarray], Any]] | None:
        if column not in self.encoders:
            stated = self.stated
            if column == "latent_mean":
                made = _at_hand(lambda: at_hand.vae(stated), "the latents", self.found)
                if made is not None and made[0] != stated["latent"].get("encoder"):
                    said = stated["latent"].get("encoder")
                    self.found.note(
                        f"the latents were not encoded anew: the VAE at hand has the encoder weights {made[0]}, they are of {said}"
                    )
                    made = None
                name = (stated.get("vae") or {}).get("path", "")
            else:
                vision = stated["vision"][column]
                name = vision["encoder"]
                made = _at_hand(lambda: at_hand.vision(vision, stated["grid"]), f"'{column}' and its flips ({name})", self.found)
                if made is not None and made[0] != vision["weights"]:
                    self.foreign[column] = True
            self.encoders[column] = made
            if made is not None and name not in self.found.encoders:
                self.found.encoders.append(name)
        return self.encoders[column]

    def _compare_tokens(self, column: str, rows: list[Any], fresh: np.ndarray) -> None:
        """N x F x L x V: as near as the storage allows, or as other hardware comes."""
        stored = np.concatenate([_floats(row[4], column) for row in rows])
        vision = self.stated["vision"][column]
        if fresh.shape != stored.shape:
            where = provenance.NAME
            return self.found.fault(
                where, f"vision.{column}: {vision['encoder']} gives tokens of {fresh.shape[2:]}, stored are {stored.shape[2:]}"
            )
        cosine = _cosine(stored, fresh)  # N x F x L
        length, new_length = np.linalg.norm(stored, axis=-1), np.linalg.norm(fresh, axis=-1)
        long = (np.abs(length - new_length) > SIZE * new_length + 1e-6).any((1, 2))
        low = cosine.min((1, 2)) < COSINE
        if column in self.foreign:
            self.foreign[column] &= not (low.any() or long.any())
            return None
        self._name(column, rows, low, lambda row: f"tokens {self._like(stored, fresh, row, rows)} (cosine {cosine[row].min():.3f})")
        self._name(column, rows, long & ~low, lambda row: "tokens of the right direction and another length: their scale is wrong")
        # Half a step of the rounding, and a little for the order in which a machine adds up.
        step = (
            np.concatenate([tables.tensor_values(row[4], f"{column}_scale") for row in rows])[..., None]
            if vision["storage"] == "int8"
            else None
        )
        bound = (step / 2 if step is not None else np.abs(fresh) / 256) + 1e-3 * np.abs(fresh).max(-1, keepdims=True)
        beyond = (np.abs(stored - fresh) > bound).any((1, 2, 3)) & ~low & ~long
        if beyond.any():
            self.found.note(
                f"column '{column}': {int(beyond.sum())} of {len(rows)} images differ from their new encoding by more than rounding, at a cosine of "
                f"{cosine[beyond].min():.4f} or more: as other hardware or library versions do"
            )
        return None

    def _like(self, stored: np.ndarray, fresh: np.ndarray, row: int, rows: list[Any]) -> str:
        """What tokens that are not their image's look like."""

        def alike(one: np.ndarray, other: np.ndarray) -> bool:
            return bool(_cosine(one, other).min() >= COSINE)

        if self.stated["flip"] and alike(stored[row, ::-1], fresh[row]):
            return "of swapped sides: the mirrored image's come first"
        if self.stated["flip"] and alike(stored[row, 0], fresh[row, 0]):
            return "whose second side is not the mirrored image's"
        for other in range(len(rows)):
            if other != row and alike(stored[row], fresh[other]):
                return f"of another image, key '{rows[other][2]}'"
        return "that its image does not give: of another image, encoder or weights"

    def _compare_latents(self, rows: list[Any], fresh: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for index, column in enumerate(("latent_mean", "latent_std")):
            stored = np.concatenate([_floats(row[4], column) for row in rows])  # N x F x c x h x w
            new = np.stack([side[index] for side in fresh], 1)
            if new.shape != stored.shape:
                return self.found.fault(provenance.NAME, f"the VAE gives latents of {new.shape[2:]}, stored are {stored.shape[2:]}")
            error = _relative(stored, new)
            swapped = _relative(stored[:, ::-1], new).max(1) < LATENT_ERROR
            what = [
                f"{'swapped sides: the mirrored image comes first' if turned else 'not what the VAE makes of its image'} (relative error {off:.3f})"
                for turned, off in zip(swapped, error.max(1), strict=True)
            ]
            self._name(column, rows, error.max(1) >= LATENT_ERROR, what.__getitem__)
        return None

    def _name(self, column: str, rows: list[Any], wrong: np.ndarray, what: Callable[[int], str]) -> None:
        """A fault for each part with sampled rows that are wrong, by the first of them."""
        for part in dict.fromkeys(rows[row][0] for row in np.flatnonzero(wrong).tolist()):
            mine = [row for row in range(len(rows)) if rows[row][0] == part]
            bad = [row for row in mine if wrong[row]]
            _, number, key, *_ = rows[bad[0]]
            self.found.fault(part, f"column '{column}': row {number} (key '{key}'), {len(bad)} of {len(mine)} looked at: {what(bad[0])}")


def _order(rows: pa.Table, found: Findings) -> None:
    """sample_id ascends over the parts, and no key comes twice."""
    ids = rows.column("sample_id").to_numpy()
    falls = np.flatnonzero(np.diff(ids) <= 0)
    if len(falls):
        row = int(falls[0]) + 1
        found.fault(
            "part-*.parquet", f"column 'sample_id': {ids[row]} comes after {ids[row - 1]} (row {row} over all parts); it must ascend"
        )
    counts = pc.value_counts(rows.column("key"))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        found.fault("part-*.parquet", f"column 'key': '{twice[0]['values'].as_py()}' occurs {twice[0]['counts'].as_py()} times")


def _selection(folder: Path, stated: dict[str, Any], rows: pa.Table, found: Findings) -> None:
    """selection.parquet holds exactly the rows of the parts."""
    wanted = dict(zip(schema.SELECTION, tables.arrow_schema(schema.SELECTION).types, strict=True))
    table = _whole_table(folder / provenance.SELECTION, wanted, found, may_be_null=("score", "rank"))
    if table is None:
        return
    where = provenance.SELECTION
    ids, chosen = rows.column("sample_id").to_numpy(), table.column("sample_id").to_numpy()
    if not np.array_equal(ids, chosen):
        lost, more = np.setdiff1d(chosen, ids), np.setdiff1d(ids, chosen)
        if len(lost):
            found.fault(where, f"column 'sample_id': {len(lost)} chosen images are in no part, the first {lost[0]}")
        if len(more):
            found.fault(where, f"column 'sample_id': {len(more)} images of the parts were not chosen, the first {more[0]}")
        if not len(lost) and not len(more):
            found.fault(where, "column 'sample_id': not in the order of the parts, or one comes twice")
    else:
        for name in ("key", "label"):
            theirs, ours = rows.column(name).to_pylist(), table.column(name).to_pylist()
            differ = [row for row, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other]
            if differ:
                row = differ[0]
                found.fault(
                    where, f"column '{name}': sample_id {ids[row]} is {ours[row]!r}, in its part {theirs[row]!r}; {len(differ)} differ"
                )
    counts = _counts(rows)
    for label, count in _counts(table).items():
        positions = np.sort(table.column("position").to_numpy()[table.column("label").to_numpy() == label])
        if counts.get(label, 0) != count:
            found.fault(where, f"label {label}: {count} images were chosen, the parts hold {counts.get(label, 0)}")
        if not np.array_equal(positions, np.arange(count)):
            found.fault(where, f"column 'position': those of label {label} are not 0 to {count - 1}, so chosen images are missing or added")
    images = stated["selection"].get("images")
    if images is not None and images != len(table):
        found.fault(where, f"{len(table)} rows, {provenance.NAME} says that {images} images were chosen")


def _whole_table(path: Path, wanted: dict[str, Any], found: Findings, may_be_null: tuple[str, ...] = ()) -> pa.Table | None:
    """A small table with exactly the wanted columns; None where something is wrong with it."""
    before = len(found.faults)
    try:
        table = tables.read(path)
        table.validate(full=True)  # among others, that text is text
    except FileNotFoundError:
        if not any(fault.startswith(f"{path.name}:") for fault in found.faults):
            found.fault(path.name, "is missing")
        return None
    except provenance.UNREADABLE as error:
        found.fault(path.name, f"cannot be read ({first_line(error)})")
        return None
    except UserError as error:
        found.faults.append(str(error))
        return None
    _matching(path.name, table.schema, wanted, found)
    for name in wanted:
        if name in table.column_names and name not in may_be_null and table.column(name).null_count:
            found.fault(path.name, f"column '{name}': {table.column(name).null_count} rows are null")
    return table if len(found.faults) == before else None


def _counts(rows: pa.Table) -> dict[int, int]:
    labels, counts = np.unique(rows.column("label").to_numpy(), return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def _evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` of 0..count-1, spread evenly; 0: all."""
    return np.arange(count) if not wanted or wanted >= count else np.unique(np.linspace(0, count - 1, wanted).round().astype(int))


def _decode(content: bytes, data: dict[str, Any]) -> np.ndarray:
    # A stranger's provenance must not lift the guard against decompression bombs.
    most = data.get("max_pixels")
    most = min(most, DataConfig.max_pixels) if isinstance(most, int) else DataConfig.max_pixels
    return decode(content, data["image_size"], data["channels"], most)


def _pillow() -> str:
    import PIL

    return PIL.__version__


def _bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32: its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _floats(table: pa.Table, column: str) -> np.ndarray:
    """A tensor column as float32, its scale applied or its bf16 bits read."""
    values = tables.tensor_values(table, column)
    if values.dtype == np.uint16:
        return _bf16(values)
    if values.dtype == np.int8:
        return values.astype(np.float32) * tables.tensor_values(table, f"{column}_scale")[..., None]
    return values.astype(np.float32)


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Over the last axis; two zero vectors are alike."""
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    nothing = ~one.any(-1) & ~other.any(-1)
    return np.where(nothing, 1.0, (one * other).sum(-1) / np.maximum(norms, 1e-30))


def _relative(stored: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Relative error of N x F x ... by row and side."""
    axes = tuple(range(2, stored.ndim))
    return np.sqrt(((stored - fresh) ** 2).sum(axes) / np.maximum((fresh**2).sum(axes), 1e-30))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _other_weights(column: str, stated: dict[str, Any], weights: str) -> str:
    return f"'{column}' was not compared with a new encoding: it was made by {stated['encoder']} with the weights {stated['weights']}, those at hand are {weights}"


def _at_hand(load: Callable[[], Any], what: str, found: Findings) -> Any:
    """What `load` gives; None, and a note, where the encoder is not here."""
    try:
        return load()
    except at_hand.ABSENT as error:
        found.note(f"{what} were not encoded anew: {first_line(error)}")
        return None
