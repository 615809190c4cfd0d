"""The manifest: one row an image of the source, in key order, with where its bytes are.

Sources, local or on S3: a folder of class folders, WebDataset tars, Parquet in the layout of dataset hubs, and the
embedded digits. Scanning reads names and headers, file by file, and holds one file's rows at a time.
"""

import hashlib
import json
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray import schema
from d2c_ray.config import DataConfig, StorageConfig
from d2c_ray.data import samples, storage, tables, tar, wordnet
from d2c_ray.data.storage import Entry
from d2c_ray.errors import UserError
from d2c_ray.wording import first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_IMAGE_EXTENSIONS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_END_BYTES = 65_536  # of each end of an archive, in the fingerprint
_WINDOW = 8 << 20  # bytes a request while the headers of a remote tar are walked
_FILES_AHEAD = 8  # remote files read at once
_FOLDER_ROWS = 65_536  # rows of class folders a table
_LABEL_BYTES = 1 << 20  # of a .cls or .json member, which is read whole
_NAMES_BYTES = 128 << 20  # of a file of class names
_IMAGE_BYTES = 256 << 20  # of an encoded image, which is in memory whole
_MOST_LABEL = 10_000_000  # counts, names and quotas are held for every label up to the largest
_SURE_ROWS = 1_000_000  # of a Parquet file: so many may take no room in it
_LOCATION = ("uri", "offset", "length", "row_group", "row")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Source:
    """What `find` recognised: its kind, its root, its archives in key order, or a digest of its images."""

    kind: str  # digits | folder | parquet | webdataset
    root: str
    files: tuple[Entry, ...] = ()  # Parquet files or tars
    images: int = 0  # of class folders
    classes: tuple[str, ...] = ()  # class folders, sorted
    digest: str = ""  # over names and sizes of the images

    @property
    def work(self) -> tuple[int, str]:
        """How much there is to scan, and in what unit."""
        return (self.images, "images") if self.kind == "folder" else (len(self.files), "files")


def find(data: DataConfig, options: StorageConfig) -> Source:
    """Recognises the source in one listing, reading no file.

    Raises:
        UserError: nothing there, nothing readable in it, or a layout that is not read.
    """
    if data.source == "digits":
        return Source("digits", str(samples.digits_folder()), (Entry("digits.parquet", 0),))
    if not data.path:
        raise UserError(
            "data.path is empty: give the file or folder of the images (data.path=/data/imagenet or s3://bucket/imagenet), "
            "or data.source=digits for the embedded ones."
        )
    base, entries = _entries(data, options)
    parquet: list[Entry] = []
    tars: list[Entry] = []
    packed: list[str] = []
    loose = ""
    classes: set[str] = set()
    digest = hashlib.blake2b(digest_size=16)
    images = others = 0
    for entry in entries:
        lower = entry.name.lower()
        if lower.endswith(IMAGE_SUFFIXES):
            if "/" in entry.name:
                images += 1
                classes.add(entry.name.split("/", 1)[0])
                digest.update(f"|{entry.name}|{entry.size}".encode("utf-8", "surrogateescape"))
            else:
                loose = loose or entry.name
        elif lower.endswith(".parquet"):
            parquet.append(entry)
        elif lower.endswith(".tar"):
            tars.append(entry)
        elif lower.endswith(_PACKED):
            packed.append(entry.name)
        else:
            others += 1
    kind = data.source
    if kind == "auto":
        kind = "parquet" if parquet else "webdataset" if tars and not images else "folder" if images or loose else "webdataset"
    if kind == "parquet" and parquet:
        return Source(kind, base, _in_key_order(parquet))
    if kind == "webdataset" and (tars or packed):
        if packed:
            raise UserError(
                f"data.path={data.path}: '{packed[0]}' is compressed, so images inside cannot be reached without unpacking all before them. "
                "Unpack it to a plain .tar or to class folders, or leave such files out (data.pattern=*.tar)."
            )
        return Source(kind, base, _in_key_order(tars))
    if kind == "folder" and (images or loose):
        if loose:
            raise UserError(
                f"data.path={data.path}: '{loose}' lies in no class folder. A folder source holds one folder a class: class_name/image.jpg."
            )
        return Source(kind, base, (), images, tuple(sorted(classes)), digest.hexdigest())
    total = images + len(parquet) + len(tars) + len(packed) + others + bool(loose)
    wanted = {"parquet": "Parquet", "webdataset": "a tar file" if data.source == "webdataset" else "an image", "folder": "an image"}[kind]
    what = f"{total:,} files, none of them {wanted}" if total else "no files"
    matching = f" that match data.pattern={data.pattern}" if data.pattern else ""
    raise UserError(
        f"data.path={data.path} holds {what}{matching}. Class folders of images, WebDataset tars, or Parquet files with an image column, would do."
    )


