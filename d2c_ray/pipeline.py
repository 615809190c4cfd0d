"""Running a plan: every stage in its folder, side by side where nothing stands between, never twice."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from d2c_ray import logs, metrics, progress, stopping, tracking, watch
from d2c_ray import plan as plans
from d2c_ray.config import CHOICES, EFFICIENTNETS, Config, EmbedConfig, pools, to_yaml
from d2c_ray.errors import UserError, no_room
from d2c_ray.job import Job, Result, Stage
from d2c_ray.plan import Node, Plan
from d2c_ray.progress import clock
from d2c_ray.repeating import repeating
from d2c_ray.rundir import PLAN, STATUS, Lock, maker, now, pid_namespace, versions, write_json, write_text
from d2c_ray.schedule import starting
from d2c_ray.wording import nearest, redacted

ON_RAY = {"teacher", "score", "embed", "attach", "train", "sample", "unguided", "reference", "evaluate"}
HEARTBEAT_SEC = 10.0  # between two signs of life in status.json
MOST_NAMED = 4  # arms whose names are said; of more their number
Say = Callable[[str], None]


def run(config: Config, upto: str = "report", say: Say = print, record: bool = True) -> Plan:
    """Runs every stage up to `upto` that is not finished yet, and what it needs.

    Args:
        record: say in the run folder's config.yaml, plan.json and status.json that this is the run.

    Returns:
        The plan, all of its stages up to `upto` finished.

    Raises:
        UserError: bad input, before any stage that needs a cluster starts wherever that can be seen.
    """
    plan = plans.make(config, upto)
    with Lock(plan.folder):
        return _run(plan, upto, say, record)


def finished(config: Config, stage: str, say: Say = print) -> Plan:
    """The plan with `stage` finished: what is missing is run first, and a run that has it is only read, even while it goes on."""
    plan = plans.make(config, stage)
    return plan if all(node.dir.done for node in plan.needed(stage)) else run(config, stage, say, record=False)


def compare_selectors(config: Config, names: list[str], say: Say = print) -> tuple[dict[str, Any], Path]:
    """Runs several selectors at the configuration's budget and compares their subsets in a space that none selected in.

    Args:
        names: selectors; empty: all.

    Returns:
        What was found, and the folder with selectors.json and selectors.html.

    Raises:
        UserError: an unknown selector; else as `run`.
    """
    known = tuple(name for name in CHOICES["select.selector"] if name != "all")  # which every subset is compared with
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such selector; one of {', '.join(map(str, known))}{nearest(name, list(map(str, known)))}")
    arms = {str(name): {"select": {"selector": str(name)}} for name in known if not names or name in names}
    if config.evaluate.network not in EFFICIENTNETS:
        raise UserError(
            f"evaluate.network={config.evaluate.network}: subsets are compared in features that an embed stage makes; one of {', '.join(EFFICIENTNETS)} would do."
        )
    space = EmbedConfig(config.evaluate.network, config.evaluate.image_size, config.evaluate.device_batch)
    plan = run(replace(config, arms=arms), "select", say, record=False)
    # Nothing is selected in the space that measures; `check` has refused that for the selectors that look at features.
    measured = run(replace(config, embed=space, arms={}, select=replace(config.select, selector="random")), "embed", say, record=False)
    from d2c_ray.report import selectors

    out = plan.folder / "selectors"
    return selectors.compare(plan, measured.of("embed")[0], space, out), out


def _run(plan: Plan, upto: str, say: Say, record: bool) -> Plan:
    status = Status(plan, record)
    with stopping.stoppable(), status.kept(upto), stopping.as_raised():
        return _run_with(plan, upto, say, record, status)


def _run_with(plan: Plan, upto: str, say: Say, record: bool, status: "Status") -> Plan:
    config = plan.config
    tracking.check(config.tracking)
    if record:
        write_text(plan.folder / "config.yaml", to_yaml(config))
    (manifest,) = plan.of("manifest")
    wanted = [node for node in plan.needed(upto if upto in plans.STAGES else "evaluate") if node is not manifest]
    attaching = [node.config for node in wanted if node.stage == "attach" and not node.dir.done]
    slots: int | None = None
    with ExitStack() as ray:
        # A cluster from the start: it shows how far the manifest is, and whether it answers at all and has room is known before hours
        # of it. A Ray of one's own would only take memory from it.
        if config.resources.address and upto != "manifest" and any(node.stage in ON_RAY and not node.dir.done for node in wanted):
            slots = ray.enter_context(connected(config, attaching, status, say))
        run_all([manifest], 1, status, say)
        if upto == "manifest":
            return plan
        facts = manifest.dir.success()["facts"]
        plans.check_against_data(plan, facts)
        if slots is None and any(_on_ray(node, facts["rows"]) and not node.dir.done for node in wanted):
            slots = ray.enter_context(connected(config, attaching, status, say))
        if slots is not None:
            status.plan(wanted, slots)
        run_all(wanted, 1 if slots is None else slots, status, say)
    if upto == "report":
        from d2c_ray.stages import report

        report.run(plan)
    return plan


def _on_ray(node: Node, rows: int) -> bool:
    """Whether a stage needs Ray; select does where it looks at features, or has more rows than it ranks at once."""
    many = rows > node.config.resources.rows_per_partition and "score" in node.inputs
    return node.stage in ON_RAY or (node.stage == "select" and (many or "embed" in node.inputs))


def run_all(nodes: list[Node], slots: int, status: "Status", say: Say) -> None:
    """Runs nodes as soon as what they read is there, in the order given, on `slots` places (a core or a GPU each).

    A training takes a place a worker; any other stage shares what is left with those that could start with it.
    """
    waiting = [node for node in nodes if not node.dir.done]
    for node in nodes:
        if node.dir.done:
            say(f"{_title(node, status)}: {node.name} is there")
    running: dict[Future[float], tuple[Node, int]] = {}
    free = slots
    try:
        _schedule(waiting, running, free, status, say)
    except BaseException as error:
        status.ends(error)
        _abandon(list(running), 20.0 if isinstance(error, Exception) else 1.0)
        raise


def _schedule(waiting: list[Node], running: dict["Future[float]", tuple[Node, int]], free: int, status: "Status", say: Say) -> None:
    while waiting or running:
        for node, share in starting(waiting, [one for one, _ in running.values()], free, lambda node: node.dir.done):
            free -= share
            waiting.remove(node)
            running[_in_thread(partial(run_node, node, share, status))] = (node, share)
        if not running:
            raise RuntimeError(f"none of these can start: {', '.join(node.name for node in waiting)}")
        wait(running, return_when=FIRST_COMPLETED)
        for future in [future for future in running if future.done()]:
            node, share = running.pop(future)
            free += share
            say(f"{_title(node, status)}: done in {clock(future.result())}")
            if node.stage == "score":
                _say_stability(node.dir.success()["facts"], say)
            if node.stage in ("select", "evaluate"):
                for notice in node.dir.success()["facts"].get("notices", []):
                    say(f"{_title(node, status)}: {notice}")


def _abandon(running: list["Future[float]"], seconds: float) -> None:
    """Takes Ray away from stages that still run beside one that failed, and waits until they have noticed."""
    if running:
        disconnect()
        wait(running, timeout=seconds)


def _title(node: Node, status: "Status") -> str:
    """The stage, and its arms where they differ."""
    if len(node.arms) == status.num_arms:
        return node.stage
    return f"{node.stage} {', '.join(node.arms) if len(node.arms) <= MOST_NAMED else f'for {len(node.arms)}'}"


def run_node(node: Node, share: int, status: "Status") -> float:
    """Makes one stage on `share` places, unless another process makes it meanwhile; gives the seconds that passed."""
    started = time.monotonic()
    with logs.working_for(node.stage, node.name, node.folder.parent.name), maker(node.folder, logs.say):
        if not node.dir.done:  # by the one that was waited for
            with _watched(node, status):
                _make(node, share, status)
    return time.monotonic() - started


@contextmanager
def _watched(node: Node, status: "Status") -> Iterator[None]:
    """Has the watchdog look after a stage, and monitoring know that it is made."""

    def told(lines: list[str]) -> None:
        status.waits(node, lines)
        progress.rewrite(node.name)  # where the driver of a sweep looks, whose trials write no status

    metrics.tell("d2c_stage_running", 1)
    try:
        with watch.stage(logs.here(), node.config.resources.watchdog_sec, told, partial(_look, node.folder)):
            yield
    finally:
        metrics.tell("d2c_stage_running", 0)


def _look(folder: Path) -> watch.Facts:
    """What Ray knows, if this process has one."""
    if "ray" not in sys.modules:
        return watch.Facts()
    from d2c_ray.distributed import look

    return look.look(folder)


def _make(node: Node, share: int, status: "Status") -> None:
    node.folder.mkdir(parents=True, exist_ok=True)
    node.dir.clear()
    status.set(node, "running")
    before = node.dir.seconds_so_far()
    started = time.monotonic()
    inputs = {name: given.dir for name, given in node.inputs.items()}
    try:
        job = Job(node.config, inputs, node.folder, node.hash, _title(node, status), share, before, node.lineage)
        result = stage_function(node.stage)(job)
        _check_counts(node, result)
        node.dir.finish(
            {
                "stage": node.stage, "fingerprint": node.hash, "inputs": {name: given.name for name, given in node.inputs.items()},
                "rows_in": result.rows_in, "rows_done": result.rows_done, "rows_rejected": result.rows_rejected,
                "seconds": round(before + time.monotonic() - started + result.seconds_elsewhere, 2), "place_seconds": round((before + time.monotonic() - started) * share + result.place_seconds_elsewhere, 2), **({"lineage": node.lineage} if node.lineage else {}), "places": share, "device": _device(node), "finished": now(),
                "versions": versions(), "facts": result.facts,
            }
        )  # fmt: skip
    except BaseException as error:
        with suppress(OSError, UserError):  # on a full disk, or one that is gone, the status cannot be written either
            status.set(node, "failed", redacted(f"{type(error).__name__}: {error}"))
        raise
    status.set(node, "done")


def stage_function(stage: str) -> Stage:
    """The function of a stage; its module is imported when it is first needed."""
    from importlib import import_module

    return import_module(f"d2c_ray.stages.{plans.SAME_AS.get(stage, stage)}").run


def _check_counts(node: Node, result: Result) -> None:
    if result.rows_done + result.rows_rejected != result.rows_in:
        raise RuntimeError(
            f"{node.name}: {result.rows_done} rows done and {result.rows_rejected} rejected do not make the {result.rows_in} that came in"
        )


def _say_stability(facts: dict[str, Any], say: Say) -> None:
    stability, count = facts["rank_stability"], facts["num_timesteps"]
    if stability is None:
        say("score: too few timesteps or images to tell how stable the ranks are")
    elif stability >= 0.9:
        say(f"score: rank stability {stability:.2f} at |T| = {count}: enough (0.9)")
    else:
        needed = facts["needed_timesteps"]
        more = (
            f"; about {needed} timesteps would reach 0.9 (score.num_timesteps={needed})"
            if needed
            else "; the score carries no stable signal, a better teacher would help"
        )
        say(f"score: rank stability {stability:.2f} at |T| = {count}: not enough (0.9){more}")


@contextmanager
def connected(config: Config, attaching: list[Config], status: "Status", say: Say, dashboard: bool = False) -> Iterator[int]:
    """Within, this process works with Ray, of which it gives the places for work. How the run ended is written before Ray is let go of.

    Args:
        attaching: configurations of datasets that will be made.
        dashboard: a local Ray gets one.
    """
    say("starting Ray" if not config.resources.address else f"connecting to Ray at {config.resources.address}")
    try:
        with stopping.as_raised():
            yield _connect(config, attaching, dashboard)
    except BaseException as error:
        status.ends(error)  # not after: if this process does not survive Ray's end, the reason is known
        raise
    finally:
        disconnect()


def _connect(config: Config, attaching: list[Config], dashboard: bool) -> int:
    from d2c_ray.distributed import cluster

    try:
        cluster.connect(config.resources, dashboard)
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        stopping.stop()  # Ray's handler has the signal while Ray connects
    finally:
        stopping.listen()
    cluster.preflight(config.resources, max((pools(own) for own in attaching), default=1))
    return cluster.places(config.resources)


def follow() -> None:
    """Has Ray export this process's numbers, which has one without having connected to it."""
    from d2c_ray.distributed import telemetry

    telemetry.follow()


