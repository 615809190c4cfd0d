"""Running a plan: stage by stage, each in its folder, those of several arms side by side, never twice."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from d2c_ray import plan as plans
from d2c_ray.config import Config, to_yaml
from d2c_ray.errors import UserError
from d2c_ray.job import Job, Result, Stage
from d2c_ray.plan import Node, Plan
from d2c_ray.progress import clock
from d2c_ray.rundir import Lock, versions, write_json, write_text

ON_RAY = {"teacher", "score", "attach", "train", "sample", "reference", "evaluate"}
WORKERS_OF = {"train": "train_workers"}
Say = Callable[[str], None]


def run(config: Config, upto: str = "report", say: Say = print) -> Plan:
    """Runs every stage up to `upto` that is not finished yet, and what it needs.

    Returns:
        The plan, all of its stages up to `upto` finished.

    Raises:
        UserError: bad input, before any stage that needs a cluster starts wherever that can be seen.
    """
    plan = plans.make(config)
    with Lock(plan.folder):
        return _run(plan, upto, say)


def _run(plan: Plan, upto: str, say: Say) -> Plan:
    config = plan.config
    write_text(plan.folder / "config.yaml", to_yaml(config))
    status = Status(plan)
    wanted = [stage for stage in plans.STAGES if _needed(stage, upto)]
    _run_stage(plan, "manifest", status, say)
    (manifest,) = plan.of("manifest")
    if upto == "manifest":
        return plan
    plans.check_against_data(plan, manifest.dir.success()["facts"])
    connected = False
    try:
        for stage in wanted[1:]:
            if not connected and stage in ON_RAY and any(not node.dir.done for node in plan.of(stage)):
                say("starting Ray" if not config.resources.address else f"connecting to Ray at {config.resources.address}")
                _connect(config)
                connected = True
            _run_stage(plan, stage, status, say)
    finally:
        if connected:
            _disconnect()
    if upto == "report":
        from d2c_ray.stages import report

        report.run(plan)
    status.write()
    return plan


def _needed(stage: str, upto: str) -> bool:
    """Whether `stage` is `upto` or something it reads, directly or not."""
    if upto == "report" or stage == upto:
        return True
    inputs = plans.STAGES[upto][0]
    return any(_needed(stage, name) for name in inputs)


def _run_stage(plan: Plan, stage: str, status: "Status", say: Say) -> None:
    todo = [node for node in plan.of(stage) if not node.dir.done]
    for node in plan.of(stage):
        if node.dir.done:
            say(f"{stage}: {node.name} is there")
    if not todo:
        return
    at_once = _side_by_side(plan.config, stage, len(todo))
    started = time.monotonic()
    waiting, running = list(todo), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            node = waiting.pop(0)
            running[_in_thread(lambda node=node: _run_node(node, len(plan.arms), min(at_once, len(todo)), status))] = node
        for future in [future for future in running if future.done()]:
            del running[future]
            future.result()
        time.sleep(0.05)
    say(f"{stage}: done in {clock(time.monotonic() - started)}")
    if stage == "score":
        _say_stability(todo[0].dir.success()["facts"], say)


def _run_node(node: Node, arms: int, side_by_side: int, status: "Status") -> None:
    node.folder.mkdir(parents=True, exist_ok=True)
    status.set(node, "running")
    before = node.dir.seconds_so_far()
    started = time.monotonic()
    title = node.stage if len(node.arms) == arms else f"{node.stage} {' '.join(node.arms)}"
    inputs = {name: given.dir for name, given in node.inputs.items()}
    try:
        result = stage_function(node.stage)(Job(node.config, inputs, node.folder, node.hash, title, side_by_side, before))
        _check_counts(node, result)
    except BaseException as error:
        status.set(node, "failed", f"{type(error).__name__}: {error}")
        raise
    node.dir.finish(
        {
            "stage": node.stage, "fingerprint": node.hash, "inputs": {name: given.name for name, given in node.inputs.items()},
            "rows_in": result.rows_in, "rows_done": result.rows_done, "rows_rejected": result.rows_rejected,
            "seconds": round(before + time.monotonic() - started, 2), "side_by_side": side_by_side, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(), "facts": result.facts,
        }
    )  # fmt: skip
    status.set(node, "done")


def stage_function(stage: str) -> Stage:
    """The function of a stage; its module is imported when it is first needed."""
    from importlib import import_module

    return import_module(f"d2c_ray.stages.{stage}").run


def _check_counts(node: Node, result: Result) -> None:
    if result.rows_done + result.rows_rejected != result.rows_in:
        raise RuntimeError(f"{node.name}: {result.rows_done} rows done and {result.rows_rejected} rejected do not make the {result.rows_in} that came in")


def _say_stability(facts: dict[str, Any], say: Say) -> None:
    stability, count = facts["rank_stability"], facts["num_timesteps"]
    if stability is None:
        say("score: too few timesteps or images to tell how stable the ranks are")
    elif stability >= 0.9:
        say(f"score: rank stability {stability:.2f} at |T| = {count}: enough (0.9)")
    else:
        needed = facts["needed_timesteps"]
        more = f"; about {needed} timesteps would reach 0.9 (score.num_timesteps={needed})" if needed else "; the score carries no stable signal, a better teacher would help"
        say(f"score: rank stability {stability:.2f} at |T| = {count}: not enough (0.9){more}")


def _side_by_side(config: Config, stage: str, wanted: int) -> int:
    if stage not in ON_RAY or wanted == 1:
        return 1
    from d2c_ray.distributed import cluster

    return cluster.side_by_side(config.resources, wanted, getattr(config.resources, WORKERS_OF.get(stage, ""), 1))


def _connect(config: Config) -> None:
    from d2c_ray.distributed import cluster

    cluster.connect(config.resources)
    cluster.preflight(config.resources)


def _disconnect() -> None:
    from d2c_ray.distributed import cluster

    cluster.disconnect()


def _in_thread(work: Callable[[], None]) -> "Future[None]":
    """Runs `work` in a daemon thread: an interrupt of the main thread ends the process without waiting for it."""
    future: Future[None] = Future()

    def call() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


class Status:
    """status.json: the state of every stage's folder, readable while the run goes on."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._path = plan.folder / "status.json"
        self._states: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        write_json(plan.folder / "plan.json", plan.to_json())
        self.write()

    def set(self, node: Node, state: str, error: str = "") -> None:
        with self._lock:
            self._states[node.name] = {"state": state, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **({"error": error} if error else {})}
        self.write()

    def write(self) -> None:
        with self._lock:
            stages = {node.name: self._states.get(node.name, {"state": "done" if node.dir.done else "waiting"}) for node in self._plan.nodes}
            write_json(self._path, {"stages": stages})


def unwrap(error: BaseException) -> UserError | None:
    """The `UserError` inside an error of Ray, if there is one: raised in an actor, it arrives wrapped."""
    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        found = stack.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, UserError):
            return found
        failures = getattr(found, "worker_failures", None)
        stack += [found.__cause__, found.__context__, getattr(found, "cause", None), *(failures.values() if isinstance(failures, dict) else [])]
    return None


def run_folder(config: Config) -> Path:
    """Where a configuration's run lies."""
    return Path(config.run.dir).expanduser() / config.run.name
