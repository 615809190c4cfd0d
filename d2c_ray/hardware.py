"""What work runs on: the machine at hand, or a cluster that is described, and what its devices hold."""

import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from d2c_ray.config import ResourcesConfig
from d2c_ray.errors import UserError
from d2c_ray.models.flops import dense_peak

HERE, DESCRIBED, AT_HAND = "this machine", "described", "at hand"
CPUS_A_GPU = 8  # of a described cluster that says nothing of its CPUs; clouds give 8 to 26
TRAININGS = ("teacher", "train")
ON_DRIVER = ("manifest", "select", "union")
# Words of a device's name, all of which must be there, more special ones first, and its memory, GB of 1e9 bytes, by its data sheet: of
# what is sold in two sizes the smaller, unless the name says one (A100-80GB). What drivers leave of it is about as many GB of 1e9 bytes.
_MEMORY: list[tuple[tuple[str, ...], float]] = [
    (("H200",), 141), (("GH200",), 96), (("H100", "NVL"), 94), (("H100",), 80), (("A100",), 40), (("L40S",), 48), (("L4",), 24), (("A10G",), 24),
    (("A10",), 24), (("RTX", "4090"), 24), (("V100",), 16), (("T4",), 16),
]  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What one process computes on: a GPU by name (empty: one that is not there), or CPU cores by their model name."""

    name: str
    gpu: bool
    threads: int = 1  # of torch, on cores
    cores: int = 0  # that each process has to itself; 0: as many as threads

    def is_same(self, name: str, gpu: bool) -> bool:
        """Whether a name means this device, however long: 'NVIDIA H100 80GB HBM3' is an 'H100'."""
        return self.gpu == gpu and (self.name == name or (gpu and kind(self.name) is not None and kind(self.name) == kind(name)))


@dataclass(frozen=True)
class Cluster:
    """Places to work on.

    Attributes:
        gpu: the name of its GPUs; empty without any. cpus: cores for decoding and, without GPUs, for everything.
        cpu: the model name of its cores; empty: not known. how: HERE, DESCRIBED or AT_HAND. gpu_bytes: memory of one; None: as its name says.
    """

    gpus: int
    gpu: str
    cpus: int
    cpu: str
    how: str
    assumed: tuple[str, ...] = ()
    gpu_bytes: float | None = None

    def gpus_per_actor(self, resources: ResourcesConfig) -> float:
        return resources.gpus_per_actor if resources.gpus_per_actor >= 0 else float(self.gpus > 0)

    def places(self, resources: ResourcesConfig) -> int:
        """Actors that work at once, as a run on it would have them."""
        each = self.gpus_per_actor(resources)
        return resources.actors or max(1, int(self.gpus / each) if each > 0 else self.cpus)

    def trains_on_gpus(self, resources: ResourcesConfig) -> bool:
        if resources.train_gpus >= 0:
            return resources.train_gpus > 0
        return self.gpus_per_actor(resources) > 0 or self.gpus > 0

    def device(self, stage: str, resources: ResourcesConfig) -> Device:
        """What a process of a stage computes on; a GPU without a name where it wants one and there is none (yet)."""
        on_gpu = self.trains_on_gpus(resources) if stage in TRAININGS else self.gpus_per_actor(resources) > 0 and stage not in ON_DRIVER
        return Device(self.gpu, True) if on_gpu else Device(self.cpu, False, resources.threads)

    @property
    def title(self) -> str:
        on = f"{self.gpus} x {self.gpu} and {self.cpus} CPU cores" if self.gpus else f"{self.cpus} CPU cores, no GPU"
        return f"{on} ({self.how})"


def kind(name: str) -> str | None:
    """A GPU by the name that the tables of peaks and memories know it by."""
    found = dense_peak(name, "fp32")
    return found[0] if found else None


def memory_bytes(name: str) -> float | None:
    """Memory of a GPU by its name; None: not known."""
    words = name.replace("-", " ").split()
    for word in words:
        if said := re.fullmatch(r"(\d+)GB?", word):
            return float(said[1]) * 1e9
    return next((size * 1e9 for wanted, size in _MEMORY if all(word in words for word in wanted)), None)


def host_memory() -> float | None:
    """Bytes of memory that this process may have."""
    found = []
    if hasattr(os, "sysconf"):
        found.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (said := limit.read_text().strip()).isdigit():
        found.append(float(said))
    return min(found, default=None)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cpu_name() -> str:
    """Model name of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


@cache
def native_bf16() -> bool:
    """Whether this machine's CPU multiplies in bf16; elsewhere it is emulated, and slow."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(info.read_text().split())


def here() -> Cluster:
    """This machine alone."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    size = float(torch.cuda.get_device_properties(0).total_memory) if gpus else None
    return Cluster(gpus, torch.cuda.get_device_name(0) if gpus else "", cores(), cpu_name(), HERE, gpu_bytes=size)


def described(gpus: str, cpus: int = 0) -> Cluster:
    """A cluster in words: '8xH100', 'H100', or CPU cores alone.

    Args:
        gpus: empty: none. cpus: in all; 0: not said.

    Raises:
        UserError: no such description.
    """
    if not gpus:
        return Cluster(0, "", cpus, cpu_name(), DESCRIBED, (f"that its CPU cores are like this machine's ({cpu_name()})",))
    said = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?([A-Za-z].*?)\s*", gpus)
    count = int(said[1] or 1) if said else 0
    if said is None or not count or "," in gpus:
        raise UserError(f"--gpus {gpus}: a number of GPUs of one kind, for example 8xH100, would do.")
    assumed = () if cpus else (f"{CPUS_A_GPU} CPU cores a GPU (--cpus N says how many there are)",)
    return Cluster(count, said[2], cpus or CPUS_A_GPU * count, "", DESCRIBED, assumed)
