"""A real S3 service of this machine's own, and a proxy in front of it that fails on order."""

import http.client
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTESTTEST", "secret-of-the-tests"
CHANGED = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
    "AWS_PROFILE": None,
    "AWS_SESSION_TOKEN": None,
    "AWS_ENDPOINT_URL": None,
    "AWS_ENDPOINT_URL_S3": None,
}

SLOW_DOWN = (503, "SlowDown", "Please reduce your request rate.")
ACCESS_DENIED = (403, "AccessDenied", "Access Denied")


class S3Server:
    """Moto's server on a free port, with credentials for it in the environment while it runs."""

    def __enter__(self) -> "S3Server":
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends
        from moto.server import ThreadedMotoServer

        self._before = {name: os.environ.get(name) for name in CHANGED}
        _set_environment(CHANGED)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request otherwise
        self._objects = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.endpoint = "http://{}:{}".format(*self._server.get_host_and_port())
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()
        _set_environment(self._before)

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """Stores an object, in a bucket that is made where there is none. Past HTTP, which would take milliseconds each."""
        if bucket not in self._objects.buckets:
            self._objects.create_bucket(bucket, "us-east-1")
        self._objects.put_object(bucket, key, content)

    def contents(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """The objects below a prefix, by the rest of their names; not those that only stand for a folder."""
        keys = self._objects.buckets[bucket].keys
        return {name.removeprefix(prefix): keys[name].value for name in keys if name.startswith(prefix) and not name.endswith("/")}

    def begin_upload(self, bucket: str, key: str) -> str:
        """Begins the upload of an object in parts, and leaves it at that; gives the key back."""
        import boto3

        boto3.client("s3", endpoint_url=self.endpoint).create_multipart_upload(Bucket=bucket, Key=key)
        return key

    def unfinished(self, bucket: str, prefix: str) -> list[str]:
        """Names of the objects below a prefix whose upload was begun and is not ended, one an upload."""
        return [upload.key_name for upload in self._objects.buckets[bucket].multiparts.values() if upload.key_name.startswith(prefix)]


def is_object(path: str) -> bool:
    """Whether the path of a GET is an object's, and not a bucket's listing."""
    parts = urlsplit(path)
    return "/" in parts.path.strip("/") and "list-type" not in parse_qs(parts.query)


def is_listing(path: str) -> bool:
    """Whether the path of a GET asks for a page of a listing."""
    return "list-type" in parse_qs(urlsplit(path).query)


def once_each(kinds: Sequence[str]) -> Callable[[int, str, int], str]:
    """Faults by which the first try of every range fails, in turns of `kinds`, and the next one does not."""
    turns = itertools.cycle(kinds)
    return lambda number, path, tries: "ok" if tries else next(turns)


class FaultyProxy:
    """Passes requests on to an S3 endpoint and spoils answers to GETs of objects, or to requests of other `methods`.

    Faults: ok | 503 (SlowDown) | 403 (AccessDenied) | reset (half of the body, then RST) | cut (half of the body, then a
    normal close) | stall (half of the body, then silence) | trickle (half of the body, then a byte at a time) | lost (RST in
    place of the answer). The body is the answer's; a request that has one of its own (a PUT) is reset, cut and stalled in the
    middle of that, and then not passed on.

    Args:
        endpoint: where the requests go.
        faults: a list that is repeated, an item a GET in order of arrival; or a function of (number of the GET, its path,
            how often the same range of the same path was asked for before).
        only: the paths that faults are for; a GET of another path is neither spoilt nor counted.
        methods: what is spoilt and counted in the place of GETs.
        stall_sec: the longest silence.
        trickle_sec: the pause between two bytes.

    Attributes:
        endpoint: the proxy's own address.
        counts: GETs by what was done to them.
        gets: path and Range header of each, in order of arrival.
    """

    def __init__(
        self, endpoint: str, faults: Sequence[str] | Callable[[int, str, int], str] = ("ok",), only: Callable[[str], bool] = is_object,
        stall_sec: float = 5.0, trickle_sec: float = 0.1, methods: Sequence[str] = ("GET",),
    ):  # fmt: skip
        self._upstream = urlsplit(endpoint).netloc
        self.faults, self.only, self.stall_sec, self.trickle_sec = faults, only, stall_sec, trickle_sec
        self.methods = methods
        self.counts: Counter[str] = Counter()
        self.gets: list[tuple[str, str | None]] = []
        self._asked: Counter[tuple[str, str | None]] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def reset(self, faults: Sequence[str] | Callable[[int, str, int], str] = ("ok",)) -> None:
        """Forgets what was counted and takes other faults."""
        with self._lock:
            self.faults, self.counts, self.gets, self._asked = faults, Counter(), [], Counter()

    def __enter__(self) -> "FaultyProxy":
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False  # a connection that is kept alive has a thread as long as its client wants
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, method: str, path: str, range_header: str | None) -> str:
        """What happens to a request; counts it."""
        if method not in self.methods or not self.only(path):
            return "ok"
        with self._lock:
            number, tries = len(self.gets), self._asked[path, range_header]
            fault = self.faults(number, path, tries) if callable(self.faults) else self.faults[number % len(self.faults)]
            self.gets.append((path, range_header))
            self._asked[path, range_header] += 1
            self.counts[fault] += 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FaultyProxy

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.owner.fault(self.command, self.path, self.headers.get("Range"))
        if fault in ("reset", "cut", "stall") and self._sends():
            self._take_half()
            if fault == "stall":
                self.owner._closing.wait(self.owner.stall_sec)  # reads nothing more: whether the client is still there is not seen
            self._break_off("reset" if fault == "reset" else "cut")
            return
        sent = self._body()
        if fault in ("503", "403"):
            self._refuse(*(SLOW_DOWN if fault == "503" else ACCESS_DENIED))
            return
        status, headers, content = self._forward(sent)
        if fault == "lost":
            self._break_off("reset")
            return
        self._start(status, headers)
        if self.command == "HEAD":
            return
        if fault == "ok":
            self.wfile.write(content)
            return
        half = len(content) // 2
        try:
            self.wfile.write(content[:half])
            self.wfile.flush()
            if fault == "trickle":
                for place in itertools.takewhile(lambda _: not self.owner._closing.is_set(), range(half, len(content))):
                    self.wfile.write(content[place : place + 1])
                    time.sleep(self.owner.trickle_sec)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up, as it should
        self._break_off("cut" if fault == "trickle" else fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _break_off(self, fault: str) -> None:
        """Ends the connection in the middle of something."""
        self.close_connection = True
        if fault == "reset":
            time.sleep(0.02)  # lets the half arrive; a reset discards what lies unread
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()  # holds the socket open
            self.connection.close()
        elif fault == "stall":
            self._wait_for_client(self.owner.stall_sec)
        elif fault != "cut":
            raise ValueError(f"no fault '{fault}'")

    def _sends(self) -> bool:
        return "Transfer-Encoding" in self.headers or int(self.headers.get("Content-Length") or 0) > 0

    def _take_half(self) -> None:
        """Reads half of what is sent, or of its first chunk."""
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        length = int(self.rfile.readline().split(b";")[0], 16) if chunked else int(self.headers["Content-Length"])
        self.rfile.read(length // 2)

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length) if length else None
        chunks = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _forward(self, sent: bytes | None) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.owner._upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", "transfer-encoding"):
                    upstream.putheader(name, value)
            if "Transfer-Encoding" in self.headers:
                upstream.putheader("Content-Length", str(len(sent or b"")))
            upstream.putheader("Connection", "close")
            upstream.endheaders(sent)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _start(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: int, code: str, message: str) -> None:
        content = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
        self._start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))])
        self.wfile.write(content)

    def _wait_for_client(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.connection.settimeout(0.05)
        while time.monotonic() < end and not self.owner._closing.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
