"""Formulas against values worked out another way."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from d2c_ray import diffusion
from d2c_ray.config import DIT_STEPS, SAMPLERS
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


def test_the_bound_at_the_first_step_is_the_decoders_likelihood() -> None:
    """At t = 0: minus the log of the Gaussian's mass between the neighbouring levels, to infinity at the ends; by the error function."""
    betas, cumulative = float64_schedule()
    # Dark and bright ends, and between them; what is predicted leads near, and far off.
    z = torch.tensor([-1.0, -0.9995, -100 / 127.5, 0.0, 31 / 127.5, 1.0])
    noise, predicted = torch.tensor([0.3, -1.0, 0.5, 2.0, -0.7, 0.2]), torch.tensor([0.2, -1.1, 0.9, 1.5, -0.7, 0.6])
    v, t = torch.tensor([-1.0, 0.4, 0.0, 1.0, -0.3, 0.8]), torch.tensor([0])
    as_image = [value.reshape(1, 1, 2, 3) for value in (predicted, v, z, noise)]
    x_t = ddpm.add_noise(as_image[2], as_image[3], t)
    found = ddpm.variational_bound(as_image[0], as_image[1], as_image[2], x_t, t)
    # q(x_0 | x_1, x_0) is x_0 itself, so the mean is the predicted image; the smallest log variance is that of the second step.
    smallest = math.log(betas[1] * (1 - cumulative[0]) / (1 - cumulative[1]))
    bits = []
    for x, eps, guess, fraction in zip(
        z.double().tolist(), noise.double().tolist(), predicted.double().tolist(), v.double().tolist(), strict=True
    ):
        x_1 = math.sqrt(cumulative[0]) * x + math.sqrt(1 - cumulative[0]) * eps
        mean = (x_1 - math.sqrt(1 - cumulative[0]) * guess) / math.sqrt(cumulative[0])
        deviation = math.exp(0.5 * ((fraction + 1) / 2 * math.log(betas[0]) + (1 - fraction) / 2 * smallest))
        below = 0.0 if x < -0.999 else 0.5 * (1 + math.erf((x - 1 / 255 - mean) / deviation / math.sqrt(2)))
        above = 1.0 if x > 0.999 else 0.5 * (1 + math.erf((x + 1 / 255 - mean) / deviation / math.sqrt(2)))
        bits.append(-math.log2(max(above - below, 1e-12)))
    assert max(bits) > 3 * min(bits) > 0, "they are told apart"
    assert found.item() == pytest.approx(sum(bits) / len(bits), rel=1e-3)


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
    assert flow.Flow().score_timesteps(4, 0, 1).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert flow.Flow().score_timesteps(2, 0.5, 1).tolist() == [0.625, 0.875]


