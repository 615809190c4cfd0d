"""The interpolants SiT is trained on (Ma et al., arXiv 2401.08740), data at t = 0 and noise at t = 1.

x_t = alpha_t z + sigma_t eps on one of two paths: linear (1 - t and t), or cosine, the paper's generalised
variance-preserving one (cos and sin of pi t / 2). The network predicts the velocity v = alpha'_t z + sigma'_t eps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _linear(t: Tensor) -> tuple[Any, Any, Any, Any, float]:
    return 1 - t, t, -1.0, 1.0, 1.0


def _cosine(t: Tensor) -> tuple[Any, Any, Any, Any, float]:
    quarter = math.pi / 2
    alpha, sigma = (quarter * t).cos(), (quarter * t).sin()
    return alpha, sigma, -quarter * sigma, quarter * alpha, quarter


# alpha, sigma, their derivatives, and alpha sigma' - alpha' sigma, which is the same at all t on both.
PATHS: dict[str, Callable[[Tensor], tuple[Any, Any, Any, Any, float]]] = {"linear": _linear, "cosine": _cosine}


@dataclass(frozen=True)
class Flow:
    """The objective on one path, with the functions that `ddpm` has."""

    path: str = "linear"  # linear | cosine

    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        """t ~ U(0, 1), from uniforms in [0, 1)."""
        return uniform

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t z + sigma_t eps; t has one entry an image."""
        alpha, sigma, *_ = PATHS[self.path](_like(t, z))
        return alpha * z + sigma * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity dx_t/dt = alpha'_t z + sigma'_t eps; eps - z on the linear path."""
        _, _, d_alpha, d_sigma, _ = PATHS[self.path](_like(t, z))
        return d_alpha * z + d_sigma * noise

    def loss(self, prediction: Tensor, z: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Velocity MSE an image (N)."""
        return (prediction.float() - self.target(z, noise, t)).square().flatten(1).mean(1)

    def noise_of(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a velocity at x_t stands for: eps = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma)."""
        alpha, _, d_alpha, _, determinant = PATHS[self.path](_like(t, x_t))
        return (alpha * velocity - d_alpha * x_t) / determinant

    def noise_error(self, velocity_error: Tensor, t: Tensor) -> Tensor:
        """The noise-prediction error that a velocity error stands for: e_eps = (alpha / (alpha sigma' - alpha' sigma))^2 e_v.

        With x_t known, z is eliminated from x_t and v: eps = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma). So
        an error of v enters eps scaled by (1 - t) on the linear path, by 2/pi cos(pi t / 2) on the cosine one.
        """
        alpha, _, _, _, determinant = PATHS[self.path](t)
        return (alpha / determinant).square() * velocity_error

    def score_timesteps(self, count: int, t_min: float, t_max: float) -> Tensor:
        """|T| midpoints of equal strata of [t_min, t_max], float32."""
        return (t_min + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (t_max - t_min)).float()


def _like(t: Tensor, z: Tensor) -> Tensor:
    return t.reshape(-1, *([1] * (z.ndim - 1)))
