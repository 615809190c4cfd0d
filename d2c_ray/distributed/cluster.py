"""Connecting to Ray, and refusing work that the cluster cannot hold before anything starts."""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray._private import auto_init_hook, ray_constants, services
from ray._private import worker as ray_worker

from d2c_ray import logs
from d2c_ray.config import ResourcesConfig
from d2c_ray.distributed import telemetry
from d2c_ray.errors import UserError
from d2c_ray.hardware import AT_HAND, LIGHT_CPUS, Cluster, cores, cpu_name, decode_cpus, gpu_models, lacking, room
from d2c_ray.wording import first_line

# Of tasks and actors: anywhere in the cluster. By default those that a trial of a sweep starts would have to fit into its own place,
# which is for its driver alone.
ANYWHERE: Literal["DEFAULT"] = "DEFAULT"


@dataclass(frozen=True)
class Share:
    """What one stage may use: a part of the cluster when several run side by side."""

    actors: int
    gpus_per_actor: float
    rows_per_task: int
    threads: int
    min_actors: int = 0  # the pool grows from here to `actors`; 0: all at once
    autoscaling: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_actor > 0 else "cpu"


def connect(resources: ResourcesConfig, dashboard: bool = False) -> None:
    """Connects to the cluster of `resources.address`, or starts a local Ray that ends with this process.

    Args:
        dashboard: of a local Ray. Without it, a Tune trial that is ended leaves its training's place taken.

    Raises:
        UserError: no cluster answers at the address.
    """
    if ray.is_initialized():
        telemetry.follow()
        return
    # Where Ray's own files go; a private folder lets several local Rays live on one machine.
    temp_dir = os.environ.get("D2C_RAY_TMPDIR")
    # A stage that is left behind by a failed one must not start a Ray of its own, and nor must the watchdog. Ray reads the variable
    # when it is imported, so that it is for workers alone.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    auto_init_hook.enable_auto_connect = False
    # Says at every start that authentication, which is on, is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    _check_answers(resources.address)
    more: dict[str, Any] = {}
    if logs.as_json():
        # Its own line at every start would be one of another shape.
        logging.getLogger("ray._private.worker").setLevel(logging.WARNING)
        more["logging_config"] = ray.LoggingConfig(encoding="JSON")  # of workers; this process's handlers are taken back below
    if not resources.address or logs.as_json():
        # C++ lines of the driver go to the terminal whatever the Python level is.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not resources.address:
        # A machine of one's own is not taken away, and the watcher is a process more that starts with every training.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        more |= {"num_cpus": resources.num_cpus or cores() + LIGHT_CPUS, "include_dashboard": dashboard, "_temp_dir": temp_dir}
        more["dashboard_host"] = "127.0.0.1"
    try:
        with _said_as_lines() if logs.as_json() else nullcontext(), nullcontext() if resources.address else _on_loopback():
            ray.init(address=resources.address or "local", log_to_driver=False, logging_level=logging.WARNING, **more)
    except ConnectionError as error:
        raise UserError(
            f"resources.address={resources.address}: no Ray cluster answers there ({first_line(error)}). Leave it empty for a local one."
        ) from error
    if logs.as_json():
        logs.own_handlers()
    telemetry.follow()


@contextmanager
def _said_as_lines() -> Iterator[None]:
    """Says what is written to the terminal past Python within, as Ray's C++ part does when it starts, like everything else."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if line.startswith('{"time"'):
                    sys.stderr.write(f"{line}\n")  # it is one already
                elif line.strip():
                    logs.say(line, logger="ray")


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts meanwhile listens to this machine alone, as Ray's own default is on macOS and Windows.

    Elsewhere it takes the machine's outer address even where the inner one is asked for (`_node_ip_address`), and its processes
    then listen to everybody.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_answers(address: str) -> None:
    """Refuses what is no address, and a host:port that nothing listens at; Ray itself would try for minutes.

    `auto` finds a local Ray of another run too, which listens to this machine alone, under an address that nothing listens at.
    """
    if "://" in address:
        raise UserError(
            f"resources.address={address}: HEAD:6379 would do, where the cluster's head listens to nodes, or auto on one of them. "
            "(d2c submit takes the dashboard's, http://HEAD:8265.)"
        )
    found = address
    if address == "auto":
        with suppress(ConnectionError):  # there is none, which Ray says
            found = services.canonicalize_bootstrap_address(address) or ""
    host, colon, port = found.rpartition(":")
    if not colon or "/" in found or not port.isdigit():
        return
    reason = answers(host, int(port))
    if reason:
        at = f", at {found}" if found != address else ""
        raise UserError(f"resources.address={address}: no Ray cluster answers there ({reason}{at}). Leave it empty for a local one.")


def answers(host: str, port: int) -> str:
    """Empty where something listens at host:port, else the reason in words."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        return str(error)
    return ""


