"""Reading local files and a real S3 service, through a proxy that fails on order."""

import logging
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_s3 import ACCESS_KEY, SECRET_KEY, FaultyProxy, S3Server, is_listing, once_each

from d2c_ray.config import StorageConfig
from d2c_ray.data import storage
from d2c_ray.errors import UserError

FAULTS = ["503", "reset", "stall", "cut"]
CONTENT = np.random.default_rng(0).bytes(300_000)
LOCAL = StorageConfig()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        running.put("pictures", "big.bin", CONTENT)
        running.put("pictures", "empty.bin", b"")
        yield running


@pytest.fixture(scope="module")
def proxy_of_module(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.endpoint, stall_sec=120.0) as running:
        yield running


@pytest.fixture
def proxy(proxy_of_module: FaultyProxy) -> FaultyProxy:
    proxy_of_module.reset()
    return proxy_of_module


@pytest.fixture
def s3(proxy: FaultyProxy) -> StorageConfig:
    return StorageConfig(endpoint=proxy.endpoint, timeout_sec=2.0)  # of what stalls alone: an answer takes milliseconds


# Byte order of the whole path, worked out by hand: '-' < '.' < '/' < '0' < 'B' < 'a', and UTF-8 keeps code point order where
# UTF-16 would put the emoji before the full-width tilde.
NAMES = ["B/z", "a-b/x", "a.txt", "a/b.txt", "a/b/c", "a/x", "a0", "é/1", "～.txt", "😀.txt"]
HIDDEN = [".hidden", ".cache/x", "a/.part", "a/.tmp/y"]


def test_walk_gives_the_same_order_locally_and_on_s3(server: S3Server, s3: StorageConfig, tmp_path: Path) -> None:
    shuffled = NAMES + HIDDEN
    random.Random(0).shuffle(shuffled)
    for number, name in enumerate(shuffled):
        content = bytes(number)
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(content)
        server.put("walked", f"some/top/{name}", content)
    server.put("walked", "some/top/", b"")  # what a console makes for a folder
    server.put("walked", "some/top/a/", b"")
    server.put("walked", "some/topless", b"not below it")
    wanted = [storage.Entry(name, shuffled.index(name)) for name in NAMES]
    assert list(storage.walk(str(tmp_path / "root"), LOCAL)) == wanted
    for root in ("s3://walked/some/top", "s3://walked/some/top/"):
        assert list(storage.walk(root, s3)) == wanted
    for root, config in ((str(tmp_path / "root"), LOCAL), ("s3://walked/some/top", s3)):
        assert [len(storage.read_all(storage.join(root, entry.name), config)) for entry in wanted] == [entry.size for entry in wanted]


def test_walk_reads_every_page_and_a_failed_page_again(server: S3Server) -> None:
    for number in range(2_005):
        server.put("paged", f"p/{number:05d}", b"x")
    with FaultyProxy(server.endpoint, ["503", "cut", "ok", "reset", "stall", "ok", "ok"], only=is_listing, stall_sec=120.0) as proxy:
        config = StorageConfig(endpoint=proxy.endpoint, timeout_sec=6.0)  # a full page takes the service a while
        names = [entry.name for entry in storage.walk("s3://paged/p", config)]
    assert names == [f"{number:05d}" for number in range(2_005)]
    assert proxy.counts == {"503": 1, "cut": 1, "reset": 1, "stall": 1, "ok": 3}


