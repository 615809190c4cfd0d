"""How far a run is, read from its folder alone: no cluster is asked, and the folder may be a copy in a bucket.

A run that goes on rewrites status.json every few seconds, so that one that was killed, and could say nothing, shows by its silence.
"""

import json
import os
import socket
from datetime import datetime
from typing import Any

from d2c_ray.config import StorageConfig
from d2c_ray.data import storage
from d2c_ray.errors import UserError
from d2c_ray.progress import clock
from d2c_ray.rundir import PLAN, PROGRESS, STATUS, SUCCESS, pid_namespace

MOST_NAMED = 4  # arms whose names are said; of more their number
OF_TRIALS = ("train", "sample", "unguided", "evaluate")  # stages of a sweep that its trials run
SILENT_BEATS = 3  # missed signs of life after which a run counts as silent
TAIL_BYTES = 4096  # holds the last line of a metrics.jsonl
WIDEST = 40  # characters of a stage and its arms


def read(run: str, options: StorageConfig, now: datetime | None = None) -> dict[str, Any]:
    """What a run folder says of its run.

    Args:
        run: the run's folder, or the folder of a sweep in it; local or s3://.
        now: the time it is.

    Returns:
        state: 'running', 'done', 'failed', 'stopped' (it was asked to end), 'gone' (its process was killed) or 'silent' (no sign of life, and
        its process is elsewhere); upto, host, pid, job, started, updated, silent_sec, error, to_mend (whether the error is the user's
        to mend, and would only come again). stages: stage, arms, folder, state, and as far as they are known done, total, unit, rate (units a second),
        left_sec, note, seconds, error. sweep: counts of trials by state, those that run and those that failed; None where there is none.

    Raises:
        UserError: nothing is there, or no run folder.
    """
    storage.check(run)
    folder = _Folder(run.rstrip("/") if storage.is_remote(run) else os.path.abspath(os.path.expanduser(run)), options)
    sweep = ""
    if folder.json("sweep.json") is not None:  # the folder of a sweep lies in its run's
        parent, _, sweep = folder.root.rpartition("/")
        folder = _Folder(parent, options)
    plan, said = folder.json(PLAN), folder.json(STATUS)
    if plan is None or said is None:
        there = storage.kind(folder.root, options)
        what = "there is no such folder" if there is None else f"it holds no {PLAN if plan is None else STATUS}"
        raise UserError(
            f"'{run}' is no run folder: {what}. RUN_DIR/RUN_NAME of a run that was started would do (runs/quickstart), s3://bucket/prefix of a copy "
            "of it, or the run's configuration file."
        )
    now = now or datetime.now().astimezone()
    found: dict[str, Any] = {
        key: said[key] for key in ("upto", "host", "pid", "job", "started", "updated", "error", "to_mend") if key in said
    }
    found = {"run": folder.root, "state": _state(said, now), **found, "silent_sec": _silence(said, now) if "updated" in said else None}
    sweep = sweep or said.get("sweep", "")
    nodes = [node for node in plan["nodes"] if not (sweep and node["stage"] in OF_TRIALS)]
    found["stages"] = [_stage(folder, node, said["stages"], found["state"]) for node in nodes]
    for stage in found["stages"]:
        stage["arms"] = [] if len(stage["arms"]) == len(plan["arms"]) else stage["arms"]  # all of them
    found["sweep"] = _sweep(folder, sweep, plan, found["state"]) if sweep else None
    return found


class _Folder:
    """Files of a folder by their names in it."""

    def __init__(self, root: str, options: StorageConfig):
        self.root, self._options = root, options

    def json(self, name: str) -> Any:
        """The value of a file; None where it is not there, or is a copy that is not whole."""
        try:
            return json.loads(storage.read_all(storage.join(self.root, name), self._options))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return None

    def last_line(self, name: str) -> dict[str, Any]:
        """The last whole line of a file of JSON lines."""
        uri = storage.join(self.root, name)
        try:
            size = storage.size(uri, self._options)
            lines = storage.read(uri, max(0, size - TAIL_BYTES), TAIL_BYTES, self._options).split(b"\n")
            return json.loads(lines[-2]) if len(lines) > 1 else {}
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def names(self, folder: str) -> list[str]:
        try:
            return [entry.name for entry in storage.walk(storage.join(self.root, folder), self._options)]
        except FileNotFoundError:
            return []


