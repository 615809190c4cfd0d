"""The condensed dataset as a thing one holds: its provenance, card, checks and exports, and that other tools read it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT

from d2c_ray import schema
from d2c_ray.config import DataConfig, StorageConfig, TextConfig, VaeConfig, VisionConfig
from d2c_ray.data import at_hand, attached, decode, export, manifest, provenance, tables, units, verify
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, offline
from d2c_ray.models import text as encoders_of_text
from d2c_ray.models import vision as encoders_of_images
from d2c_ray.report import card
from d2c_ray.training.batches import dequantise

CPU = torch.device("cpu")
GRID, SEEN, ROWS_PER_PART, DEVICE_BATCH = 4, 64, 9, 8


def read_rows(source: Path, count: int, pattern: str = "train-000.parquet", size: int = 32) -> tuple[pa.Table, list[str]]:
    """The first decoded rows of a source, with their encoded images, and the class names."""
    data = DataConfig(path=str(source), pattern=pattern, image_size=size)
    options, silent, listing = StorageConfig(), type("Silent", (), {"advance": lambda self, n: None})(), manifest.Listing()
    found = manifest.find(data, options)
    table = pa.concat_tables(list(manifest.scan(found, data, options, listing, 10_000, silent)))
    return units.decode_rows(table.slice(0, count), data, options, keep_bytes=True)[0], listing.class_names(found, data, options)


def write_artefact(
    folder: Path, rows: pa.Table, names: list[str], *, flip: bool = True, vae: Path | None = None, storage: str = "int8",
    encoder: str = "efficientnet-lite0", text: bool = True,
) -> Path:  # fmt: skip
    """A condensed dataset in exactly the form that attach leaves, of real images and real encodings."""
    folder.mkdir(parents=True)
    pixels = torch.from_numpy(units.pixels_of(rows))
    latent: dict[str, Any] = {"kind": "pixels", "channels": pixels.shape[3], "side": pixels.shape[1]}
    whole, vision = rows, {}
    if vae is not None:
        network = frozen.Vae(VaeConfig(path=str(vae), device_batch=DEVICE_BATCH), CPU)
        found = attached.latents(pixels, network, flip)
        whole = attached.add(whole.drop_columns("pixels"), found)
        facts = frozen.vae_facts(str(vae), "")
        latent = {"kind": "vae", "channels": facts["channels"], "side": found["latent_mean"].shape[3], "scale": facts["scale"]}
        latent |= {"shift": facts["shift"], "vae": facts["hash"], "encoder": facts["encoder"]}
    if encoder != "none":
        options = VisionConfig(encoder=encoder, image_size=SEEN, storage=storage, device_batch=DEVICE_BATCH)
        model = encoders_of_images.load(options, GRID, CPU)
        tokens, cosine = attached.tokens(pixels, model, GRID, flip, storage == "int8", "vision", DEVICE_BATCH)
        whole = attached.add(whole, tokens, {"vision": cosine})
        vision["vision"] = {**encoders_of_images.facts(options, GRID), "storage": storage, "cosine_min": cosine}
    for part, start in enumerate(range(0, len(whole), ROWS_PER_PART)):
        facts = {"rejected": [], "device": "cpu", "storage": dict.fromkeys(vision, storage)}
        attached.write(folder / f"part-{part:06d}.parquet", whole.slice(start, ROWS_PER_PART), facts, names)
    words = TextConfig(encoder="minilm", tokens=8, device_batch=8)
    prompts = [encoders_of_text.prompt(words.template, name) if text else "" for name in names]
    states = encoders_of_text.encode(words, prompts, CPU) if text else None
    attached.write_classes(folder / "classes.parquet", names, prompts, states)
    labels = rows.column("label").to_numpy()
    chosen = {"images": len(rows), "selector": "interval", "budget": len(rows), "f": 0.75, "share": len(rows) / 5000}
    chosen |= {"scores": "scores-01234567", "num_classes": len(set(labels.tolist())), "shortfall": 0}
    position = [int((labels[:row] == label).sum()) for row, label in enumerate(labels)]
    selection = {
        "sample_id": rows.column("sample_id").to_pylist(), "key": rows.column("key").to_pylist(), "label": labels.tolist(),
        "score": np.linspace(0.1, 0.9, len(rows)).tolist(), "rank": position, "class_size": [500] * len(rows), "position": position,
    }  # fmt: skip
    tables.write(folder / "selection.parquet", pa.table(selection, schema=tables.arrow_schema(schema.SELECTION)), chosen)
    tables.write(folder / "rows.parquet", rows.select(["sample_id", "key"]), {})
    described = provenance.write(
        folder, fingerprint="0123abcd", rows=len(rows), class_names=names, flip=flip, latent=latent, grid=GRID, vision=vision, selection=chosen,
        data={"source": "parquet", "path": "/data/cifar10", "image_size": 32, "channels": 3},
        vae={"path": str(vae), "subfolder": "", "precision": "fp32", "device_batch": DEVICE_BATCH} if vae else None,
        text=encoders_of_text.facts(words) if text else None,
        cost_seconds={"teacher": 3600.0, "score": 120.5, "select": 0.4, "attach": 61.0},
        versions={"python": "3.11", "pillow": PIL.__version__, "commit": "abc1234"},
    )  # fmt: skip
    facts = {"class_names": names, "labels": sorted(set(labels.tolist())), "flip": flip, "latent": latent, "fingerprint": "0123abcd"}
    success = {
        "stage": "attach",
        "fingerprint": "0123abcd",
        "rows_in": len(rows),
        "rows_done": len(rows),
        "rows_rejected": 0,
        "seconds": 61.0,
        "facts": facts,
    }
    card.write(folder, described)
    (folder / "_SUCCESS.json").write_text(json.dumps(success))
    return folder


@pytest.fixture(scope="module")
def made(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 CIFAR-10 images in pixels, int8 tokens of both flips, text."""
    rows, names = read_rows(cifar10, 40)
    return write_artefact(tmp_path_factory.mktemp("made") / "condensed-0123abcd", rows, names)


