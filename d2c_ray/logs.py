"""What the tool says: lines for people, or one JSON object a line (log.format=json), in every process of a run.

A driver's threads each work for a stage (`working_for`); a worker's process works for one all its life (`adopt`).
"""

import io
import json
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from d2c_ray.wording import redacted


@dataclass(frozen=True)
class About:
    """What a thread or a process works for: the run, the stage, the stage's folder. Travels to the workers of a stage."""

    run: str = ""
    stage: str = ""
    folder: str = ""
    format: str = "plain"  # plain | json


_process = About()
_thread: ContextVar[About | None] = ContextVar("about", default=None)
_lock = threading.RLock()  # what is said may come from a finalizer that runs while a line is written


def configure(format: str, run: str = "") -> None:
    """Sets how this process speaks, and for which run. With 'json', what libraries log and warn of is said the same way."""
    global _process
    _process = replace(_process, format=format, run=run)
    if format == "json":
        logging.captureWarnings(True)
        own_handlers()


def adopt(about: About) -> None:
    """Has this whole process, a worker's, work for a stage. What libraries log there is Ray's to format."""
    global _process
    _process = about
    if about.format == "json":
        logging.captureWarnings(True)


def here() -> About:
    """What this thread works for, or else the process."""
    return _thread.get() or _process


@contextmanager
def working_for(stage: str, folder: str, run: str = "") -> Iterator[About]:
    """Has this thread work for a stage while the block lasts."""
    about = replace(_process, run=run or _process.run, stage=stage, folder=folder)
    token = _thread.set(about)
    try:
        yield about
    finally:
        _thread.reset(token)


def as_json() -> bool:
    return _process.format == "json"


def say(text: str, level: str = "info", about: About | None = None, plain: str = "", **fields: Any) -> None:
    """Says a line on stderr.

    Args:
        level: debug | info | warning | error.
        about: what it is said for, where that is not this thread's.
        plain: the whole line for people; empty: the text behind the tool's name.
        fields: more members of the JSON object, for machines: numbers that the text has in words.
    """
    said = line(text, level, about or here(), **fields) if as_json() else plain or f"d2c: {text}"
    with _lock:  # in one piece: stages side by side speak at once
        sys.stderr.write(said + "\n")
        sys.stderr.flush()


def line(text: str, level: str, about: About, at: float = 0.0, **fields: Any) -> str:
    """One line of JSON: time (ISO 8601, UTC), level, run, stage, folder, message, then `fields`."""
    now = at or time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    said = {"time": stamp, "level": level, "run": about.run, "stage": about.stage, "folder": about.folder, "message": text, **fields}
    return json.dumps(said, ensure_ascii=False, default=str)


class Formatter(logging.Formatter):
    """Records of Python's logging in the same shape, with `logger`."""

    def format(self, record: logging.LogRecord) -> str:
        more = {"traceback": redacted(self.formatException(record.exc_info))} if record.exc_info else {}
        return line(redacted(record.getMessage()), record.levelname.lower(), here(), record.created, logger=record.name, **more)


class _Handler(logging.StreamHandler):
    """On whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            said = self.format(record)
            with _lock:
                sys.stderr.write(said + "\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)  # whoever logs is none to fail


def own_handlers() -> None:
    """Gives Python's logging of a driver this shape: Ray puts handlers of its own there when it starts."""
    handler = _Handler()
    handler.setFormatter(Formatter())
    for name in ("", "ray"):
        logger = logging.getLogger(name)
        for found in list(logger.handlers):
            if type(found) in (logging.StreamHandler, _Handler):  # files stay, and whatever others have put there
                logger.removeHandler(found)
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)


@contextmanager
def results() -> Iterator[None]:
    """With JSON, every line that is printed within becomes one of the log; rows of numbers are for `table`."""
    if not as_json():
        yield
        return
    lines = _Lines()
    with redirect_stdout(lines):
        yield
    lines.end()


def table(printed: Iterable[str], rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Prints a table for people; with JSON, says each of its rows instead: a text, and the numbers as fields.

    Args:
        printed: the table's lines.
        rows: text and fields of each row.
    """
    if as_json():
        for text, fields in rows:
            say(text, **fields)
    else:
        print("\n".join(printed))


class _Lines(io.TextIOBase):
    """Says every line that is written to it."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for one in lines:
            if one.strip():
                say(one.rstrip())
        return len(text)

    def end(self) -> None:
        """Says what was written after the last line's end."""
        self.write("\n")

    def flush(self) -> None: ...