def coefficients(path: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma as the SiT paper defines the paths, its time turned round."""
    return (1 - t, t) if path == "linear" else (torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_derivative_of_the_path(path: str) -> None:
    """By automatic differentiation of x_t by t, one pixel at a time."""
    torch.manual_seed(0)
    z, eps = torch.randn(5, 1, 2, 2, dtype=torch.float64), torch.randn(5, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in coefficients(path, t))
    x_t = alpha * z + sigma * eps
    velocity = torch.stack([torch.autograd.grad(column.sum(), t, retain_graph=True)[0] for column in x_t.flatten(1).T], 1)
    objective = diffusion.objective("sit", path)
    assert torch.allclose(objective.add_noise(z, eps, t), x_t, atol=1e-12)
    assert torch.allclose(objective.target(z, eps, t).flatten(1), velocity, atol=1e-12)
    assert torch.allclose(objective.add_noise(z, eps, t)[[0, 4]], torch.stack([z[0], eps[4]]), atol=1e-12)
    guess = torch.randn(5, 1, 2, 2)
    by_hand = (guess.flatten(1) - velocity).square().mean(1)
    assert torch.allclose(objective.loss(guess, z, eps, x_t, t), by_hand, rtol=1e-6)
    if path == "cosine":  # the variance of unit data stays one
        assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_error_gives_the_noise_error(path: str) -> None:
    """Turn a wrong velocity into the noise it implies, by solving for it, and compare errors directly."""
    torch.manual_seed(0)
    z, eps, t = torch.randn(5, 1, 4, 4).double(), torch.randn(5, 1, 4, 4).double(), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double()
    objective = flow.Flow(path)
    wrong = objective.target(z, eps, t) + torch.randn(5, 1, 4, 4)
    x_t = objective.add_noise(z, eps, t)
    implied = []
    for i, step in enumerate(t):
        # x_t = alpha z + sigma eps and v = alpha' z + sigma' eps are two equations of two unknowns at every pixel.
        (alpha, sigma), slopes = (
            coefficients(path, step),
            torch.autograd.functional.jacobian(lambda at: torch.stack(coefficients(path, at)), step),
        )
        system = torch.stack([torch.stack([alpha, sigma]), slopes])
        implied.append(torch.linalg.solve(system, torch.stack([x_t[i].flatten(), wrong[i].flatten()]))[1])
    expected = (torch.stack(implied) - eps.flatten(1)).square().mean(1)
    assert torch.allclose(objective.noise_error(objective.loss(wrong, z, eps, x_t, t).double(), t), expected, rtol=1e-5)


def test_ddpm_is_called_in_the_same_way() -> None:
    z, eps, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([3, 800])
    objective = diffusion.objective("dit")
    assert torch.equal(objective.target(z, eps, t), eps)
    assert objective.loss(torch.cat([eps, eps], 1), z, eps, objective.add_noise(z, eps, t), t).shape == (2,)


def test_alignment_is_minus_the_mean_cosine() -> None:
    a, b = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    for i in range(3):
        cosines = [float(a[i, j] @ b[i, j]) / (float(a[i, j].norm()) * float(b[i, j].norm())) for j in range(5)]
        assert align.loss(a, b)[i].item() == pytest.approx(-sum(cosines) / 5, rel=1e-5)
    assert torch.allclose(align.loss(a, 7.5 * b), align.loss(a, b), atol=1e-6)
    assert [align.default_depth(depth) for depth in (4, 12, 24, 28)] == [2, 4, 8, 8]


MEAN, SPREAD = 1.5, 0.4  # data that are one Gaussian, whose perfect predictor is known


def known_velocity(path: str) -> samplers.Predict:
    """E[alpha' z + sigma' eps | x_t] for z ~ N(MEAN, SPREAD^2)."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in coefficients(path, t))
        d_alpha, d_sigma = (-1.0, 1.0) if path == "linear" else (-math.pi / 2 * sigma, math.pi / 2 * alpha)
        centred, variance = x - alpha * MEAN, (alpha * SPREAD) ** 2 + sigma**2
        return d_alpha * (MEAN + alpha * SPREAD**2 * centred / variance) + d_sigma * sigma * centred / variance

    return velocity


def known_noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[eps | x_t] for z ~ N(MEAN, SPREAD^2) on a dit's schedule, and the smaller variance."""
    assert t.dtype == torch.long
    alpha, sigma = (ddpm.schedule("cpu")[name][t].reshape(-1, 1, 1, 1) for name in ("alpha", "sigma"))
    noise = sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
    return torch.cat([noise, torch.full_like(noise, -1.0)], 1)


def known(kind: str, path: str) -> samplers.Predict:
    return known_noise if kind == "dit" else known_velocity(path)


def transported(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """Where the probability-flow ODE takes each x_t: between two Gaussians, to the point as many deviations from the mean."""
    return MEAN + SPREAD * (x - alpha * MEAN) / math.sqrt(alpha**2 * SPREAD**2 + sigma**2)


def unused(step: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for fresh noise")


def starting_noise() -> torch.Tensor:
    return torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_every_sampler_of_the_configuration_is_there() -> None:
    for (kind, path), names in SAMPLERS.items():
        for name in names:
            assert callable(samplers.find(name, kind, path))


BEGINNINGS = {"sit": (0.0, 1.0), "dit": tuple(float(ddpm.schedule("cpu")[name][-1]) for name in ("alpha", "sigma"))}  # alpha, sigma
DETERMINISTIC = [(name, *of) for of, names in SAMPLERS.items() for name in names if name not in ("ddpm", "sde")]


@pytest.mark.parametrize(("name", "kind", "path"), DETERMINISTIC)
def test_deterministic_samplers_take_each_point_where_the_ode_does(name: str, kind: str, path: str) -> None:
    """Not on the average alone; so the mean and the deviation of the data are reached too."""
    noise, begin = starting_noise(), (0.001, 0.999) if (name, kind) == ("dpm-solver++", "sit") else BEGINNINGS[kind]
    z = samplers.find(name, kind, path)(known(kind, path), noise, 250, unused)
    first_order = name in ("euler", "ddim")
    assert (z - transported(noise, *begin)).abs().max() < (0.03 if first_order else 0.002)  # four deviations from the mean
    assert z.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert z.std().item() == pytest.approx(SPREAD, abs=0.02)


@pytest.mark.parametrize(
    ("name", "kind", "path", "factor"),
    [
        ("euler", "sit", "linear", 2),
        ("euler", "sit", "cosine", 2),
        ("heun", "sit", "linear", 4),
        ("heun", "sit", "cosine", 4),
        ("ddim", "dit", "linear", 2),
    ],
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name: str, kind: str, path: str, factor: int) -> None:
    noise = torch.linspace(-3, 3, 13).reshape(-1, 1, 1, 1)
    errors = [
        float(
            (samplers.find(name, kind, path)(known(kind, path), noise, steps, unused) - transported(noise, *BEGINNINGS[kind])).abs().mean()
        )
        for steps in (16, 32, 64)
    ]
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(factor, rel=0.15)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_sde_has_the_marginals_of_the_ode_until_its_last_step(path: str) -> None:
    noise, generator = starting_noise(), torch.Generator().manual_seed(1)
    z = samplers.find("sde", "sit", path)(known("sit", path), noise, 500, lambda i: torch.randn(noise.shape, generator=generator))
    # What is left is a step of the mean from t = 0.04 to 0, x - 0.04 (v + E[eps | x_t]), of a Gaussian that is known there.
    t = torch.tensor([0.04])
    alpha, sigma = (float(value) for value in coefficients(path, t))
    variance = alpha**2 * SPREAD**2 + sigma**2
    points = alpha * MEAN + math.sqrt(variance) * torch.tensor([-1.0, 1.0]).reshape(-1, 1, 1, 1)
    ends = (points - 0.04 * (known("sit", path)(points, t) + sigma * (points - alpha * MEAN) / variance)).flatten()
    assert z.mean().item() == pytest.approx(float(ends.mean()), abs=0.01)
    assert z.std().item() == pytest.approx(float(ends[1] - ends[0]) / 2, abs=0.008)
    assert z.mean().item() == pytest.approx(MEAN, abs=0.02) and z.std().item() == pytest.approx(SPREAD, abs=0.02)
    # The ODE would keep every point where it began.
    assert abs(float(torch.corrcoef(torch.stack([z.flatten(), noise.flatten()]))[0, 1])) < 0.5


def test_the_noise_that_a_velocity_stands_for() -> None:
    z, eps, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.04, 0.5, 1.0])
    for path in ("linear", "cosine"):
        objective = flow.Flow(path)
        found = objective.noise_of(objective.target(z, eps, t), objective.add_noise(z, eps, t), t)
        assert torch.allclose(found, eps, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 28])
