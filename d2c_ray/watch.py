"""The hang watchdog: when a stage stands still, it says which operator waits for what. It ends nothing.

Stages are watched by the process that makes them, in one thread for all (a look at Ray, which may never answer, has one of its own), and
go by their progress. What stands still is told in the log and in status.json until it goes on.
"""

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from d2c_ray import logs, metrics
from d2c_ray.errors import UserError
from d2c_ray.logs import About

POLL_SEC = 2.0
LOOK_SEC = 20.0  # after which a look at Ray has failed
SILENT_SEC = 60.0  # after which a worker that says where it stands every few seconds is silent
MOST = 3  # of what is alike that is listed
PACKAGE = str(Path(__file__).parent)
SERVANTS = ("_", "ActorLocationTracker", "JobSupervisor")  # Ray's own actors, which take no room
HIDDEN = ("object_store_memory", "node:", "bundle_group", "accelerator_type:")  # resources that nobody asks for

Told = Callable[[list[str]], None]  # what is waited for; nothing once there is progress again
Look = Callable[[], "Facts"]  # the cluster as it is


@dataclass(frozen=True)
class Operator:
    """An operator of Ray Data, of those that are not finished.

    Attributes:
        tasks: submitted and not finished, queued: blocks before it.
        running, pending, restarting: its actors, where it has a pool.
        asks: resources of a task or an actor.
        after: the operator before it, empty for the first or where that has finished.
    """

    name: str
    tasks: int
    queued: int
    pool: bool = False
    running: int = 0
    pending: int = 0
    restarting: int = 0
    asks: dict[str, float] = field(default_factory=dict)
    after: str = ""


@dataclass(frozen=True)
class Worker:
    """A training worker: where its main thread last said it stood, and how long ago."""

    rank: int
    host: str
    at: str
    images: int
    seconds_ago: float


@dataclass(frozen=True)
class Facts:
    """What is known of the cluster at one moment, in the shapes that Ray gives.

    Attributes:
        operators: of the stage's own execution, in order; operators_age: seconds since Ray Data last turned them.
        actors: of the whole cluster, dictionaries with ActorClassName, State, Address.
        placement_groups: dictionaries as of ray.util.placement_group_table.
        nodes: dictionaries as of ray.nodes.
        free: what is free of each node's resources, by node id.
        demands: (resources, how many times) that tasks and actors ask for and do not have.
        workers: of the stage's training, and how many it has in all.
        silent: why Ray could not be asked.
    """

    operators: list[Operator] = field(default_factory=list)
    operators_age: float = 0.0
    actors: list[dict[str, Any]] = field(default_factory=list)
    placement_groups: list[dict[str, Any]] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    free: dict[str, dict[str, float]] = field(default_factory=dict)
    demands: list[tuple[dict[str, float], int]] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    num_workers: int = 0
    silent: str = ""


def explain(facts: Facts, frame: str = "") -> list[str]:
    """Says which operator waits for what, the likeliest cause first.

    Args:
        frame: where the stage's own thread stands.
    """
    said = [facts.silent] if facts.silent else []
    for operator in facts.operators:
        said += _operator(operator)
    if facts.operators and facts.operators_age > SILENT_SEC:
        said.append(f"Ray Data has not turned its operators for {facts.operators_age:.0f} s")
    said += _workers(facts)
    said += _placement_groups(facts)
    pools = {operator.name for operator in facts.operators}
    states = Counter((actor["ActorClassName"], actor["State"]) for actor in facts.actors)
    for (name, state), count in sorted(states.items()):
        if state not in ("ALIVE", "DEAD") and not any(pool in name for pool in pools):
            said.append(f"{_times(count, f'actor {name}', f'actors {name}')}: {_in_words(state)}")
    demands: Counter[str] = Counter()
    for asked, count in facts.demands:
        demands[f"{_listed(asked)} asked for: {_why_not(asked, facts)}"] += count
    said += [f"{count} x {why}" for why, count in demands.items()]
    if facts.demands:
        said += _held(states)
    dead = [node for node in facts.nodes if not node["Alive"]]
    for node in dead[-MOST:]:
        reason = node.get("DeathReasonMessage") or "no reason given"
        said.append(f"node {_name(node)} is dead: {' '.join(str(reason).split())[:200]}")
    if len(dead) > MOST:
        said.append(f"and {len(dead) - MOST} more nodes are dead")
    if frame:
        said.append(f"the driver stands in {frame}")
    return said


def _operator(operator: Operator) -> list[str]:
    name, said = f"operator {operator.name}", []
    if operator.pending:
        whole = operator.running + operator.pending + operator.restarting
        said.append(f"{name}: {operator.pending} of {_times(whole, 'actor')} not there yet, {_listed(operator.asks)} each")
    if operator.restarting:
        said.append(f"{name}: {_times(operator.restarting, 'actor')} being started again")
    if operator.tasks:
        said.append(f"{name}: {_times(operator.tasks, 'task')} not finished, {_times(operator.queued, 'block')} behind them")
    elif operator.queued and not (operator.pool and operator.pending):
        what = "its actors take none" if operator.pool else f"no task runs ({_listed(operator.asks)} each)"
        said.append(f"{name}: {_times(operator.queued, 'block')} queued, and {what}")
    elif operator.after and not operator.queued:
        said.append(f"{name}: waits for {operator.after}")
    return said


