"""Diffusion Dataset Condensation on Ray.

    from d2c_ray import condensed

opens condensed datasets in Python. It loads when it is asked for: the command line answers before torch is there.
"""

from typing import Any

PUBLIC = {"condensed": "d2c_ray.data.condensed"}
__all__ = ["condensed"]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'd2c_ray' has no attribute '{name}'")
    import importlib

    return importlib.import_module(PUBLIC[name])