def disconnect() -> None:
    """Ends the local Ray, or lets go of the cluster; threads that are still at work with it find it gone. May be called again.

    Ray ends its C++ core worker first and takes it away from threads later. What a thread asks of it in between ends the process with
    `_exit(1)`: no error is said, no `finally` is run. Dropping the last reference to an object is enough, as threads of Ray Data do
    that outlive the iterator they read for.
    """
    worker: Any = ray_worker.global_worker
    if worker.mode == ray.SCRIPT_MODE and not isinstance(getattr(worker, "core_worker", None), None | _Leaving):
        worker.core_worker = _Leaving(worker)
    ray.shutdown()
    telemetry.forget()


class _Leaving:
    """Stands in for the core worker of a driver until that is ended, before which it takes itself away from threads."""

    def __init__(self, worker: Any):
        self._worker, self._core_worker = worker, worker.core_worker

    def shutdown_driver(self) -> None:
        core_worker, self._core_worker = self._core_worker, None
        del self._worker.core_worker
        try:
            if core_worker is not None:  # no earlier call was interrupted
                core_worker.shutdown_driver()
        finally:
            self._worker.core_worker = self  # `ray.shutdown` takes it away next

    def __getattr__(self, name: str) -> Any:
        if self._core_worker is None:
            raise AttributeError(f"{name}: Ray is being taken away from this process")
        return getattr(self._core_worker, name)


def at_hand(local: bool = False) -> Cluster:
    """What the connected Ray has, as plans describe it; its cores are taken to be like the driver's.

    Args:
        local: it runs on this machine alone, which knows more of its GPUs than their kind.
    """
    gpu, models = gpu_name(), set(gpu_models()) if local else set[str]()
    assumed: tuple[str, ...] = ()
    if gpu and len(models) == 1:
        gpu = models.pop()
    elif gpu:
        assumed = (f"that {gpu}, as Ray names the GPUs, is the kind of that name in the tables, and what d2c bench measured on any such",)
    return replace(_cluster(), gpu=gpu, cpu=cpu_name(), assumed=assumed)


def _cluster() -> Cluster:
    """The connected Ray's nodes, without the names of what they have."""
    alive = nodes()
    return Cluster(total_gpus(), "", max(1, int(sum(cpus for cpus, _ in alive)) - LIGHT_CPUS), "", AT_HAND, nodes=tuple(alive))


def total_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def gpu_name() -> str:
    """The kind of GPU of the cluster as Ray names it, for example 'H200'; empty without GPUs."""
    if not total_gpus():
        return ""
    kinds = sorted(name.removeprefix("accelerator_type:") for name in ray.cluster_resources() if name.startswith("accelerator_type:"))
    return "+".join(kinds) or "GPU"


def train_on_gpus(resources: ResourcesConfig) -> bool:
    """As `Cluster.trains_on_gpus`, of the connected Ray."""
    return _cluster().trains_on_gpus(resources)


def training_waits_for(workers: int, on_gpus: bool) -> str:
    """In words, what a training that has shown no step yet waits for."""
    have = sum(gpus if on_gpus else cpus for cpus, gpus in nodes())
    if have < workers:
        return f"waiting for capacity: {workers} {'GPUs' if on_gpus else 'CPUs'} asked for, the cluster has {have:g}"
    return "starting"


def places(resources: ResourcesConfig) -> int:
    """As `Cluster.places`, of the connected Ray."""
    return _cluster().places(resources)


def trainings(resources: ResourcesConfig) -> int:
    """As `Cluster.trainings`, of the connected Ray."""
    return _cluster().trainings(resources)


def share(resources: ResourcesConfig, actors: int) -> Share:
    """What a stage that got `actors` places may use."""
    least = min(resources.min_actors or actors, actors)
    return Share(actors, _cluster().gpus_per_actor(resources), resources.rows_per_task, resources.threads, least, resources.autoscaling)


def nodes() -> list[tuple[float, float]]:
    """(CPUs, GPUs) of every node that is alive."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(float(node.get("CPU", 0)), float(node.get("GPU", 0))) for node in found]


def waiting_for(share: Share) -> str:
    """In words, what a pool that gives nothing waits for."""
    alive = nodes()
    held, least = room(alive, share.gpus_per_actor), share.min_actors or share.actors
    each = f"1 CPU and {share.gpus_per_actor:g} GPU" if share.gpus_per_actor else "1 CPU"
    if held < least:
        return f"waiting for capacity: {least} actors of {each} asked for, the cluster's {len(alive)} nodes hold {held}"
    if decode_cpus(alive, least, share.gpus_per_actor) < 1:
        return f"waiting for capacity: {least} actors of {each} leave no CPU to decode on"
    return "waiting for the first results of new actors"


def preflight(resources: ResourcesConfig, pools: int = 1) -> None:
    """Refuses actors or workers that the cluster has no room for; Ray would wait for ever without a word.

    An autoscaling cluster is not refused: what is missing may come.

    Args:
        pools: actor pools that work one behind the other, each of one actor at least.

    Raises:
        UserError: names what is wanted, what there is, and the knob.
    """
    for lack in lacking(_cluster(), resources, pools):
        raise UserError(lack.refusal)
