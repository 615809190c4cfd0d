"""Formulas against values worked out another way."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from d2c_ray.diffusion import align, ddpm, flow, samplers


def float64_schedule() -> tuple[np.ndarray, np.ndarray]:
    betas = np.linspace(1e-4, 0.02, 1000)
    return betas, np.cumprod(1 - betas)


def test_schedule_is_the_linear_one() -> None:
    betas, cumulative = float64_schedule()
    constants = ddpm.schedule("cpu")
    for t in (0, 1, 500, 999):
        assert constants["alpha"][t].item() == pytest.approx(math.sqrt(cumulative[t]), rel=1e-6)
        assert constants["sigma"][t].item() == pytest.approx(math.sqrt(1 - cumulative[t]), rel=1e-5)
        assert constants["log_beta"][t].item() == pytest.approx(math.log(betas[t]), rel=1e-6)


def test_posterior_equals_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) from the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), two Gaussians."""
    betas, cumulative = float64_schedule()
    constants = ddpm.schedule("cpu")
    for t in (1, 10, 400, 999):
        forward, prior = betas[t], 1 - cumulative[t - 1]
        precision = (1 - betas[t]) / forward + 1 / prior
        x0_weight = math.sqrt(cumulative[t - 1]) / prior / precision
        xt_weight = math.sqrt(1 - betas[t]) / forward / precision
        assert constants["posterior_x0"][t].item() == pytest.approx(x0_weight, rel=1e-4)
        assert constants["posterior_xt"][t].item() == pytest.approx(xt_weight, rel=1e-4)
        assert constants["posterior_log_variance"][t].item() == pytest.approx(math.log(1 / precision), rel=1e-4)


def test_variational_bound_is_the_gaussian_kl() -> None:
    torch.manual_seed(0)
    z, noise, predicted = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    v, t = torch.rand(3, 2, 4, 4) * 2 - 1, torch.tensor([5, 300, 999])
    x_t = ddpm.add_noise(z, noise, t)
    constants = ddpm.schedule("cpu")
    for i, step in enumerate(t.tolist()):
        x0_weight, xt_weight = constants["posterior_x0"][step], constants["posterior_xt"][step]
        x0 = (x_t[i] - constants["sigma"][step] * predicted[i]) / constants["alpha"][step]
        spread = torch.exp(
            0.5 * ((v[i] + 1) / 2 * constants["log_beta"][step] + (1 - v[i]) / 2 * constants["posterior_log_variance"][step])
        )
        true = Normal(x0_weight * z[i] + xt_weight * x_t[i], torch.exp(0.5 * constants["posterior_log_variance"][step]))
        expected = kl_divergence(true, Normal(x0_weight * x0 + xt_weight * x_t[i], spread)).mean() / math.log(2)
        found = ddpm.variational_bound(predicted, v, z, x_t, t)[i]
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_decoder_likelihood_sums_to_one_over_the_levels() -> None:
    levels = torch.arange(256) / 127.5 - 1
    log_mass = ddpm._discretised_log_likelihood(levels, torch.full((256,), 0.2), torch.full((256,), -3.0))
    assert log_mass.exp().sum().item() == pytest.approx(1.0, abs=1e-3)


def test_the_learned_variance_does_not_move_the_mean() -> None:
    prediction = torch.randn(2, 2, 4, 4, requires_grad=True)
    z, noise, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([3, 800])
    x_t = ddpm.add_noise(z, noise, t)
    (both,) = torch.autograd.grad(ddpm.loss(prediction, z, noise, x_t, t).sum(), prediction)
    (mse,) = torch.autograd.grad((noise - prediction[:, :1]).square().flatten(1).mean(1).sum(), prediction)
    assert torch.allclose(both[:, :1], mse[:, :1])
    assert both[:, 1:].abs().sum() > 0


def test_stratified_timesteps_are_midpoints() -> None:
    assert ddpm.score_timesteps(4, 0, 1).tolist() == [125, 375, 625, 875]
    assert flow.score_timesteps(4, 0, 1).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert flow.score_timesteps(2, 0.5, 1).tolist() == [0.625, 0.875]


def test_velocity_error_gives_the_noise_error() -> None:
    """Turn a wrong velocity into the noise it implies and compare errors directly."""
    torch.manual_seed(0)
    z, eps, t = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    wrong = eps - z + torch.randn(5, 1, 4, 4)
    implied_noise = flow.add_noise(z, eps, t) + (1 - t[:, None, None, None]) * wrong  # eps = x_t + (1 - t) v
    velocity_error = flow.loss(wrong, z, eps, z, t)
    expected = (implied_noise - eps).square().flatten(1).mean(1)
    assert torch.allclose(flow.noise_error(velocity_error, t), expected, rtol=1e-5)


def test_alignment_is_minus_the_mean_cosine() -> None:
    a, b = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    for i in range(3):
        cosines = [float(a[i, j] @ b[i, j]) / (float(a[i, j].norm()) * float(b[i, j].norm())) for j in range(5)]
        assert align.loss(a, b)[i].item() == pytest.approx(-sum(cosines) / 5, rel=1e-5)
    assert torch.allclose(align.loss(a, 7.5 * b), align.loss(a, b), atol=1e-6)
    assert [align.default_depth(depth) for depth in (4, 12, 24, 28)] == [2, 4, 8, 8]


MEAN, SPREAD = 1.5, 0.4  # data that are one Gaussian, whose perfect predictor is known


def test_euler_reaches_the_data_of_a_known_flow() -> None:
    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[eps - z | x_t] for z ~ N(MEAN, SPREAD^2)."""
        t = t.reshape(-1, 1, 1, 1)
        variance = ((1 - t) * SPREAD) ** 2 + t**2
        centred = x - (1 - t) * MEAN
        return t * centred / variance - (MEAN + (1 - t) * SPREAD**2 * centred / variance)

    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = samplers.euler(velocity, noise, 200, lambda i: noise)
    assert z.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert z.std().item() == pytest.approx(SPREAD, abs=0.02)


@pytest.mark.parametrize("steps", [250, 1000])
def test_ancestral_sampling_reaches_the_data_of_a_known_diffusion(steps: int) -> None:
    constants = ddpm.schedule("cpu")

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (constants[name][t].reshape(-1, 1, 1, 1) for name in ("alpha", "sigma"))
        noise = sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)  # E[eps | x_t]
        return torch.cat([noise, torch.full_like(noise, -1.0)], 1)  # the smaller variance

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 2, 2, generator=generator)
    z = samplers.ancestral(predict, noise, steps, lambda i: torch.randn(noise.shape, generator=generator))
    assert z.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert z.std().item() == pytest.approx(SPREAD, abs=0.03)


def test_guidance_extrapolates_and_leaves_the_variance_alone() -> None:
    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return label.float().reshape(-1, 1, 1, 1).expand(-1, 2, 2, 2).clone()

    predict = samplers.guided(network, torch.tensor([1, 2]), 4, 3.0, channels=1)
    out = predict(torch.zeros(2, 1, 2, 2), torch.zeros(2))
    assert out[:, 0, 0, 0].tolist() == [4 + 3 * (1 - 4), 4 + 3 * (2 - 4)]
    assert out[:, 1, 0, 0].tolist() == [1, 2]
