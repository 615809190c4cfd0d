"""What work runs on: the machine at hand, or a cluster that is described, and what its devices hold."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from d2c_ray.config import ResourcesConfig
from d2c_ray.errors import UserError
from d2c_ray.models.flops import dense_peak

HERE, DESCRIBED, AT_HAND = "this machine", "described", "at hand"
LIGHT_CPUS = 2  # logical CPUs of a local Ray beyond the cores: decode tasks and drivers next to busy actors
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
    """What one process computes on: a GPU by name (empty: one that is not there), or CPU cores by their model name.

    Attributes:
        roughly: the name is Ray's, which may say less: an 'H100 PCIe' is an 'H100' there.
    """

    name: str
    gpu: bool
    threads: int = 1  # of torch, on cores
    cores: int = 0  # that each process has to itself; 0: as many as threads
    roughly: bool = False

    def is_same(self, name: str, gpu: bool) -> bool:
        """Whether a name means this device, however long: 'NVIDIA H100 80GB HBM3' is an 'H100'."""
        if self.gpu != gpu:
            return False
        if self.name == name or not gpu:
            return self.name == name
        return (kind(self.name) is not None and kind(self.name) == kind(name)) or (self.roughly and self._is_in(name))

    def is_taken_for(self, name: str, gpu: bool) -> bool:
        """Whether they are only taken to be the same, since Ray says no more."""
        return self.roughly and self.is_same(name, gpu) and kind(self.name) != kind(name)

    def _is_in(self, name: str) -> bool:
        words = [one.upper().replace("-", " ").split() for one in (self.name, name)]
        return bool(words[0]) and set(words[0]) <= set(words[1])


@dataclass(frozen=True)
class Cluster:
    """Places to work on.

    Attributes:
        gpu: the name of its GPUs; empty without any. cpus: cores for decoding and, without GPUs, for everything.
        cpu: the model name of its cores; empty: not known. how: HERE, DESCRIBED or AT_HAND. gpu_bytes: memory of one; None: as its name says.
        nodes: CPUs and GPUs of each, of a Ray that is connected; empty elsewhere.
    """

    gpus: int
    gpu: str
    cpus: int
    cpu: str
    how: str
    assumed: tuple[str, ...] = ()
    gpu_bytes: float | None = None
    nodes: tuple[tuple[float, float], ...] = ()

    def nodes_with(self, resources: ResourcesConfig) -> list[tuple[float, float]]:
        """(CPUs, GPUs) of every node, CPUs as Ray counts them: on a machine that works alone with some for light work beyond its cores."""
        if self.nodes:
            return list(self.nodes)
        light = 0 if self.how == DESCRIBED and self.gpus else LIGHT_CPUS
        return [(float((self.how == HERE and resources.num_cpus) or self.cpus + light), float(self.gpus))]

    def gpus_per_actor(self, resources: ResourcesConfig) -> float:
        return resources.gpus_per_actor if resources.gpus_per_actor >= 0 else float(self.gpus > 0)

    def places(self, resources: ResourcesConfig) -> int:
        """Actors that work at once: one a GPU, or one a core where there are no GPUs."""
        if resources.actors:
            return resources.actors
        each = self.gpus_per_actor(resources)
        if each > 0:
            return max(1, int(self.gpus / each + 1e-9))
        return max(1, int(sum(cpus for cpus, _ in self.nodes_with(resources))) - LIGHT_CPUS)

    def trains_on_gpus(self, resources: ResourcesConfig) -> bool:
        """Whether trainings run on GPUs: as resources.train_gpus says, else if there are any or actors wait for some."""
        if resources.train_gpus >= 0:
            return resources.train_gpus > 0
        return self.gpus_per_actor(resources) > 0 or self.gpus > 0

    def trainings(self, resources: ResourcesConfig) -> int:
        """Training workers that run at once."""
        return (self.gpus if self.trains_on_gpus(resources) else 0) or self.places(resources)

    def device(self, stage: str, resources: ResourcesConfig) -> Device:
        """What a process of a stage computes on; a GPU without a name where it wants one and there is none (yet)."""
        on_gpu = self.trains_on_gpus(resources) if stage in TRAININGS else self.gpus_per_actor(resources) > 0 and stage not in ON_DRIVER
        return Device(self.gpu, True, roughly=self.how == AT_HAND) if on_gpu else Device(self.cpu, False, resources.threads)

    @property
    def title(self) -> str:
        on = f"{self.gpus} x {self.gpu} and {self.cpus} CPU cores" if self.gpus else f"{self.cpus} CPU cores, no GPU"
        return f"{on} ({self.how})"


# What there is no room for


@dataclass(frozen=True)
class Lack:
    """Actors or workers that a cluster has no room for.

    Attributes:
        what: the knob with its value. wants, has: in words. would: changes that make it fit; empty: none.
        refusal: all of it in words, for a run that does not start.
    """

    what: str
    wants: str
    has: str
    would: tuple[str, ...]
    refusal: str


def room(nodes: Sequence[tuple[float, float]], gpus_per_actor: float) -> int:
    """How many actors of one CPU and `gpus_per_actor` the nodes hold, none of them split over two nodes."""
    return sum(min(int(cpus), int(gpus / gpus_per_actor + 1e-9)) if gpus_per_actor else int(cpus) for cpus, gpus in nodes)


def decode_cpus(nodes: Sequence[tuple[float, float]], actors: int, gpus_per_actor: float) -> int:
    """Whole CPUs left for decode tasks once the actors are placed."""
    return sum(int(cpus) for cpus, _ in nodes) - min(actors, room(nodes, gpus_per_actor))


def lacking(cluster: Cluster, resources: ResourcesConfig, pools: int = 1) -> list[Lack]:
    """What a cluster has no room for, for which Ray would wait for ever without a word; nothing where nodes come on demand.

    Args:
        pools: actor pools that work one behind the other, each of one actor at least.
    """
    if resources.autoscaling:
        return []
    nodes = cluster.nodes_with(resources)
    found = [lack] if (lack := _actors(cluster, nodes, resources, pools)) else []
    on_gpus, cpus = cluster.trains_on_gpus(resources), sum(cpus for cpus, _ in nodes)
    have, what = (float(cluster.gpus), "GPUs") if on_gpus else (cpus, "CPUs")
    for knob, workers in (("train_workers", resources.train_workers), ("teacher_workers", resources.teacher_workers)):
        if min(workers, resources.train_workers_min or workers) > have:  # an elastic training starts with what there is
            ways = f" resources.train_gpus=0 trains on CPUs. {GROWS}" if on_gpus else ""
            would = (f"resources.{knob}={int(have)}",) if have >= 1 else ("resources.train_gpus=0",) if on_gpus else ()
            refusal = f"resources.{knob}={workers} wants {workers} {what}; the cluster has {have:g}.{ways}"
            found.append(Lack(f"resources.{knob}={workers}", f"{workers} {what}", f"{have:g}", would, refusal))
    return found


def _actors(cluster: Cluster, nodes: list[tuple[float, float]], resources: ResourcesConfig, pools: int) -> Lack | None:
    each, cpus, gpus = cluster.gpus_per_actor(resources), sum(cpus for cpus, _ in nodes), float(cluster.gpus)
    actors, held = max(pools, cluster.places(resources)), room(nodes, each)
    apart = f" (a pool for each of {pools} encoders)" if pools > cluster.places(resources) else ""
    what = f"resources.actors={actors}{apart}"
    # As many as leave a CPU to decode on; fewer than pools no attaching can do with.
    fit = next((count for count in range(min(actors, held), 0, -1) if decode_cpus(nodes, count, each) >= 1), 0)
    if apart:
        would: tuple[str, ...] = ("resources.encoders_apart=false", *([f"resources.actors={fit}"] if fit else []))
    elif fit:
        would = (f"resources.actors={fit}",)
    else:
        would = (
            ("resources.gpus_per_actor=0", *([f"resources.actors={int(cpus) - 1}"] if resources.actors >= cpus > 1 else []))
            if each and not gpus
            else ()
        )
    if actors * each > gpus:
        refusal = f"{what} with resources.gpus_per_actor={each} want {actors * each:g} GPUs; the cluster has {gpus:g}. {GROWS}"
        return Lack(what, f"{actors * each:g} GPUs", f"{gpus:g}", would, refusal)
    if each and actors > held:
        refusal = (
            f"resources.actors={actors} of 1 CPU and {each:g} GPU each do not fit on the nodes ({_listed(nodes)}), which hold {held}. "
            f"resources.actors={held} would do. {GROWS}"
        )
        return Lack(what, f"{actors} places of 1 CPU and {each:g} GPU", f"{held}", would, refusal)
    if actors > held or decode_cpus(nodes, actors, each) < 1:
        more = f"resources.num_cpus={actors + 1}"
        if fit:  # logical CPUs a local Ray alone takes
            way = f"resources.actors={fit}" if resources.address else f"resources.actors={fit}, or more logical CPUs ({more}),"
        else:
            way = f"A cluster with {actors + 1} CPUs" if resources.address else f"More logical CPUs ({more})"
        refusal = (
            f"{actors} actor{'s' if actors > 1 else ''} of one CPU and one free CPU for decoding want {actors + 1} CPUs; Ray has {cpus:g} ({_listed(nodes)}). "
            f"{way} would do. {GROWS}"
        )
        return Lack(
            what, f"{actors + 1} CPUs, one of them to decode on", f"{cpus:g}", would or ((more,) if cluster.how == HERE else ()), refusal
        )
    return None


GROWS = "With nodes that come on demand, resources.autoscaling=true waits for them."


def _listed(nodes: list[tuple[float, float]]) -> str:
    return ", ".join(f"{cpus:g} CPU" + (f" {gpus:g} GPU" if gpus else "") for cpus, gpus in nodes[:8]) + (" ..." if len(nodes) > 8 else "")


def kind(name: str) -> str | None:
    """A GPU by the name that the tables of peaks and memories know it by."""
    found = dense_peak(name, "fp32")
    return found[0] if found else None


def memory_bytes(name: str) -> float | None:
    """Memory of a GPU by its name; None: not known."""
    words = name.upper().replace("-", " ").split()
    for word in () if "GH200" in words else words:  # whose name ends with the CPU's memory
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


def gpu_models() -> list[str]:
    """This machine's GPUs by their full names, as the driver lists them; no context is made on any of them, as torch would."""
    said = [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return [found[1].strip() for text in said if (found := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))]


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
    swapped = re.fullmatch(r"(.+?)\s*[xX×*]\s*(\d+)", said[2]) if said else None
    if said and swapped and not said[1] and kind(swapped[1]):
        raise UserError(f"--gpus {gpus}: the number stands in front, and {swapped[2]}x{swapped[1]} would do.")
    if said is None or not count or "," in gpus or (swapped and kind(swapped[1])):
        raise UserError(f"--gpus {gpus}: a number of GPUs of one kind, for example 8xH100, would do.")
    assumed = () if cpus else (f"{CPUS_A_GPU} CPU cores a GPU (--cpus N says how many there are)",)
    return Cluster(count, said[2], cpus or CPUS_A_GPU * count, "", DESCRIBED, assumed)
