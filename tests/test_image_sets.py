"""Anybody's images: every layout is read alike, what cannot be read is said, and what is measured is what there is."""

import io
import json
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from d2c_ray import cli
from d2c_ray.config import EvaluateConfig, evaluate_options
from d2c_ray.data import image_sets, reference_stats
from d2c_ray.data.decode import decode, encode_png
from d2c_ray.errors import UserError
from d2c_ray.evaluate.frechet import frechet_distance, statistics
from d2c_ray.models import frozen, networks
from d2c_ray.progress import Progress
from d2c_ray.report import html
from d2c_ray.report import image_sets as measured

PLENTY = 10**9
SMALL = "evaluate.image_size=32"
DIGITS = np.round(load_digits().images * 15.9375).astype(np.uint8)[..., None]  # 1797 x 8 x 8 x 1
LABELS = load_digits().target


def folder(path: Path, pixels: np.ndarray, labels: np.ndarray | None = None) -> Path:
    """PNG files, in a folder a class where there are labels; their names in the order of the rows."""
    for index, image in enumerate(pixels):
        file = path / ("" if labels is None else f"digit-{labels[index]}") / f"{index:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(image))
    return path


def npz(path: Path, pixels: np.ndarray, labels: np.ndarray | None = None) -> Path:
    np.savez_compressed(path, pixels, *(() if labels is None else (labels,)))
    return path