@pytest.fixture(scope="module")
def made_with_vae(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images as latents, bf16 tokens."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2,
        norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    vae = tmp_path_factory.mktemp("vae")
    network.save_pretrained(vae)
    rows, names = read_rows(cifar10, 12)
    return write_artefact(tmp_path_factory.mktemp("latents") / "condensed-0123abcd", rows, names, vae=vae, storage="bf16")


@pytest.fixture(scope="module")
def made_plain(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images without labels, text, tokens and flips."""
    rows, _ = read_rows(cifar10, 12)
    unlabelled = rows.set_column(rows.column_names.index("label"), "label", pa.array([-1] * 12, pa.int32()))
    return write_artefact(tmp_path_factory.mktemp("plain") / "condensed-0123abcd", unlabelled, [], flip=False, encoder="none", text=False)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` to break."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a table, its schema's and fields' metadata kept."""
    pq.write_table(change(pq.read_table(path, partitioning=None)), path, compression="zstd")


def with_values(name: str, change: Callable[[np.ndarray], None]) -> Callable[[pa.Table], pa.Table]:
    """Changes a tensor column in place."""

    def changed(table: pa.Table) -> pa.Table:
        values = np.array(tables.tensor_values(table, name))
        change(values)
        return table.set_column(table.column_names.index(name), table.schema.field(name), tables.tensor_column(values))

    return changed


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """Changes a plain column."""

    def changed(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        return table.set_column(table.column_names.index(name), field, pa.array(change(table.column(name).to_pylist()), field.type))

    return changed


def with_provenance(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stated = json.loads((folder / "provenance.json").read_text())
    change(stated)
    (folder / "provenance.json").write_text(json.dumps(stated))


def take_stock(folder: Path) -> None:
    """Makes the inventory agree, so that only what is inside the files can tell."""
    with_provenance(folder, lambda stated: stated.update(files=provenance.inventory(folder)))


def test_good_artefacts_pass_and_say_what_was_looked_at(made: Path, made_with_vae: Path, made_plain: Path) -> None:
    found = verify.check(made, images=0)
    assert (found.faults, found.notes) == ([], [])
    assert (found.rows, found.files, found.decoded, found.encoded) == (40, 7, 40, 40)
    assert found.encoders == ["minilm", "efficientnet-lite0"]
    found = verify.check(made, images=5)
    assert (found.faults, found.decoded) == ([], 5)
    found = verify.check(made_with_vae)
    few = "images are too few to see by themselves whether their flips are right"
    assert (found.faults, found.notes) == ([], [f"'{column}': 12 {few}" for column in ("latent_mean", "latent_std", "vision")])
    assert len(found.encoders) == 3
    said: list[str] = []
    assert verify.verify(made_plain, say=said.append) == []
    assert said == []


PART = "part-000001.parquet"
RAYS = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}


def with_code(table: pa.Table) -> pa.Table:
    """The bytes of the images as of Ray's type, whether or not that is registered in this process."""
    image = table.schema.field("image")
    inside = [part.with_metadata(RAYS) if part.name == "bytes" else part for part in image.type.fields]
    return table.cast(
        pa.schema([field.with_type(pa.struct(inside)) if field.name == "image" else field for field in table.schema], table.schema.metadata)
    )


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no _SUCCESS": (lambda f: (f / "_SUCCESS.json").unlink(), r"_SUCCESS\.json: is missing: the dataset is not finished"),
    "no JSON": (lambda f: (f / "_SUCCESS.json").write_text("{"), r"_SUCCESS\.json: cannot be read"),
    "another fingerprint": (
        lambda f: with_provenance(f, lambda s: s.update(fingerprint="ffffffff")), r'_SUCCESS\.json: says fingerprint "0123abcd", provenance\.json "ffffffff"',
    ),
    "other classes": (lambda f: with_provenance(f, lambda s: s["class_names"].reverse()), r"_SUCCESS\.json: says class_names"),
    "no provenance": (lambda f: (f / "provenance.json").unlink(), r"holds no provenance\.json"),
    "provenance cut off": (lambda f: (f / "provenance.json").write_text('{"format": 1'), r"provenance\.json' is no JSON"),
    "provenance of another form": (lambda f: with_provenance(f, lambda s: s["data"].pop("image_size")), r"'data\.image_size' is missing"),
    "provenance of the future": (lambda f: with_provenance(f, lambda s: s.update(format=2)), r"format 2 is newer"),
    "a part lost": (lambda f: (f / PART).unlink(), r"part-000001\.parquet: is missing"),
    "a part more": (lambda f: shutil.copy(f / PART, f / "part-000009.parquet"), r"part-000009\.parquet: is not in the inventory"),
    "a byte changed": (lambda f: flip_byte(f / PART), r"part-000001\.parquet: sha256 is \w+, the inventory says \w+"),
    "cut off": (lambda f: (f / PART).write_bytes((f / PART).read_bytes()[:-100]), r"part-000001\.parquet: bytes is \d+, the inventory says \d+"),
    "no classes": (lambda f: (f / "classes.parquet").unlink(), r"classes\.parquet: is missing"),
}  # fmt: skip
# As above, with an inventory that agrees.
INSIDE: dict[str, tuple[Callable[[Path], None], str]] = {
    "unreadable": (lambda f: (f / PART).write_bytes(b"PAR1 no more"), r"part-000001\.parquet: cannot be read"),
    "rows lost": (lambda f: rewrite(f / PART, lambda t: t.slice(2)), r"part-\*\.parquet: 38 rows in all, provenance\.json says 40"),
    "rows lost, selected": (lambda f: rewrite(f / PART, lambda t: t.slice(2)), r"selection\.parquet: column 'sample_id': 2 chosen images are in no part, the first 9"),
    "a column lost": (lambda f: rewrite(f / PART, lambda t: t.drop_columns(["vision_scale"])), r"part-000001\.parquet: column 'vision_scale' is missing"),
    "a column more": (lambda f: rewrite(f / PART, lambda t: t.append_column("x", t.column("label"))), r"column 'x' is not one that provenance"),
    "another type": (lambda f: rewrite(f / PART, lambda t: t.set_column(2, "label", t.column("label").cast(pa.int32()))), r"column 'label' is int32, int64 would do"),
    "another shape said": (lambda f: rewrite(f / PART, lambda t: reshaped(t, [2, 8, 2560])), r"column 'vision' says int8 of shape \[2, 8, 2560\], provenance\.json int8 of \[2, 16, 1280\]"),
    "no shape said": (lambda f: rewrite(f / PART, lambda t: reshaped(t, None)), r"column 'vision' does not say its dtype and shape"),
    "no hub metadata": (lambda f: rewrite(f / PART, lambda t: t.replace_schema_metadata({})), r"schema metadata 'huggingface' says null of 'image'"),
    "a type that code belongs to": (
        lambda f: rewrite(f / PART, with_code),
        r"part-000001\.parquet: column 'image' is of the extension type 'ray\.data\.arrow_pickled_object'",
    ),
    "null": (lambda f: rewrite(f / PART, with_column("key", lambda v: [*v[:4], None, *v[5:]])), r"part-000001\.parquet: column 'key': row 4 is null, of 1"),
    "null image": (
        lambda f: rewrite(f / PART, with_column("image", lambda v: [{**v[0], "bytes": None}, *v[1:]])), r"part-000001\.parquet: column 'image': row 0 is null",
    ),
    "null tensor": (lambda f: rewrite(f / PART, with_column("vision", lambda v: [*v[:3], None, *v[4:]])), r"column 'vision': row 3 is null"),
    "order": (lambda f: rewrite(f / PART, lambda t: t.take(list(range(8, -1, -1)))), r"column 'sample_id': 16 comes after 17 \(row 10 over all parts\); it must ascend"),
    "an id twice": (lambda f: rewrite(f / PART, with_column("sample_id", lambda v: [v[0], v[0], *v[2:]])), r"column 'sample_id': 9 comes after 9"),
    "a key twice": (lambda f: rewrite(f / PART, with_column("key", lambda v: [v[0], v[0], *v[2:]])), r"column 'key': 'train-000\.parquet#000000009' occurs 2 times"),
    "a label too high": (lambda f: rewrite(f / PART, with_column("label", lambda v: [*v[:2], 10, *v[3:]])), r"column 'label': row 2 \(key '.*000011'\): a label that is not 0 to 9"),
    "a label of none": (lambda f: rewrite(f / PART, with_column("label", lambda v: [-1, *v[1:]])), r"column 'label': row 0 .*a label that is not 0 to 9"),
    "another label": (lambda f: rewrite(f / PART, with_column("label", lambda v: [(v[0] + 1) % 10, *v[1:]])), r"selection\.parquet: column 'label': sample_id 9 is"),
    "another label, counted": (lambda f: rewrite(f / PART, with_column("label", lambda v: [(v[0] + 1) % 10, *v[1:]])), r"selection\.parquet: label \d: \d images were chosen, the parts hold \d"),
    "another key": (lambda f: rewrite(f / PART, with_column("key", lambda v: ["x", *v[1:]])), r"selection\.parquet: column 'key': sample_id 9 is 'train.*', in its part 'x'"),
    "chosen, and one more": (lambda f: rewrite(f / "selection.parquet", lambda t: t.slice(1)), r"selection\.parquet: column 'sample_id': 1 images of the parts were not chosen, the first 0"),
    "positions": (lambda f: rewrite(f / "selection.parquet", with_column("position", lambda v: [7, *v[1:]])), r"selection\.parquet: column 'position': those of label 1"),
    "a class less": (lambda f: rewrite(f / "classes.parquet", lambda t: t.slice(0, 9)), r"classes\.parquet: column 'label': 9 rows, which are not 0 to 9"),
    "another name": (lambda f: rewrite(f / "classes.parquet", with_column("name", lambda v: [*v[:3], "lion", *v[4:]])), r"classes\.parquet: column 'name': row 3 is 'lion', provenance\.json says 'cat'"),
    "another prompt": (
        lambda f: rewrite(f / "classes.parquet", with_column("prompt", lambda v: [*v[:3], "a lion", *v[4:]])),
        r"classes\.parquet: column 'prompt': row 3 \(key 'cat'\): is not the template 'a photo of a \{name\}', filled in",
    ),
    "no text left": (lambda f: rewrite(f / "classes.parquet", with_values("text_mask", lambda v: v[4].fill(0))), r"column 'text_mask': row 4 \(key 'deer'\): no token is left"),
    "text of another class": (
        lambda f: rewrite(f / "classes.parquet", with_values("text_states", lambda v: v.__setitem__(2, v[3].copy()))),
        r"column 'text_states': row 2 \(key 'bird'\): states are not what minilm makes of the prompt",
    ),
    "image cut off": (
        lambda f: rewrite(f / PART, with_column("image", lambda v: [*v[:5], {**v[5], "bytes": v[5]["bytes"][:300]}, *v[6:]])), r"column 'image': row 5 \(key '.*000014'\): OSError",
    ),
    "pixels of another image": (lambda f: rewrite(f / PART, with_values("pixels", lambda v: v.__setitem__(6, v[7].copy()))), r"column 'pixels': row 6 .*not the pixels of its image"),
    "a pixel": (lambda f: rewrite(f / PART, with_values("pixels", lambda v: v.__setitem__((6, 0, 0, 0), v[6, 0, 0, 0] ^ 1))), r"column 'pixels': row 6 .* 1 grey levels apart"),
    "-128": (lambda f: rewrite(f / PART, with_values("vision", lambda v: v.__setitem__((3, 1, 4, 5), -128))), r"column 'vision': row 3 .*-128, where int8 goes from -127"),
    "no tokens": (lambda f: rewrite(f / PART, with_values("vision", lambda v: v[2].fill(0))), r"column 'vision': row 2 .*no token but zeros"),
    "a scale of nan": (lambda f: rewrite(f / PART, with_values("vision_scale", lambda v: v.__setitem__((1, 0, 0), np.nan))), r"column 'vision_scale': row 1 .*not finite or below 0"),
    "a scale below 0": (lambda f: rewrite(f / PART, with_values("vision_scale", lambda v: v.__setitem__((1, 1, 3), -0.1))), r"column 'vision_scale': row 1 .*not finite or below 0"),
    "a scale too large": (lambda f: rewrite(f / PART, with_values("vision_scale", lambda v: v.__setitem__((1, 1, 3), 1.3 * v[1, 1, 3]))), r"column 'vision': row 1 .*their scale is wrong"),
    "second side not mirrored": (lambda f: rewrite(f / PART, same_sides), r"column 'vision': row 0 .*, and 8 more: both sides are the same, the mirrored image was not"),
    "second side not mirrored, encoded": (lambda f: rewrite(f / PART, same_sides), r"column 'vision': row 0 .*tokens whose second side is not the mirrored image's"),
    "sides swapped": (lambda f: rewrite(f / PART, swapped_sides), r"part-000001\.parquet: column 'vision': row 0 \(key .*\), 9 of 9 looked at: tokens of swapped sides"),
    "rows swapped": (lambda f: rewrite(f / PART, swapped_rows), r"column 'vision': row 4 .*2 of 9 looked at: tokens of another image, key 'train-000\.parquet#000000014'"),
    "noise": (
        lambda f: rewrite(f / PART, with_values("vision", lambda v: v.__setitem__(0, np.random.default_rng(0).integers(-127, 128, v[0].shape)))),
        r"column 'vision': row 0 .*1 of 9 looked at: tokens that its image does not give",
    ),
}  # fmt: skip


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def reshaped(table: pa.Table, shape: list[int] | None) -> pa.Table:
    index = table.column_names.index("vision")
    metadata = {"dtype": "int8", "shape": json.dumps(shape)} if shape else {}
    return table.set_column(index, table.schema.field(index).with_metadata(metadata), table.column(index))


def swapped_sides(table: pa.Table) -> pa.Table:
    for name in ("vision", "vision_scale"):
        table = with_values(name, lambda values: values.__setitem__(slice(None), values[:, ::-1].copy()))(table)
    return table


def same_sides(table: pa.Table) -> pa.Table:
    for name in ("vision", "vision_scale"):
        table = with_values(name, lambda values: values.__setitem__((slice(None), 1), values[:, 0].copy()))(table)
    return table


def swapped_rows(table: pa.Table) -> pa.Table:
    for name in ("vision", "vision_scale"):
        table = with_values(name, lambda values: values.__setitem__([4, 5], values[[5, 4]]))(table)
    return table


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_wrong_is_named(copy: Path, how: str) -> None:
    change, said = BROKEN[how]
    change(copy)
    faults = verify.verify(copy, images=4)
    assert any(re.search(said, fault) for fault in faults), faults


@pytest.mark.parametrize("how", INSIDE)
def test_what_is_wrong_inside_is_named_though_the_hashes_agree(copy: Path, how: str) -> None:
    change, said = INSIDE[how]
    change(copy)
    take_stock(copy)
    faults = verify.verify(copy, images=0)
    assert any(re.search(said, fault) for fault in faults), faults
    assert not [fault for fault in faults if "inventory" in fault]


def test_flips_are_judged_where_the_encoder_is_not_at_hand(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_provenance(copy, lambda stated: stated["vision"]["vision"].update(encoder="/nowhere/dinov2"))
    found = verify.check(copy)
    assert found.faults == []
    (note,) = found.notes
    said = "'vision' and its flips (/nowhere/dinov2) were not encoded anew: attach.vision.encoder=/nowhere/dinov2: there is no such folder"
    assert note.startswith(said)

    def jitter(tokens: np.ndarray) -> None:
        tokens[:, 1] = np.clip(tokens[:, 0] + np.random.default_rng(0).choice([-1, 1], tokens[:, 0].shape), -127, 127)

    def nearly_plain(table: pa.Table) -> pa.Table:
        return with_values("vision", jitter)(same_sides(table))

    for path in copy.glob("part-*.parquet"):
        rewrite(path, nearly_plain)
    take_stock(copy)
    wrong = "column 'vision': the second side does not look like the mirror image of the first"
    assert verify.verify(copy, say=lambda _: None) == [f"part-*.parquet: {wrong}"]
    monkeypatch.setattr(verify, "_JUDGED_ROWS", 8)
    assert verify.verify(copy, say=lambda _: None) == [
        *(f"part-00000{part}.parquet: {wrong}" for part in range(4)),
        f"part-*.parquet: {wrong}",
    ]


def test_other_weights_and_encoders_are_named(copy: Path) -> None:
    stated = json.loads((copy / "provenance.json").read_text())
    with_provenance(copy, lambda stated: stated["vision"]["vision"].update(weights="0" * 16))
    (fault,) = verify.verify(copy)
    assert fault.startswith(
        "provenance.json: vision.vision says weights 0000000000000000; the tokens are those of efficientnet-lite0 with weights "
    )
    other = frozen.file_hash(frozen.weights_file("efficientnet-lite2"))
    with_provenance(copy, lambda s: s["vision"]["vision"].update(encoder="efficientnet-lite2"))
    found = verify.check(copy)
    assert found.faults == []
    (note,) = found.notes
    assert note.endswith(f"made by efficientnet-lite2 with the weights 0000000000000000, those at hand are {other}")
    with_provenance(copy, lambda s: s["vision"]["vision"].update(weights=other))
    faults = verify.verify(copy)
    assert len(faults) == 5
    assert all("tokens that its image does not give: of another image, encoder or weights" in fault for fault in faults)
    with_provenance(copy, lambda s: s.update(vision={"vision": {**stated["vision"]["vision"], "image_size": 80}}))
    assert len(verify.verify(copy)) == 5, "another size the encoder sees"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_values("latent_mean", lambda v: v.__setitem__((3, 0, 0, 0, 0), np.inf)), r"column 'latent_mean': row 3 .*not finite"),
        (with_values("latent_std", lambda v: v.__setitem__((3, 1, 0, 0, 0), 0)), r"column 'latent_std': row 3 .*not above 0"),
        (with_values("latent_mean", lambda v: v.__setitem__(slice(None), v[:, ::-1].copy())), r"column 'latent_mean': row 0 .*9 of 9 looked at: swapped sides"),
        (with_values("latent_mean", lambda v: v.__setitem__([0, 5], v[[5, 0]])), r"column 'latent_mean': row 0 .*2 of 9 looked at: not what the VAE makes"),
        (with_values("latent_std", lambda v: v.__setitem__(2, v[2] * 2)), r"column 'latent_std': row 2 .*not what the VAE makes .*relative error 1\.0"),
        (with_values("vision", lambda v: v.__setitem__((4, 0, 7, 9), 0x7FC0)), r"column 'vision': row 4 .*not finite"),
        (with_values("vision", lambda v: v.__setitem__(slice(None), v[:, ::-1].copy())), r"column 'vision': .*9 of 9 looked at: tokens of swapped sides"),
    ],
)  # fmt: skip
def test_wrong_latents_and_bf16_tokens_are_named(
    made_with_vae: Path, tmp_path: Path, change: Callable[[pa.Table], pa.Table], said: str
) -> None:
    folder = Path(shutil.copytree(made_with_vae, tmp_path / "copy"))
    rewrite(folder / "part-000000.parquet", change)
    take_stock(folder)
    faults = verify.verify(folder)
    assert any(re.search(f"part-000000.parquet: {said}", fault) for fault in faults), faults


