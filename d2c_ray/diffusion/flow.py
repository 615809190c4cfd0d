"""The linear interpolant SiT is trained on (Ma et al., arXiv 2401.08740), data at t = 0 and noise at t = 1."""

import torch
from torch import Tensor


def draw_timesteps(uniform: Tensor) -> Tensor:
    """t ~ U(0, 1), from uniforms in [0, 1)."""
    return uniform


def add_noise(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) z + t eps; t has one entry an image."""
    t = t.reshape(-1, *([1] * (z.ndim - 1)))
    return (1 - t) * z + t * noise


def loss(prediction: Tensor, z: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Velocity MSE an image (N): v = eps - z."""
    return (prediction.float() - (noise - z)).square().flatten(1).mean(1)


def noise_error(velocity_error: Tensor, t: Tensor) -> Tensor:
    """The noise-prediction error that a velocity error stands for: e_eps = (1 - t)^2 e_v.

    With x_t known, eps = x_t + (1 - t) v, so an error of v enters eps scaled by (1 - t).
    """
    return (1 - t).square() * velocity_error


def score_timesteps(count: int, t_min: float, t_max: float) -> Tensor:
    """|T| midpoints of equal strata of [t_min, t_max], float32."""
    return (t_min + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (t_max - t_min)).float()