def parquet(path: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    images = pa.array(
        [{"bytes": encode_png(image), "path": None} for image in pixels], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": images, "label": pa.array(labels)}), path, row_group_size=7)
    return path


def samples(path: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    path.mkdir()
    for part, rows in enumerate(np.array_split(np.arange(len(pixels)), 3)):
        images = pa.array([encode_png(pixels[i]) for i in rows], pa.binary())
        table = pa.table({"index": pa.array(rows), "label": pa.array(labels[rows]), "image": images})
        pq.write_table(table, path / f"part-{part:06d}.parquet")
    return path


def read_all(given: Path, size: int = 0, max_pixels: int = PLENTY) -> tuple[image_sets.Read, list[np.ndarray]]:
    """What is said of a set, and its images in its order."""
    read = image_sets.Read()
    found = []
    for pixels in image_sets.decoded(image_sets.find(given), size, max_pixels, read):
        found.append(pixels)
        assert len(read.names) == len(read.labels) == len(found), "what is said of an image is there when it comes"
    return read, found


def test_every_layout_holds_the_same_images(tmp_path: Path) -> None:
    pixels, labels = DIGITS[:40], LABELS[:40]
    order = np.argsort(labels, kind="stable")  # as class folders list them
    pixels, labels = pixels[order], labels[order]
    given = {
        "folder": folder(tmp_path / "folder", pixels, labels), "npz": npz(tmp_path / "a.npz", pixels, labels),
        "parquet": parquet(tmp_path / "a.parquet", pixels, labels), "samples": samples(tmp_path / "samples-0123abcd", pixels, labels),
    }  # fmt: skip
    for kind, path in given.items():
        found = image_sets.find(path)
        assert (found.kind, found.count) == (kind, 40)
        read, images = read_all(path)
        assert read.labels == labels.tolist(), kind
        for mine, theirs in zip(images, pixels, strict=True):
            assert np.array_equal(np.broadcast_to(theirs, (8, 8, 3)), np.broadcast_to(mine, (8, 8, 3))), kind
        assert (read.sizes, read.rejected) == ({"8 x 8": 40}, [])
    assert image_sets.find(given["folder"]).class_names == [f"digit-{label}" for label in range(10)]
    assert read_all(given["folder"])[0].names[0] == "digit-0/00000.png"
    assert read_all(given["samples"])[0].names[3] == "sample 3"


def test_sizes_may_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = [(4 + i % 7, 5 + i % 3) for i in range(60)]
    for index, shape in enumerate(shapes):
        (tmp_path / f"{index:03d}.png").write_bytes(encode_png(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)))
    read, images = read_all(tmp_path)
    assert [image.shape[:2] for image in images] == shapes
    assert sum(read.sizes.values()) == 60 and len(read.sizes) == 21
    assert read.labels == [-1] * 60, "a folder without folders has no classes"


def test_images_of_many_sizes_fill_every_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And have the features that they have alone, in networks that see them in different sizes."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (8 + i, 40 - i, 3), dtype=np.uint8) for i in range(20)]
    for index, image in enumerate(images):
        (tmp_path / f"{index:03d}.png").write_bytes(encode_png(image))
    own = options("evaluate.device_batch=8")
    loaded = {name: networks.load(name, own, torch.device("cpu")) for name in ("efficientnet-lite2", "efficientnet-lite0")}
    wide = options("evaluate.device_batch=8", "evaluate.image_size=48")
    loaded["efficientnet-lite0"] = networks.load("efficientnet-lite0", wide, torch.device("cpu"))
    forwards = []
    in_batches = frozen.in_batches

    def counted(run: Callable[..., torch.Tensor], device_batch: int, *columns: torch.Tensor) -> torch.Tensor:
        forwards.append(len(columns[0]))
        return in_batches(run, device_batch, *columns)

    with monkeypatch.context() as patch:
        patch.setattr(networks.frozen, "in_batches", counted)
        found = measured._embed("images", image_sets.find(tmp_path), loaded, 8, 0, PLENTY, Progress("embed", 20, "images"))
    # Network and encoder each batch once: 8, 8 and 4 images for each of the two.
    assert sorted(forwards) == [4] * 2 + [8] * (len(forwards) - 2)
    for name, network in loaded.items():
        alone = np.concatenate([network.features(image[None]) for image in images])
        assert np.array_equal(found.features[name], alone)


@pytest.mark.parametrize("shape", [(8, 8, 1), (40, 56, 3), (32, 32, 3), (100, 33, 3)])
def test_images_of_one_size_have_the_features_of_a_batch(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, *shape), dtype=np.uint8)
    network = networks.load("efficientnet-lite2", options("evaluate.device_batch=8"), torch.device("cpu"))
    assert np.array_equal(network.both_of([network.prepare(image) for image in images])[0], network.features(images))


def test_large_images_are_left_out_and_few_are_held(tmp_path: Path) -> None:
    pixels = np.zeros((40, 400, 400, 3), np.uint8)  # half a megabyte each
    folder(tmp_path / "large", pixels)
    npz(tmp_path / "large.npz", pixels)
    del pixels
    read, images = read_all(tmp_path / "large", max_pixels=400 * 400 - 1)
    assert not images and "400 x 400 pixels, more than 159999" in read.rejected[0][1]
    for size in (0, 500):
        with pytest.raises(
            UserError, match="images of 400 x 400 pixels are more than --max-pixels 170000" if size else "--max-pixels 159999"
        ):
            read_all(tmp_path / "large.npz", size, 170_000 if size else 159_999)
    tracemalloc.start()
    try:
        for _ in image_sets.decoded(image_sets.find(tmp_path / "large"), 0, PLENTY, image_sets.Read()):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6, "the images of the decoders, of 19 MB in all"


def test_a_crop_is_the_one_that_training_makes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 40, 56, 3), dtype=np.uint8)
    crops = [decode(encode_png(image), 16, 3, PLENTY) for image in pixels]
    for given in (folder(tmp_path / "wide", pixels), npz(tmp_path / "wide.npz", pixels)):
        read, images = read_all(given, size=16)
        assert np.array_equal(images, crops)
        assert read.sizes == {"16 x 16": 3}


def test_what_cannot_be_decoded_is_counted_and_named(tmp_path: Path) -> None:
    folder(tmp_path, DIGITS[:5])
    (tmp_path / "00001.png").write_bytes(b"no picture")
    (tmp_path / "00003.png").write_bytes(encode_png(DIGITS[3])[:60])
    read, images = read_all(tmp_path)
    assert read.names == ["00000.png", "00002.png", "00004.png"]
    assert np.array_equal(images[1][..., :1], DIGITS[2])
    assert [name for name, _ in read.rejected] == ["00001.png", "00003.png"]
    assert "no known image format" in read.rejected[0][1]


def test_an_archive_is_streamed(tmp_path: Path) -> None:
    pixels = np.zeros((600, 160, 160, 3), np.uint8)  # 46 MB
    pixels[:, 0, 0, 0] = np.arange(600) % 256
    given = npz(tmp_path / "large.npz", pixels)
    del pixels
    tracemalloc.start()
    try:
        seen = np.concatenate([[image[0, 0, 0]] for image in image_sets.decoded(image_sets.find(given), 0, PLENTY, image_sets.Read())])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(seen, np.arange(600) % 256)
    assert peak < 3e6, "a few images of 77 kB, not the archive"