def test_walk_follows_links_but_no_loops(tmp_path: Path) -> None:
    (tmp_path / "root" / "real").mkdir(parents=True)
    (tmp_path / "root" / "real" / "x").write_bytes(b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y").write_bytes(b"22")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "real" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "itself").symlink_to("itself")
    (tmp_path / "root" / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "root" / "pipe")
    found = [(entry.name, entry.size) for entry in storage.walk(str(tmp_path / "root"), LOCAL)]
    assert found == [("gone", 0), ("itself", 0), ("linked/y", 2), ("real/x", 1)]
    with pytest.raises(FileNotFoundError):  # a dead link is not dropped in silence
        storage.read_all(str(tmp_path / "root" / "gone"), LOCAL)


def test_kind_and_size(s3: StorageConfig, server: S3Server, tmp_path: Path) -> None:
    server.put("kinds", "p/x.bin", b"12345")
    (tmp_path / "x.bin").write_bytes(b"123")
    assert [storage.kind(f"s3://kinds{key}", s3) for key in ("", "/", "/p", "/p/", "/p/x.bin", "/p/x.bin/", "/p/x")] == [
        "folder", "folder", "folder", "folder", "file", None, None,
    ]  # fmt: skip
    assert [storage.kind(str(path), LOCAL) for path in (tmp_path, tmp_path / "x.bin", tmp_path / "y", tmp_path / "x.bin" / "z")] == [
        "folder", "file", None, None,
    ]  # fmt: skip
    assert storage.size("s3://kinds/p/x.bin", s3) == 5 and storage.size(str(tmp_path / "x.bin"), LOCAL) == 3
    with pytest.raises(FileNotFoundError) as missing:
        storage.size("s3://kinds/p/y.bin", s3)
    assert missing.value.filename == "s3://kinds/p/y.bin"


def test_who_may_read_but_not_list_still_reads(server: S3Server) -> None:
    with FaultyProxy(server.endpoint, ["403"], only=is_listing) as proxy:
        config = StorageConfig(endpoint=proxy.endpoint)
        assert storage.kind("s3://pictures/big.bin", config) == "file"
        with pytest.raises(storage.StorageError, match="credentials refused"):
            storage.kind("s3://pictures/elsewhere", config)
    assert proxy.counts == {"403": 2}


@pytest.mark.parametrize("fault", [*FAULTS, "trickle"])
def test_a_spoilt_body_is_read_again(fault: str, proxy: FaultyProxy, s3: StorageConfig) -> None:
    proxy.reset([fault, fault, "ok"])
    assert storage.read("s3://pictures/big.bin", 1_000, 50_000, s3) == CONTENT[1_000:51_000]
    assert proxy.counts == {fault: 2, "ok": 1}
    assert proxy.gets == [("/pictures/big.bin", "bytes=1000-50999")] * 3


def test_ranges_are_equal_under_every_fault(proxy: FaultyProxy, s3: StorageConfig, server: S3Server, tmp_path: Path) -> None:
    for number in range(8):
        server.put("ranges", f"{number}.bin", CONTENT[number * 1_000 :])
        (tmp_path / f"{number}.bin").write_bytes(CONTENT[number * 1_000 :])
    draw = random.Random(1)
    wanted = [(f"{draw.randrange(8)}.bin", draw.randrange(310_000), draw.choice([-1, 0, 1, 5_000, 250_000])) for _ in range(60)]
    proxy.reset(once_each(FAULTS))
    remote = storage.read_ranges([(f"s3://ranges/{name}", offset, length) for name, offset, length in wanted], s3)
    local = storage.read_ranges([(str(tmp_path / name), offset, length) for name, offset, length in wanted], LOCAL)
    files = [CONTENT[int(name[0]) * 1_000 :] for name, _, _ in wanted]
    expected = [file[offset : None if length < 0 else offset + length] for file, (_, offset, length) in zip(files, wanted, strict=True)]
    assert local == expected
    assert remote == expected
    assert set(proxy.counts) == {*FAULTS, "ok"} and min(proxy.counts[fault] for fault in FAULTS) > 0


def test_neighbouring_ranges_share_a_request(proxy: FaultyProxy, s3: StorageConfig, server: S3Server) -> None:
    gap, first = storage.GAP_BYTES, 10
    server.put("near", "a.bin", bytes(2 * gap + 1_000))
    ranges = [
        ("s3://near/a.bin", 2 * gap + 100, 10),  # further from the one before than the gap
        ("s3://near/a.bin", 0, first),
        ("s3://near/a.bin", 5, 20),  # overlaps
        ("s3://near/a.bin", 25 + gap, 10),  # just within the gap
        ("s3://pictures/big.bin", 0, 10),
    ]
    assert [len(content) for content in storage.read_ranges(ranges, s3) if isinstance(content, bytes)] == [10, 10, 20, 10, 10]
    assert sorted(proxy.gets) == [
        ("/near/a.bin", f"bytes=0-{25 + gap + 10 - 1}"),
        ("/near/a.bin", f"bytes={2 * gap + 100}-{2 * gap + 109}"),
        ("/pictures/big.bin", "bytes=0-9"),
    ]


def test_no_request_is_larger_than_a_piece(proxy: FaultyProxy, s3: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 70_000)
    assert storage.read_all("s3://pictures/big.bin", s3) == CONTENT
    pieces = [f"bytes={start}-{stop}" for start, stop in ((0, 69_999), (70_000, 139_999), (140_000, 209_999), (210_000, 279_999))]
    assert sorted(asked or "" for _, asked in proxy.gets) == sorted([*pieces, "bytes=280000-299999"])
    proxy.reset()
    halves = [("s3://pictures/big.bin", 0, 40_000), ("s3://pictures/big.bin", 40_000, 40_000)]
    assert storage.read_ranges(halves, s3) == [CONTENT[:40_000], CONTENT[40_000:80_000]]
    assert len(proxy.gets) == 2


def test_missing_files_are_elements_of_the_answer(s3: StorageConfig, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"local")
    ranges = [
        ("s3://pictures/none.bin", 0, 10), (str(tmp_path / "none"), 0, 1), ("s3://pictures/big.bin", 0, 4),
        (str(tmp_path / "here"), 1, 3), ("s3://pictures/none.bin", 5, 0),
    ]  # fmt: skip
    missing, missing_locally, there, there_locally, missing_too = storage.read_ranges(ranges, s3)
    assert (there, there_locally) == (CONTENT[:4], b"oca")
    for error, uri in ((missing, ranges[0][0]), (missing_locally, ranges[1][0]), (missing_too, ranges[4][0])):
        assert isinstance(error, FileNotFoundError) and error.filename == uri
    with pytest.raises(IsADirectoryError):
        storage.read_ranges([(str(tmp_path), 0, 1)], LOCAL)


def test_a_forbidden_local_file_is_an_element_of_the_answer(tmp_path: Path) -> None:
    (tmp_path / "forbidden").write_bytes(b"x")
    (tmp_path / "forbidden").chmod(0)
    if os.access(tmp_path / "forbidden", os.R_OK):
        pytest.skip("nothing is forbidden to this user")
    (error,) = storage.read_ranges([(str(tmp_path / "forbidden"), 0, 1)], LOCAL)
    assert isinstance(error, PermissionError)


def test_empty_files_and_ends(s3: StorageConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "big").write_bytes(CONTENT)
    for empty, big in (("s3://pictures/empty.bin", "s3://pictures/big.bin"), (str(tmp_path / "empty"), str(tmp_path / "big"))):
        assert storage.size(empty, s3) == 0
        assert storage.read_all(empty, s3) == b"" == storage.read(empty, 0, 10, s3)
        assert storage.read_ranges([(empty, 0, 5), (empty, 0, 0), (empty, 3, -1)], s3) == [b"", b"", b""]
        assert storage.read(big, 299_990, 100, s3) == CONTENT[-10:] == storage.read(big, 299_990, -1, s3)
        assert storage.read(big, 300_000, 10, s3) == b"" == storage.read(big, 400_000, -1, s3)
        with storage.open_file(empty, s3) as file:
            assert (file.read(), file.size()) == (b"", 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_tries_are_used_up_in_time(fault: str, proxy: FaultyProxy) -> None:
    proxy.reset([fault])
    config = StorageConfig(endpoint=proxy.endpoint, attempts=3, timeout_sec=0.3)
    start = time.monotonic()
    with pytest.raises(storage.StorageError, match=r"'s3://pictures/big\.bin' could not be read in 3 tries.*storage\.attempts") as raised:
        storage.read_all("s3://pictures/big.bin", config)
    assert time.monotonic() - start < 60, "one silence is longer"
    assert proxy.counts == {fault: 3}
    assert isinstance(raised.value, UserError) and str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    with pytest.raises(storage.StorageError):
        storage.read_ranges([("s3://pictures/big.bin", 0, 5), ("s3://pictures/empty.bin", 0, 5)], config)


def test_a_service_that_is_not_there() -> None:
    with pytest.raises(storage.StorageError, match=r"2 tries; the last one: EndpointConnectionError.*storage\.endpoint"):
        storage.size("s3://pictures/big.bin", StorageConfig(endpoint="http://127.0.0.1:1", attempts=2, timeout_sec=0.5))


def test_refusals_come_at_once_and_quote_no_credential(
    proxy: FaultyProxy, s3: StorageConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    messages = []

    def refused(uri: str, config: StorageConfig, words: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            storage.read_all(uri, config)
        messages.append(str(raised.value))

    proxy.reset(["403"])
    refused("s3://pictures/big.bin", s3, r"credentials refused \(AccessDenied.*~/\.aws.*storage\.anonymous=true")
    assert proxy.counts == {"403": 1}
    proxy.reset()
    refused("s3://no-such-bucket/x", s3, "no bucket 'no-such-bucket'")
    assert proxy.counts == {"ok": 1}
    refused("s3://pictures/big.bin", StorageConfig(endpoint=proxy.endpoint, anonymous=True), r"unsigned requests .* refused")
    refused("s3://pictures/x", StorageConfig(endpoint="nonsense"), r"storage\.endpoint")
    named = proxy.endpoint.replace("//", f"//{ACCESS_KEY}:{SECRET_KEY}@")
    refused("s3://pictures/x", StorageConfig(endpoint=named), "credentials do not belong there")
    refused("s3://pictures", s3, "cannot be asked for")
    refused("s3:///x", s3, "names no bucket")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused("s3://pictures/x", StorageConfig(endpoint=proxy.endpoint, attempts=7), "no credentials found.*AWS_ACCESS_KEY_ID")
    for text in [*messages, caplog.text]:
        assert ACCESS_KEY not in text and SECRET_KEY not in text


@pytest.mark.parametrize("path", ["gs://b/x", "http://host/x", "hdfs://x", "s3a://b/x", "s3:/b/x", "s3://", "s3:///x"])
def test_paths_that_are_not_read(path: str) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/prefix"):
        storage.check(path)


def test_paths_that_are_read() -> None:
    for path in ("data/x", "/data/x", "s3://bucket", "s3://bucket/x", "a:b"):
        storage.check(path)
    assert [storage.is_remote(path) for path in ("s3://b/x", "s3/b")] == [True, False]
    assert storage.join("s3://b/p", "x/y.jpg") == storage.join("s3://b/p/", "x/y.jpg") == "s3://b/p/x/y.jpg"
    assert storage.join("/data", "x/y.jpg") == "/data/x/y.jpg"


def test_parquet_by_row_group(proxy: FaultyProxy, s3: StorageConfig, server: S3Server, tmp_path: Path) -> None:
    table = pa.table({"image": [CONTENT[start : start + 9_000] for start in range(200)], "label": list(range(200))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=50, use_dictionary=False, compression="none")
    content = (tmp_path / "x.parquet").read_bytes()
    server.put("tables", "x.parquet", content)
    proxy.reset(once_each(FAULTS))
    for uri in (str(tmp_path / "x.parquet"), "s3://tables/x.parquet"):
        with pq.ParquetFile(storage.open_file(uri, s3)) as file:
            for group in (3, 0, 2, 1):
                assert file.read_row_group(group).equals(table.slice(group * 50, 50))
    assert all(proxy.counts[fault] for fault in FAULTS)
    proxy.reset()
    with pq.ParquetFile(storage.open_file("s3://tables/x.parquet", s3)) as file:
        file.read_row_group(1, columns=["label"])
    asked = [range_header.removeprefix("bytes=").split("-") for _, range_header in proxy.gets if range_header]
    read = sum(min(int(stop), len(content) - 1) + 1 - int(start) for start, stop in asked)
    assert len(asked) == 3 and read < 0.7 * len(content)  # the size, the footer, and the column with what was read ahead


def test_an_open_object_is_a_file(proxy: FaultyProxy, s3: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "AHEAD_BYTES", 10_000)
    with storage.open_file("s3://pictures/big.bin", s3) as file:
        assert (file.size(), file.readable(), file.seekable()) == (300_000, True, True)
        proxy.reset()
        assert b"".join(file.read(512) for _ in range(19)) == CONTENT[: 19 * 512]
        assert len(proxy.gets) == 1  # read ahead
        draw = random.Random(2)
        for _ in range(40):
            at, length = draw.randrange(310_000), draw.choice([0, 1, 3_000, 9_999, 20_000, 400_000])
            file.seek(at - 300_000, os.SEEK_END) if at < 300_000 and at % 2 else file.seek(at)
            assert file.tell() == at
            assert file.read(length) == CONTENT[at : at + length]
            assert file.tell() == max(at, min(at + length, 300_000))
        file.seek(299_000)
        buffer = bytearray(2_000)
        assert file.readinto(buffer) == 1_000 and buffer[:1_000] == CONTENT[299_000:]
        with pytest.raises(ValueError, match="before the start"):
            file.seek(-1)


def test_keys_of_any_letters(proxy: FaultyProxy, s3: StorageConfig, server: S3Server) -> None:
    names = ["a b+c.txt", "q?x=1#y", "ü/％%41.txt"]
    for name in names:
        server.put("letters", f"p/{name}", name.encode())
    assert [entry.name for entry in storage.walk("s3://letters/p", s3)] == names
    assert storage.read_ranges([(f"s3://letters/p/{name}", 0, -1) for name in names], s3) == [name.encode() for name in names]
    assert {unquote(path.partition("?")[0]) for path, _ in proxy.gets} == {f"/letters/p/{name}" for name in names}


def test_a_client_stays_in_its_process(proxy: FaultyProxy, s3: StorageConfig) -> None:
    assert storage.read("s3://pictures/big.bin", 0, 9, s3) == CONTENT[:9]
    mine = storage._client(s3, os.getpid())
    assert storage._client(StorageConfig(**vars(s3)), os.getpid()) is mine  # one of a configuration
    child = os.fork()
    if child == 0:
        good = False
        try:
            same = storage.read("s3://pictures/big.bin", 5, 9, s3) == CONTENT[5:14]
            good = same and storage._client(s3, os.getpid()) is not mine
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    file = storage.open_file("s3://pictures/big.bin", s3)
    assert file.read(4) == CONTENT[:4]
    assert b"boto" not in pickle.dumps((s3, storage.Entry("x", 1), storage.read_ranges, storage.StorageError("x")))


def test_local_reading_imports_no_s3_client(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    script = (
        "import sys; from d2c_ray.config import StorageConfig; from d2c_ray.data import storage as s; c = StorageConfig();"
        "root = sys.argv[1]; assert [s.read_all(s.join(root, e.name), c) for e in s.walk(root, c)] == [b'abc'];"
        "assert s.read_ranges([(root + '/x', 1, 1)], c) == [b'b'] and s.open_file(root + '/x', c).read() == b'abc';"
        "heavy = {'boto3', 'botocore', 'torch', 'ray'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
