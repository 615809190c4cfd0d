"""Files on local paths and in s3:// buckets, read only: what is there, and its bytes.

Objects are read in ranges of at most 16 MiB. A try of a request is its answer and its body together: botocore's own
retries end where the body starts, and most of what goes wrong on a busy link goes wrong there. A try is also bound in
its total time, which the timeouts of a socket, started anew by every byte, are not.
"""

import errno
import io
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from random import SystemRandom
from typing import Any

from d2c_ray.config import StorageConfig
from d2c_ray.errors import UserError
from d2c_ray.wording import redacted

S3 = "s3://"
PIECE_BYTES = 16 << 20  # most that one request asks for
GAP_BYTES = 256 << 10  # ranges that lie so close share a request
AHEAD_BYTES = 1 << 20  # least that an open S3 file asks for
SLOWEST_BYTES_PER_SEC = 64 << 10  # an answer that comes slower is given up
PAGE_BYTES = 1 << 20  # more than a page of a listing holds
REQUESTS = 8  # at a time, of one call
FIRST_PAUSE_SEC, LONGEST_PAUSE_SEC = 0.2, 20.0

THROTTLED = {
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "ThrottledException",
    "RequestThrottled", "RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "PriorRequestNotComplete",
}  # fmt: skip
REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
WHERE = (
    "They are looked for in the environment (AWS_ACCESS_KEY_ID and the like), in the profile of ~/.aws and in the role of the machine; "
    "storage.anonymous=true reads public buckets without any."
)

_chance = SystemRandom()  # jitter: drawn apart from the generators that results come from, and not alike in forked processes


class StorageError(UserError):
    """The storage did not give what it was asked for: tries used up, access refused, or a request it does not accept."""


class Refused(StorageError):
    """Access was refused, or there is nothing to ask for it with."""


@dataclass(frozen=True)
class Entry:
    """A file below a root."""

    name: str  # relative to the root, '/'-separated
    size: int  # bytes


def is_remote(path: str) -> bool:
    """Whether the path is an s3:// one."""
    return str(path).startswith(S3)


def check(path: str) -> None:
    """Raises UserError where the path is of a kind that is not read, or names no bucket."""
    scheme, colon, rest = str(path).partition(":")
    if is_remote(path):
        _split(path)
    elif "://" in str(path) or (colon and scheme.lower() in ("s3", "s3a", "s3n")):
        raise UserError(f"'{path}': local (or mounted) paths and s3://bucket/prefix are read, '{scheme}{colon}{rest[:2]}' is not.")


def join(root: str, name: str) -> str:
    """The uri of a name below a root."""
    return f"{str(root).removesuffix('/')}/{name}" if is_remote(root) else os.path.join(root, name)