def write_truncated(path: Path, lies: int = 0) -> Path:
    """An archive whose array says more images than it holds; its list of contents adds bytes that are not there."""
    out = io.BytesIO()
    np.lib.format.write_array(out, DIGITS[:10])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", out.getvalue()[:-100])
        archive.getinfo("arr_0.npy").file_size += lies
    return path


def said(path: Path, shape: tuple[object, ...], descr: str = "|u1", values: bytes = b"", version: bytes = b"\x01\x00") -> Path:
    """An archive whose array has a header that says anything."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + values)
    return path


def flipped(path: Path, at: int) -> Path:
    """An archive with a byte of its values changed."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    return path


def stored(path: Path) -> Path:
    np.savez(path, DIGITS[:10])
    return path


def encrypted(path: Path) -> Path:
    """Says that it is encrypted, in both of its lists."""
    content = bytearray(stored(path).read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + at] |= 1
    path.write_bytes(content)
    return path


def unfinished(path: Path) -> Path:
    samples(path, DIGITS[:6], LABELS[:6])
    (path / "_progress.json").write_text("{}")
    return path


def without_images(path: Path) -> Path:
    pq.write_table(pa.table({"index": [0, 1], "label": [0, 1]}), path)
    return path


def touched(path: Path, content: bytes = b"") -> Path:
    path.write_bytes(content)
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda tmp: tmp / "nowhere", "there is no '.*nowhere'; a folder with images"),
    "an empty folder": (lambda tmp: tmp, "no images in "),
    "another file": (lambda tmp: touched(tmp / "a.txt"), "a file of a kind that is not read"),
    "no archive": (lambda tmp: touched(tmp / "a.npz", b"no zip"), "it is no .npz archive"),
    "other names": (lambda tmp: [np.savez(tmp / "a.npz", images=DIGITS[:3]), tmp / "a.npz"][1], "holds images and no arr_0"),
    "statistics": (
        lambda tmp: [np.savez(tmp / "a.npz", mu=np.zeros(3), sigma=np.eye(3)), tmp / "a.npz"][1],
        r"holds mu, sigma \(statistics, which can be a reference and nothing else\)",
    ),
    "floats": (lambda tmp: npz(tmp / "a.npz", DIGITS[:3] / 255.0), "arr_0 is float64 of 3 x 8 x 8 x 1; uint8 of N x H x W x 3"),
    "channels first": (lambda tmp: npz(tmp / "a.npz", DIGITS[:3].transpose(0, 3, 1, 2)), "arr_0 is uint8 of 3 x 1 x 8 x 8"),
    "columns first": (lambda tmp: npz(tmp / "a.npz", np.asfortranarray(DIGITS[:3].repeat(3, 3))), "Fortran order"),
    "pickles": (lambda tmp: npz(tmp / "a.npz", np.array([{"a": 1}], object)), "arr_0 is object of 1"),
    "labels of others": (lambda tmp: npz(tmp / "a.npz", DIGITS[:3], LABELS[:4]), "one whole number for each of the 3 images"),
    "a cut archive": (lambda tmp: write_truncated(tmp / "a.npz"), r"says uint8 of 10 x 8 x 8 x 1, 640 bytes, and the archive holds 540"),
    "an archive that lies": (lambda tmp: write_truncated(tmp / "a.npz", 100), "ends after 8 of 10 images"),
    "more than memory": (lambda tmp: said(tmp / "a.npz", (10**12, 10**6, 10**6, 3)), "and the archive holds 0"),
    "labels more than memory": (lambda tmp: npz(tmp / "a.npz", DIGITS[:3], np.zeros((3, 10**5), np.int8)), "arr_1 is int8 of 3 x 100000"),
    "less than nothing": (lambda tmp: said(tmp / "a.npz", (-1, 8, 8, 3)), r"has the shape \(-1, 8, 8, 3\), which is none"),
    "a truth for a side": (lambda tmp: said(tmp / "a.npz", (3, True, 8, 3)), "which is none"),
    "no pixels": (lambda tmp: npz(tmp / "a.npz", DIGITS[:3, :0]), "images without a pixel"),
    "no shape": (lambda tmp: said(tmp / "a.npz", ("a",)), "arr_0: it cannot be read"),
    "an unknown version": (lambda tmp: said(tmp / "a.npz", (1,), version=b"\x09\x00"), "arr_0: it cannot be read|nobody knows"),
    "a wrong checksum": (lambda tmp: flipped(stored(tmp / "a.npz"), 400), "Bad CRC-32 for file 'arr_0.npy'"),
    "a broken stream": (lambda tmp: flipped(npz(tmp / "a.npz", DIGITS[:100]), 700), "arr_0: it cannot be read"),
    "a broken header": (lambda tmp: flipped(stored(tmp / "a.npz"), 80), "arr_0: it cannot be read"),
    "a password": (lambda tmp: encrypted(tmp / "a.npz"), "is encrypted, password required"),
    "an endless label": (lambda tmp: npz(tmp / "a.npz", DIGITS[:2], np.asarray([0, 2**64 - 1], np.uint64)), "has the label 18446744073709551615"),
    "no images in a table": (lambda tmp: without_images(tmp / "a.parquet"), "sample.keep=none, which keeps features and no images"),
    "no table": (lambda tmp: touched(tmp / "a.parquet", b"PAR1"), "no Parquet file could be read"),
    "an unfinished sampling": (lambda tmp: unfinished(tmp / "samples-0"), "is not finished"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_set_of_images_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        read_all(make(tmp_path))


def options(*overrides: str) -> EvaluateConfig:
    return evaluate_options([SMALL, "evaluate.kid_subsets=2", *overrides], {})


def d2c(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit status and what was printed."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real digits as a reference, others that were trained on, copies of these, and others held out."""
    root = tmp_path_factory.mktemp("sets")
    copies = np.arange(700, 730).repeat(2)
    return {
        "reference": folder(root / "reference", DIGITS[:100], LABELS[:100]), "train": parquet(root / "train.parquet", DIGITS[700:730], LABELS[700:730]),
        "copies": npz(root / "copies.npz", DIGITS[copies], LABELS[copies]), "held_out": folder(root / "held_out", DIGITS[400:460], LABELS[400:460]),
    }  # fmt: skip


def test_copies_are_called_out_from_the_command_line(sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    rest = ["--train", str(sets["train"]), "--held-out", str(sets["held_out"]), "--out", str(out), "--batch", "16"]
    status, said, errors = d2c(capsys, "evaluate", str(sets["copies"]), SMALL, "--reference", str(sets["reference"]), *rest)
    assert status == 0, errors
    found = json.loads(out.read_text())
    copying = found["copying"]
    assert copying["share_closer"] == 1.0 and copying["median_generated"] < 1e-3 < copying["median_real"]
    assert copying["pairs"][0]["image"].startswith("arr_0[") and copying["pairs"][0]["nearest"].startswith("train.parquet#")
    pair = copying["pairs"][0]
    assert int(re.sub(r"\D", "", pair["nearest"].split("#")[1])) == pair["index"] // 2, "the image that it is a copy of"
    assert found["counts"] == {"generated": 60, "sampled": 60, "real": 60, "subset": 30, "reference": 100, "width": 1280}
    assert found["label_agreement"] is not None, "class folders and numbers of the same ten classes"
    assert found["record"]["generated"] == 60 and found["record"]["network"] == "efficientnet-lite2" and "sampler" not in found["record"]
    for words in (
        "measured in efficientnet-lite2",
        "floor: its subset of 30",
        "none of them is an FID",
        "--network inception",
        "100.00%",
        f"record: {out}",
    ):
        assert words in said, words


def test_mirrored_copies_are_called_out_unless_training_did_not_mirror(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirrored = npz(tmp_path / "mirrored.npz", DIGITS[np.arange(700, 730).repeat(2), :, ::-1])
    out = tmp_path / "record.json"
    rest = ["--reference", str(sets["reference"]), "--held-out", str(sets["held_out"]), "--out", str(out)]
    given = [str(mirrored), SMALL, *rest, "--train", str(sets["train"])]
    status, said, errors = d2c(capsys, "evaluate", *given)
    assert status == 0, errors
    found = json.loads(out.read_text())
    assert found["copying"]["share_closer"] == 1.0 and found["record"]["copying_orientations"] == 2
    pair = found["copying"]["pairs"][0]
    assert pair["mirrored"] and int(re.sub(r"\D", "", pair["nearest"].split("#")[1])) == pair["index"] // 2
    assert f"from {pair['nearest']}, mirrored" in said and "30 in both orientations" in said
    assert "note: copies are sought in both orientations, as training with flips shows them; --no-mirror, where it had none" in said
    status, said, errors = d2c(capsys, "evaluate", *given, "--no-mirror")
    assert status == 0, errors
    other = json.loads(out.read_text())
    assert other["copying"]["share_closer"] < 0.5 and other["record"]["copying_orientations"] == 1
    assert other["subset"] == found["subset"] and "in both orientations" not in said
    status, _, errors = d2c(capsys, "evaluate", str(mirrored), *rest, "--no-mirror")
    assert status == 2 and "--no-mirror is of the images that were trained on: --train" in errors


def test_the_numbers_are_those_of_the_features(sets: dict[str, Path], tmp_path: Path) -> None:
    """Of the same network by hand; published statistics of the same images give the same distance."""
    own = options("evaluate.more_networks=[efficientnet-lite0]")
    found = measured.evaluate(str(sets["copies"]), str(sets["reference"]), own, device=torch.device("cpu"))
    order = np.argsort(LABELS[:100], kind="stable")
    network = networks.load("efficientnet-lite2", own, torch.device("cpu"))
    real, made = network.features(DIGITS[:100][order]), network.features(DIGITS[np.arange(700, 730).repeat(2)])
    distance = frechet_distance(statistics(made), statistics(real))
    assert found["generated"]["frechet"] == pytest.approx(distance, rel=1e-6)
    assert found["more"]["efficientnet-lite0"]["generated"]["frechet"] != pytest.approx(distance, rel=1e-3)
    assert found["copying"] is None and found["real"]["frechet"] is None
    assert any("--train" in note for note in measured.notes(found)) and any("--held-out" in note for note in measured.notes(found))

    reference_stats.write(tmp_path / "stats.npz", statistics(real))
    given = measured.evaluate(str(sets["copies"]), str(tmp_path / "stats.npz"), options(), device=torch.device("cpu"))
    assert given["generated"]["frechet"] == pytest.approx(distance, rel=1e-6)
    assert given["generated"]["precision"] is None and given["generated"]["kid"] is None
    assert given["record"]["reference_statistics"] and not given["record"]["reference_images"]
    assert "to the statistics in" in "\n".join(measured.lines(given))
    reference_stats.write(tmp_path / "narrow.npz", statistics(np.random.default_rng(0).normal(size=(100, 64))))
    with pytest.raises(UserError, match="statistics of 64 features, and efficientnet-lite2 has 1280"):
        measured.evaluate(str(sets["copies"]), str(tmp_path / "narrow.npz"), options())


def test_the_references_statistics_are_kept(sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a second set of images is measured against without reading the reference again."""
    kept, out = tmp_path / "kept" / "statistics.npz", tmp_path / "record.json"
    given = ["evaluate", str(sets["copies"]), SMALL, "--out", str(out)]
    status, said, errors = d2c(capsys, *given, "--reference", str(sets["reference"]), "--save-statistics", str(kept))
    assert status == 0 and f"statistics of the reference in efficientnet-lite2: {kept}" in said, errors
    first = json.loads(out.read_text())
    assert d2c(capsys, *given, "--reference", str(kept))[0] == 0
    second = json.loads(out.read_text())
    assert second["generated"]["frechet"] == pytest.approx(first["generated"]["frechet"], rel=1e-6)
    assert second["counts"]["reference"] == 100 and second["record"]["reference_statistics"]
    for file, words in ((tmp_path / "a.txt", "a file that ends in .npz would do"), (out / "a.npz", "is no folder")):
        status, _, errors = d2c(capsys, *given, "--reference", str(sets["reference"]), "--save-statistics", str(file))
        assert status == 2 and words in errors
    status, _, errors = d2c(capsys, *given, "--reference", str(kept), "--save-statistics", str(tmp_path / "b.npz"))
    assert status == 2 and "--save-statistics: the reference is statistics alone" in errors


def test_held_out_images_are_taken_out_of_the_reference(tmp_path: Path) -> None:
    real, made = folder(tmp_path / "real", DIGITS[:60]), folder(tmp_path / "made", DIGITS[60:90])
    (real / "00007.png").write_bytes(b"no picture")
    found = measured.evaluate(str(made), str(real), options(), held_out="20")
    assert found["counts"] == {"generated": 20, "sampled": 30, "real": 20, "subset": 0, "reference": 39, "width": 1280}
    assert found["sets"]["reference"]["rejected"] == 1
    assert "1 could not be decoded and are left out: 00007.png: no known image format" in "\n".join(measured.lines(found))
    assert found["label_agreement"] is None, "without labels"


def test_classes_are_the_same_by_name() -> None:
    def embedded(role: str, labels: list[int], names: list[str] | None) -> measured.Embedded:
        return measured.Embedded(role, "", "folder", [str(i) for i in labels], np.asarray(labels), names, {}, {}, {}, [])

    def unified(*sets: measured.Embedded) -> tuple[bool, list[list[int]], str]:
        read = {own.role: own for own in sets}
        labelled, _, said = measured._unify(read)
        return labelled, [own.labels.tolist() for own in read.values()], " ".join(said)

    dogs = embedded("images", [0, 1], ["cat", "dog"])
    assert unified(dogs, embedded("reference", [0, 1, 2], ["ant", "cat", "dog"])) == (True, [[1, 2], [0, 1, 2]], "")
    labelled, _, said = unified(embedded("images", [0, 2], None), embedded("reference", [0, 1, 2], ["ant", "cat", "dog"]))
    assert labelled and "numbers are taken for the places of the class folders" in said
    labelled, _, said = unified(embedded("images", [0, 3], None), embedded("reference", [0, 1, 2], ["ant", "cat", "dog"]))
    assert not labelled and "nothing is measured by class" in said
    assert not unified(embedded("images", [-1, -1], None), embedded("reference", [0, 1], None))[0]
    others = embedded("images", [0, 1], ["run-1", "run-2"])
    labelled, _, said = unified(others, embedded("reference", [0, 1, 2], ["ant", "cat", "dog"]))
    assert not labelled and "2 of its 2 class folders not in the reference (run-1, run-2)" in said
    most = embedded("images", [0, 1, 2], ["ant", "bee", "cat"])
    labelled, labels, said = unified(most, embedded("reference", [0, 1, 2], ["ant", "cat", "dog"]))
    assert (labelled, labels) == (True, [[0, 1, 2], [0, 2, 3]])
    assert "images has 1 of its 3 class folders not in the reference (bee): no image of these can agree" in said


def test_folders_of_other_names_are_no_classes(tmp_path: Path) -> None:
    real, made = folder(tmp_path / "real", DIGITS[:60], LABELS[:60] % 3), folder(tmp_path / "made", DIGITS[60:90], LABELS[60:90] % 3)
    for place in list(made.iterdir()):
        place.rename(made / place.name.replace("digit", "group"))
    found = measured.evaluate(str(made), str(real), options(), held_out="20")
    assert found["label_agreement"] is None and found["per_class"] is None
    assert any("3 of its 3 class folders not in the reference" in line for line in measured.lines(found))


def test_held_out_images_are_of_all_classes(tmp_path: Path) -> None:
    """Class folders come one after the other: whatever is measured of them is drawn from all."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    noise = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    apart = np.concatenate([DIGITS[:20], 255 - DIGITS[20:40], noise])  # on black, on white, and none at all
    real = folder(tmp_path / "real", apart, labels)
    for few, most in ((8, 20), (20, 8)):  # images and held-out ones, either the fewer
        rows = np.arange(few) * 60 // few
        made = folder(tmp_path / f"made-{few}", apart[rows], labels[rows])
        found = measured.evaluate(str(made), str(real), options("evaluate.neighbours=1"), held_out=str(most))
        assert found["counts"]["generated"] == found["counts"]["real"] == 8
        for part in ("generated", "real"):
            assert found[part]["coverage"] is not None
        # Of one class alone the distance would be several times as large.
        assert 0 < found["generated"]["frechet"] < 2.5 * found["real"]["frechet"] < 6.25 * found["generated"]["frechet"]


def test_classes_are_shown_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = networks.load("efficientnet-lite2", options(), torch.device("cpu"))

    @dataclass(frozen=True)
    class Narrow(networks.Network):
        """The same network's first four features, of which a class has enough images."""

        def both_of(self, prepared: list[torch.Tensor]) -> tuple[np.ndarray, None]:
            return super().both_of(prepared)[0][:, :4], None

    real, made = folder(tmp_path / "real", DIGITS[:60], LABELS[:60] % 3), folder(tmp_path / "made", DIGITS[60:120], LABELS[60:120] % 3)
    monkeypatch.setattr(measured.networks, "load", lambda *_: Narrow(**vars(narrow)))
    found = measured.evaluate(str(made), str(real), options())
    assert set(found["per_class"]) == {"digit-0", "digit-1", "digit-2"}
    (line,) = [line for line in measured.lines(found) if line.startswith("Fréchet distance of 3 classes each: best ")]
    order = sorted(found["per_class"], key=found["per_class"].__getitem__)
    assert re.findall(r"digit-\d", line) == [*order[:2], order[2]]
    arm = SimpleNamespace(name="own", metrics={**found, "per_class": {"0": 3.0, "1": 1.0, "7": 2.0}})
    (row,) = html.per_class([arm], ["ant", "bee"])  # type: ignore[list-item]
    assert (row["best"], row["worst"], row["classes"]) == ("bee 1.00, label 7 2.00", "ant 3.00", 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{images}"], "--reference, a folder, an .npz or .parquet of them, is missing"),
        (["{images}", "--reference", "{images}", "--held-out", "30"], "--held-out 30 of 20 images in the reference: 2 to 10 would do"),
        (["{images}", "--reference", "{images}", "train.lr=1"], "'train.lr=1' means nothing to images that belong to no run"),
        (["{images}", "--reference", "{images}", "evaluate.reference=a.npz"], "'evaluate.reference=a.npz' does nothing to .*: --reference, which takes"),
        (["{images}", "--reference", "{images}", "evaluate.unguided=true"], "'evaluate.unguided=true' does nothing .*without guidance, measured by"),
        (["{images}", "--reference", "{images}", "evaluate.max_reference=9"], "'evaluate.max_reference=9' does nothing .*a set of fewer images would do"),
        (["{images}", "--reference", "{images}", "--network", "efficientnet-lite3"], "did you mean 'efficientnet-lite"),
        (["{images}", "--reference", "{images}", "--out", "record.txt"], "a file that ends in .json would do"),
        (["{images}", "--reference", "{images}", "--out", "{bad}/00000.png/record.json"], "--out .*record.json: '.*00000.png' is no folder"),
        (["{images}", "--reference", "{images}", "--out", "{folder}"], "--out .*folder.json: there is a folder of that name"),
        (["{one}", "--reference", "{images}"], "1 image in '.*one' has no spread"),
        (["{bad}", "--reference", "{images}", SMALL], "3 of 3 images in '.*bad' cannot be decoded, the first 00000.png"),
        (["configs/debug.yaml", "--network", "inception"], "--network is of images; a configuration says it itself"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {
        "images": folder(tmp_path / "images", DIGITS[:20]),
        "one": folder(tmp_path / "one", DIGITS[:1]),
        "bad": folder(tmp_path / "bad", DIGITS[:3]),
        "folder": tmp_path / "folder.json",
    }
    places["folder"].mkdir()
    for file in places["bad"].iterdir():
        file.write_bytes(b"no picture")
    status, _, errors = d2c(capsys, "evaluate", *(arg.format(**places) for arg in args))
    (line,) = [line for line in errors.splitlines() if line.startswith("d2c: ")]
    assert status == 2
    assert re.search(message, line), line


def test_colours_of_a_palette_and_alpha_are_read_as_training_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (8, 8, 4), dtype=np.uint8), "RGBA")
    image.save(tmp_path / "a.png")
    image.convert("RGB").convert("P").save(tmp_path / "b.png")
    _, images = read_all(tmp_path)
    for name, found in zip("ab", images, strict=True):
        assert np.array_equal(found, decode((tmp_path / f"{name}.png").read_bytes(), 8, 3, PLENTY))
