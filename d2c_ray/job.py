"""What a stage gets to work with, and what it gives back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2c_ray.config import Config
from d2c_ray.progress import Progress
from d2c_ray.rundir import SUCCESS, StageDir


@dataclass(frozen=True)
class Job:
    """One stage's work.

    Attributes:
        inputs: the finished folders of the stages it reads.
        out: its own folder; what an interrupted attempt left there is still there.
        fingerprint: its hash.
        title: what to call it in progress lines.
        lineage: a hash that folders share one of which can be made from another (`plan.LINEAGE`); empty: there are none.
        places: actors or training workers it may run at once.
    """

    config: Config
    inputs: dict[str, StageDir]
    out: Path
    fingerprint: str
    title: str
    places: int = 1
    seconds_before: float = 0.0
    lineage: str = ""
    started: float = field(default_factory=time.monotonic)

    def facts(self, stage: str) -> dict[str, Any]:
        """The facts an input's stage recorded."""
        return self.inputs[stage].success()["facts"]

    def relatives(self) -> list[StageDir]:
        """Finished folders beside this one that share its lineage."""
        pattern = f"{self.out.name.rpartition('-')[0]}-*/{SUCCESS}"
        found = [StageDir(path.parent) for path in sorted(self.out.parent.glob(pattern)) if path.parent != self.out]
        return [folder for folder in found if self.lineage and folder.success().get("lineage") == self.lineage]

    def progress(self, total: int, unit: str = "images", done: int = 0, title: str = "") -> Progress:
        before = self.seconds_before + time.monotonic() - self.started  # a stage may show several in turn
        return Progress(title or self.title, total, unit, self.out, done, before, self.config.resources.progress_interval_sec)


@dataclass(frozen=True)
class Result:
    """`rows_in = rows_done + rows_rejected`, or the stage has failed; `facts` are for later stages and the report.

    seconds_elsewhere: spent for this in another folder, part of which it was made from; place_seconds_elsewhere the same times
        the places it was made on.
    """

    rows_in: int
    rows_done: int
    rows_rejected: int
    facts: dict[str, Any]
    seconds_elsewhere: float = 0.0
    place_seconds_elsewhere: float = 0.0


Stage = Callable[[Job], Result]
