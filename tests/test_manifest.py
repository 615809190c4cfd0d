"""The manifest of every source, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2c_ray.config import DataConfig, StorageConfig
from d2c_ray.data import manifest, units
from d2c_ray.data.decode import encode_png
from d2c_ray.errors import UserError

SILENT = SimpleNamespace(advance=lambda count: None)


LOCAL = StorageConfig()


def scan(data: DataConfig, rows_per_table: int = 1000, options: StorageConfig = LOCAL) -> tuple[pa.Table, list[str]]:
    source, listing = manifest.find(data, options), manifest.Listing()
    found = list(manifest.scan(source, data, options, listing, rows_per_table, SILENT))
    assert all(len(table) == rows_per_table for table in found[:-1])
    assert listing.rows == sum(map(len, found))
    return pa.concat_tables(found), listing.class_names(source, data, options)


def picture(value: int, size: int = 8) -> bytes:
    return encode_png(np.full((size, size, 3), value, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name, values in {"b_dog": (10, 20), "a_cat": (30,), "c d/deep": (40, 50)}.items():
        (root / name).mkdir(parents=True)
        for value in values:
            (root / name / f"{value}.png").write_bytes(picture(value))
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(picture(1))
    return root


def parquet(path: Path, labels: list[int], column: str = "struct", rows_per_group: int = 2, metadata: dict | None = None) -> None:
    images = [picture(10 * (index + 1) % 250) for index in range(len(labels))]
    if column == "struct":
        values = pa.array([{"bytes": image, "path": f"{index}.png"} for index, image in enumerate(images)])
    else:
        values = pa.array(images, pa.binary())
    table = pa.table({"image": values, "label": pa.array(labels, pa.int64())}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=rows_per_group)


def test_class_folders(folder: Path) -> None:
    table, names = scan(DataConfig(path=str(folder), image_size=8, flip=False))
    assert names == ["a_cat", "b_dog", "c d"]
    assert table.column("key").to_pylist() == ["a_cat/30.png", "b_dog/10.png", "b_dog/20.png", "c d/deep/40.png", "c d/deep/50.png"]
    assert table.column("label").to_pylist() == [0, 1, 1, 2, 2]
    assert table.column("sample_id").to_pylist() == [0, 1, 2, 3, 4]
    contents = manifest.read_images(table, str(folder), "", LOCAL)
    assert [len(content) for content in contents] == table.column("length").to_pylist()


@pytest.mark.parametrize("column", ["struct", "binary"])
def test_parquet_rows_read_back(tmp_path: Path, column: str) -> None:
    parquet(tmp_path / "train-0.parquet", [1, 0, 1, 2, 2], column)
    parquet(tmp_path / "train-1.parquet", [0, 0], column)
    data = DataConfig(path=str(tmp_path), image_size=8)
    table, names = scan(data)
    assert len(table) == 7
    assert names == ["", "", ""]
    decoded, rejected = units.decode_rows(table, data, LOCAL)
    assert rejected == []
    assert units.pixels_of(decoded)[:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50, 10, 20]
    assert table.column("row_group").to_pylist() == [0, 0, 1, 1, 2, 0, 0]


def test_class_names_come_from_the_file_the_schema_or_beside(tmp_path: Path) -> None:
    hub = {"huggingface": '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'}
    parquet(tmp_path / "a.parquet", [0, 1], metadata=hub)
    assert scan(DataConfig(path=str(tmp_path)))[1] == ["cat", "dog"]
    (tmp_path / "classes.txt").write_text("lion\nwolf\n")
    assert scan(DataConfig(path=str(tmp_path)))[1] == ["lion", "wolf"]
    (tmp_path / "own.txt").write_text("a\nb\nc\n")
    assert scan(DataConfig(path=str(tmp_path), classes=str(tmp_path / "own.txt")))[1] == ["a", "b"]


def test_an_empty_line_is_a_class_without_a_name(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [0, 1, 2])
    (tmp_path / "classes.txt").write_text("cat\n\nfish\n\n")
    assert scan(DataConfig(path=str(tmp_path)))[1] == ["cat", "", "fish"]


def test_pattern_and_limit(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", [0, 0, 0, 1, 1])
    parquet(tmp_path / "test-0.parquet", [0])
    table, _ = scan(DataConfig(path=str(tmp_path), pattern="train-*.parquet", limit_per_class=2))
    assert table.column("label").to_pylist() == [0, 0, 1, 1]
    assert table.column("sample_id").to_pylist() == [0, 1, 2, 3]


def test_unlabelled_data_is_one_class(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [0, 1, 2])
    table, names = scan(DataConfig(path=str(tmp_path), label_column=""))
    assert table.column("label").to_pylist() == [-1, -1, -1]
    assert names == []


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    data = DataConfig(source="digits", image_size=8, channels=1)
    table, names = scan(data)
    assert len(table) == 1797
    assert names[3] == "three"
    decoded, _ = units.decode_rows(table, data, LOCAL)
    assert np.array_equal(units.pixels_of(decoded)[..., 0], np.round(load_digits().images * 15.9375))
    assert decoded.column("label").to_pylist() == load_digits().target.tolist()


def test_fingerprint_follows_content_and_not_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        parquet(tmp_path / place / "a.parquet", [0, 1])

    def of(place: str, **fields: str) -> str:
        data = DataConfig(path=str(tmp_path / place), **fields)
        return manifest.fingerprint(manifest.find(data, LOCAL), data, LOCAL)

    first = of("one")
    assert first == of("two")
    assert first != of("one", version="2")
    parquet(tmp_path / "two" / "a.parquet", [1, 0])
    assert first != of("two")


def test_refusals_of_sources(folder: Path, tmp_path: Path) -> None:
    def refused(words: str, **fields: object) -> None:
        with pytest.raises(UserError, match=words):
            scan(DataConfig(**fields))  # type: ignore[arg-type]

    empty = tmp_path / "empty"
    empty.mkdir()
    refused("data.path is empty")
    refused("no such file or folder", path=str(tmp_path / "nowhere"))
    refused("holds no files", path=str(empty))
    refused("match data.pattern=x-", path=str(folder), pattern="x-*")
    (empty / "shard.tar.gz").write_bytes(b"x")
    refused(r"'shard\.tar\.gz' is compressed", path=str(empty))
    refused("gs://", path="gs://bucket/data")
    (folder / "loose.png").write_bytes(picture(3))
    refused("'loose.png' lies in no class folder", path=str(folder))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.parquet").write_bytes(b"PAR1 and nothing more")
    refused("no readable Parquet file", path=str(broken))
    parquet(broken / "a.parquet", [0, 1])
    refused("has no column 'img'.*image, label", path=str(broken), image_column="img")
    refused("column 'label' is int64; encoded images", path=str(broken), image_column="label")
    refused("labels below -1", path=str(_with_labels(broken, [0, -2])))
    refused("1 images have no label", path=str(_with_labels(broken, [0, -1])))
    (broken / "few.txt").write_text("cat\n")
    refused("names 1 classes; the labels go up to 1", path=str(_with_labels(broken, [0, 1])), classes=str(broken / "few.txt"))


def _with_labels(folder: Path, labels: list[int]) -> Path:
    parquet(folder / "a.parquet", labels)
    return folder


def test_duplicate_keys_are_refused_by_name(folder: Path) -> None:
    (folder.parent / "twice").mkdir()
    parquet(folder.parent / "twice" / "a.parquet", [0, 1])
    entry = manifest.Entry("a.parquet", 1)
    source = manifest.Source("parquet", str(folder.parent / "twice"), (entry, entry))
    with pytest.raises(UserError, match=r"the key 'a\.parquet#000000000' occurs twice|sorts before"):
        list(manifest.scan(source, DataConfig(path=str(folder)), LOCAL, manifest.Listing(), 10, SILENT))


def test_data_that_moved_is_read_where_it_is_and_a_lost_file_is_a_rejected_row(folder: Path, tmp_path: Path) -> None:
    table, _ = scan(DataConfig(path=str(folder)))
    moved = folder.rename(tmp_path / "moved")
    (moved / "a_cat" / "30.png").unlink()
    decoded, rejected = units.decode_rows(table, DataConfig(path=str(moved), image_size=8), LOCAL)
    assert units.pixels_of(decoded)[:, 0, 0, 0].tolist() == [10, 20, 40, 50]
    assert [row["key"] for row in rejected] == ["a_cat/30.png"]
    assert "No such file or directory" in rejected[0]["reason"]