def test_ddim_equals_diffusers(steps: int) -> None:
    """Of step counts whose timesteps lie as far apart as that scheduler takes them to: 999 / (steps - 1) is whole."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, 1e-4, 2e-2, "linear", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps - 1)  # whose gap is 1000 // (steps - 1)
    noise = starting_noise()[:8]
    x = noise
    for step in torch.linspace(999, 0, steps).round().long():
        x = scheduler.step(known_noise(x, step.repeat(8))[:, :1], int(step), x, eta=0.0).prev_sample
    assert torch.allclose(samplers.ddim(known_noise, noise, steps, unused), x, atol=1e-5)


@pytest.mark.parametrize("kind", ["sit", "dit"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_dpm_solver_is_diffusers(kind: str, steps: int) -> None:
    """Its scheduler as diffusers' own pipelines drive it: of a dit with the learned variance cut off, of a flow at its sigmas."""
    from diffusers import DPMSolverMultistepScheduler

    flows = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0} if kind == "sit" else {}
    scheduler = DPMSolverMultistepScheduler(
        1000, 1e-4, 2e-2, "linear", solver_order=2, algorithm_type="dpmsolver++", timestep_spacing="linspace", **flows
    )
    scheduler.set_timesteps(steps)
    noise = starting_noise()[:8]
    x = noise
    for step, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        t = (sigma if kind == "sit" else step).repeat(8)
        x = scheduler.step(known(kind, "linear")(x, t)[:, :1], step, x).prev_sample
    assert torch.allclose(samplers.find("dpm-solver++", kind)(known(kind, "linear"), noise, steps, unused), x, atol=1e-6)
    if steps == 50:  # a tenth of what DDIM and Euler are off by
        begin = (0.001, 0.999) if kind == "sit" else BEGINNINGS["dit"]
        assert (x - transported(noise, *begin)).abs().max() < 0.01