def test_a_class_is_named_by_its_own_row_where_some_are_looked_at(copy: Path) -> None:
    rewrite(copy / "classes.parquet", with_values("text_states", lambda v: v.__setitem__(9, v[3].copy())))
    take_stock(copy)
    (fault,) = verify.verify(copy, images=2)
    assert fault.startswith("classes.parquet: column 'text_states': row 9 (key 'truck'): states are not what minilm makes of the prompt")


def test_a_vae_that_is_not_at_hand_is_a_note(made_with_vae: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made_with_vae, tmp_path / "copy"))
    with_provenance(folder, lambda stated: stated["vae"].update(path="somebody/vae"))
    found = verify.check(folder)
    assert found.faults == []
    (note,) = [note for note in found.notes if "latents" in note]
    assert note.startswith("the latents were not encoded anew: vae.path=somebody/vae: ")


def test_a_vae_is_looked_for_here_alone(made_with_vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = []

    def load(options: VaeConfig) -> None:
        local.append(offline.is_only_local())
        raise UserError("not here")

    monkeypatch.setattr(frozen, "_load_vae", load)
    with pytest.raises(UserError, match="not here"):
        at_hand.vae({"vae": {"path": "somebody/vae", "subfolder": "", "precision": "fp32", "device_batch": 8}})
    assert local == [True]


def test_a_stranger_does_not_decide_how_much_memory_is_taken() -> None:
    assert [at_hand._device_batch({"device_batch": batch}) for batch in (-1, 8, 10**9)] == [1, 8, 1024]
    from io import BytesIO

    from PIL import Image

    large = BytesIO()
    Image.new("1", (DataConfig.max_pixels // 10_000 + 1, 10_000)).save(large, "PNG")
    for most in (10**12, "many"):
        with pytest.raises(decode.Undecodable, match=f"max_pixels={DataConfig.max_pixels} "):
            verify._decode(large.getvalue(), {"image_size": 32, "channels": 3, "max_pixels": most})


def test_rows_looked_at_do_not_keep_their_batch_in_memory(made: Path) -> None:
    table = pq.read_table(made / PART, partitioning=None)
    sample = verify._Sample(provenance.read(made), verify.Findings(), {3})
    sample.add(PART, table, 0, 0)
    (held,) = sample.held
    assert held[4].get_total_buffer_size() < 2 * table.nbytes / len(table)


def test_batches_are_bounded_in_bytes(tmp_path: Path) -> None:
    values = np.zeros((300, 1 << 19), np.uint8)  # next to nothing in the file
    tables.write(tmp_path / "x.parquet", pa.table({"x": tables.tensor_column(values)}))
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        assert verify._batch_rows(file) == 128
    tables.write(tmp_path / "y.parquet", pa.table({"y": [np.random.default_rng(row).bytes(1 << 20) for row in range(8)]}))
    with pq.ParquetFile(tmp_path / "y.parquet") as file:
        assert 60 <= verify._batch_rows(file) <= 64


def test_flips_of_deviations_are_judged(made_with_vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_JUDGED_ROWS", 8)
    stated, whole = provenance.read(made_with_vae), pq.read_table(made_with_vae / "part-000000.parquet", partitioning=None)

    def faults(change: Callable[[np.ndarray], None]) -> list[str]:
        flips = verify._Flips(stated, verify.Findings())
        flips.part("part")
        flips.add(with_values("latent_std", change)(whole), 0)
        flips.judge_all()
        flips.part("")
        return flips.found.faults

    def plain(values: np.ndarray) -> None:
        values[:, 1] = values[:, 0] * np.random.default_rng(0).choice([0.99, 1.01], values[:, 0].shape)

    assert faults(lambda values: None) == []
    assert faults(plain) == ["part: column 'latent_std': the second side does not look like the mirror image of the first"]
    (fault,) = faults(lambda values: values.__setitem__((slice(None), 1), values[:, 0]))
    assert "both sides are the same" in fault
    assert faults(lambda values: values.fill(0.5)) == [], "a deviation may be the same all over"


def no_text(values: list[str]) -> pa.Array:
    """The first of them in bytes that are no UTF-8."""
    return pa.array([b"\xff\xfe", *(value.encode() for value in values[1:])], pa.binary()).view(pa.string())


@pytest.mark.parametrize(("name", "column"), [(PART, "key"), ("selection.parquet", "key"), ("classes.parquet", "name")])
def test_text_that_is_none_is_a_fault(copy: Path, tmp_path: Path, name: str, column: str) -> None:
    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index(column)
        return table.set_column(index, table.schema.field(index), no_text(table.column(column).to_pylist()))

    rewrite(copy / name, change)
    take_stock(copy)
    faults = verify.verify(copy, images=1, say=lambda _: None)
    assert any(re.match(f"{name}: cannot be read .*UTF8", fault) for fault in faults), faults
    if name == PART:
        with pytest.raises(UserError, match=f"{PART}' cannot be read"):
            export.export(copy, "ids", tmp_path / "ids.txt")


def test_a_damaged_file_is_a_fault_wherever_it_is_damaged(made_plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made_plain, tmp_path / "copy"))
    (folder / "part-000009.parquet").mkdir()
    for name in (PART, "selection.parquet"):
        good = (folder / name).read_bytes()
        for place in np.random.default_rng(0).integers(4, len(good), 40).tolist():
            bad = bytearray(good)
            bad[place] ^= 0x55
            (folder / name).write_bytes(bad)
            assert any(fault.startswith(f"{name}: sha256") for fault in verify.check(folder, images=1).faults)
        (folder / name).write_bytes(good)


def test_a_provenance_that_attach_could_not_have_meant_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fingerprint' is missing"):
        provenance.write(tmp_path, rows=3)
    with pytest.raises(UserError, match="there is no such folder"):
        verify.verify(tmp_path / "nowhere")
    for look in (provenance.read, verify.check, lambda folder: export.export(folder, "ids", tmp_path / "ids.txt")):
        with pytest.raises(UserError, match=r"'s3://bucket/condensed-0123abcd': .* Copy it there first"):
            look("s3://bucket/condensed-0123abcd")
    with pytest.raises(UserError, match="are written to a local folder"):
        export.export(tmp_path, "ids", "s3://bucket/ids.txt")


def front_matter(card_text: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(card_text.removeprefix("---\n").split("\n---\n")[0])


def code_blocks(card_text: str) -> dict[str, str]:
    """The Python of a card by the library that reads."""
    blocks = re.findall(r"```python\n(.*?)```", card_text, re.DOTALL)
    return {
        name: block
        for name in ("datasets", "pyarrow", "polars", "duckdb")
        for block in blocks
        if re.search(rf"^(import|from) {name}", block, re.M)
    }


METRICS = {
    "counts": {"generated": 500, "real": 500, "subset": 40, "reference": 4000},
    "generated": {"frechet": 812.34, "precision": 0.5, "recall": 0.25, "precision_recall_count": 500},
    "real": {"frechet": 300.0, "precision": 0.8, "recall": 0.75, "precision_recall_count": 500},
    "subset": {"frechet": 700.0, "precision": None, "recall": None, "precision_recall_count": 40},
    "label_agreement": 0.61,
    "probe_accuracy": 0.73,
    "record": {
        "sampler": "euler", "steps": 50, "guidance": 1.5, "guidance_interval": None, "weights": "ema", "ema_decay": 0.999, "class_draw": "balanced", "sample_seed": 0,
        "train_images": 64000, "network": "efficientnet-lite2", "network_weights": "abcd", "generated": 500, "reference": 4000, "neighbours": 3, "seeds": 1,
    },
}  # fmt: skip


def test_the_card_is_one_that_hubs_read(made: Path) -> None:
    from huggingface_hub import DatasetCard

    written = (made / "README.md").read_text()
    loaded = DatasetCard.load(made / "README.md")
    assert loaded.data.pretty_name == "cifar10, condensed to 40 images"
    assert loaded.data.size_categories == ["n<1K"]
    assert loaded.data.license is None
    assert "# license: left to you" in written
    assert {each["config_name"]: each["data_files"][0]["path"] for each in front_matter(written)["configs"]}["default"] == "part-*.parquet"
    for words in (
        "chosen from 5,000 (0.80%)",
        "selector `interval` kept 40",
        "`efficientnet-lite0` (weights `579344248a93e230`, fp32) at 64 px",
        "both flips",
        "Not evaluated",
        "3,781.9",
    ):
        assert words in written, words
    assert (made / "examples.png").read_bytes()[:4] == b"\x89PNG"
    before = written, (made / "examples.png").read_bytes()
    (made / "examples.png").unlink()
    card.write(made, provenance.read(made))
    assert ((made / "README.md").read_text(), (made / "examples.png").read_bytes()) == before


def test_the_card_does_not_say_where_things_lay_on_the_makers_disk(made_with_vae: Path) -> None:
    stated = provenance.read(made_with_vae)
    stated["text"]["encoder"], stated["vision"]["vision"]["encoder"] = "~/secret/t5", "facebook/dinov2-base"
    shown = card.render(stated, [])
    stated["command"] = (
        "/secret/bin/d2c attach ../secret/a.yaml vae.path=/secret/vae attach.also='[{name: x, encoder: /secret/dino}]' "
        "attach.text.encoder=google/flan-t5-xl data.path=~/secret/images"
    )
    for words in (shown, card.render(stated, [])):
        assert "secret" not in words
        assert str(Path(stated["vae"]["path"]).parent) not in words
        assert "`facebook/dinov2-base`" in words
    assert (
        "d2c attach a.yaml vae.path=vae 'attach.also=[{name: x, encoder: dino}]' attach.text.encoder=google/flan-t5-xl data.path=images"
        in words
    )


@pytest.mark.parametrize(
    ("rows", "size"), [(999, "n<1K"), (10**7, "10M<n<100M"), (10**8, "100M<n<1B"), (10**9, "1B<n<10B"), (10**12, "n>1T")]
)
def test_sizes_are_those_that_hubs_know(made: Path, rows: int, size: str) -> None:
    assert front_matter(card.render({**provenance.read(made), "rows": rows}, []))["size_categories"] == [size]


def test_numbers_come_with_their_record(copy: Path) -> None:
    card.update(copy, {"interval": METRICS, "ran|dom": {**METRICS, "record": {**METRICS["record"], "steps": 25}}})
    written = (copy / "README.md").read_text()
    assert "Not evaluated" not in written
    assert "| real images, held out | 500 | 300.0 | 0.800 | 0.750 | 73.0% |" in written
    assert "| interval | 500 | 812.3 | 0.500 | 0.250 | 61.0% |" in written
    assert "| floor: the dataset's own images | 40 | 700.0 | - | - | - |" in written
    assert r"| ran\|dom | 500 |" in written
    assert "interval: How it was measured: euler sampler, 50 steps, guidance 1.5, ema weights" in written
    assert "were not measured alike:** their records differ in steps" in written
    assert "none of them is an FID" in written
    assert "At fewer than 10,000 generated images" in written
    assert verify.verify(copy, images=2) == [], "the card is no part of the inventory"
    card.update(copy, {"interval": METRICS})
    assert "How it was measured: euler" in (copy / "README.md").read_text()
    assert "not measured alike" not in (copy / "README.md").read_text()


NASTY = ['a "quoted": name', "two\nlines", "| bar", "<b>bold</b>", "", "crane", "crane", "---", "# head", "`tick` é 🦩"]


def test_nasty_class_names_spoil_neither_header_nor_page(cifar10: Path, tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    rows, _ = read_rows(cifar10, 10)
    folder = write_artefact(tmp_path / "condensed-0123abcd", rows, NASTY, encoder="none", text=False, flip=False)
    with_provenance(folder, lambda stated: stated["data"].update(path='/x/my "data": <set>\n---'))
    card.write(folder, provenance.read(folder))
    written = (folder / "README.md").read_text()
    assert front_matter(written)["pretty_name"] == 'my "data": <set> ---, condensed to 10 images'
    page = MarkdownIt("commonmark").enable("table").render(written.split("\n---\n", 1)[1])
    assert "<b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "two lines, | bar," in page
    assert "label 4, crane, crane, ---, # head, `tick` é 🦩." in page
    assert page.count("<h1>") == 1
    names = json.loads(pq.read_schema(folder / "part-000000.parquet").metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    assert names == [
        'a "quoted": name',
        "two\nlines",
        "| bar",
        "<b>bold</b>",
        "(label 4)",
        "crane (label 5)",
        "crane (label 6)",
        "---",
        "# head",
        "`tick` é 🦩",
    ]
    assert verify.verify(folder, images=2) == []
    done = elsewhere(folder, code_blocks(written)["datasets"] + "\nassert name in data.features['label'].names", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def elsewhere(folder: Path, code: str, home: Path) -> subprocess.CompletedProcess:
    """Runs code in the artefact's folder where this package cannot be imported and no hub be asked."""
    guard = "import sys; sys.modules['d2c_ray'] = None; sys.path[:] = [p for p in sys.path if p not in ('', ROOT)]\n".replace(
        "ROOT", repr(str(ROOT))
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    return subprocess.run([sys.executable, "-I", "-c", guard + code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("library", ["datasets", "pyarrow", "polars", "duckdb"])
@pytest.mark.parametrize("which", ["made", "made_with_vae", "made_plain"])
def test_the_code_of_the_card_runs_without_this_package_and_decodes_right(
    which: str, library: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(which)
    block = code_blocks((folder / "README.md").read_text())[library]
    done = elsewhere(folder, block + "\nimport numpy as np\nnp.save(" + repr(str(tmp_path / "x.npy")) + ", tensor)", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pq.read_table(folder / "part-000000.parquet")
    column = "vision" if "vision" in table.column_names else "pixels"
    values = tables.tensor_values(table, column)[0]
    if which == "made":
        values = values * tables.tensor_values(table, "vision_scale")[0][..., None]
    if which == "made_with_vae":
        values = dequantise(values, None).numpy()
    assert np.array_equal(np.load(tmp_path / "x.npy"), values)


def test_datasets_sees_images_names_and_every_table(made: Path, tmp_path: Path) -> None:
    code = """
import glob, os, datasets
here = os.getcwd()
data = datasets.load_dataset("parquet", data_files=sorted(glob.glob("part-*.parquet")), split="train")
assert len(data) == 40
assert data[0]["image"].size == (32, 32), data[0]["image"]
assert data.features["label"].names[3] == "cat"
assert data[0]["key"] == "train-000.parquet#000000000"
assert len(data[0]["vision"]) == 2 * 16 * 1280
assert datasets.get_dataset_config_names(here) == ["default", "classes", "selection"]
assert len(datasets.load_dataset(here, split="train")) == 40
assert datasets.load_dataset(here, "classes", split="train")["name"][3] == "cat"
assert len(datasets.load_dataset(here, "selection", split="train")) == 40
"""
    done = elsewhere(made, code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def images_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Label and bytes of every image, by key."""
    rows = [
        row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part, columns=["key", "label", "image"]).to_pylist()
    ]
    return {row["key"]: (row["label"], row["image"]["bytes"]) for row in rows}


def test_webdataset_reads_the_tars_and_so_does_this_project(made: Path, tmp_path: Path) -> None:
    import webdataset

    out = tmp_path / "shards"
    assert export.export(made, "webdataset", out, per_shard=16) == 40
    assert sorted(path.name for path in out.iterdir()) == ["000000.tar", "000001.tar", "000002.tar", "classes.txt"]
    wanted = images_of(made)
    found = list(webdataset.WebDataset([str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False))
    assert [json.loads(sample["json"])["sample_id"] for sample in found] == list(range(40))
    for sample in found:
        facts = json.loads(sample["json"])
        assert (int(sample["cls"]), sample["jpg"]) == wanted[facts["key"]]
        assert facts["label"] == int(sample["cls"])
        assert set(sample) == {"__key__", "__url__", "__local_path__", "jpg", "cls", "json"} or set(sample) == {
            "__key__",
            "__url__",
            "jpg",
            "cls",
            "json",
        }
    rows, names = read_rows(out, 40, pattern="")
    assert names[3] == "cat"
    assert list(zip(rows.column("label").to_pylist(), rows.column("image").to_pylist(), strict=True)) == list(wanted.values())
    export.export(made, "webdataset", tmp_path / "again", per_shard=16)
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_folders_are_read_by_this_project_and_by_datasets(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "folders"
    (tmp_path / "folders").mkdir()
    export.export(made, "folders", out)
    wanted, (rows, names) = images_of(made), read_rows(out, 40, pattern="")
    by_bytes = {content: label for label, content in wanted.values()}
    assert len(rows) == 40
    assert [by_bytes[content] for content in rows.column("image").to_pylist()] == rows.column("label").to_pylist()
    assert names[3] == "cat", "class folders sort as CIFAR-10's names do"
    code = "import datasets\ndata = datasets.load_dataset('imagefolder', data_dir='.', split='train')\nassert len(data) == 40 and data[0]['image'].size == (32, 32)\nassert sorted(data['sample_id']) == list(range(40))"
    done = elsewhere(out, code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_ids_are_the_keys_in_order(made: Path, tmp_path: Path) -> None:
    export.export(made, "ids", tmp_path / "ids.txt")
    assert (tmp_path / "ids.txt").read_text().splitlines() == list(images_of(made))
    export.export(made, "ids", tmp_path / "ids.csv")
    import csv

    rows = list(csv.DictReader((tmp_path / "ids.csv").open()))
    assert [row["key"] for row in rows] == list(images_of(made))
    assert rows[1] == {"sample_id": "1", "key": "train-000.parquet#000000001", "label": "1", "name": "automobile"}


def test_exports_write_over_nothing_and_appear_whole(made: Path, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for form in ("webdataset", "folders"):
        with pytest.raises(UserError, match="is there already and not empty"):
            export.export(made, form, tmp_path / "out")
    with pytest.raises(UserError, match="is a folder; ids are written to a file"):
        export.export(made, "ids", tmp_path / "out")
    with pytest.raises(UserError, match="is there already and not empty"):
        export.export(made, "ids", tmp_path / "out" / "mine.txt")
    with pytest.raises(UserError, match="is a file; folders are written to a folder"):
        export.export(made, "folders", tmp_path / "out" / "mine.txt")
    with pytest.raises(UserError, match="did you mean 'folders'"):
        export.export(made, "folder", tmp_path / "new")
    rewrite(copy / "part-000004.parquet", with_column("image", lambda images: [*images[:3], {"bytes": b"no image", "path": ""}]))
    for form in ("webdataset", "folders"):
        with pytest.raises(UserError, match=r"'train-000.parquet#000000039': its bytes are no image"):
            export.export(copy, form, tmp_path / "new")
    (copy / "_SUCCESS.json").unlink()
    with pytest.raises(UserError, match="no finished condensed dataset"):
        export.export(copy, "ids", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["condensed-0123abcd", "out"], "nothing half is left"
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_images_of_every_format_and_keys_that_would_collide_or_leave_the_folder(cifar10: Path, tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    names = ["../x", "a/b", "", "CON", "x" * 300, "bird", "bird", "Bird", "a_b", "unlabelled"]
    keys = ["../../etc/a.b.jpg", "a/b.jpg", "a b.jpg", "a_b.jpg", "a:b.jpg", "é.jpg", "..", "/abs/x.tar#y.png", "CON", "k" * 400]
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG", "PNG", "JPEG"]
    rows, _ = read_rows(cifar10, 10)
    contents = []
    for content, form in zip(rows.column("image").to_pylist(), formats, strict=True):
        out = BytesIO()
        Image.open(BytesIO(content)).save(out, format=form)
        contents.append(out.getvalue())
    for name, values in (("key", keys), ("image", contents), ("label", list(range(10)))):
        index = rows.column_names.index(name)
        rows = rows.set_column(index, name, pa.array(values, rows.schema.field(name).type))
    rows = rows.set_column(
        rows.column_names.index("pixels"),
        rows.schema.field("pixels"),
        tables.tensor_column(np.stack([decode.decode(c, 32, 3, 10**9) for c in contents])),
    )
    folder = write_artefact(tmp_path / "in" / "condensed-0123abcd", rows, names, encoder="none", text=False, flip=False)
    assert verify.verify(folder, images=0) == []
    export.export(folder, "folders", tmp_path / "folders")
    written = sorted(str(path.relative_to(tmp_path / "folders")) for path in (tmp_path / "folders").rglob("*") if path.is_file())
    assert len(written) == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folders", "in"], "nothing left the folder"
    places = dict(enumerate(export.folder_names(names)))
    assert places == {
        0: "_x",
        1: "a_b",
        2: "label_2",
        3: "CON_",
        4: "x" * 100,
        5: "bird",
        6: "bird_6",
        7: "Bird_7",
        8: "a_b_8",
        9: "unlabelled_9",
    }
    extensions = {
        path.parent.name: path.suffix for path in (tmp_path / "folders").rglob("*") if path.is_file() and path.name != "metadata.csv"
    }
    assert [extensions[places[label]] for label in range(10)] == [
        ".jpg",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".ppm",
        ".jpg",
        ".png",
        ".jpg",
    ]
    export.export(folder, "webdataset", tmp_path / "tars")
    found, again = read_rows(tmp_path / "tars", 10, pattern="")
    assert found.column("image").to_pylist() == contents
    assert found.column("label").to_pylist() == list(range(10))
    assert again[5] == "bird"
    import tarfile

    with tarfile.open(tmp_path / "tars" / "000000.tar") as shard:
        members = shard.getnames()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.[a-z]+", name) for name in members), members


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / PART).unlink(), f"not complete: {PART} is missing"),
        (lambda f: shutil.copy(f / PART, f / "part-000009.parquet"), "not complete: part-000009.parquet is not listed in provenance.json"),
        (lambda f: rewrite(f / PART, lambda t: t.slice(2)), f"not complete: {PART} has 7 rows, provenance.json says 9"),
        (lambda f: (f / PART).write_bytes(b"PAR1"), f"not complete: {PART} has no rows that can be read"),
        (lambda f: with_provenance(f, lambda s: s.update(rows=41)), "not complete: its parts hold 40 rows, provenance.json says 41"),
        (lambda f: rewrite(f / PART, with_column("sample_id", lambda v: [v[0], v[0], *v[2:]])), f"{PART}': sample_id 9 occurs twice"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_not_exported(copy: Path, tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    change(copy)
    for form in export.FORMS:
        with pytest.raises(UserError, match=said):
            export.export(copy, form, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [copy.name], "nothing appears"


def test_a_class_may_be_called_as_the_table_beside_the_folders() -> None:
    assert export.folder_names(["cat", "Metadata.csv"]) == ["cat", "Metadata.csv_1"]


def test_the_table_beside_the_folders_names_them_as_they_are_and_holds_no_formula() -> None:
    names = ["-minus", "=1+1", "@home", "+", "a-b"]
    places = export.folder_names(names)
    assert places == ["_minus", "_1+1", "_home", "_", "a-b"]


def test_unlabelled_images_export(made_plain: Path, tmp_path: Path) -> None:
    export.export(made_plain, "folders", tmp_path / "folders")
    assert [path.name for path in (tmp_path / "folders").iterdir() if path.is_dir()] == ["unlabelled"]
    export.export(made_plain, "webdataset", tmp_path / "tars")
    rows, names = read_rows(tmp_path / "tars", 12, pattern="")
    assert rows.column("label").to_pylist() == [-1] * 12
    assert names == []


def d2c(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "d2c_ray.cli", *args], capture_output=True, text=True, cwd=ROOT)


def test_the_commands_say_what_they_did_and_exit_with_2_where_something_is_wrong(copy: Path, tmp_path: Path) -> None:
    done = d2c("verify", str(copy), "--images", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"all right: {copy}: 40 rows in 7 files, 4 images decoded, 4 encoded anew with minilm, efficientnet-lite0\n"
    done = d2c("export", str(copy), "ids", str(tmp_path / "ids.txt"))
    assert (done.returncode, done.stdout) == (0, f"40 images: {tmp_path / 'ids.txt'}\n")
    done = d2c("export", str(copy), "ids", str(tmp_path / "ids.txt"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    flip_byte(copy / PART)
    done = d2c("verify", str(copy), "--images", "4")
    assert done.returncode == 2
    assert done.stdout.startswith("wrong: part-000001.parquet: sha256 is ")
    assert "Traceback" not in done.stderr
    done = d2c("verify", str(copy), "data.image_size=4")
    assert (done.returncode, "is a folder, to which data.image_size=4 means nothing" in done.stderr) == (2, True)
    done = d2c("verify", "nowhere.yaml")
    assert done.returncode == 2
