"""Headers of every tar format, against Python's tarfile; samples grouped by WebDataset's rule; what is refused."""

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_manifest import LOCAL, picture, scan

from d2c_ray.config import DataConfig
from d2c_ray.data import manifest, tar, units
from d2c_ray.errors import UserError

LONG = "a_very_long_folder_name/" * 9 + "träumerei." + "x" * 40 + ".jpg"


def pack(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def walked(content: bytes) -> list[tuple[str, int, int]]:
    return list(tar.members(lambda start, stop: content[start:stop], len(content), "x.tar"))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
def test_members_are_those_of_tarfile(tmp_path: Path, kind: int) -> None:
    prefix = "deep/" * 25 + "within_the_prefix_field.jpg"  # ustar splits it over name and prefix
    names = ["a.jpg", prefix, "empty.txt", "b/c.json", *([] if kind == tarfile.USTAR_FORMAT else [LONG]), "last.jpg"]
    path = pack(tmp_path / "x.tar", [(name, name.encode() * (0 if name == "empty.txt" else 37)) for name in names], kind)
    with tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive if info.isfile()]
    assert walked(path.read_bytes()) == expected
    assert [name for name, _, _ in expected] == names


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_members_are_those_of_the_tar_program(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    for index in range(30):
        (folder / f"{index:03d}.jpg").write_bytes(bytes([index]) * index * 100)
    subprocess.run(["tar", f"--format={kind}", "-cf", "x.tar", "images"], cwd=tmp_path, check=True)
    listed = subprocess.run(["tar", "-tf", "x.tar"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    content = (tmp_path / "x.tar").read_bytes()
    found = [member for member in walked(content) if not member[0].endswith("/")]
    assert [name for name, _, _ in found] == [name for name in listed if not name.endswith("/")]
    for name, offset, length in found:
        assert content[offset : offset + length] == (tmp_path / name).read_bytes()


def test_sizes_beyond_octal_are_read() -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 9 << 33  # base 256 in GNU, a record in pax
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = info.tobuf(kind)
        found = tar.members(lambda start, stop, header=header: header[start:stop], 1 << 40, "x.tar")
        assert next(found) == ("huge.jpg", len(header), 9 << 33)


def test_a_global_pax_header_and_the_end_block(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all of them"}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO(b""))
    content = path.read_bytes()
    assert [name for name, _, _ in walked(content)] == ["a.jpg"]
    assert walked(content + b"what follows the end is no header") == walked(content)
    bare = content.rstrip(b"\0")
    assert [name for name, _, _ in walked(bare + bytes(-len(bare) % 512))] == ["a.jpg"]  # end blocks left out, as some writers do


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:700], "is cut off: 'a.jpg' ends at byte 1512, the file at byte 700"),
        (lambda content: content[:300], "cut off: 300 bytes of a header at byte 0"),
        (lambda content: b"\x1f\x8b" + content[2:257] + b"     " + content[262:], r"is compressed \(gzip\)"),
        (lambda content: content[:1600] + b"rubbish" * 200, "cut off|no tar header at byte"),
        (lambda content: b"no archive at all" * 100, "is no tar file"),
        (lambda content: content[:124] + b"not a size!!" + content[136:], "gives no size"),
    ],
    ids=["member", "header", "gzip", "rubbish", "text", "size"],
)
def test_damage_is_refused_in_words(tmp_path: Path, damage, words: str) -> None:
    content = pack(tmp_path / "x.tar", [("a.jpg", bytes(1000)), ("b.jpg", bytes(10))], tarfile.GNU_FORMAT).read_bytes()
    with pytest.raises(UserError, match=words):
        walked(damage(content))


def test_links_are_refused_rather_than_lost(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [("a.jpg", b"x")])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"'b\.jpg' is a link"):
        walked(path.read_bytes())


