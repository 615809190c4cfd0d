"""The manifest: one row an image of the source, in key order, with where its bytes are.

Sources: a folder of class folders, Parquet in the layout of dataset hubs, and the embedded digits.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2c_ray import schema
from d2c_ray.config import DataConfig
from d2c_ray.data import samples, tables
from d2c_ray.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Source:
    """What `find` recognised: its kind, its root and its files, sorted by their name below the root."""

    kind: str  # digits | folder | parquet
    root: Path
    files: tuple[str, ...]


def find(data: DataConfig) -> Source:
    """Recognises the source and lists its files, reading none of them.

    Raises:
        UserError: nothing there, nothing readable in it, or a layout that is not read.
    """
    if data.source == "digits":
        return Source("digits", samples.digits_folder(), ("digits.parquet",))
    if not data.path:
        raise UserError(
            "data.path is empty: give the file or folder of the images (data.path=/data/imagenet), or data.source=digits for the embedded ones."
        )
    if data.path.startswith(("s3://", "gs://", "hdfs://", "http://", "https://")):
        raise UserError(f"data.path={data.path}: this version reads local files and folders. Mount or copy the data.")
    root = Path(data.path).expanduser()
    if not root.exists():
        raise UserError(f"data.path={data.path}: there is no such file or folder (looked at {root.absolute()}).")
    if root.is_file():
        names: list[str] = [root.name]
        root = root.parent
    else:
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob(data.pattern or "*") if path.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    parquet = [name for name in visible if name.endswith(".parquet")]
    images = [name for name in visible if name.lower().endswith(IMAGE_SUFFIXES)]
    tars = [name for name in visible if ".tar" in name or name.endswith((".tgz", ".zip"))]
    kind = data.source if data.source != "auto" else ("parquet" if parquet else "folder")
    if kind == "parquet" and parquet:
        return Source("parquet", root, tuple(parquet))
    if kind == "folder" and images:
        loose = [name for name in images if "/" not in name]
        if loose:
            raise UserError(
                f"data.path={data.path}: '{loose[0]}' lies in no class folder. A folder source holds one folder a class: class_name/image.jpg."
            )
        return Source("folder", root, tuple(images))
    if tars:
        raise UserError(
            f"data.path={data.path} holds archives ('{tars[0]}'): this version reads class folders and Parquet. Unpack them into class folders."
        )
    what = f"{len(visible)} files, none of them {'Parquet' if kind == 'parquet' else 'an image'}" if visible else "no files"
    matching = f" that match data.pattern={data.pattern}" if data.pattern else ""
    raise UserError(
        f"data.path={data.path} holds {what}{matching}. Class folders of images, or Parquet files with an image column, would do."
    )


def fingerprint(source: Source, data: DataConfig) -> str:
    """A hash of the source that does not depend on where it lies: names and sizes, and for Parquet both ends of each file.

    A Parquet file's end holds its statistics and offsets, so a rewritten file shows. An image replaced by another of
    exactly the same size does not: `data.version` is for that.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{source.kind}|{data.version}".encode())
    for name in source.files if source.kind != "digits" else ():
        path = source.root / name
        size = path.stat().st_size
        digest.update(f"|{name}|{size}".encode())
        if source.kind == "parquet":
            with path.open("rb") as file:
                digest.update(file.read(65_536))
                file.seek(max(0, size - 65_536))
                digest.update(file.read())
    names = class_file(source, data)
    if names is not None:
        digest.update(names.read_bytes())
    return digest.hexdigest()


def class_file(source: Source, data: DataConfig) -> Path | None:
    """The file of class names: the one given, or a classes.txt beside Parquet files.

    Raises:
        UserError: the file given is not there.
    """
    if data.classes:
        path = Path(data.classes).expanduser()
        if not path.is_file():
            raise UserError(f"data.classes={data.classes}: there is no such file. It holds one class name a line, line i for label i.")
        return path
    beside = source.root / "classes.txt"
    return beside if source.kind == "parquet" and beside.is_file() else None