def _workers(facts: Facts) -> list[str]:
    if not facts.num_workers:
        return []
    missing = sorted(set(range(facts.num_workers)) - {worker.rank for worker in facts.workers})
    said = []
    if missing:
        said.append(f"training workers that have not reported: {_listed_few([f'rank {rank}' for rank in missing])} of {facts.num_workers}")
    for worker in [worker for worker in facts.workers if worker.seconds_ago > SILENT_SEC][:MOST]:
        said.append(f"training worker of rank {worker.rank} on {worker.host} is silent for {worker.seconds_ago:.0f} s, last in {worker.at}")
    places: dict[str, list[int]] = {}
    for worker in facts.workers:
        if worker.seconds_ago <= SILENT_SEC:
            places.setdefault(worker.at, []).append(worker.rank)
    for at, ranks in sorted(places.items(), key=lambda place: len(place[1]))[:MOST]:  # who stands alone is whom the others wait for
        said.append(f"training workers in {at}: {_listed_few([f'rank {rank}' for rank in ranks])}")
    return said


def _placement_groups(facts: Facts) -> list[str]:
    said = []
    for group in facts.placement_groups:
        if group["state"] in ("PENDING", "RESCHEDULING"):
            bundles = Counter(_listed(bundle) for bundle in group["bundles"].values())
            whole = ", ".join(f"{count} x {asked}" for asked, count in bundles.items())
            largest = max(group["bundles"].values(), key=lambda bundle: sum(bundle.values()))
            said.append(
                f"placement group {group['name'] or group['placement_group_id'][:8]} ({whole}, {group['strategy']}) waits: {_why_not(largest, facts)}"
            )
    return said


def _why_not(asked: dict[str, float], facts: Facts) -> str:
    """Why no node gives what is asked for."""
    alive = [node for node in facts.nodes if node["Alive"]]
    able = [node for node in alive if _fits(asked, node["Resources"])]
    if not able:
        lacking = sorted(name for name in asked if not any(_fits({name: asked[name]}, node["Resources"]) for node in alive))
        return f"none of {_times(len(alive), 'node')} has {_listed({name: asked[name] for name in lacking}) if lacking else 'all of it'}"
    now = [node for node in able if _fits(asked, facts.free.get(node["NodeID"], {}))]
    if now:
        return f"there is room on {_listed_few([_name(node) for node in now])}, it should be placed soon"
    return (
        "taken on "
        + "; ".join(f"{_name(node)} ({_used(asked, node, facts)})" for node in able[:MOST])
        + (" ..." if len(able) > MOST else "")
    )


def _used(asked: dict[str, float], node: dict[str, Any], facts: Facts) -> str:
    free = facts.free.get(node["NodeID"], {})
    return ", ".join(f"{free.get(name, 0):g} of {node['Resources'][name]:g} {name} free" for name in sorted(_shown(asked)))


def _held(states: Counter[tuple[str, str]]) -> list[str]:
    """Who has what is asked for."""
    alive = [f"{count} {name}" for (name, state), count in sorted(states.items()) if state == "ALIVE" and not name.startswith(SERVANTS)]
    return [f"actors alive: {', '.join(alive)}"] if alive else []


def _fits(asked: dict[str, float], given: dict[str, float]) -> bool:
    return all(given.get(name, 0.0) >= amount - 1e-9 for name, amount in asked.items())


def _shown(asked: dict[str, float]) -> dict[str, float]:
    """Without what asks for nothing: Ray's own names, and the byte of memory that keeps operators apart."""
    return {
        name: amount
        for name, amount in asked.items()
        if amount and not name.startswith(HIDDEN) and not (name == "memory" and amount < 2**20)
    }


def _listed(asked: dict[str, float]) -> str:
    parts = [
        f"{amount / 2**30:.3g} GiB {name}" if name == "memory" else f"{amount:g} {name}" for name, amount in sorted(_shown(asked).items())
    ]
    return " and ".join(parts) or "nothing"


def _listed_few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']}/{node['NodeID'][:8]}"


