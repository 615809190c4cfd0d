"""Drills: tests that disturb a run for real and measure what that cost. `python jobs/bench/drills.py` runs them by themselves.

A test is one by its mark: `@pytest.mark.drill("what is done to the run")`. With ci=False it runs only where drills are asked for
(--drills all, or -m drill). The fixture `drill` takes what a drill measured; --drills-out=FILE keeps it, a line of JSON each.
"""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

OUTCOME = pytest.StashKey[str]()


class Drill:
    """What a drill measured, to be told of it alone: how it ended is its test's outcome."""

    def __init__(self, name: str):
        self.name = name
        self.rows: list[dict] = []
        self._since = time.monotonic()

    def measured(self, found: Iterable, wanted: Iterable, redone: float | None, name: str = "", seconds: float | None = None) -> None:
        """Keeps what became of the rows, and checks that none is lost or there twice.

        Args:
            found: ids of the rows that the disturbed run ended with. wanted: of the undisturbed run's.
            redone: work that was begun a second time, as a share of all of it; None: there is no log of it.
            name, seconds: of this one, where a test is several drills.
        """
        found, wanted = list(found), set(wanted)
        assert wanted and (redone is None or redone >= 0)
        lost, twice = len(wanted ^ set(found)), len(found) - len(set(found))
        self._keep(name, not lost and not twice, lost, twice, None if redone is None else round(redone, 4), seconds)
        assert (lost, twice) == (0, 0)

    def refused(self, before: object, after: object, name: str = "") -> None:
        """Keeps that a run was refused, and checks that what was there before is there as it was."""
        self._keep(name, before == after, None, None, None)
        assert before == after

    def _keep(
        self, name: str, survived: bool, lost: int | None, twice: int | None, redone: float | None, seconds: float | None = None
    ) -> None:
        now = time.monotonic()
        row = {"name": name or self.name, "survived": survived, "rows_lost": lost, "rows_twice": twice, "redone_share": redone}
        self.rows.append({**row, "seconds": round(now - self._since if seconds is None else seconds, 1)})
        self._since = now

    def failed(self) -> None:
        """Keeps that it came to nothing, unless a row says so already."""
        if all(row["survived"] for row in self.rows):
            self._keep("", False, None, None, None)


@pytest.fixture
def drill(request: pytest.FixtureRequest) -> Iterator[Drill]:
    (mark,) = request.node.iter_markers("drill")
    measured = Drill(mark.args[0])
    yield measured
    if request.node.stash.get(OUTCOME, "") == "failed":
        measured.failed()
    if out := request.config.getoption("drills_out"):
        with Path(out).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in measured.rows)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of writing of every file of a run but those that say who holds it, what was asked for and how it goes."""
    passing = (".owner.json", ".lock", "config.yaml", "plan.json", "status.json", "_progress.json")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in passing and ".locks" not in path.parts)
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drills", choices=("all", "quick"), help="drills alone: all, or those that are no trouble to run every time")
    parser.addoption("--drills-out", help="file that gets what drills measured, a line of JSON each")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "drill(name, ci=True): disturbs a run for real; ci=False: only where drills are asked for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("drills")
    every = asked == "all" or (asked is None and "drill" in (config.getoption("markexpr") or ""))
    kept, left = [], []
    for item in items:
        mark = item.get_closest_marker("drill")
        fits = (asked is None) if mark is None else (every or mark.kwargs.get("ci", True))
        (kept if fits else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[OUTCOME] = report.outcome
    return report
