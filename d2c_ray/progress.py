"""Progress of long work: a bar with rate and time left on a terminal, a line an interval in a job's log.

What is done so far is also written to `_progress.json` in the stage's folder, with the seconds spent, so that another
process can read it and an interrupted attempt is charged to the stage.
"""

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from d2c_ray import logs, metrics, watch
from d2c_ray.rundir import PROGRESS, now, write_json

_bars: Any = None  # one live display for all bars of the process; rich allows no two
_bars_users = 0
_bars_lock = threading.Lock()
_live: dict[str, "Progress"] = {}  # by the name of the stage's folder, of the work that goes on


class Progress:
    """Counts `total` units of work; a context manager.

    Args:
        label: what is being done.
        total: units in all, including `done`.
        unit: what is counted, for example 'images'.
        folder: stage folder for `_progress.json`, or None.
        seconds_before: seconds that earlier attempts spent.
        interval_sec: between two lines in a log.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        folder: Path | None = None,
        done: int = 0,
        seconds_before: float = 0.0,
        interval_sec: float = 20.0,
    ):
        self.label, self.total, self.unit, self.folder = label, total, unit, folder
        self.done = self._first = done
        self._before, self._interval = seconds_before, interval_sec
        self._start = self._began = self._last_line = self._last_file = time.monotonic()
        self._task: Any = None
        self._note = ""
        self._about = logs.here()  # lines come from other threads too
        self._writing = threading.Lock()
        self._over = False

    def __enter__(self) -> "Progress":
        global _bars, _bars_users
        if sys.stderr.isatty() and not logs.as_json():
            with _bars_lock:
                if _bars is None:
                    _bars = _make_bars()
                    _bars.start()
                _bars_users += 1
                self._task = _bars.add_task(self.label, total=self.total, completed=self.done, unit=self.unit, note="")
        else:
            self._line()
        self._tell()
        self._write()
        if self.folder is not None:
            _live[self.folder.name] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _bars, _bars_users
        if self.folder is not None:
            _live.pop(self.folder.name, None)
        self._write(last=True)
        if self._task is not None:
            with _bars_lock:
                _bars.refresh()
                _bars_users -= 1
                if _bars_users == 0:
                    _bars.stop()
                    _bars = None
        elif kind is None:
            self._line()

    def advance(self, count: int, note: str = "") -> None:
        """Counts `count` more units; `note` is shown behind the rate."""
        self.at(self.done + count, note)

    def at(self, done: int, note: str = "", per_second: float | None = None) -> None:
        """Sets the count of finished units.

        Args:
            per_second: the rate of the units that are new, where whoever does them says it: the first time it tells when they were
                begun, and what came before (workers that start, a checkpoint that is read) is not in the rate that is shown.
        """
        now = time.monotonic()
        if per_second and done > self.done and self._began == self._start:
            self._first, self._began = self.done, max(self._start, now - (done - self.done) / per_second)
        self._first = min(self._first, done)  # steps that are taken again
        self.done, self._note = done, note or self._note
        self._tell()
        if self._task is not None:
            _bars.update(self._task, completed=done, note=self._note)
        elif now - self._last_line >= self._interval:
            self._line()
        if now - self._last_file >= 2.0:
            self._write()

    def seconds(self) -> float:
        """Seconds spent, earlier attempts included."""
        return self._before + time.monotonic() - self._start

    def _rate(self, elapsed: float) -> float:
        """Units a second since the first was begun, 0 where that is too short a time to say."""
        return (self.done - self._first) / elapsed if elapsed > 0.5 else 0.0

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = self._rate(self._last_line - self._began)
        seconds_left = (self.total - self.done) / rate if rate > 0 and self.done < self.total else None
        left = f", {clock(seconds_left)} left" if seconds_left is not None else ""
        speed = f" ({rate:,.1f} {self.unit}/s{left})" if rate else ""
        text = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}{speed} {self._note}".rstrip()
        logs.say(
            text, about=self._about, plain=f"{time.strftime('%H:%M:%S')} {text}", rows_done=self.done, rows_total=self.total, unit=self.unit,
            rows_per_second=round(rate, 3), seconds_left=round(seconds_left, 1) if seconds_left is not None else None, note=self._note,
        )  # fmt: skip

    def _tell(self) -> None:
        metrics.tell("d2c_rows_done", self.done, self._about)
        metrics.tell("d2c_rows_total", self.total, self._about)
        watch.heard(self._about.folder, self.done, self.label)

    def _write(self, last: bool = False) -> None:
        self._last_file = time.monotonic()
        if self.folder is None:
            return
        with self._writing:  # the watchdog has it written too, and what is older must not come last
            if self._over:
                return
            self._over = last
            with suppress(FileNotFoundError):  # a test's folder may be gone
                write_json(
                    self.folder / PROGRESS,
                    {
                        "label": self.label,
                        "done": self.done,
                        "total": self.total,
                        "unit": self.unit,
                        "seconds": self.seconds(),
                        "note": self._note,
                        "rate": self._rate(self._last_file - self._began),
                        "at": now(),
                        **({"waits_for": waits} if (waits := watch.waits_for(self._about.folder)) else {}),
                    },
                )


def rewrite(folder: str) -> None:
    """Has the work of a stage's folder, named, write `_progress.json` at once: what is done by now, and what it waits for."""
    if (live := _live.get(folder)) is not None:
        live._write()


def clock(seconds: float) -> str:
    """Seconds as people say them: 48 s, 3 min 10 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _make_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "")

    return Bars(
        TextColumn("{task.description:<28}"), BarColumn(bar_width=30), MofNCompleteColumn(), Rate(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True),
    )  # fmt: skip