def _entries(data: DataConfig, options: StorageConfig) -> tuple[str, Iterator[Entry]]:
    """The source's root, and its files below it in key order."""
    storage.check(data.path)
    path = data.path if storage.is_remote(data.path) else str(Path(data.path).expanduser().absolute())
    kind = storage.kind(path, options)
    if kind is None:
        where = "" if storage.is_remote(path) else f" (looked at {path})"
        raise UserError(f"data.path={data.path}: there is no such file or folder{where}.")
    base = root(data, options, kind)
    if kind == "file":
        return base, iter([Entry(path.rsplit("/", 1)[1], storage.size(path, options))])
    return base, (entry for entry in storage.walk(path, options) if not data.pattern or _matches(entry.name, data.pattern))


def _matches(name: str, pattern: str) -> bool:
    from pathlib import PurePosixPath

    return PurePosixPath(name).match(pattern)


def _in_key_order(entries: list[Entry]) -> tuple[Entry, ...]:
    # Keys are 'file#member', so files in this order give keys in order.
    return tuple(sorted(entries, key=lambda entry: entry.name + "#"))


def fingerprint(source: Source, data: DataConfig, options: StorageConfig) -> str:
    """A hash of the source that does not depend on where it lies: names and sizes, and both ends of each archive.

    A Parquet file's end holds its statistics and offsets, so a rewritten file shows. An image replaced by another of
    exactly the same size does not: `data.version` is for that.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{source.kind}|{data.version}|{source.digest}".encode())
    if source.kind != "digits":

        def ends(entry: Entry) -> bytes:
            uri = storage.join(source.root, entry.name)
            tail = max(0, entry.size - _END_BYTES)
            return storage.read(uri, 0, _END_BYTES, options) + storage.read(uri, tail, _END_BYTES, options)

        for entry, content in zip(
            source.files, _ahead(ends, source.files, _FILES_AHEAD if storage.is_remote(source.root) else 1), strict=True
        ):
            digest.update(f"|{entry.name}|{entry.size}".encode("utf-8", "surrogateescape"))
            digest.update(content)
    names = class_file(source, data, options)
    if names is not None:
        digest.update(names.encode())
        if wordnet.mapping(names):
            digest.update(b"|by id")
    nouns = wordnet.file(data.classes)
    if nouns is not None:
        digest.update(f"|{wordnet.digest(nouns)}".encode())
    return digest.hexdigest()


def class_file(source: Source, data: DataConfig, options: StorageConfig) -> str | None:
    """The text of the file of class names: the one given, or a classes.txt beside archives.

    Raises:
        UserError: the file given, or WordNet, is not there.
    """
    if data.classes and wordnet.file(data.classes) is None:
        path = data.classes if storage.is_remote(data.classes) else str(Path(data.classes).expanduser())
        try:
            return _names_file(path, options)
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(
                f"data.classes={data.classes}: there is no such file. It holds one class name a line, line i for label i; 'wordnet' translates WordNet ids."
            ) from None
    if source.kind not in ("parquet", "webdataset"):
        return None
    try:
        return _names_file(storage.join(source.root, "classes.txt"), options)
    except FileNotFoundError:
        return None


def _names_file(uri: str, options: StorageConfig) -> str:
    content = storage.read(uri, 0, _NAMES_BYTES + 1, options)
    if len(content) > _NAMES_BYTES:
        raise UserError(f"'{uri}' has more than {_NAMES_BYTES:,} bytes, which no class names take.")
    return content.decode()


@dataclass
class Listing:
    """What `scan` learns on the way; complete once its tables are used up."""

    rows: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # images a label
    unlabelled: int = 0
    names: list[str] = field(default_factory=list)  # as the source says, by label
    passed_over: int = 0  # members of tars that belong to no image

    def class_names(self, source: Source, data: DataConfig, options: StorageConfig) -> list[str]:
        """Names by label; an unnamed class has an empty name.

        A file of names is read line by line, or by WordNet id where its lines begin with one and the source's own names
        are ids.

        Raises:
            UserError: a file of names that is too short, or a WordNet id that cannot be translated.
        """
        given, names, count = class_file(source, data, options), self.names, len(self.counts)
        nouns = wordnet.file(data.classes)
        if given is not None:
            where = data.classes if data.classes and not nouns else storage.join(source.root, "classes.txt")
            known = wordnet.mapping(given)
            if known and any(map(wordnet.is_id, names)):
                names = wordnet.by_mapping(names[:count], known, where)
            else:
                lines = [line.strip() for line in given.rstrip().splitlines()]  # an empty line is a class without a name
                if len(lines) < count:
                    raise UserError(f"'{where}' names {len(lines)} classes; the labels go up to {count - 1}, so {count} lines are needed.")
                names = [known[line.split()[0]] if known and line else line for line in lines]
        names = names[:count] + [""] * (count - len(names))
        return wordnet.translate(names, nouns) if nouns else names


def scan(
    source: Source, data: DataConfig, options: StorageConfig, listing: Listing, rows_per_table: int, progress: Any
) -> Iterator[pa.Table]:
    """The manifest's rows in key order, in tables of `rows_per_table` rows, the last one shorter.

    Args:
        listing: filled on the way.
        progress: `advance(n)` is called as the source is read.

    Raises:
        UserError: an archive that cannot be read or lacks a column, labels that are no integers, some images with a
            label and others without, duplicate keys, or no row at all.
    """
    fields = tables.arrow_schema(schema.MANIFEST)
    waiting: list[pa.Table] = []
    held = start = 0
    last = ""
    kept = np.zeros(0, np.int64)  # rows kept so far, by label + 1, for limit_per_class
    for table in _SCANS[source.kind](source, data, options, listing, progress):
        if not len(table):
            continue
        table, last = _checked_order(table, last, data)
        labels = table.column("label").to_numpy()
        if data.limit_per_class:
            chosen, kept = _first_of_each(labels, kept, data.limit_per_class)
            table, labels = table.take(pa.array(chosen)), labels[chosen]
        _count(listing, labels)
        waiting.append(table)
        held += len(table)
        while held >= rows_per_table:
            whole = pa.concat_tables(waiting)
            yield _numbered(whole.slice(0, rows_per_table), start, data.rows_per_shard, fields)
            waiting, held, start = [whole.slice(rows_per_table)], held - rows_per_table, start + rows_per_table
    if listing.rows == 0:
        raise UserError(f"data.path={data.path}: no image in {len(source.files)} files.")
    if 0 < listing.unlabelled < listing.rows:
        raise UserError(
            f"data.path={data.path}: {listing.unlabelled} images have no label (-1) and others have one. Label all of them, or none (data.label_column=)."
        )
    if held:
        yield _numbered(pa.concat_tables(waiting), start, data.rows_per_shard, fields)


def _numbered(table: pa.Table, start: int, rows_per_shard: int, fields: pa.Schema) -> pa.Table:
    ids = np.arange(start, start + len(table))
    table = table.append_column("sample_id", pa.array(ids)).append_column("shard", pa.array((ids // rows_per_shard).astype(np.int32)))
    return table.select(fields.names).cast(fields)


def _checked_order(table: pa.Table, last: str, data: DataConfig) -> tuple[pa.Table, str]:
    """A file's rows in key order, all behind the file before; refuses a key that comes twice."""
    keys = table.column("key").combine_chunks()
    if not pc.all(pc.greater_equal(keys.slice(1), keys.slice(0, len(keys) - 1))).as_py():
        table = table.take(pc.sort_indices(keys))
        keys = table.column("key").combine_chunks()
    same = pc.equal(keys.slice(1), keys.slice(0, len(keys) - 1))
    twice = keys[1 + pc.index(same, True).as_py()].as_py() if pc.any(same).as_py() else ""
    first = keys[0].as_py()
    if twice or first == last:
        raise UserError(
            f"data.path={data.path}: the key '{twice or first}' occurs twice. Every image needs a key of its own; a file listed twice, or packed twice, gives such keys."
        )
    if first < last:
        raise UserError(
            f"data.path={data.path}: '{first}' sorts before '{last}' of another file; a '#' in file names does that. Rename them."
        )
    return table, keys[-1].as_py()