@pytest.mark.parametrize("steps", [250, 1000])
def test_ancestral_sampling_reaches_the_data_of_a_known_diffusion(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 2, 2, generator=generator)
    z = samplers.ancestral(known_noise, noise, steps, lambda i: torch.randn(noise.shape, generator=generator))
    assert z.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert z.std().item() == pytest.approx(SPREAD, abs=0.03)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for (kind, _), names in SAMPLERS.items() for name in names])
def test_a_single_step_begins_at_noise(kind: str, name: str) -> None:
    at: list[float] = []

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        at.append(float(t[0]))
        return known(kind, "linear")(x, t)

    z = samplers.find(name, kind)(predict, starting_noise()[:4], 1, unused)
    assert at[0] >= (0.999 if kind == "sit" else 999) * (1 - 1e-6)
    if name not in ("heun", "sde"):
        assert (z - MEAN).abs().max() < 0.05, "one step leads to the mean of the data"


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver++"])
def test_a_schedule_has_only_so_many_steps(name: str) -> None:
    with pytest.raises(ValueError, match="1001 were asked for"):
        samplers.find(name, "dit")(known_noise, starting_noise()[:1], 1001, unused)
    assert (
        samplers.find(name, "dit")(known_noise, starting_noise()[:1], DIT_STEPS[name], lambda i: torch.zeros(1, 1, 2, 2)).isfinite().all()
    )


def test_guidance_extrapolates_and_leaves_the_variance_alone() -> None:
    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return label.float().reshape(-1, 1, 1, 1).expand(-1, 2, 2, 2).clone()

    predict = samplers.guided(network, torch.tensor([1, 2]), 4, 3.0, channels=1)
    out = predict(torch.zeros(2, 1, 2, 2), torch.zeros(2))
    assert out[:, 0, 0, 0].tolist() == [4 + 3 * (1 - 4), 4 + 3 * (2 - 4)]
    assert out[:, 1, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize(("kind", "unit", "dtype"), [("sit", 1.0, torch.float32), ("dit", 1000.0, torch.long)])
def test_guidance_acts_within_its_interval_on_its_channels(kind: str, unit: float, dtype: torch.dtype) -> None:
    rows: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return label.float().reshape(-1, 1, 1, 1).expand(-1, 8 if kind == "dit" else 4, 2, 2).clone()

    predict = samplers.guided(network, torch.tensor([1, 2]), 4, 3.0, channels=3, interval=(0.25, 0.3), unit=unit)
    conditional, mixed = [1.0, 2.0], [4 + 3 * (1 - 4), 4 + 3 * (2 - 4)]
    for time, inside in ((0.0, False), (0.249, False), (0.25, True), (0.3, True), (0.301, False), (0.999, False)):
        out = predict(torch.zeros(2, 4, 2, 2), torch.full((2,), time * unit).round(decimals=3).to(dtype))
        assert rows.pop() == (4 if inside else 2), time
        for channel in range(out.shape[1]):
            assert out[:, channel, 0, 0].tolist() == (mixed if inside and channel < 3 else conditional), (time, channel)
    whole = samplers.guided(network, torch.tensor([1, 2]), 4, 3.0, channels=3, unit=unit)
    for time in (0.0, 0.999, 1.0):
        assert whole(torch.zeros(2, 4, 2, 2), torch.full((2,), time * unit).to(dtype))[0, 0, 0, 0] == mixed[0]