def _times(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _in_words(state: str) -> str:
    return {
        "PENDING_CREATION": "waiting to be placed, or loading",
        "DEPENDENCIES_UNREADY": "waiting for its arguments",
        "RESTARTING": "being started again",
    }.get(state, state)


# The thread that watches


@dataclass
class _Stage:
    about: About
    thread: int
    limit: float
    told: Told
    look: Look
    since: float  # of the last progress
    done: int = 0
    label: str = ""
    said: list[str] = field(default_factory=list)
    said_at: float = 0.0
    logged_at: float = 0.0
    looking: threading.Thread | None = None  # at Ray, which has not answered yet


_stages: dict[str, _Stage] = {}  # by folder
_watching = threading.Lock()
_ended = threading.Event()
_thread: threading.Thread | None = None


@contextmanager
def stage(about: About, limit_sec: float, told: Told, look: Look) -> Iterator[None]:
    """Watches a stage, made by this thread, while the block lasts.

    Args:
        limit_sec: without progress, after which it is said what is waited for; 0: never.
        told: gets what is waited for, and an empty list when there is progress again or the stage ends.
    """
    global _thread
    if not limit_sec:
        yield
        return
    mine = _Stage(about, threading.get_ident(), limit_sec, told, look, time.monotonic())
    with _watching:
        _stages[about.folder] = mine
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_watch, daemon=True, name="d2c-watchdog")
            _thread.start()
    try:
        yield
    finally:
        with _watching:
            _stages.pop(about.folder, None)
        _clear(mine)


def heard(folder: str, done: int, label: str) -> None:
    """Notes how far the stage with this folder is; the same count again is no progress."""
    mine = _stages.get(folder)
    if mine is not None and (mine.done, mine.label) != (done, label):
        mine.done, mine.label, mine.since = done, label, time.monotonic()


def waits_for(folder: str) -> list[str]:
    """What the stage with this folder was last said to wait for; empty while there is progress."""
    mine = _stages.get(folder)
    return mine.said if mine is not None else []


def _watch() -> None:
    """Until there is nothing left to watch."""
    while True:
        time.sleep(min([POLL_SEC, *(mine.limit / 4 for mine in list(_stages.values()))]))
        with _watching:
            watched = list(_stages.values())
            if not watched:
                global _thread
                _thread = None
                return
        for mine in watched:
            _look_at(mine)


def _look_at(mine: _Stage) -> None:
    still = time.monotonic() - mine.since
    if still < mine.limit:
        if mine.said:
            _clear(mine)
        return
    if mine.said and time.monotonic() - mine.said_at < min(mine.limit, 60.0):
        return  # it was looked at a moment ago
    lines = explain(_patiently(mine), _stands(mine.thread)) or ["nothing that can be seen"]
    with _watching:  # as the end of the stage has it, which must come last
        if _stages.get(mine.about.folder) is not mine or mine.since > time.monotonic() - mine.limit:
            return  # there was progress meanwhile
        news = _gist(lines) != _gist(mine.said) or time.monotonic() - mine.logged_at >= 10 * mine.limit
        mine.said, mine.said_at = lines, time.monotonic()
        mine.logged_at = mine.said_at if news else mine.logged_at
        metrics.tell("d2c_stage_stalled", 1, mine.about)
    if news:
        logs.say(
            f"{mine.label or mine.about.stage}: no progress for {still:.0f} s: {'; '.join(lines)}", "warning", mine.about,
            seconds_without_progress=round(still, 1), waits_for=lines, rows_done=mine.done,
        )  # fmt: skip
    _tell(mine, lines)


def _gist(lines: list[str]) -> list[str]:
    """What is waited for without for how long, which is no news."""
    return [re.sub(r"\b\d+ s\b", "", line) for line in lines]


def _clear(mine: _Stage) -> None:
    with _watching:
        said, mine.said = mine.said, []
        metrics.tell("d2c_stage_stalled", 0, mine.about)
    if said:
        logs.say(f"{mine.label or mine.about.stage}: goes on", about=mine.about, rows_done=mine.done)
        _tell(mine, [])


def _tell(mine: _Stage, lines: list[str]) -> None:
    with suppress(OSError, UserError):  # a full disk is the stage's to fail on
        mine.told(lines)


def _patiently(mine: _Stage) -> Facts:
    """A look that does not wait for ever for a head that has gone, and none beside one that still waits."""
    found: list[Facts] = []

    def look() -> None:
        try:
            found.append(mine.look())
        except Exception as error:  # whatever Ray raises: the watchdog is the last that may fall over it
            found.append(Facts(silent=f"Ray could not be asked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"))

    if mine.looking is None or not mine.looking.is_alive():
        mine.looking = threading.Thread(target=look, daemon=True, name="d2c-look")
        mine.looking.start()
        mine.looking.join(LOOK_SEC)
    return found[0] if found else Facts(silent=f"Ray's head does not answer within {LOOK_SEC:.0f} s")


def _stands(thread: int) -> str:
    """Where a thread of this process stands in this package."""
    frame = sys._current_frames().get(thread)
    return where(frame) if frame is not None else ""


def where(frame: FrameType | None) -> str:
    """The innermost function of this package on a stack, with the innermost one of all where that is another."""
    inner = frame
    for own in _outward(frame):
        if own.f_code.co_filename.startswith(PACKAGE):
            place = f"{Path(own.f_code.co_filename).relative_to(Path(PACKAGE).parent)}:{own.f_lineno} {own.f_code.co_name}"
            return place if own is inner or inner is None else f"{place} (in {inner.f_code.co_name})"
    return ""


def _outward(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
