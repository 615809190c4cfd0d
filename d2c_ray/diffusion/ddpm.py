"""Gaussian diffusion with linear betas and a learned variance, as DiT trains it (Nichol and Dhariwal, arXiv 2102.09672).

Shapes: N images, C channels. Predictions hold the noise in the first C channels and the variance's v in the others.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

NUM_STEPS = 1000


@lru_cache(maxsize=8)
def schedule(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The constants of the 1000-step linear schedule, float32 tensors of length 1000, computed in float64."""
    betas = torch.linspace(1e-4, 2e-2, NUM_STEPS, dtype=torch.float64)
    return {name: value.float().to(device) for name, value in constants(betas).items()}


def constants(betas: Tensor) -> dict[str, Tensor]:
    """What training and sampling need of a schedule of betas (float64), one entry a step."""
    alphas = 1.0 - betas
    cumulative = alphas.cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    posterior_variance = betas * (1.0 - previous) / (1.0 - cumulative)
    return {
        "alpha": cumulative.sqrt(),
        "sigma": (1.0 - cumulative).sqrt(),
        "log_beta": betas.log(),
        # The variance is zero at the first step; its logarithm is clipped to the second step's.
        "posterior_log_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        "posterior_x0": betas * previous.sqrt() / (1.0 - cumulative),
        "posterior_xt": (1.0 - previous) * alphas.sqrt() / (1.0 - cumulative),
    }


def draw_timesteps(uniform: Tensor) -> Tensor:
    """Uniform integers in 0..999 from uniforms in [0, 1)."""
    return (uniform * NUM_STEPS).long().clamp_(max=NUM_STEPS - 1)


def add_noise(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t z + sigma_t eps for integer timesteps t (N)."""
    c = schedule(z.device)
    return _at(c["alpha"], t, z) * z + _at(c["sigma"], t, z) * noise


def target(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network predicts: the noise."""
    return noise


def loss(prediction: Tensor, z: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Hybrid loss an image (N): noise MSE plus the variational bound of the learned variance.

    L = mean |eps - eps_theta|^2 + KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits a dimension, the mean detached
    (equation 16 of arXiv 2102.09672, weighed by 1 as DiT does: the bound times T/1000 at T = 1000).
    """
    predicted_noise, v = prediction.float().chunk(2, dim=1)
    mse = (noise - predicted_noise).square().flatten(1).mean(1)
    return mse + variational_bound(predicted_noise.detach(), v, z, x_t, t)


def variational_bound(predicted_noise: Tensor, v: Tensor, z: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """KL between the true and the predicted posterior in bits a dimension (N); at t = 0 the decoder's likelihood."""
    c = schedule(z.device)
    true_mean = _posterior_mean(z, x_t, t)
    true_log_variance = _at(c["posterior_log_variance"], t, z)
    mean = _posterior_mean(predict_z(x_t, predicted_noise, t), x_t, t)
    log_variance = model_log_variance(v, t)
    kl = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = -_discretised_log_likelihood(z, mean, 0.5 * log_variance)
    bound = torch.where((t == 0)[:, None], likelihood.flatten(1), kl.flatten(1)).mean(1)
    return bound / math.log(2.0)


def predict_z(x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z = (x_t - sigma_t eps) / alpha_t."""
    c = schedule(x_t.device)
    return (x_t - _at(c["sigma"], t, x_t) * noise) / _at(c["alpha"], t, x_t)


def model_log_variance(v: Tensor, t: Tensor) -> Tensor:
    """Interpolates in the log domain between the posterior variance and beta (equation 15); v in [-1, 1]."""
    c = schedule(v.device)
    least, most = _at(c["posterior_log_variance"], t, v), _at(c["log_beta"], t, v)
    fraction = (v + 1) / 2
    return fraction * most + (1 - fraction) * least


def score_timesteps(count: int, t_min: float, t_max: float) -> Tensor:
    """|T| midpoints of equal strata of the schedule, as integers."""
    middle = t_min + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (t_max - t_min)
    return (middle * NUM_STEPS).floor().long().clamp(max=NUM_STEPS - 1)


def _posterior_mean(z: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    c = schedule(z.device)
    return _at(c["posterior_x0"], t, z) * z + _at(c["posterior_xt"], t, z) * x_t


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood of x in [-1, 1], rounded to 255 levels, under a Gaussian: the mass of each level's bin."""
    inverse = (-log_scale).exp()
    upper = _normal_cdf(inverse * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse * (x - mean - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(), torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return values[t].reshape(-1, *([1] * (like.ndim - 1)))