def _state(said: dict[str, Any], now: datetime) -> str:
    state = said.get("state", "silent")  # one of a version that gave no signs of life
    if state != "running":
        return state
    here = (socket.gethostname(), pid_namespace())  # containers may share a host's name and not its processes
    if (said["host"], said.get("pid_namespace", here[1])) == here and not _alive(said["pid"]):
        return "gone"
    return "silent" if _silence(said, now) > SILENT_BEATS * said["every_sec"] else "running"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _silence(said: dict[str, Any], now: datetime) -> float:
    """Seconds since the last sign of life."""
    return max(0.0, (now - datetime.fromisoformat(said["updated"])).total_seconds()) if "updated" in said else float("inf")


def _stage(folder: _Folder, node: dict[str, Any], said: dict[str, Any], run: str) -> dict[str, Any]:
    own = said.get(node["folder"], {"state": "waiting"})
    found = {key: node[key] for key in ("stage", "arms", "folder")}
    success = folder.json(f"{node['folder']}/{SUCCESS}")
    if success is not None:
        counts = {"done": success["rows_done"], "total": success["rows_in"], "rejected": success["rows_rejected"]}
        return {**found, "state": "done", **counts, "unit": "rows", "seconds": success["seconds"]}
    state = own["state"]
    if state == "running" and run != "running":
        state = "stopped"  # with its run
    found |= {"state": state, **({"error": own["error"]} if "error" in own else {})}
    if state == "running" and "waits_for" in own:
        found["waits_for"] = own["waits_for"]["lines"]
    if state == "waiting":
        return found
    progress = folder.json(f"{node['folder']}/{PROGRESS}") or {}
    found |= {key: progress[key] for key in ("done", "total", "unit", "rate", "note", "seconds") if progress.get(key)}
    if node["stage"] in ("train", "teacher"):
        last = folder.last_line(f"{node['folder']}/metrics.jsonl")
        if last.get("images", 0) > found.get("done", 0):
            found["done"] = last["images"]
        if "images_per_sec" in last and found.get("unit") == "images":
            found["rate"] = last["images_per_sec"]
    if state == "running" and found.get("rate") and "total" in found:
        found["left_sec"] = max(0, found["total"] - found.get("done", 0)) / found["rate"]
    return found


def _sweep(folder: _Folder, name: str, plan: dict[str, Any], run: str) -> dict[str, Any]:
    about = folder.json(f"{name}/sweep.json") or {"trials": {}}
    records = [folder.json(f"{name}/trials/{file}") for file in folder.names(f"{name}/trials") if file.endswith(".json")]
    records = [record for record in records if record]
    if run != "running":  # whose trials went with it
        records = [{**record, "state": "cut_off"} if record["state"] == "running" else record for record in records]
    counts = {state: sum(record["state"] == state for record in records) for state in ("done", "running", "cut_off", "failed", "stopped")}
    counts["waiting"] = len(set(about["trials"]) - {record["id"] for record in records})
    running = [
        {"label": record["label"], **_trial(folder, plan["arms"].get(record["id"], {}))}
        for record in records
        if record["state"] == "running"
    ]
    failed = [{"label": record["label"], "error": record["error"]} for record in records if record["state"] == "failed"]
    return {"folder": name, "trials": sum(counts.values()), "counts": counts, "running": running, "failed": failed}


def _trial(folder: _Folder, stages: dict[str, str]) -> dict[str, Any]:
    """Where a trial stands: its first stage that is not finished."""
    for stage in OF_TRIALS:
        if stage in stages and folder.json(f"{stages[stage]}/{SUCCESS}") is None:
            progress = folder.json(f"{stages[stage]}/{PROGRESS}") or {}
            return {"stage": stage, **{key: progress[key] for key in ("done", "total", "unit", "rate", "waits_for") if progress.get(key)}}
    return {}


