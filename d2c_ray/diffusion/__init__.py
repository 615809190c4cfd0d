"""What a network is trained to predict (`ddpm`, `flow`), what aligns it, and how images are drawn from it."""

from typing import Any

from d2c_ray.diffusion import ddpm, flow


def objective(kind: str, path: str = "linear") -> Any:
    """The objective of a model: draw_timesteps, add_noise, target, loss and score_timesteps, of one signature each.

    Args:
        kind: sit (velocity) or dit (noise). path: of a sit, linear or cosine.
    """
    return ddpm if kind == "dit" else flow.Flow(path)