def test_samples_whose_members_lie_apart(tmp_path: Path) -> None:
    """All images first, then all labels; extensions in any spelling; json and cls; names with folders."""
    pack(
        tmp_path / "w" / "shard-1.tar",
        [
            ("n1/b.JPEG", picture(20)), ("n1/a.jpeg", picture(10)), ("c.Png", picture(30)), ("readme.txt", b"hello"), (".hidden.jpg", b"x"),
            ("c.cls", b" 2\n"), ("n1/a.json", b'{"label": 0, "caption": "x"}'), ("n1/b.cls", b"1"), ("n1/a.txt", b"a caption"), ("noextension", b""),
        ],
    )  # fmt: skip
    pack(tmp_path / "w" / "shard-0.tar", [("z.webp", picture(40)), ("z.cls", b"2")])
    (tmp_path / "w" / "classes.txt").write_text("cat\ndog\nfish\n")
    data = DataConfig(path=str(tmp_path / "w"), image_size=8)
    table, names = scan(data)
    assert names == ["cat", "dog", "fish"]
    assert table.column("key").to_pylist() == ["shard-0.tar#z.webp", "shard-1.tar#c.Png", "shard-1.tar#n1/a.jpeg", "shard-1.tar#n1/b.JPEG"]
    assert table.column("label").to_pylist() == [2, 2, 0, 1]
    decoded, rejected = units.decode_rows(table, data, LOCAL)
    assert rejected == []
    assert units.pixels_of(decoded)[:, 0, 0, 0].tolist() == [40, 30, 10, 20]
    source = manifest.find(data, LOCAL)
    listing = manifest.Listing()
    list(manifest.scan(source, data, LOCAL, listing, 100, type("Silent", (), {"advance": lambda self, n: None})()))
    assert listing.passed_over == 4  # readme, hidden, a caption, no extension


def test_a_json_field_and_an_extension_are_chosen_by_name(tmp_path: Path) -> None:
    members = [("a.seg.png", picture(1)), ("a.jpg", picture(2)), ("a.json", json.dumps({"class": 5, "label": "word"}).encode())]
    path = pack(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"'a' holds several images, 'a\.seg\.png' and 'a\.jpg'\. data\.image_column=jpg"):
        scan(DataConfig(path=str(path)))
    table, _ = scan(DataConfig(path=str(path), image_column="jpg", label_column="class"))
    assert table.column("key").to_pylist() == ["x.tar#a.jpg"]
    assert table.column("label").to_pylist() == [5]
    with pytest.raises(UserError, match="holds label='word'; an integer"):
        scan(DataConfig(path=str(path), image_column="jpg"))
    table, _ = scan(DataConfig(path=str(path), image_column="seg.png", label_column=""))
    assert table.column("label").to_pylist() == [-1]


def test_tars_that_cannot_be_a_manifest(tmp_path: Path) -> None:
    def refused(words: str, members: list[tuple[str, bytes]]) -> None:
        path = pack(tmp_path / "x.tar", members)
        with pytest.raises(UserError, match=words):
            scan(DataConfig(path=str(path)))

    refused(r"the key 'x\.tar#a\.jpg' occurs twice", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")])
    refused("1 images have no label", [("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"2")])
    refused("'a.cls' holds b'cat'; an integer", [("a.jpg", b"1"), ("a.cls", b"cat")])
    refused("'a.json' is no JSON", [("a.jpg", b"1"), ("a.json", b"{")])
    refused("no image in 1 files", [("a.txt", b"1")])
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no tar file: 0 bytes"):
        scan(DataConfig(path=str(tmp_path / "x.tar")))


def test_a_tar_that_was_cut_since_gives_rejected_rows(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [(f"{index}.png", picture(index)) for index in range(4)])
    data = DataConfig(path=str(path), image_size=8)
    table, _ = scan(data)
    content = path.read_bytes()
    path.write_bytes(content[: table.column("offset")[3].as_py() + 5])
    decoded, rejected = units.decode_rows(table, data, LOCAL)
    assert len(decoded) == 3
    assert "cut off: 5 of" in rejected[0]["reason"]
