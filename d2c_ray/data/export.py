"""A condensed dataset's images in other forms: WebDataset tars, class folders, or the list of their keys."""

import csv
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

from d2c_ray.data import provenance, storage, tables
from d2c_ray.data.decode import FORMATS
from d2c_ray.errors import UserError
from d2c_ray.rundir import SUCCESS, UMASK, whole
from d2c_ray.wording import first_line, nearest

PER_SHARD = 10_000
METADATA = "metadata.csv"  # beside the class folders
UNLABELLED = "unlabelled"  # the class folder of images without a label
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_BATCH_ROWS = 256
_FOLDER_BYTES = 100  # of a class folder's name, which file systems hold to 255
_EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm",
}  # fmt: skip
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}  # on Windows


@dataclass(frozen=True)
class Row:
    """A chosen image."""

    sample_id: int
    key: str
    label: int
    name: str  # of its class; empty without one
    image: bytes

    @property
    def stem(self) -> str:
        """A file name without extension: safe everywhere, no two rows have the same, and a 'test' in the key makes no split of it."""
        return f"{self.sample_id:09d}"

    def extension(self) -> str:
        """By the bytes, not by what the key says."""
        try:
            with Image.open(io.BytesIO(self.image), formats=FORMATS) as image:
                return _EXTENSIONS.get(image.format or "", (image.format or "bin").lower())
        except Exception as error:
            raise UserError(
                f"'{self.key}': its bytes are no image that can be opened ({error}); d2c verify says what else is wrong."
            ) from None


def export(folder: str | Path, form: str, out: str | Path, per_shard: int = PER_SHARD) -> int:
    """Writes the images of a condensed dataset in another form; gives their number. What is there already is never written over.

    Args:
        form: 'webdataset' (000000.tar ... and classes.txt), 'folders' (class_name/image.jpg and metadata.csv) or 'ids' (a
            key a line in the order of sample_id; sample_id, key, label and name where `out` ends in .csv).
        out: folder, or file of 'ids', that appears once it is whole.
        per_shard: images a tar at most.

    Raises:
        UserError: no finished condensed dataset, an unknown form, or an output that is there.
    """
    if storage.is_remote(str(out)):
        raise UserError(f"'{out}': images are written to a local folder. Copy them from there.")
    out = Path(out).expanduser().absolute()
    if form not in FORMS:
        raise UserError(f"'{form}' is no form to export to; one of {', '.join(FORMS)}{nearest(form, list(FORMS))}")
    if per_shard < 1:
        raise UserError(f"--per-shard {per_shard}: a tar holds at least one image.")
    stated, folder = provenance.read(folder), Path(folder)
    names = stated["class_names"]
    if not (folder / SUCCESS).is_file():
        raise UserError(f"'{folder}' is no finished condensed dataset: it has no {SUCCESS}.")
    if out.is_dir() if form == "ids" else out.exists() and not out.is_dir():
        raise UserError(
            f"'{out}' is {'a folder' if out.is_dir() else 'a file'}; {form} are written to a {'file' if form == 'ids' else 'folder'}."
        )
    if out.exists() and (any(out.iterdir()) if out.is_dir() else out.stat().st_size):
        raise UserError(f"'{out}' is there already and not empty. Nothing is written over: give another name, or remove it.")
    _complete(folder, stated)
    return FORMS[form](folder, names, out, per_shard)


def _complete(folder: Path, stated: dict[str, Any]) -> None:
    """Raises UserError where the parts or their rows are not those that the provenance lists."""
    there = {path.name: provenance.rows_of(path) for path in sorted(folder.glob("part-*.parquet"))}
    listed = {name: entry.get("rows") for name, entry in sorted(stated["files"].items()) if name.startswith("part-")}
    wrong = [f"{name} is missing" for name in listed if name not in there]
    wrong += [f"{name} is not listed in {provenance.NAME}" for name in there if name not in listed]
    wrong += [
        f"{name} has {'no rows that can be read' if rows is None else f'{rows} rows'}, {provenance.NAME} says {listed[name]}"
        for name, rows in there.items()
        if name in listed and rows != listed[name]
    ]
    if not wrong and sum(rows or 0 for rows in there.values()) != stated["rows"]:
        wrong = [f"its parts hold {sum(rows or 0 for rows in there.values())} rows, {provenance.NAME} says {stated['rows']}"]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"'{folder}' is not complete: {'; '.join(wrong[:3])}{more}. Copy it again; d2c verify says all that is wrong.")


