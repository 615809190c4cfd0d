"""How the workers of a training find each other: as Ray has it on a cluster, and through a file on one machine.

Ray's way is a store of torch's that listens on every address of the machine and asks nobody who they are. Where all workers are on one
machine, whose Ray listens to it alone, a file in a private folder does the same, and what talks besides is kept to the loopback device.
"""

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

LOOPBACK = "127.0.0.1"
_DEVICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def config() -> TorchConfig:
    """For trainings on the Ray that this process is connected to."""
    here = all(node["NodeManagerAddress"] == LOOPBACK for node in ray.nodes() if node["Alive"])
    return _OnOneMachine() if here else TorchConfig()


class _OnOneMachine(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):
    """Ray's, but for how the group is set up. Workers that are started again are another group, with a file of its own."""

    _folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        self._remove()
        self._folder = tempfile.mkdtemp(prefix="d2c-group-")
        worker_group.execute(_stay_here)
        worker_group.execute(_set_torch_distributed_env_vars)
        workers = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _setup_torch_process_group, backend=backend_config.backend, world_rank=rank, world_size=workers,
                    init_method=(Path(self._folder) / "store").as_uri(), timeout_s=backend_config.timeout_s,
                )
                for rank in range(workers)
            ]
        )  # fmt: skip

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            self._remove()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _stay_here() -> None:
    """In a worker: gloo and NCCL talk over the loopback device, unless their environment says what else."""
    device = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    for variable in _DEVICES if device else ():
        os.environ.setdefault(variable, device or "")
