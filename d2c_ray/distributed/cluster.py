"""Connecting to Ray, and refusing work that the cluster cannot hold before anything starts."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import ray

from d2c_ray.config import ResourcesConfig
from d2c_ray.errors import UserError

LIGHT_CPUS = 2  # logical CPUs of a local Ray beyond the cores: decode tasks and drivers next to busy actors


@dataclass(frozen=True)
class Share:
    """What one stage may use: a part of the cluster when several run side by side."""

    actors: int
    gpus_per_actor: float
    rows_per_task: int
    threads: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_actor > 0 else "cpu"


def connect(resources: ResourcesConfig) -> None:
    """Connects to the cluster of `resources.address`, or starts a local Ray that ends with this process.

    Raises:
        UserError: no cluster answers at the address.
    """
    if ray.is_initialized():
        return
    # Where Ray's own files go; a private folder lets several local Rays live on one machine.
    temp_dir = os.environ.get("D2C_RAY_TMPDIR")
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if resources.address:
            ray.init(address=resources.address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",
                num_cpus=resources.num_cpus or cores() + LIGHT_CPUS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _temp_dir=temp_dir,
            )
    except ConnectionError as error:
        raise UserError(f"resources.address={resources.address}: no Ray cluster answers there ({str(error).splitlines()[0]}). Leave it empty for a local one.") from error


def disconnect() -> None:
    """Ends the local Ray, or lets go of the cluster."""
    ray.shutdown()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def train_gpus(workers: int) -> bool:
    """Whether trainings run on GPUs: if the cluster has any."""
    return total_gpus() > 0


def share(resources: ResourcesConfig, side_by_side: int = 1) -> Share:
    """What one of `side_by_side` equal stages may use."""
    gpus = total_gpus()
    per_actor = resources.gpus_per_actor if resources.gpus_per_actor >= 0 else float(gpus > 0)
    if resources.actors:
        actors = resources.actors
    elif per_actor > 0:
        actors = max(1, int(gpus / per_actor))
    else:
        free = int(ray.cluster_resources().get("CPU", 1)) - LIGHT_CPUS
        actors = max(1, free)
    return Share(max(1, actors // side_by_side), per_actor, resources.rows_per_task, resources.threads)


def preflight(resources: ResourcesConfig) -> None:
    """Refuses actors or workers that the cluster has no room for; Ray would wait for ever without a word.

    Raises:
        UserError: names what is wanted, what there is, and the knob.
    """
    cpus, gpus = ray.cluster_resources().get("CPU", 0.0), float(total_gpus())
    wanted = share(resources)
    largest = max(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    if wanted.actors * wanted.gpus_per_actor > gpus:
        raise UserError(
            f"resources.actors={wanted.actors} with resources.gpus_per_actor={wanted.gpus_per_actor} want {wanted.actors * wanted.gpus_per_actor:g} GPUs; the cluster has {gpus:g}."
        )
    if wanted.actors + 1 > cpus or largest < 1:
        raise UserError(
            f"{wanted.actors} actors of one CPU and one free CPU for decoding want {wanted.actors + 1} CPUs; Ray has {cpus:g}. "
            f"resources.actors={max(1, int(cpus) - 1)}, or more logical CPUs (resources.num_cpus={wanted.actors + 1} on a local Ray), would do."
        )
    for knob, workers in (("train_workers", resources.train_workers), ("teacher_workers", resources.teacher_workers)):
        have, what = (gpus, "GPUs") if gpus else (cpus, "CPUs")
        if workers > have:
            raise UserError(f"resources.{knob}={workers} wants {workers} {what}; the cluster has {have:g}.")


def side_by_side(resources: ResourcesConfig, wanted: int, workers: int) -> int:
    """How many of `wanted` trainings of `workers` fit at once, at most one a core or GPU a worker."""
    have = total_gpus() or max(1, int(ray.cluster_resources().get("CPU", 1)) - LIGHT_CPUS)
    return max(1, min(wanted, have // workers))


def check_address(address: str) -> None:
    """Refuses an address that is a local path by mistake."""
    if address and Path(address).exists():
        raise UserError(f"resources.address={address} is a file; an address looks like 10.0.0.1:6379 or auto.")