def _first_of_each(labels: np.ndarray, kept: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are among the first `limit` of their label, and the counts with them added."""
    kept = np.pad(kept, (0, max(0, int(labels.max()) + 2 - len(kept))))
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    nth = np.arange(len(labels)) - np.searchsorted(ordered, ordered) + kept[ordered + 1]
    chosen = np.sort(order[nth < limit])
    return chosen, kept + np.bincount(labels[chosen] + 1, minlength=len(kept))


def _count(listing: Listing, labels: np.ndarray) -> None:
    listing.rows += len(labels)
    listing.unlabelled += int((labels < 0).sum())
    counts = np.bincount(labels[labels >= 0])
    size = max(len(counts), len(listing.counts))
    listing.counts = np.pad(listing.counts, (0, size - len(listing.counts))) + np.pad(counts, (0, size - len(counts)))


def _rows(columns: dict[str, Any]) -> pa.Table:
    """A table of what every scan gives: key, label and location."""
    count = len(columns["key"])
    none = {"offset": -1, "length": -1, "row_group": -1, "row": -1}
    types = tables.arrow_schema(schema.MANIFEST)
    try:
        return pa.table(
            {
                name: pa.array(columns[name] if name in columns else np.full(count, none[name]), types.field(name).type)
                for name in ("key", "label", *_LOCATION)
            }
        )
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {error.object!r} is no UTF-8, and a key has to be. Rename the file.") from None


def _scan_folder(source: Source, data: DataConfig, options: StorageConfig, listing: Listing, progress: Any) -> Iterator[pa.Table]:
    label_of = {name: label for label, name in enumerate(source.classes)}
    listing.names = list(source.classes)
    _, entries = _entries(data, options)
    keys: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []

    def flush() -> pa.Table:
        table = _rows({"key": keys, "label": labels, "uri": keys, "offset": np.zeros(len(keys), np.int64), "length": sizes})
        progress.advance(len(keys))
        for column in (keys, labels, sizes):
            column.clear()
        return table

    for entry in entries:
        if not entry.name.lower().endswith(IMAGE_SUFFIXES) or "/" not in entry.name:
            continue
        name = entry.name.split("/", 1)[0]
        if name not in label_of:
            raise UserError(f"data.path={data.path}: the folder '{name}' came while its images were being listed. Run it again.")
        keys.append(entry.name)
        labels.append(label_of[name])
        sizes.append(entry.size)
        if len(keys) == _FOLDER_ROWS:
            yield flush()
    if keys:
        yield flush()


def _scan_tars(source: Source, data: DataConfig, options: StorageConfig, listing: Listing, progress: Any) -> Iterator[pa.Table]:
    remote = storage.is_remote(source.root)
    work = partial(_scan_tar, source=source, data=data, options=options)
    for table, passed_over in _ahead(work, source.files, _FILES_AHEAD if remote else 1):
        listing.passed_over += passed_over
        progress.advance(1)
        yield table


def _scan_tar(entry: Entry, source: Source, data: DataConfig, options: StorageConfig) -> tuple[pa.Table, int]:
    """The samples of one tar (WebDataset's rule: a member's name up to the first dot of its last part is its sample)."""
    uri = storage.join(source.root, entry.name)
    if entry.size == 0:
        raise UserError(f"'{uri}' is no tar file: 0 bytes.")
    only = "" if data.image_column == DataConfig.image_column else data.image_column.lower().lstrip(".")
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    passed_over = 0
    with _reader(uri, entry.size, options) as read:
        for name, offset, length in tar.members(read, entry.size, uri):
            slash = name.rfind("/")
            dot = name.find(".", slash + 1)
            if dot <= slash + 1:  # no extension, or hidden
                passed_over += not name.endswith("/")
                continue
            sample, extension = name[:dot], name[dot + 1 :].lower()
            if extension == only if only else (extension in _IMAGE_EXTENSIONS or extension.rsplit(".", 1)[-1] in _IMAGE_EXTENSIONS):
                before = images.get(sample)
                if before is not None and before[0] != name:
                    raise UserError(
                        f"'{uri}': the sample '{sample}' holds several images, '{before[0]}' and '{name}'. data.image_column={extension} would take the second; "
                        "if they are images of their own, names need other characters than dots before the extension."
                    )
                if before is not None:
                    raise UserError(
                        f"'{uri}': the key '{entry.name}#{name}' occurs twice. Every image needs a key of its own; pack the tar anew."
                    )
                images[sample] = (name, offset, length)
            elif extension == "cls" and data.label_column:
                labels[sample] = _class_label(_small(read, offset, length, uri, name), uri, name)
            elif extension == "json" and data.label_column and sample not in labels:
                label = _json_label(_small(read, offset, length, uri, name), data.label_column, uri, name)
                if label is not None:
                    labels[sample] = label
                passed_over += label is None
            else:
                passed_over += 1
    table = _rows(
        {
            "key": [f"{entry.name}#{name}" for name, _, _ in images.values()],
            "label": [labels.get(sample, -1) for sample in images],
            "uri": [entry.name] * len(images),
            "offset": [offset for _, offset, _ in images.values()],
            "length": [length for _, _, length in images.values()],
        }
    )
    return table, passed_over


def _small(read: Callable[[int, int], bytes], offset: int, length: int, uri: str, name: str) -> bytes:
    """A member that holds a label."""
    if length > _LABEL_BYTES:
        raise UserError(f"'{uri}': '{name}' has {length:,} bytes; a label takes {_LABEL_BYTES:,} at most.")
    return read(offset, offset + length)


def _class_label(content: bytes, uri: str, name: str) -> int:
    try:
        return _in_range(int(content), uri)
    except ValueError:
        raise UserError(f"'{uri}': '{name}' holds {content[:40]!r}; an integer label would do.") from None


def _in_range(label: int, uri: str) -> int:
    """A label, for which there is room: -1 to _MOST_LABEL - 1."""
    if not -1 <= label < _MOST_LABEL:
        raise UserError(f"'{uri}' holds the label {label}; numbers from 0 to {_MOST_LABEL - 1:,} would do, -1 for none.")
    return label


def _json_label(content: bytes, column: str, uri: str, name: str) -> int | None:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"'{uri}': '{name}' is no JSON: {content[:40]!r}.") from None
    label = values.get(column) if isinstance(values, dict) else None
    if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
        raise UserError(f"'{uri}': '{name}' holds {column}={label!r}; an integer label would do (data.label_column names the field).")
    return label if label is None else _in_range(label, uri)


class _reader:
    """Random access to the bytes of a file: memory-mapped, or through a window that moves over a remote one."""

    def __init__(self, uri: str, size: int, options: StorageConfig):
        self.uri, self.size, self.options = uri, size, options
        self._start, self._window = 0, b""
        self._map: mmap.mmap | None = None

    def __enter__(self) -> Callable[[int, int], bytes]:
        if storage.is_remote(self.uri):
            return self._read
        with open(self.uri, "rb") as file:
            self._map = mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return lambda start, stop: mapped[start:stop]

    def __exit__(self, *exc: object) -> None:
        if self._map is not None:
            self._map.close()

    def _read(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size)
        if start < self._start or stop > self._start + len(self._window):
            self._start = start
            self._window = storage.read(self.uri, start, max(_WINDOW, stop - start), self.options)
        return self._window[start - self._start : stop - self._start]


def _scan_parquet(source: Source, data: DataConfig, options: StorageConfig, listing: Listing, progress: Any) -> Iterator[pa.Table]:
    remote = storage.is_remote(source.root)
    work = partial(_scan_parquet_file, source=source, data=data, options=options)
    for table, names in _ahead(work, source.files, _FILES_AHEAD if remote else 1):
        listing.names = listing.names or names
        progress.advance(1)
        yield table


def _scan_parquet_file(entry: Entry, source: Source, data: DataConfig, options: StorageConfig) -> tuple[pa.Table, list[str]]:
    uri = storage.join(source.root, entry.name)
    try:
        handle = storage.open_file(uri, options)
        file = tables.opened(handle, uri, [data.image_column, *([data.label_column] if data.label_column else [])])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"'{uri}' is no readable Parquet file: {first_line(error)}") from error
    with file:
        found = file.schema_arrow
        _check_columns(uri, found, data)
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        total = sum(counts)
        if total > max(_SURE_ROWS, handle.size()):  # a label said once for all of them takes no room, but every row takes some here
            raise UserError(
                f"'{uri}' says that it holds {total:,} images in {handle.size():,} bytes, which no file does. Leave it out (data.pattern)."
            )
        labels = np.full(total, -1, np.int32)
        if data.label_column:
            column = file.read(columns=[data.label_column]).column(0)
            if column.null_count:
                raise UserError(f"'{uri}': column '{data.label_column}' has {column.null_count} empty labels; -1 for none would do.")
            values = column.to_numpy()
            if values.min(initial=0) < -1:
                raise UserError(f"'{uri}': column '{data.label_column}' holds labels below -1; integers from 0 would do, -1 for none.")
            _in_range(int(values.max(initial=0)), uri)
            labels = values.astype(np.int32)
    return _rows(
        {
            # Row numbers are zero-padded so that key order is file order.
            "key": pc.binary_join_element_wise(
                f"{entry.name}#", pc.utf8_lpad(pc.cast(pa.array(np.arange(total)), pa.string()), 9, "0"), ""
            ),
            "label": labels,
            "uri": pa.repeat(pa.scalar(entry.name), total),
            "row_group": np.repeat(np.arange(len(counts)), counts),
            "row": np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int32),
        }
    ), _names_of(uri, found, data)


_SCANS: dict[str, Callable[..., Iterator[pa.Table]]] = {
    "folder": _scan_folder,
    "webdataset": _scan_tars,
    "parquet": _scan_parquet,
    "digits": _scan_parquet,
}


def _ahead(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`work` of every item in order, the next `workers` of them under way in threads."""
    if workers <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _check_columns(uri: str, found: pa.Schema, data: DataConfig) -> None:
    for name, column in (("data.image_column", data.image_column), ("data.label_column", data.label_column)):
        if column and column not in found.names:
            raise UserError(f"'{uri}' has no column '{column}' ({name}); it has {', '.join(found.names)}.")
    kind = found.field(data.image_column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"'{uri}': column '{data.image_column}' is {found.field(data.image_column).type}; encoded images as binary, or struct<bytes, path>, would do."
        )
    if data.label_column:  # before any is read: a text that is said again and again takes no room in the file, and its rows take all of it
        kind = found.field(data.label_column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not pa.types.is_integer(kind):
            raise UserError(f"'{uri}': column '{data.label_column}' is {kind}; integers from 0 would do, -1 for none.")


def _names_of(uri: str, found: pa.Schema, data: DataConfig) -> list[str]:
    """Class names a Parquet file carries: ours, or the ClassLabel that dataset hubs write into the schema."""
    stored = found.metadata or {}
    try:
        if tables.METADATA in stored:
            names = json.loads(stored[tables.METADATA]).get("classes", [])
        else:
            features = json.loads(stored.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            names = features.get(data.label_column, {}).get("names", [])
    except (ValueError, AttributeError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"'{uri}': the class names in its metadata cannot be read. A file of names would do (data.classes), once they are taken out."
        )
    return names


def root(data: DataConfig, options: StorageConfig, kind: str | None = None) -> str:
    """The folder that the manifest's uris are relative to: where the source lies now, on this node."""
    if data.source == "digits":
        return str(samples.digits_folder())
    path = data.path if storage.is_remote(data.path) else str(Path(data.path).expanduser().absolute())
    path = path.rstrip("/")
    if (kind or storage.kind(path, options)) == "file":
        return path.rsplit("/", 1)[0]
    return path


def read_images(rows: pa.Table, base: str, image_column: str, options: StorageConfig) -> list[bytes | OSError]:
    """The encoded bytes of manifest rows; an element is the error of a file that is no longer there, no longer whole, or too large to be an image.

    Byte ranges that lie close to each other share one request, and rows of a Parquet row group one read.
    """
    uris = [storage.join(base, uri) for uri in rows.column("uri").to_pylist()]
    groups = rows.column("row_group").to_numpy()
    found: list[bytes | OSError] = [b""] * len(uris)
    ranged = np.flatnonzero(groups < 0)
    offsets, lengths = rows.column("offset").to_numpy(), rows.column("length").to_numpy()
    for row in ranged[lengths[ranged] > _IMAGE_BYTES].tolist():
        found[row] = _too_large(int(lengths[row]))
    ranged = ranged[lengths[ranged] <= _IMAGE_BYTES]
    contents = storage.read_ranges([(uris[row], int(offsets[row]), int(lengths[row])) for row in ranged], options)
    for row, content in zip(ranged.tolist(), contents, strict=True):
        found[row] = content
    numbers = rows.column("row").to_numpy()
    together: dict[tuple[str, int], list[int]] = {}
    for row in np.flatnonzero(groups >= 0).tolist():
        together.setdefault((uris[row], int(groups[row])), []).append(row)
    for (uri, group), members in together.items():
        try:
            values = _row_group(uri, group, image_column, options).take(pa.array(numbers[members]))
        except FileNotFoundError as error:
            values = [error] * len(members)
        except pa.ArrowInvalid as error:  # cut off since it was listed, as a tar may be
            values = [OSError(f"no readable Parquet file ({first_line(error)})")] * len(members)
        for row, value in zip(members, values, strict=True):
            if isinstance(value, OSError):
                found[row] = value
            else:
                content = value.as_py()
                content = (content["bytes"] if isinstance(content, dict) else content) or b""
                found[row] = content if len(content) <= _IMAGE_BYTES else _too_large(len(content))
    return found


def _too_large(num_bytes: int) -> OSError:
    return OSError(f"{num_bytes:,} bytes, more than the {_IMAGE_BYTES:,} of an encoded image")


_last_group: tuple[tuple[str, int, str], pa.ChunkedArray] | None = None


def _row_group(uri: str, group: int, column: str, options: StorageConfig) -> pa.ChunkedArray:
    """The images of a row group; the last one is kept, since the next unit of work often lies in it too."""
    global _last_group
    if _last_group is None or _last_group[0] != (uri, group, column):
        _last_group = None
        with tables.opened(storage.open_file(uri, options), uri, [column]) as file:
            _last_group = (uri, group, column), tables.read_column(file, group, column, uri)
    return _last_group[1]