def kind(root: str, storage: StorageConfig) -> str | None:
    """'file', 'folder', or None where nothing is there. An S3 name that is both an object and a prefix is a folder; a bucket always is."""
    if not is_remote(root):
        try:
            mode = os.stat(root).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else None
    bucket, key = _split(root)
    refused = None
    try:
        prefix = _folder(key)
        if _page(root, storage, Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents") or not prefix:
            return "folder"
    except Refused as error:
        refused = error  # who may not list may still be allowed to read
    if key and not key.endswith("/"):
        try:
            size(root, storage)
            return "file"
        except FileNotFoundError:
            pass
    if refused:
        raise refused
    return None


def walk(root: str, storage: StorageConfig) -> Iterator[Entry]:
    """Every file below a folder, in byte order of its relative name, a folder or a page of a listing at a time.

    Names with a part that starts with a dot are left out. Linked folders are followed, except into one that the link
    itself lies in. A link that leads nowhere is an entry of size 0, so that reading it says what is wrong.
    """
    return _walk_s3(root, storage) if is_remote(root) else _walk_local(os.fspath(root), "", frozenset())


def size(uri: str, storage: StorageConfig) -> int:
    """Bytes of a file; FileNotFoundError where there is none."""
    return _get(uri, 0, 1, storage)[1] if is_remote(uri) else os.stat(uri).st_size  # a HEAD would not say why it fails


def read(uri: str, offset: int, length: int, storage: StorageConfig) -> bytes:
    """The bytes of a range, to the end where `length` is negative; fewer only where the file ends."""
    if not is_remote(uri):
        with open(uri, "rb", buffering=0) as file:
            return _pread(file.fileno(), offset, length)
    # The first piece says how much there is; a range of nothing still asks, for the sake of a missing file.
    first, total = _get(uri, offset, min(length, PIECE_BYTES) if length > 0 else 1 if length == 0 else PIECE_BYTES, storage)
    stop = total if length < 0 else min(offset + length, total)
    starts = range(offset + len(first), stop, PIECE_BYTES)
    rest = _parallel(lambda start: _get(uri, start, min(PIECE_BYTES, stop - start), storage)[0], starts)
    return b"".join([first, *rest]) if length else b""


def read_all(uri: str, storage: StorageConfig) -> bytes:
    """The whole file."""
    return read(uri, 0, -1, storage)


def read_ranges(ranges: Sequence[tuple[str, int, int]], storage: StorageConfig) -> list[bytes | OSError]:
    """The bytes of every (uri, offset, length), in the same order.

    A local file is opened once; neighbouring ranges of an object share a request.

    Returns:
        In place of a range's bytes: the FileNotFoundError, or PermissionError of a local file, that kept it from being read.
    """
    found: list[bytes | OSError] = [b""] * len(ranges)
    order = sorted(range(len(ranges)), key=lambda index: ranges[index])

    def work(group: list[int]) -> None:
        uri = ranges[group[0]][0]
        try:
            if not is_remote(uri):
                with open(uri, "rb", buffering=0) as file:
                    for index in group:
                        found[index] = _pread(file.fileno(), *ranges[index][1:])
            elif len(group) == 1:
                found[group[0]] = read(*ranges[group[0]], storage)
            else:
                start = ranges[group[0]][1]
                content = read(uri, start, max(offset + length for _, offset, length in map(ranges.__getitem__, group)) - start, storage)
                for index in group:
                    _, offset, length = ranges[index]
                    found[index] = content[offset - start : offset - start + length]
        except (FileNotFoundError, PermissionError) as error:
            for index in group:
                found[index] = error

    groups: dict[bool, list[list[int]]] = {False: [], True: []}
    for group in _groups(ranges, order):
        groups[is_remote(ranges[group[0]][0])].append(group)
    for group in groups[False]:
        work(group)
    remote = groups[True]
    if remote:
        _tried(ranges[remote[0][0]][0], 0, storage, lambda client: None)  # one client, before threads make one each
    _parallel(work, remote)
    return found


def open_file(uri: str, storage: StorageConfig) -> Any:
    """A seekable binary file object, also for `pyarrow.parquet.ParquetFile`."""
    if is_remote(uri):
        return _S3File(uri, storage)
    import pyarrow as pa

    os.stat(uri)  # pyarrow's error has no file name
    return pa.OSFile(os.fspath(uri))


def forget_unfinished(root: str, storage: StorageConfig) -> None:
    """Ends the uploads of objects below an S3 folder that were begun and cut off: their parts are in no listing and cost as much as any object.

    While nobody writes there. A thousand at most.
    """
    bucket, key = _split(root)
    prefix = _folder(key)
    found = _tried(root, PAGE_BYTES, storage, lambda client: client.list_multipart_uploads(Bucket=bucket, Prefix=prefix))
    for upload in found.get("Uploads", []):
        if upload["Key"].startswith(prefix):  # not every compatible service goes by the prefix
            with suppress(FileNotFoundError):  # ended by an earlier try, whose answer was lost
                _tried(root, PAGE_BYTES, storage, partial(_end_upload, bucket, upload))


class _S3File(io.RawIOBase):
    """An object as a file. Small reads ask for AHEAD_BYTES and are served from there."""

    def __init__(self, uri: str, storage: StorageConfig):
        self._uri, self._storage, self._size = uri, storage, size(uri, storage)
        self._at = self._start = 0  # position; offset of what was read ahead
        self._ahead = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError(f"seek to {at}, before the start of '{self._uri}'")
        self._at = at
        return at

    def read(self, length: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        length = left if length is None or length < 0 else min(length, left)
        skip = self._at - self._start
        if skip < 0 or skip + length > len(self._ahead):
            content = read(self._uri, self._at, min(left, max(length, AHEAD_BYTES)), self._storage)
            if length >= AHEAD_BYTES:
                self._at += len(content)
                return content
            self._start, self._ahead, skip = self._at, content, 0
        content = self._ahead[skip : skip + length]
        self._at += len(content)
        return content

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)


def _walk_local(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) in above:
        return
    above |= {(info.st_dev, info.st_ino)}
    entries = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            try:
                info = entry.stat()
            except OSError:
                entries.append((entry.name, 0))
                continue
            if stat.S_ISDIR(info.st_mode):
                entries.append((f"{entry.name}/", 0))  # sorts as its files do
            elif stat.S_ISREG(info.st_mode):
                entries.append((entry.name, info.st_size))
    for name, num_bytes in sorted(entries):
        if name.endswith("/"):
            yield from _walk_local(os.path.join(folder, name[:-1]), prefix + name, above)
        else:
            yield Entry(prefix + name, num_bytes)


def _walk_s3(root: str, storage: StorageConfig) -> Iterator[Entry]:
    bucket, key = _split(root)
    prefix, last = _folder(key), ""
    more: dict[str, str] = {}
    while True:
        page = _page(root, storage, Bucket=bucket, Prefix=prefix, **more)
        for item in page.get("Contents", []):
            name = item["Key"][len(prefix) :]
            if name < last:
                raise StorageError(
                    f"'{root}' is listed out of order ('{name}' after '{last}'), as directory buckets are; copy it elsewhere."
                )
            last = name
            if not name.endswith("/") and name and not any(part.startswith(".") for part in name.split("/")):
                yield Entry(name, item["Size"])
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _pread(handle: int, offset: int, length: int) -> bytes:
    left = max(0, os.fstat(handle).st_size - offset) if length < 0 else length
    pieces: list[bytes] = []
    while left and (piece := os.pread(handle, left, offset)):  # one call gives at most 2 GiB
        pieces.append(piece)
        offset, left = offset + len(piece), left - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _groups(ranges: Sequence[tuple[str, int, int]], order: list[int]) -> Iterator[list[int]]:
    """Runs of sorted indices that are read together: a local file's, or an object's that lie close."""
    group: list[int] = []
    start = stop = 0
    for index in order:
        uri, offset, length = ranges[index]
        close = bool(group) and ranges[group[0]][0] == uri
        if close and is_remote(uri):
            bounded = length >= 0 and ranges[group[-1]][2] >= 0
            close = bounded and offset - stop <= GAP_BYTES and max(stop, offset + length) - start <= PIECE_BYTES
        if not close:
            if group:
                yield group
            group, start, stop = [], offset, offset
        group.append(index)
        stop = max(stop, offset + length)
    if group:
        yield group


def _parallel(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(REQUESTS, len(items))) as pool:
        return list(pool.map(work, items))


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if not bucket:
        raise UserError(f"'{uri}' names no bucket; s3://bucket/prefix would do.")
    return bucket, key


def _folder(key: str) -> str:
    return key if not key or key.endswith("/") else f"{key}/"


def _get(uri: str, offset: int, length: int, storage: StorageConfig) -> tuple[bytes, int]:
    """One request: the bytes of a range, and how many the whole object has (0 where the range starts behind its end)."""
    from botocore.exceptions import ClientError, IncompleteReadError

    bucket, key = _split(uri)

    def once(client: Any) -> tuple[bytes, int]:
        try:
            answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-{offset + length - 1}")
        except ClientError as error:
            if error.response["ResponseMetadata"].get("HTTPStatusCode") == 416:
                return b"", 0
            raise
        content, where = bytearray(), answer.get("ContentRange")
        total = int(where.rpartition("/")[2]) if where else answer["ContentLength"]
        wanted = max(0, min(length, total - offset))
        if answer["ContentLength"] > wanted or (offset and not where):
            answer["Body"].close()
            raise StorageError(f"'{uri}': the service answers no ranges of bytes, which this needs (storage.endpoint).")
        deadline = time.monotonic() + _limit_sec(wanted, storage)
        with answer["Body"] as body:
            some = getattr(body, "read1", body.read)  # what has come, where read() waits until all has
            while len(content) < wanted and (piece := some(min(wanted - len(content), SLOWEST_BYTES_PER_SEC))):
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError("the body came too slowly")
        if len(content) < wanted:
            raise IncompleteReadError(actual_bytes=len(content), expected_bytes=wanted)
        return bytes(content), total

    return _tried(uri, length, storage, once)


def _end_upload(bucket: str, upload: dict[str, Any], client: Any) -> None:
    client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _page(uri: str, storage: StorageConfig, **query: Any) -> dict[str, Any]:
    return _tried(uri, PAGE_BYTES, storage, lambda client: client.list_objects_v2(**query))


def _tried(uri: str, num_bytes: int, storage: StorageConfig, once: Callable[[Any], Any]) -> Any:
    """What `once(client)` gives, called again after failures that may pass; `num_bytes` at most are asked for."""
    last = ""
    for attempt in range(storage.attempts):
        if attempt:
            time.sleep(min(LONGEST_PAUSE_SEC, FIRST_PAUSE_SEC * 2 ** (attempt - 1)) * _chance.uniform(0.5, 1.0))
        try:
            client = _client(storage, os.getpid())
            return _within(2 * storage.timeout_sec + _limit_sec(num_bytes, storage), partial(once, client))  # connect, answer, send
        except Exception as error:
            last = _passing(error, uri, storage)
    raise StorageError(
        f"'{uri}' could not be read in {storage.attempts} tries; the last one: {last}. "
        "If the service is at storage.endpoint (empty: AWS), a larger storage.attempts or storage.timeout_sec may carry over the trouble."
    )


def _limit_sec(num_bytes: int, storage: StorageConfig) -> float:
    return storage.timeout_sec + num_bytes / SLOWEST_BYTES_PER_SEC


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` gives if it takes no longer. What does (an address looked up for ever, a trickling listing) is left behind."""
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise
        raise TimeoutError(f"no end within {seconds:.0f} s") from None


def _passing(error: Exception, uri: str, storage: StorageConfig) -> str:
    """What an error that may pass says. Raises what any other means, in words that quote no credential."""
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, (UserError, FileNotFoundError)):
        raise error
    if isinstance(error, boto.ClientError):
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        code = error.response["Error"].get("Code", "")
        if status >= 500 or status == 429 or code in THROTTLED:
            return f"{code} (HTTP {status})"
        if code == "NoSuchBucket":
            raise StorageError(f"'{uri}': there is no bucket '{_split(uri)[0]}' (storage.endpoint, storage.region).") from None
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from None
        if code in REFUSED or (status in (401, 403) and code not in ("InvalidObjectState", "RequestTimeTooSkewed")):
            what = "unsigned requests (storage.anonymous)" if storage.anonymous else "credentials"
            raise Refused(f"'{uri}': {what} refused ({code}, HTTP {status}). {WHERE}") from None
        raise StorageError(f"'{uri}': the service answered {code} (HTTP {status}); see storage.endpoint and storage.region.") from None
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        raise Refused(f"'{uri}': no credentials found. {WHERE}") from None
    if isinstance(error, (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError, boto.ProfileNotFound)):
        raise Refused(f"'{uri}': no credentials found ({type(error).__name__}). {WHERE}") from None
    if isinstance(error, boto.NoRegionError):
        raise StorageError(f"'{uri}': no region is known; storage.region=us-east-1, for example, gives one.") from None
    passing = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, HTTPError, ResponseParserError, OSError)
    if isinstance(error, passing):
        return f"{type(error).__name__}: {_line(error)}"
    if isinstance(error, boto.BotoCoreError):
        raise StorageError(f"'{uri}' cannot be asked for: {_line(error)}.") from None
    raise error


def _line(error: Exception) -> str:
    """What a library says, which quotes the URL it was given."""
    return " ".join(redacted(str(error)).split()).rstrip(".")


@lru_cache(maxsize=16)
def _client(storage: StorageConfig, process: int) -> Any:
    """The client of a process, which its threads share. `process` keeps a forked child off its parent's connections."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    if redacted(storage.endpoint) != storage.endpoint:
        raise UserError(f"storage.endpoint holds a user name; credentials do not belong there. {WHERE}")
    config = Config(
        connect_timeout=storage.timeout_sec,
        read_timeout=storage.timeout_sec,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=REQUESTS * REQUESTS,  # ranges at a time, pieces of each
        s3={"addressing_style": "path" if storage.endpoint else "auto"},
        signature_version=UNSIGNED if storage.anonymous else None,
        # Ranges have no checksums to verify, and not every compatible service accepts being asked for them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client = boto3.session.Session().client(
            "s3", endpoint_url=storage.endpoint or None, region_name=storage.region or None, config=config
        )
    except ValueError as error:
        raise UserError(f"storage.endpoint or storage.region cannot be used: {_line(error)}.") from None
    if redacted(client.meta.endpoint_url) != client.meta.endpoint_url:
        raise UserError(f"the endpoint of S3 in the environment or the profile (AWS_ENDPOINT_URL) holds a user name or a password. {WHERE}")
    return client