def _rows(folder: Path, names: list[str], with_images: bool = True) -> Iterator[Row]:
    """Every row in the order of sample_id, some read at a time."""
    wanted = ["sample_id", "key", "label", *(["image"] if with_images else [])]
    before = None
    for part in sorted(folder.glob("part-*.parquet")):
        try:
            with tables.opened(part, part, wanted) as file:
                missing = [name for name in wanted if name not in file.schema_arrow.names]
                if missing:
                    raise UserError(f"'{part}' has no column '{missing[0]}': nothing to export.")
                for batch in file.iter_batches(tables.rows_at_once(file, wanted, _BATCH_ROWS), columns=wanted):
                    for row in batch.to_pylist():
                        label, sample_id = row["label"], row["sample_id"]
                        if before is not None and sample_id <= before:  # files are named by it
                            wrong = "occurs twice" if sample_id == before else f"comes after {before}, though it must ascend"
                            raise UserError(f"'{part}': sample_id {sample_id} {wrong}; d2c verify says what else is wrong.")
                        before = sample_id
                        name = names[label] if 0 <= label < len(names) else ""
                        yield Row(row["sample_id"], row["key"], label, name, row["image"]["bytes"] if with_images else b"")
        except (*provenance.UNREADABLE, TypeError) as error:  # damaged; TypeError: a null where there should be a value
            raise UserError(f"'{part}' cannot be read ({first_line(error)}); d2c verify says what is wrong.") from error


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `out`; renames it to `out` if the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~UMASK)
        try:
            os.rename(temporary, out)  # onto an empty folder, but never onto one that has been filled meanwhile
        except OSError as error:
            raise UserError(f"'{out}' came while it was being written: {error.strerror}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _webdataset(folder: Path, names: list[str], out: Path, per_shard: int) -> int:
    """Tars of KEY.jpg, KEY.cls and KEY.json; the same bytes every time."""
    count = 0
    with _whole_folder(out) as temporary:
        rows = _rows(folder, names)
        for number in itertools.count():
            some = itertools.islice(rows, per_shard)
            first = next(some, None)
            if first is None:
                break
            with tarfile.open(temporary / f"{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
                for row in itertools.chain([first], some):
                    facts = {"key": row.key, "label": row.label, "name": row.name, "sample_id": row.sample_id}
                    _add(shard, f"{row.stem}.{row.extension()}", row.image)
                    if row.label >= 0:
                        _add(shard, f"{row.stem}.cls", str(row.label).encode())
                    _add(shard, f"{row.stem}.json", json.dumps(facts).encode())
                    count += 1
        if any(names):  # beside the tars, where `d2c` looks for the names of its labels; a line each
            lines = [" ".join(name.split()) or f"label {label}" for label, name in enumerate(names)]
            (temporary / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return count


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner and group empty
    member.size, member.mode = len(content), 0o644
    shard.addfile(member, io.BytesIO(content))


def _folders(folder: Path, names: list[str], out: Path, per_shard: int) -> int:
    """class_name/image.jpg, and metadata.csv with what the names of folders and files do not say."""
    places = folder_names(names)
    count = 0
    with _whole_folder(out) as temporary, open(temporary / METADATA, "w", newline="", encoding="utf-8") as file:
        table = _csv(file, "file_name", "sample_id", "key", "label", "name")
        for row in _rows(folder, names):
            place = places[row.label] if 0 <= row.label < len(places) else UNLABELLED
            path = temporary / place / f"{row.stem}.{row.extension()}"
            path.parent.mkdir(exist_ok=True)
            with open(path, "xb") as image:  # x: two rows of one name must not pass in silence
                image.write(row.image)
            table((f"{place}/{path.name}", row.sample_id, row.key, row.label, row.name))
            count += 1
    return count


def _ids(folder: Path, names: list[str], out: Path, per_shard: int) -> int:
    """The keys, a line each; or CSV."""
    count = 0
    with whole(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        as_csv = out.suffix.lower() == ".csv"
        table = _csv(file, "sample_id", "key", "label", "name") if as_csv else None
        for row in _rows(folder, names, with_images=False):
            if table:
                table((row.sample_id, row.key, row.label, row.name))
            elif "\n" in row.key or "\r" in row.key:
                raise UserError(
                    f"the key {row.key!r} has a line break, so it cannot be a line of its own. A file that ends in .csv can hold it."
                )
            else:
                file.write(row.key + "\n")
            count += 1
    return count


FORMS: dict[str, Callable[[Path, list[str], Path, int], int]] = {"webdataset": _webdataset, "folders": _folders, "ids": _ids}


def _csv(file: IO[str], *columns: str) -> Callable[[tuple[object, ...]], object]:
    """Writes rows, in which a text that a spreadsheet would take for a formula has a ' before it."""
    write = csv.writer(file, lineterminator="\n").writerow
    write(columns)
    return lambda row: write([f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULAS) else cell for cell in row])


def folder_names(names: list[str]) -> list[str]:
    """A folder name for every class: one safe on every file system, and no two alike even where case is not told apart."""
    taken = {UNLABELLED, METADATA}
    found = []
    for label, name in enumerate(names):
        place = _safe(name) or f"label_{label}"
        while place.casefold() in taken:
            place = f"{place}_{label}"
        taken.add(place.casefold())
        found.append(place)
    return found


def _safe(name: str) -> str:
    """A class name as one path component; empty where nothing of it can stay."""
    name = unicodedata.normalize("NFC", name)
    name = "".join("_" if char in '<>:"/\\|?*' or unicodedata.category(char)[0] == "C" else char for char in name)
    name = name.encode("utf-8", "replace")[:_FOLDER_BYTES].decode("utf-8", "ignore")
    name = " ".join(name.split()).strip(". ")  # hidden, or eaten by Windows
    if name.startswith(_FORMULAS):
        name = f"_{name[1:]}"  # metadata.csv names the folder, and a spreadsheet would take that for a formula
    return f"{name}_" if name.split(".")[0].casefold() in _RESERVED else name