def scan(source: Source, data: DataConfig, progress: Any) -> tuple[pa.Table, list[str]]:
    """The manifest's rows in key order, and the class names by label (an unnamed class has an empty name).

    Args:
        progress: `advance(n)` is called as files are read.

    Raises:
        UserError: a Parquet file that cannot be read or lacks a column, labels that are no integers, duplicate keys, or
            no row at all.
    """
    columns, names = (_scan_folder if source.kind == "folder" else _scan_parquet)(source, data, progress)
    keys = pa.array(columns["key"], pa.string())
    if len(keys) == 0:
        raise UserError(f"data.path={data.path}: no image in {len(source.files)} files.")
    order = pc.sort_indices(keys)
    keys = keys.take(order)
    same = pc.equal(keys.slice(1), keys.slice(0, len(keys) - 1))
    if pc.any(same).as_py():
        key = keys[1 + pc.index(same, True).as_py()].as_py()
        raise UserError(
            f"data.path={data.path}: the key '{key}' occurs twice. Every image needs a key of its own; a file listed twice or a linked folder gives such keys."
        )
    labels = np.asarray(columns["label"], np.int32)[order.to_numpy()]
    if labels.min() < 0 <= labels.max():
        raise UserError(
            f"data.path={data.path}: {(labels < 0).sum()} images have no label (-1) and others have one. Label all of them, or none (data.label_column=)."
        )
    names = _class_names(class_file(source, data), names, labels)
    table = pa.table(
        {
            "key": keys,
            "sample_id": pa.array(np.arange(len(keys))),
            "label": pa.array(labels),
            **{
                name: pa.array(columns[name], tables.arrow_schema(schema.MANIFEST).field(name).type).take(order)
                for name in ("uri", "offset", "length", "row_group", "row")
            },
        }
    )
    if data.limit_per_class:
        kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[: data.limit_per_class] for label in np.unique(labels)]))
        table = table.take(pa.array(kept)).set_column(1, "sample_id", pa.array(np.arange(len(kept))))
    shard = pa.array((np.arange(len(table)) // data.rows_per_shard).astype(np.int32))
    return table.append_column("shard", shard).cast(tables.arrow_schema(schema.MANIFEST)), names


def _scan_folder(source: Source, data: DataConfig, progress: Any) -> tuple[dict[str, Any], list[str]]:
    names = sorted({name.split("/", 1)[0] for name in source.files})
    label_of = {name: label for label, name in enumerate(names)}
    progress.advance(len(source.files))
    count = len(source.files)
    return {
        "key": list(source.files),
        "label": [label_of[name.split("/", 1)[0]] for name in source.files],
        "uri": list(source.files),
        "offset": np.zeros(count, np.int64),
        "length": np.asarray([(source.root / name).stat().st_size for name in source.files], np.int64),
        "row_group": np.full(count, -1, np.int32),
        "row": np.full(count, -1, np.int32),
    }, names


def _scan_parquet(source: Source, data: DataConfig, progress: Any) -> tuple[dict[str, Any], list[str]]:
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "label", "uri", "offset", "length", "row_group", "row")}
    names: list[str] = []
    for name in source.files:
        path = source.root / name
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"'{path}' is no readable Parquet file: {str(error).splitlines()[0]}") from error
        found = file.schema_arrow
        _check_columns(path, found, data)
        names = names or _names_of(found, data)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            labels = (
                file.read_row_group(group, columns=[data.label_column]).column(0).to_numpy() if data.label_column else np.full(rows, -1)
            )
            if not np.issubdtype(labels.dtype, np.integer) or (data.label_column and labels.min(initial=0) < -1):
                raise UserError(
                    f"'{path}': column '{data.label_column}' holds {labels.dtype} or labels below -1; integers from 0 would do, -1 for none."
                )
            # Row numbers are zero-padded so that key order is file order.
            columns["key"].extend(f"{name}#{row:09d}" for row in range(first, first + rows))
            columns["label"].extend(labels.tolist())
            columns["row_group"].extend([group] * rows)
            columns["row"].extend(range(rows))
            columns["uri"].extend([name] * rows)
            columns["offset"].extend([-1] * rows)
            columns["length"].extend([-1] * rows)
            first += rows
        progress.advance(1)
    return columns, names


def _check_columns(path: Path, found: pa.Schema, data: DataConfig) -> None:
    for field, column in (("data.image_column", data.image_column), ("data.label_column", data.label_column)):
        if column and column not in found.names:
            raise UserError(f"'{path}' has no column '{column}' ({field}); it has {', '.join(found.names)}.")
    kind = found.field(data.image_column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"'{path}': column '{data.image_column}' is {found.field(data.image_column).type}; encoded images as binary, or struct<bytes, path>, would do."
        )


def _names_of(found: pa.Schema, data: DataConfig) -> list[str]:
    """Class names a Parquet file carries: ours, or the ClassLabel that dataset hubs write into the schema."""
    stored = found.metadata or {}
    if tables.METADATA in stored:
        return json.loads(stored[tables.METADATA]).get("classes", [])
    if b"huggingface" in stored:
        features = json.loads(stored[b"huggingface"]).get("info", {}).get("features", {})
        return list(features.get(data.label_column, {}).get("names", []))
    return []


def _class_names(given: Path | None, names: list[str], labels: np.ndarray) -> list[str]:
    count = int(labels.max()) + 1
    if given is not None:
        names = [line.strip() for line in given.read_text().rstrip().splitlines()]  # an empty line is a class without a name
        if len(names) < count:
            raise UserError(f"'{given}' names {len(names)} classes; the labels go up to {count - 1}, so {count} lines are needed.")
    return names[:count] + [""] * (count - len(names))


def root(data: DataConfig) -> Path:
    """The folder that the manifest's uris are relative to: where the source lies now, on this node."""
    if data.source == "digits":
        return samples.digits_folder()
    path = Path(data.path).expanduser()
    return path.parent if path.is_file() else path


def read_bytes(row: dict[str, Any], root: Path, image_column: str) -> bytes:
    """The encoded bytes of a manifest row. Neighbouring rows of a Parquet row group share one read.

    Raises:
        FileNotFoundError: the file is no longer where it was.
    """
    path = root / row["uri"]
    if row["row_group"] < 0:
        with path.open("rb") as file:
            file.seek(row["offset"])
            return file.read(row["length"])
    value = _row_group(str(path), row["row_group"], image_column)[row["row"]].as_py()
    return (value["bytes"] if isinstance(value, dict) else value) or b""


@lru_cache(maxsize=2)
def _row_group(path: str, group: int, column: str) -> pa.ChunkedArray:
    return pq.ParquetFile(path, memory_map=True).read_row_group(group, columns=[column]).column(0)