def lines(found: dict[str, Any]) -> list[str]:
    """`read`'s answer for people."""
    out = [f"{found['run']}: {_words(found)}"]
    if found.get("error"):
        out.append(f"  {_short(found['error'])}")
    for stage in found["stages"]:
        arms = stage["arms"]
        title = stage["stage"] + (f" {', '.join(arms) if len(arms) <= MOST_NAMED else f'for {len(arms)}'}" if arms else "")
        title = title if len(title) <= WIDEST else f"{title[: WIDEST - 3]}..."
        out.append(f"  {title:<{WIDEST}} {stage['state']:<8} {_counts(stage)}".rstrip())
        if stage.get("error"):
            out.append(f"    {_short(stage['error'])}")
        out += [f"    waits: {_short(line)}" for line in stage.get("waits_for", ())]
    sweep = found["sweep"]
    if sweep:
        words = {"stopped": "ended early", "cut_off": "cut off"}
        counts = ", ".join(f"{count} {words.get(state, state)}" for state, count in sweep["counts"].items() if count)
        out.append(f"  {sweep['folder']}: {sweep['trials']} trials: {counts or 'none has begun'}")
        for trial in sweep["running"]:
            out.append(f"    running  {trial['label']}: {trial.get('stage', 'starting')} {_counts(trial)}".rstrip())
            out += [f"      waits: {_short(line)}" for line in trial.get("waits_for", ())]
        out += [f"    failed   {trial['label']}: {_short(trial['error'])}" for trial in sweep["failed"]]
    return out


def _words(found: dict[str, Any]) -> str:
    if "updated" not in found:
        return "of an earlier version, which gave no signs of life"
    by = f"process {found['pid']} on {found['host']}" + (f", Ray job {found['job']}" if "job" in found else "")
    ago = f"{clock(found['silent_sec'])} ago"
    upto = f" up to {found['upto']}" if found.get("upto") not in (None, "report", "sweep") else ""
    again = "the same command goes on from here"
    return {
        "running": f"running{upto} ({by}), last sign of life {ago}",
        "done": f"done{upto}, {ago}",
        # What is no refusal may have gone by itself: a node, a cluster.
        "failed": f"failed {ago} ({by}); {'once that is mended, ' if found.get('to_mend') else ''}{again}",
        "stopped": f"stopped {ago} ({by}); {again}",
        "gone": f"cut off: {by} is gone, its last sign of life {ago}; {again}",
        "silent": f"silent: no sign of life of {by} for {clock(found['silent_sec'])}; it, its node or the copying of this folder has ended",
    }[found["state"]]


def _counts(stage: dict[str, Any]) -> str:
    """Counts of a stage, its rate, what is left, and what it says itself."""
    words = []
    if "total" in stage:
        done, unit = stage.get("done", 0), stage.get("unit", "")
        words.append(f"{done:,} {unit}" if stage.get("state") == "done" else f"{done:,} of {stage['total']:,} {unit}")
        if stage.get("rejected"):
            words.append(f"{stage['rejected']:,} rejected")
    if stage.get("state") == "running" and stage.get("rate"):
        words.append(f"{stage['rate']:,.1f} {stage.get('unit', '')}/s")
    if "left_sec" in stage:
        words.append(f"{clock(stage['left_sec'])} left")
    if stage.get("state") == "done":
        words.append(clock(stage["seconds"]))
    elif stage.get("note"):
        words.append(stage["note"])
    return ", ".join(words)


def _short(error: str) -> str:
    """The line of an error that says what was wrong: Ray's are tracebacks, which end with it."""
    said = [line for line in error.strip().splitlines() if line.strip()] or [""]
    return said[0] if len(said) == 1 else f"{said[0]} ... {said[-1].strip()}"
