"""Opening a condensed dataset: the node's copy is what was written, and batches are what is in it."""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from faulty_s3 import FaultyProxy, S3Server, once_each

from d2c_ray import condensed, schema
from d2c_ray.config import StorageConfig, TrainConfig
from d2c_ray.data import latent_cache, node_cache, tables
from d2c_ray.errors import UserError
from d2c_ray.logs import About
from d2c_ray.models.frozen import quantise
from d2c_ray.models.transformer import TransformerSpec
from d2c_ray.training import batches

CPU = torch.device("cpu")
ROWS = 40
PARTS = 5


@pytest.fixture(scope="module")
def written(cifar10: Path) -> dict[str, np.ndarray]:
    """Every kind of column, from real images: pixels as bytes, their colours as latents and as tokens, both flips."""
    from d2c_ray.data.decode import decode

    table = pq.ParquetFile(cifar10 / "train-000.parquet").read_row_group(0).slice(0, ROWS)
    pixels = np.stack(
        [decode(row["bytes"], 32, 3, 10**6) for row in table.column("img" if "img" in table.column_names else "image").to_pylist()]
    )
    both = np.stack([pixels, pixels[:, :, ::-1]], 1).astype(np.float32) / 255  # N x F x H x W x C
    tokens = both.reshape(ROWS, 2, 4, 8, 4, 8, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(ROWS, 2, 16, 192) - 0.5
    vision, scale = quantise(tokens)
    large = torch.from_numpy(tokens[..., :96].copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return {
        "sample_id": np.arange(ROWS) * 7 + 3,
        "label": np.array([row % 10 - (row == 5) * 6 for row in range(ROWS)]),  # row 5: -1
        "pixels": pixels,
        "latent_mean": np.ascontiguousarray(both.transpose(0, 1, 4, 2, 3), np.float16),
        "latent_std": np.ascontiguousarray(both.transpose(0, 1, 4, 2, 3) * 0.1, np.float16),
        "vision": vision,
        "vision_scale": scale,
        "vision_large": large,
    }  # fmt: skip


def write(folder: Path, columns: dict[str, np.ndarray], provenance: bool = True, fingerprint: str = "f" * 64, parts: int = PARTS) -> Path:
    """A condensed dataset of several parts, the second of which has several row groups."""
    folder.mkdir(parents=True)
    files: dict[str, dict] = {}
    for number, rows in enumerate(np.array_split(np.arange(len(columns["sample_id"])), parts)):
        path = folder / f"part-{number:06d}.parquet"
        write_part(path, {name: values[rows] for name, values in columns.items()}, 3 if number == 1 else None)
        files[path.name] = listed(path)
    write_classes(folder / condensed.CLASSES)
    files[condensed.CLASSES] = listed(folder / condensed.CLASSES)
    facts = {
        "class_names": [str(i) for i in range(10)], "labels": list(range(10)), "flip": True, "latent": {"kind": "vae", "scale": 0.5},
        "fingerprint": fingerprint,
    }  # fmt: skip
    if provenance:
        (folder / condensed.PROVENANCE).write_text(json.dumps({"format": 1, "rows": ROWS, "files": files}))
    (folder / "_SUCCESS.json").write_text(json.dumps({"facts": facts}))
    return folder


def write_part(path: Path, columns: dict[str, np.ndarray], row_group_rows: int | None = None) -> None:
    tensors = {name: values for name, values in columns.items() if name not in ("sample_id", "label")}
    kinds = {name: (str(values.dtype), values.shape[1:]) for name, values in tensors.items()}
    fields = tables.arrow_schema({"sample_id": "int64", "label": "int32", **dict.fromkeys(tensors, "tensor")}, kinds)
    arrays = [pa.array(columns["sample_id"]), pa.array(columns["label"].astype(np.int32)), *map(tables.tensor_column, tensors.values())]
    tables.write(path, pa.table(arrays, schema=fields), {}, row_group_rows)


def write_classes(path: Path) -> None:
    states = torch.arange(10 * 2 * 4).reshape(10, 2, 4).bfloat16().view(torch.int16).numpy().view(np.uint16)
    kinds = {"text_states": ("uint16", (2, 4)), "text_mask": ("int8", (2,))}
    fields = tables.arrow_schema(schema.CLASSES, kinds)
    columns = {"label": pa.array(range(10), pa.int32()), "name": pa.array(map(str, range(10))), "prompt": pa.array(map(str, range(10)))}
    columns |= {"text_states": tables.tensor_column(states), "text_mask": tables.tensor_column(np.ones((10, 2), np.int8))}
    tables.write(path, pa.table([columns[name] for name in fields.names], schema=fields), {})


def listed(path: Path) -> dict:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": pq.read_metadata(path).num_rows}


def change_facts(folder: Path, **facts: object) -> None:
    success = json.loads((folder / "_SUCCESS.json").read_text())
    (folder / "_SUCCESS.json").write_text(json.dumps({"facts": success["facts"] | facts}))


def check(opened: condensed.Condensed, columns: dict[str, np.ndarray]) -> None:
    assert set(opened.arrays) == set(columns)
    for name, values in columns.items():
        assert np.array_equal(opened.arrays[name], values), name
        assert isinstance(opened.arrays[name], np.memmap) and not opened.arrays[name].flags.writeable
        assert opened.arrays[name].dtype == (np.int64 if name in ("sample_id", "label") else values.dtype), name


class Reads:
    """The parts whose bytes are read, by name."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.names: list[str] = []
        whole = node_cache.NodeCache._content
        patch.setattr(node_cache.NodeCache, "_content", lambda cache, part: [self.names.append(part.name), whole(cache, part)][1])


@pytest.mark.parametrize("provenance", [True, False])
def test_opening_gives_what_was_written(written, tmp_path: Path, provenance: bool) -> None:
    data = condensed.open(write(tmp_path / "data", written, provenance), tmp_path / "cache")
    check(data, written)
    assert len(data) == ROWS and data.class_names == [str(i) for i in range(10)] and data.labels.tolist() == written["label"].tolist()
    assert data.text[0].tolist() == torch.arange(80.0).reshape(10, 2, 4).bfloat16().float().tolist() and data.text[1].sum() == 20
    assert bool(data.provenance) == provenance and data.facts["flip"]
    assert condensed.vision_width(tmp_path / "data") == 192 and condensed.vision_width(tmp_path / "data", "large") == 96


def test_small_batches_of_rows_while_building_change_nothing(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "BATCH_BYTES", 5000)  # less than a row of some columns, a few of others
    check(condensed.open(write(tmp_path / "data", written), tmp_path / "cache"), written)


def test_the_package_offers_it_without_loading_torch(written, tmp_path: Path) -> None:
    write(tmp_path / "data", written)
    code = (
        "import sys, d2c_ray; assert not {'torch', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        f"from d2c_ray import condensed; print(len(condensed.open({str(tmp_path / 'data')!r}, {str(tmp_path / 'cache')!r})))\n"
        "print(hasattr(d2c_ray, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert not done.returncode, done.stderr
    assert done.stdout.split() == [str(ROWS), "False"]


# From S3


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


def upload(server: S3Server, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        server.put("condensed", f"{prefix}/{path.name}", path.read_bytes())
    return f"s3://condensed/{prefix}"


@pytest.mark.parametrize("provenance", [True, False])
def test_storage_that_fails_at_every_turn_gives_the_same_arrays(
    written, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provenance: bool
) -> None:
    path = upload(server, write(tmp_path / "data", written, provenance), f"faulty-{provenance}")
    monkeypatch.setattr(node_cache, "FETCH_BYTES", 100_000)  # several a part
    faults = ["503", "reset", "stall", "cut"]
    with FaultyProxy(server.endpoint, once_each(faults), stall_sec=60.0) as proxy:
        reached = StorageConfig(endpoint=proxy.endpoint, timeout_sec=1.0)
        data = condensed.open(path, tmp_path / "cache", storage=reached)
        check(data, written)
        assert torch.equal(data.text[1], torch.ones(10, 2, dtype=torch.long))
        assert all(proxy.counts[fault] for fault in faults)
        proxy.reset()
        check(condensed.open(path, tmp_path / "cache", storage=replace(reached, timeout_sec=60.0)), written)  # no try is a second one
        asked = [(urlsplit(uri).path, where) for uri, where in proxy.gets if "part-" in uri]
        if provenance:
            assert {name for name, _ in asked} == {f"/condensed/faulty-{provenance}/part-000000.parquet"}, (
                "a footer, for the columns' kinds"
            )
        assert len(asked) <= 1 + 4 + PARTS * (not provenance)
    assert not [name for name in os.listdir(next((tmp_path / "cache").glob("condensed-*[0-9a-f]"))) if not name.endswith((".npy", ".json"))]


def test_each_byte_of_a_remote_part_is_read_once(written, server: S3Server, tmp_path: Path) -> None:
    path = upload(server, write(tmp_path / "data", written), "once")
    with FaultyProxy(server.endpoint) as proxy:
        condensed.open(path, tmp_path / "cache", storage=StorageConfig(endpoint=proxy.endpoint))
        asked = [urlsplit(uri).path for uri, _ in proxy.gets if "part-" in uri]
    whole = [f"/condensed/once/part-{number:06d}.parquet" for number in range(PARTS)]
    assert sorted(asked)[-PARTS + 1 :] == whole[1:] and set(asked) == set(whole)


def test_a_damaged_remote_part_and_a_missing_dataset_are_named(written, server: S3Server, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    flip_byte(folder / "part-000002.parquet")
    path = upload(server, folder, "damaged")
    with pytest.raises(UserError, match=r"s3://condensed/damaged/part-000002\.parquet' is damaged: its sha256"):
        condensed.open(path, tmp_path / "cache", storage=StorageConfig(endpoint=server.endpoint))
    with pytest.raises(UserError, match="s3://condensed/nowhere' is no finished condensed dataset"):
        condensed.open("s3://condensed/nowhere", tmp_path / "cache", storage=StorageConfig(endpoint=server.endpoint))


# What is refused


def flip_byte(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_named_and_a_mended_part_gone_on_from(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "NOTE_SEC", 0.0)
    folder = write(tmp_path / "data", written)
    whole = (folder / "part-000003.parquet").read_bytes()
    flip_byte(folder / "part-000003.parquet")
    with pytest.raises(UserError, match=r"part-000003\.parquet' is damaged: its sha256"):
        condensed.open(folder, tmp_path / "cache")
    (folder / "part-000003.parquet").write_bytes(whole)
    reads = Reads(monkeypatch)
    check(condensed.open(folder, tmp_path / "cache"), written)
    assert reads.names == ["part-000003.parquet", "part-000004.parquet"]


def test_a_flipped_byte_of_the_class_table_is_named(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    flip_byte(folder / condensed.CLASSES, 0.3)
    with pytest.raises(UserError, match=r"classes\.parquet' is damaged"):
        condensed.open(folder, tmp_path / "cache")
    (folder / condensed.CLASSES).unlink()
    with pytest.raises(UserError, match=r"classes\.parquet, which provenance\.json lists, is missing"):
        condensed.open(folder, tmp_path / "cache")


def test_parts_that_are_missing_cut_off_or_extra_are_named(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    shutil.copy(folder / "part-000001.parquet", folder / "part-000009.parquet")
    with pytest.raises(UserError, match=r"part-000009\.parquet is there, though provenance\.json does not list it"):
        condensed.open(folder, tmp_path / "cache")
    (folder / "part-000009.parquet").unlink()
    content = (folder / "part-000002.parquet").read_bytes()
    (folder / "part-000002.parquet").write_bytes(content[:-10])
    with pytest.raises(
        UserError, match=rf"part-000002\.parquet' is damaged: it has {len(content) - 10} bytes, provenance.json says {len(content)}"
    ):
        condensed.open(folder, tmp_path / "cache")
    (folder / "part-000002.parquet").unlink()
    (folder / "part-000004.parquet").unlink()
    with pytest.raises(UserError, match=r"part-000002\.parquet \(and 1 more\) is missing"):
        condensed.open(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_a_list_a_part_that_is_no_parquet_is_named(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written, provenance=False)
    content = (folder / "part-000002.parquet").read_bytes()
    (folder / "part-000002.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"part-000002\.parquet' cannot be read as Parquet"):
        condensed.open(folder, tmp_path / "cache")
    (folder / "part-000002.parquet").write_bytes(content[:4] + bytes(len(content) // 2 - 4) + content[len(content) // 2 :])
    with pytest.raises(UserError, match=r"part-000002\.parquet' cannot be read as Parquet"):
        condensed.open(folder, tmp_path / "cache")


@pytest.mark.parametrize("provenance", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part | {"vision": part["vision"][:, :, :8]}, r"column 'vision' is int8 \[2, 8, 192\], int8 \[2, 16, 192\] in the dataset's first"),
        (lambda part: part | {"vision": part["vision"].view(np.uint8)}, r"column 'vision' is uint8 .*, int8 "),
        (lambda part: {name: part[name] for name in part if name != "latent_std"}, "has no column 'latent_std'"),
    ],
)  # fmt: skip
def test_a_part_of_another_shape_is_refused_by_name(written, tmp_path: Path, provenance: bool, change, message: str) -> None:
    folder = write(tmp_path / "data", written, provenance)
    path = folder / "part-000003.parquet"
    write_part(path, change({name: values[24:32] for name, values in written.items()}))
    relist(folder, path)
    with pytest.raises(UserError, match=rf"part-000003\.parquet'.*{message}"):
        condensed.open(folder, tmp_path / "cache")


def relist(folder: Path, path: Path, **facts: int) -> None:
    """Makes the provenance agree with a part that was written anew."""
    where = folder / condensed.PROVENANCE
    if where.is_file():
        provenance = json.loads(where.read_text())
        provenance["files"][path.name] = listed(path) | facts
        where.write_text(json.dumps(provenance))


def test_rows_that_are_not_as_many_as_listed_and_nulls_are_refused(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    path = folder / "part-000001.parquet"
    relist(folder, path, rows=9)
    with pytest.raises(UserError, match=r"part-000001\.parquet' holds 8 rows, 9 are listed"):
        condensed.open(folder, tmp_path / "cache")
    table = pq.read_table(path)
    at = table.schema.get_field_index("label")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array([None, *range(7)], pa.int32())), path)
    relist(folder, path)
    with pytest.raises(UserError, match=r"part-000001\.parquet': column 'label' holds nulls"):
        condensed.open(folder, tmp_path / "cache")


def test_a_full_disk_is_refused_before_writing(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", written)
    whole = sum(values.nbytes for values in written.values())
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": whole})())
    with pytest.raises(UserError, match=r"GiB are free\. resources\.cache_dir, .*cache_dir=.* another disk"):
        condensed.open(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*"))
    monkeypatch.setattr(
        node_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1.06 * (whole - written["vision_large"].nbytes)})()
    )
    condensed.open(folder, tmp_path / "cache", columns=["pixels", "latent_mean", "latent_std", "vision"])  # only what is missing counts
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1.06 * written["vision_large"].nbytes})())
    check(condensed.open(folder, tmp_path / "cache"), written)


def test_a_disk_that_fills_up_while_the_copy_is_written_is_said(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    code = (
        "import resource, signal, sys\nfrom d2c_ray import condensed\nfrom d2c_ray.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"try: condensed.open({str(folder)!r}, {str(tmp_path / 'cache')!r})\nexcept UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert not done.returncode, done.stderr
    assert "cannot be written" in done.stdout and "resources.cache_dir" in done.stdout, done.stdout
    assert not list((tmp_path / "cache").glob("*/*.npy")), "what is begun would keep the disk full"
    check(condensed.open(folder, tmp_path / "cache"), written)


@pytest.mark.parametrize("spoil", [
    lambda root, folder: root.mkdir(mode=0o755),
    lambda root, folder: (root.mkdir(mode=0o700), root.chmod(0o770)),
    lambda root, folder: (folder.mkdir(mode=0o700), root.symlink_to(folder)),
    lambda root, folder: root.symlink_to(folder),
    lambda root, folder: root.touch(),
])  # fmt: skip
def test_the_folder_in_everyones_temporary_folder_must_be_this_users_alone(
    written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil
) -> None:
    monkeypatch.setattr(condensed.tempfile, "gettempdir", lambda: str(tmp_path))
    folder, root = write(tmp_path / "data", written), tmp_path / f"d2c_ray-condensed-{os.getuid()}"
    check(condensed.open(folder), written)
    assert stat.S_IMODE(root.lstat().st_mode) == 0o700
    shutil.rmtree(root)
    spoil(root, tmp_path / "elsewhere")
    for use in (condensed.open, condensed.drop_cache) if root.is_dir() else (condensed.open,):
        with pytest.raises(UserError, match=rf"{root}.*resources\.cache_dir, in Python open\(\.\.\., cache_dir="):
            use(folder)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_folder_of_another_user_is_refused(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condensed.tempfile, "gettempdir", lambda: str(tmp_path))
    folder, other = write(tmp_path / "data", written), os.getuid() + 1
    (tmp_path / f"d2c_ray-condensed-{other}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: other)  # as seen by the other user
    with pytest.raises(UserError, match=r"belongs to the user number .*resources\.cache_dir"):
        condensed.open(folder)


def test_a_cache_folder_that_cannot_be_used_is_named(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(UserError, match=rf"{root} cannot be used .*resources\.cache_dir"):
            condensed.open(folder, root)
    condensed.open(folder, tmp_path / "cache")
    (lock,) = (tmp_path / "cache").glob("*.lock")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(UserError, match="cache cannot be used"):
        condensed.open(folder, tmp_path / "cache")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("provenance.json", [1], "is a JSON list"),
    ("provenance.json", None, "is a JSON NoneType"),
    ("provenance.json", {}, "is of format None"),
    ("provenance.json", {"format": 1}, "lists no files: None"),
    ("provenance.json", {"format": 1, "files": ["part-000000.parquet"]}, "lists no files"),
    ("provenance.json", {"format": 1, "files": {"part-000000.parquet": {"bytes": 3, "sha256": "0", "rows": None}}}, "does not say rows of part-000000"),
    ("provenance.json", {"format": 1, "files": {"classes.parquet": {"bytes": 3}}}, "does not say sha256 of classes"),
    ("provenance.json", {"format": 1, "files": {"part-000000.parquet": 3}}, "does not say bytes of part-000000"),
    ("_SUCCESS.json", [], "is a JSON list"),
    ("_SUCCESS.json", {"facts": {"class_names": []}}, "does not say flip"),
    ("_SUCCESS.json", {}, "does not say class_names"),
])  # fmt: skip
def test_what_a_dataset_says_in_another_form_is_refused(written, tmp_path: Path, name: str, content: object, message: str) -> None:
    folder = write(tmp_path / "data", written)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name}'.*{message}"):
        condensed.open(folder, tmp_path / "cache")


@pytest.mark.parametrize("name", ["vision_../../../up", "vision_A", "vision_", "vision_a b"])
def test_a_column_whose_name_is_no_files_is_refused(written, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "data", written | {name: written["vision_large"]}, provenance=False)
    with pytest.raises(UserError, match="is no name of vision tokens"):
        condensed.open(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() and not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("int8", "[-2, -192]"), ("int8", "[0]"), ("int8", "[2, 192.0]"), ("int8", '"384"'), ("S0", "[2]")]
)
def test_shapes_that_are_none_are_refused(dtype: str, shape: str) -> None:
    field = pa.field("vision", pa.binary(384), metadata={"dtype": dtype, "shape": shape})
    with pytest.raises(UserError, match=r"'vision' says .* positive sizes would do"):
        node_cache.kind_of(pa.schema([field]), "vision", "part")


def test_home_is_meant_by_its_sign(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", written)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(condensed.open("~/data", "~/cache")) == ROWS and condensed.vision_width("~/data") == 192
    condensed.drop_cache("~/data", "~/cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_other_formats_and_foreign_schemes_are_refused(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    (folder / condensed.PROVENANCE).write_text(json.dumps({"format": 2, "files": {}}))
    with pytest.raises(UserError, match=r"provenance\.json' is of format 2"):
        condensed.open(folder, tmp_path / "cache")
    (folder / condensed.PROVENANCE).write_text('{"format": 1,')
    with pytest.raises(UserError, match=r"provenance\.json' is no JSON"):
        condensed.open(folder, tmp_path / "cache")
    with pytest.raises(UserError, match="gs:/"):
        condensed.open("gs://bucket/data")


# Built once, gone on with, added to


BUILDER = """
import sys
from d2c_ray.data import node_cache
from d2c_ray import condensed
node_cache.NOTE_SEC = 0.0
whole = node_cache.NodeCache._content
def content(cache, part):
    print(part.name, flush=True)
    if len(sys.argv) > 3 and part.name == sys.argv[3]:
        sys.stdin.read()  # waits to be killed
    return whole(cache, part)
node_cache.NodeCache._content = content
data = condensed.open(sys.argv[1], sys.argv[2])
print(int(data.arrays["vision"].astype("int64").sum()), flush=True)
"""


def builder(folder: Path, cache: Path, *hold: str) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(folder), str(cache), *hold]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_killed_build_is_gone_on_with(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", written)
    process = builder(folder, tmp_path / "cache", "part-000003.parquet")
    assert process.stdout is not None
    read = [process.stdout.readline().strip() for _ in range(4)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read[-1] == "part-000003.parquet"
    reads = Reads(monkeypatch)
    check(condensed.open(folder, tmp_path / "cache"), written)
    assert reads.names == ["part-000003.parquet", "part-000004.parquet"]


def test_processes_that_open_at_once_build_once(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    processes = [builder(folder, tmp_path / "cache") for _ in range(3)]
    lines = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(len(said) for said in lines) == [1, 1, 1 + PARTS]
    assert {said[-1] for said in lines} == {str(written["vision"].astype(np.int64).sum())}


def test_columns_are_added_later_and_only_what_is_asked_for_is_read(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", written)
    some = condensed.open(folder, tmp_path / "cache", columns=["latent_mean", "latent_std"])
    check(some, {name: written[name] for name in ("sample_id", "label", "latent_mean", "latent_std")})
    (cache,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert not list(cache.glob("vision*"))
    before = (cache / "latent_mean.npy").stat().st_mtime_ns
    with_tokens = condensed.open(folder, tmp_path / "cache", columns=["latent_mean", "vision"])
    assert set(with_tokens.arrays) == {"sample_id", "label", "latent_mean", "vision", "vision_scale"}
    reads = Reads(monkeypatch)
    check(condensed.open(folder, tmp_path / "cache"), written)
    assert len(reads.names) == PARTS
    assert (cache / "latent_mean.npy").stat().st_mtime_ns == before
    check(condensed.open(folder, tmp_path / "cache"), written)
    assert len(reads.names) == PARTS, "built once"
    with pytest.raises(UserError, match="no column 'depth' to open; it has pixels, latent_mean, latent_std, vision, vision_large"):
        condensed.open(folder, tmp_path / "cache", columns=["depth"])


def test_a_cache_of_other_sizes_is_built_anew(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", written)
    condensed.open(folder, tmp_path / "cache")
    (cache,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for spoil in (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(b"half"),
        lambda path: path.unlink(),
        lambda path: np.save(path, np.zeros((ROWS, 2, 16, 192), np.uint8)),
        lambda path: (cache / "state.json").write_text('{"parts": {"vis'),
    ):
        spoil(cache / "vision.npy")
        check(condensed.open(folder, tmp_path / "cache"), written)


def test_a_kill_while_a_spoilt_column_is_built_anew_leaves_no_zeros(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    condensed.open(folder, tmp_path / "cache")
    (cache,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (cache / "vision.npy").unlink()
    process = builder(folder, tmp_path / "cache", "part-000000.parquet")
    assert process.stdout is not None and process.stdout.readline()
    process.kill()
    process.communicate()
    check(condensed.open(folder, tmp_path / "cache"), written)


@pytest.mark.parametrize("provenance", [True, False])
def test_one_fingerprint_and_other_bytes_share_no_cache(written, tmp_path: Path, provenance: bool) -> None:
    first, copy = write(tmp_path / "first", written, provenance), tmp_path / "copy"
    other = write(tmp_path / "other", written | {"vision": written["vision"][::-1].copy(), "label": written["label"][::-1]}, provenance)
    shutil.copytree(first, copy)
    one, two = condensed.open(first, tmp_path / "cache"), condensed.open(other, tmp_path / "cache")
    assert not np.array_equal(one.arrays["vision"], two.arrays["vision"])
    condensed.open(copy, tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
    condensed.drop_cache(copy, tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    check(one, written)  # what is open stays readable
    check(condensed.open(first, tmp_path / "cache"), written)


# Batches


def test_batches_equal_naive_indexing_and_are_the_callers_own(written, tmp_path: Path) -> None:
    data = condensed.open(write(tmp_path / "data", written), tmp_path / "cache")
    rng = np.random.default_rng(0)
    kept: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    for count in (16, 16, 5, 24, 1):
        rows, flipped = rng.integers(0, ROWS, count), rng.random(count) < 0.5
        batch, side = data.batch(torch.from_numpy(rows), flipped), flipped.astype(int)
        mirrored = np.where(flipped[:, None, None, None], written["pixels"][rows][:, :, ::-1], written["pixels"][rows])
        large = torch.from_numpy(written["vision_large"][rows, side].view(np.int16)).view(torch.bfloat16)
        wanted = {
            "sample_id": torch.from_numpy(written["sample_id"][rows]),
            "label": torch.from_numpy(written["label"][rows]),
            "pixels": torch.from_numpy(mirrored),
            "latent_mean": torch.from_numpy(written["latent_mean"][rows, side]).float(),
            "latent_std": torch.from_numpy(written["latent_std"][rows, side]).float(),
            "vision": torch.from_numpy(written["vision"][rows, side]).float() * torch.from_numpy(written["vision_scale"][rows, side])[..., None],
            "vision_large": large.float(),
        }  # fmt: skip
        assert set(batch) == set(wanted)
        kept.append((batch, wanted))
    for batch, wanted in kept:  # after all of them were gathered through the same buffers
        for name, values in wanted.items():
            assert batch[name].dtype == values.dtype and torch.equal(batch[name], values), name
    plain = data.batch(range(ROWS))
    assert torch.equal(plain["pixels"], torch.from_numpy(written["pixels"]))


def test_rows_and_mirror_images_that_are_not_there_are_refused(written, tmp_path: Path) -> None:
    one_sided = {name: values[:, :1] if name.startswith(("latent", "vision")) else values for name, values in written.items()}
    folder = write(tmp_path / "data", one_sided)
    change_facts(folder, flip=False)
    data = condensed.open(folder, tmp_path / "cache")
    for rows in ([0, ROWS], [-1, 3]):
        with pytest.raises(IndexError, match=f"of {ROWS}"):
            data.batch(rows)
    with pytest.raises(UserError, match="holds no mirror images"):
        data.batch([0, 1], [True, False])
    with pytest.raises(ValueError, match="one number an image"):
        data.batch([0, 1], [False])
    assert torch.equal(data.batch([4, 2], [False, False])["latent_mean"], torch.from_numpy(written["latent_mean"][[4, 2], 0]).float())


@pytest.mark.parametrize("column", ["latent_mean", "vision", "vision_large"])
@pytest.mark.parametrize("flip", [True, False])
def test_a_column_with_other_sides_than_the_dataset_says_is_refused(written, tmp_path: Path, column: str, flip: bool) -> None:
    one = {name: values[:, :1] if name.startswith(("latent", "vision")) else values for name, values in written.items()}
    given, other = (written, one) if flip else (one, written)
    names = (column, f"{column}_scale") if column == "vision" else (column,)
    folder = write(tmp_path / "data", given | {name: other[name] for name in names})
    change_facts(folder, flip=flip)
    with pytest.raises(UserError, match=rf"column '{column}' is of shape .*flip={flip}"):
        condensed.open(folder, tmp_path / "cache")
    if column != "latent_mean":
        assert len(condensed.open(folder, tmp_path / "cache", columns=["latent_mean"])) == ROWS


def test_kept_latents_with_other_sides_are_not_taken(written, tmp_path: Path) -> None:
    """Half of them kept with flips, half without: neither is what either setting needs."""
    rows = pa.table({"sample_id": np.arange(8), "shard": np.zeros(8, np.int64)})
    both = {name: written[name][:8] for name in ("latent_mean", "latent_std")}
    latent_cache.write(tmp_path, rows.slice(0, 4), {name: values[:4] for name, values in both.items()})
    latent_cache.write(tmp_path, rows.slice(4), {name: values[4:, :1] for name, values in both.items()})
    first, second = latent_cache.read(tmp_path, rows.slice(0, 4), True), latent_cache.read(tmp_path, rows.slice(4), False)
    assert first is not None and second is not None
    for name, values in both.items():
        assert np.array_equal(first[name], values[:4]) and np.array_equal(second[name], values[4:, :1])
    for some, flip in ((rows, True), (rows, False), (rows.slice(0, 4), False), (rows.slice(4), True)):
        assert latent_cache.read(tmp_path, some, flip) is None


@pytest.mark.parametrize("column", ["vision", "vision_large"])
@pytest.mark.parametrize("space", ["pixels", "latent"])
def test_a_kept_gatherer_gives_the_training_batches_of_naive_indexing(written, column: str, space: str) -> None:
    """To the bit, and not changed by the next batch."""
    images = {"pixels": written["pixels"]} if space == "pixels" else {name: written[name] for name in ("latent_mean", "latent_std")}
    data = batches.TrainingSet(
        np.maximum(written["label"], 0), 10, True, **images, vision=written[column], latent_scale=0.3, latent_shift=0.1
    )
    gatherer, kept = batches.Gatherer(CPU), []
    for step in range(4):
        rows = batches.image_order(0, 32 * step, 32 * step + 32, ROWS)
        draws = batches.draw(0, step, 0, 32, data.latent_shape, 0.1, True, space == "latent", CPU)
        batch, side = batches.gather(data, rows, draws, True, gatherer), draws.flip.long().numpy()
        if space == "pixels":
            z = torch.from_numpy(data.pixels[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            z = torch.where(draws.flip[:, None, None, None], z.flip(-1), z)
        else:
            mean, std = (torch.from_numpy(written[name][rows, side]).float() for name in ("latent_mean", "latent_std"))
            z = (mean + std * draws.posterior - 0.1) * 0.3
        tokens = torch.from_numpy(written[column][rows, side].view(np.int16 if column == "vision_large" else np.int8))
        wanted = {
            "z": z,
            "label": torch.where(draws.dropped, 10, torch.from_numpy(data.labels[rows])),
            "vision": tokens.view(torch.bfloat16).float() if column == "vision_large" else tokens.float(),
        }
        kept.append((batch, wanted))
    for batch, wanted in kept:
        for name, values in wanted.items():
            assert torch.equal(batch[name], values) and batch[name].stride() == values.stride(), name


def test_gathering_takes_no_memory_but_the_results(tmp_path: Path) -> None:
    """NumPy, whose allocations tracemalloc sees, makes no second batch of 16 MiB; nothing is left behind by 30 of them.

    In a process of its own: what other tests hold would come and go beside it.
    """
    script = textwrap.dedent("""
        import sys, tracemalloc
        from pathlib import Path
        import numpy as np, torch
        from d2c_ray.training import batches

        torch.set_num_threads(1)
        values = np.load(sys.argv[1])
        array, rows, gatherer = np.load(sys.argv[1], mmap_mode="r"), np.arange(16), batches.Gatherer(torch.device("cpu"))

        def anonymous():
            return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10

        for step in range(40):
            if step == 10:  # until then torch and malloc fill their own stores
                before = anonymous()
            taken = gatherer.take("x", array, (rows * 7 + step) % 64, rows % 2, torch.int8)
            assert np.array_equal(taken.numpy(), values[(rows * 7 + step) % 64, rows % 2])
        left = anonymous() - before
        tracemalloc.start()
        gatherer.take("x", array, rows, rows % 2, torch.int8)
        print(left, tracemalloc.get_traced_memory()[1])
    """)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(-128, 127, (64, 2, 1 << 20), np.int8))
    # A fixed threshold: malloc would learn from what is freed, and keep up to 64 MiB for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.npy")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    left, peak = map(int, done.stdout.split())
    assert left < 8 << 20 and peak < 1 << 20, (left, peak)


# What a training opens


def test_align_with_chooses_the_tokens(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    data = condensed.open(folder, tmp_path / "cache")
    assert np.array_equal(data.training_set().vision, written["vision"]) and data.training_set().vision_scale is not None
    assert np.array_equal(data.training_set("large").vision, written["vision_large"]) and data.training_set("large").vision_scale is None
    assert data.training_set(None).vision is None
    assert data.training_set().labels.min() == 0 and data.training_set().latent_scale == 0.5
    for refused in (lambda: data.training_set("huge"), lambda: condensed.vision_width(folder, "huge")):
        with pytest.raises(UserError, match=r"train\.align_with='huge': .* It has those of train\.align_with='', train\.align_with=large"):
            refused()


def test_a_dataset_with_other_tokens_or_none_is_told_apart(written, tmp_path: Path) -> None:
    large = {name: values for name, values in written.items() if name not in ("vision", "vision_scale")}
    other = write(tmp_path / "other", large)
    with pytest.raises(UserError, match=r"align_with='': .*align_with=large"):
        condensed.vision_width(other)
    none = write(tmp_path / "none", {name: values for name, values in large.items() if name != "vision_large"})
    assert condensed.vision_width(none) == 0 and condensed.open(none, tmp_path / "cache").training_set().vision is None
    with pytest.raises(UserError, match="It has none at all"):
        condensed.vision_width(none, "large")


def test_a_training_opens_only_what_it_needs(written, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", written)
    facts = json.loads((folder / "_SUCCESS.json").read_text())["facts"]
    for align_with, wanted in ((None, set()), ("", {"vision", "vision_scale"}), ("large", {"vision_large"})):
        columns = condensed.training_columns(facts, align_with)
        assert (
            set(condensed.open(folder, tmp_path / "cache", columns).arrays) == {"sample_id", "label", "latent_mean", "latent_std"} | wanted
        )
    assert condensed.training_columns({"latent": {"kind": "pixels"}}, None) == ["pixels"]


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_a_worker_opens_its_columns_in_the_cache_folder_and_keeps_them_if_told(
    written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, fails: bool
) -> None:
    """What a worker of Ray Train runs, in this process; one that fails leaves its copy to the worker that is started in its place."""

    from d2c_ray.distributed import trainer

    folder = write(tmp_path / "data", written)
    monkeypatch.setattr(
        trainer.ray.train,
        "get_context",
        lambda: SimpleNamespace(get_world_rank=lambda: 0, get_local_rank=lambda: 0, get_world_size=lambda: 1),
    )
    monkeypatch.setattr(trainer.telemetry, "adopt", lambda about: None)  # this process goes on after it
    monkeypatch.setattr(trainer.ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(trainer.ray.train.torch, "get_device", lambda: CPU)
    copies: list[list[str]] = []

    def report(step: int, save: object) -> None:
        copies.append(sorted(path.name for path in (tmp_path / "cache").rglob("*.npy")))
        if fails:
            raise RuntimeError("the training failed")

    monkeypatch.setattr(trainer.checkpoints, "Uploads", lambda *args: report)
    spec = TransformerSpec("sit", 32, 3, 8, 1, 32, 2, 10, text_tokens=2, text_width=4, vision_width=96, align_depth=1, align_hidden=16)
    options = TrainConfig(num_images=32, batch_size=16, precision="fp32", align_with="large", log_every=16, checkpoint_every=32)
    facts = json.loads((folder / "_SUCCESS.json").read_text())["facts"]
    args = {
        "spec": spec.to_dict(), "train": asdict(options), "data": str(folder), "columns": condensed.training_columns(facts, "large"), "encoders": condensed.NOTHING, "start": "",
        "cache_dir": str(tmp_path / "cache"), "keep_cache": keep, "out": str(tmp_path), "threads": 1, "mended": "",
        "where": str(tmp_path), "storage": asdict(StorageConfig()), "micro_batch": 0, "recompute": False, "notices": False, "after": "", "use_gpu": False, "most_workers": 1, "about": About(),
        "beats": True,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="the training failed") if fails else nullcontext():
        trainer._worker(args)
    assert copies == [["label.npy", "latent_mean.npy", "latent_std.npy", "sample_id.npy", "vision_large.npy"]]
    assert bool(list((tmp_path / "cache").rglob("*.npy"))) == (keep or fails)
    logs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(logs) == 2 and all(log["loss_align"] != 0 for log in logs)


def test_the_docstrings_example_trains(written, tmp_path: Path) -> None:
    """The lines of Condensed's docstring, as they stand there."""
    folder = write(tmp_path / "data", written)
    lines = [
        line[8:]
        for line in (condensed.Condensed.__doc__ or "").splitlines()
        if line.startswith(" " * 8) and not line.startswith(" " * 8 + "`")
    ]
    code = "\n".join(lines[: next(index for index, line in enumerate(lines) if "loss.backward" in line) + 1])
    opened = condensed.open(folder, tmp_path / "cache")
    head = torch.nn.Linear(4, 3)
    seen: list[int] = []

    def my_loss(latents: torch.Tensor, text: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(latents))
        return (head(text / 80).mean(1) - latents.mean((2, 3))).square().mean() + 0 * tokens.mean()

    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    before = head.weight.detach().clone()
    patched = code.replace('"runs/mine/condensed-1a2b3c4d"', repr(str(folder)))
    assert patched != code
    start = time.perf_counter()
    original, condensed.open = condensed.open, lambda path: opened
    try:
        exec(patched, {"torch": torch, "my_loss": my_loss, "optimizer": optimizer})
    finally:
        condensed.open = original
    assert sum(seen) == ROWS and not torch.equal(before, head.weight) and time.perf_counter() - start < 60