def trainings(config: Config) -> int:
    """Training workers that run at once on the connected cluster."""
    from d2c_ray.distributed import cluster

    return cluster.trainings(config.resources)


def _device(node: Node) -> str:
    """What the stage's tensors lived on: bits hold for one kind of hardware."""
    import platform

    if node.stage not in ON_RAY and "embed" not in node.inputs:
        return "cpu"
    from d2c_ray.distributed import cluster

    return cluster.gpu_name() or platform.machine()


def disconnect() -> None:
    """Ends the local Ray, or lets go of the cluster."""
    from d2c_ray.distributed import cluster

    cluster.disconnect()


def _in_thread(work: Callable[[], float]) -> "Future[float]":
    """Runs `work` in a daemon thread: an interrupt of the main thread ends the process without waiting for it."""
    future: Future[float] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


class Status:
    """status.json: how the run goes and the state of every stage's folder, readable while it goes on."""

    def __init__(self, plan: Plan, record: bool = True):
        self._plan, self._record = plan, record
        self.num_arms = len(plan.arms)
        self._path = plan.folder / STATUS
        self._states: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._run: dict[str, Any] = {
            "state": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_namespace": pid_namespace(),
            "started": now(),
            **_ray_job(),
        }
        if record:
            from d2c_ray.report import gather

            write_json(plan.folder / PLAN, {**plan.to_json(), "planned": gather.kept(plan.folder)})
        self.write()

    @contextmanager
    def kept(self, upto: str, **about: str) -> Iterator[None]:
        """While the block runs, a sign of life every HEARTBEAT_SEC; then how it ended.

        Args:
            upto: the last stage that is wanted.
            about: what else to say of the run.
        """
        self._run |= {"upto": upto, **about}
        self.write()
        try:
            with repeating(self._write_if_possible, HEARTBEAT_SEC, "d2c-heartbeat"):
                yield
        except BaseException as error:
            self.ends(error)
            raise
        self._run |= {"state": "done"}
        self.write()

    def plan(self, nodes: list[Node], slots: int) -> None:
        """Keeps in plan.json what is expected of stages that have not begun, to be set beside what they take."""
        if not self._record:
            return
        from d2c_ray import forecast
        from d2c_ray.distributed import cluster

        try:
            planned = forecast.planned(self._plan, nodes, cluster.at_hand(not self._plan.config.resources.address), slots)
        except Exception as error:  # what it takes is no reason not to run
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            logs.say(f"nothing is planned for this run: {' '.join(said.split())}", "warning")
            return
        write_json(self._plan.folder / PLAN, {**self._plan.to_json(), "planned": planned})

    def set(self, node: Node, state: str, error: str = "") -> None:
        with self._lock:
            if self._stopped and state == "failed":
                return  # as all do from which Ray is taken
            self._states[node.name] = {"state": state, "at": now(), **({"error": error} if error else {})}
        self.write()

    def ends(self, error: BaseException) -> None:
        """Says how the run ends, and that the stages which still run are cut off through no fault of their own.

        At once, and not when all is cleaned up: who asks a process to end kills it soon after (`ray job stop` in 3 s).
        """
        with self._lock:
            self._stopped = True
            # One that is stopped after it failed still says why it failed.
            self._run |= _failure(error) if isinstance(error, Exception) else {"state": "stopped"}
            running = [name for name, said in self._states.items() if said["state"] == "running"]
            self._states |= {name: {"state": "stopped", "at": now()} for name in running}
        self._write_if_possible()
        for name in running:
            with suppress(OSError, UserError):
                progress.rewrite(name)  # written now and then, and the last seconds' work counts too

    def waits(self, node: Node, lines: list[str]) -> None:
        """Notes what a running stage waits for, or that it goes on."""
        with self._lock:
            state = self._states.get(node.name, {})
            if state.get("state") != "running":
                return
            state.pop("waits_for", None)
            if lines:
                state["waits_for"] = {"since": now(), "lines": lines}
        self.write()

    def _write_if_possible(self) -> None:
        """As `write`; what cannot be written, on a full disk for one, may come through next time, and must not hide what was wrong."""
        with suppress(OSError, UserError):
            self.write()

    def write(self) -> None:
        if not self._record:
            return
        with self._lock:
            stages = {
                node.name: self._states.get(node.name, {"state": "done" if node.dir.done else "waiting"}) for node in self._plan.nodes
            }
            write_json(self._path, {**self._run, "updated": now(), "every_sec": HEARTBEAT_SEC, "stages": stages})


def _failure(error: Exception) -> dict[str, Any]:
    """What status.json says of a run that failed: why, and whether that is the user's to mend."""
    given = unwrap(error)
    return {"state": "failed", "error": redacted(str(given or f"{type(error).__name__}: {error}")), "to_mend": given is not None}


def _ray_job() -> dict[str, str]:
    """The Ray job that this process is the driver of, by the name under which it was submitted."""
    with suppress(json.JSONDecodeError, AttributeError):
        name = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id", "")
        return {"job": name} if name else {}
    return {}


def unwrap(error: BaseException) -> UserError | None:
    """The `UserError` inside an error of Ray, if there is one: raised in an actor, it arrives wrapped. A full disk is one too."""
    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        found = stack.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, UserError):
            return found
        if full := no_room(found):
            return full
        failures = getattr(found, "worker_failures", None)
        stack += [
            found.__cause__,
            found.__context__,
            getattr(found, "cause", None),
            getattr(found, "controller_failure", None),  # of Ray Train, which writes its index of checkpoints there
            *(failures.values() if isinstance(failures, dict) else []),
        ]
    return None
