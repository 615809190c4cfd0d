"""Samplers, all of one signature: `sampler(predict, noise, steps, step_noise) -> z`; `find` gives the one of a name for a model.

`predict(x, t)` is the guided network output at timesteps t (N); `noise` N x C x H x H is the starting point;
`step_noise(i)` gives fresh noise of that shape for step i, so that the caller decides where randomness comes from.
A sit's timesteps run from 0 (data) to 1 (noise) and it predicts velocities; a dit's are 0 to 999, and it predicts the noise and
the variance's v. `d2c_ray.config.SAMPLERS` says which sampler is for which of them.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from d2c_ray.diffusion import ddpm, flow

Predict = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]
Sampler = Callable[[Predict, Tensor, int, StepNoise], Tensor]

SDE_LAST_STEP = 0.04  # of SiT's published sampling, whatever the number of steps


def find(name: str, kind: str, path: str = "linear") -> Sampler:
    """The sampler of a name, for a sit on a path or a dit.

    Raises:
        KeyError: no sampler of this name.
    """
    every: dict[str, Sampler] = {
        "ddpm": ancestral,
        "ddim": ddim,
        "euler": euler,
        "heun": heun,
        "sde": partial(sde, path=path),
        "dpm-solver++": partial(dpm_solver, kind=kind),
    }
    return every[name]


def euler(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise) -> Tensor:
    """Euler's method on the probability-flow ODE of either path, from t = 1 to t = 0 at equal steps; needs no fresh noise."""
    x = noise
    for now, then in pairwise(_times(steps)):
        x = x + (then - now) * predict(x, _everywhere(x, now)).float()  # dx = v dt
    return x


def heun(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise) -> Tensor:
    """Heun's method of second order on the same ODE and steps, two forwards each; needs no fresh noise.

    The last step too: a velocity is finite at t = 0, where samplers that divide by sigma have to fall back to Euler's.
    """
    x = noise
    for now, then in pairwise(_times(steps)):
        slope = predict(x, _everywhere(x, now)).float()
        ahead = predict(x + (then - now) * slope, _everywhere(x, then)).float()
        x = x + (then - now) / 2 * (slope + ahead)
    return x


def sde(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise, path: str = "linear") -> Tensor:
    """Euler-Maruyama on the reverse SDE of SiT (arXiv 2401.08740) with the choices of its published sampling.

    The SDE dx = (v - w/2 s) dt + sqrt(w) dW, run from t = 1 to 0, has the ODE's marginals for any w(t) >= 0. The score follows
    from the velocity on any path: s = -E[eps | x_t] / sigma, and eliminating z from x_t = alpha z + sigma eps and
    v = alpha' z + sigma' eps gives E[eps | x_t] = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma). SiT's sampler, with the
    coefficient that it calls sigma_t, takes v - sigma_t s for the drift and sqrt(2 sigma_t) for the noise: w = 2 sigma_t. Then
    -w/2 s = E[eps | x_t], and nothing is divided by sigma.

    `steps` - 1 equal steps lead to t = 0.04, and a last one to 0 takes the mean alone, without noise.
    """
    objective, x = flow.Flow(path), noise
    times = [*torch.linspace(1.0, SDE_LAST_STEP, steps, dtype=torch.float64).tolist(), 0.0]
    for i, (now, then) in enumerate(pairwise(times)):
        t = _everywhere(x, now)
        velocity = predict(x, t).float()
        x = x + (then - now) * (velocity + objective.noise_of(velocity, x, t))
        if then > 0:
            _, sigma, *_ = flow.PATHS[path](torch.tensor(now, dtype=torch.float64))
            x = x + math.sqrt(2 * float(sigma) * (now - then)) * step_noise(i)
    return x


def ancestral(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise) -> Tensor:
    """DDPM with the learned variance on `steps` of the 1000 timesteps, betas respaced (Nichol and Dhariwal, section 4).

    Raises:
        ValueError: more steps than the schedule has.
    """
    kept, cumulative = _respaced(steps)
    betas = 1.0 - cumulative / torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    c = {name: value.tolist() for name, value in ddpm.constants(betas).items()}
    if steps == 1:
        c["posterior_log_variance"] = c["log_beta"]
    x = noise
    for i in reversed(range(steps)):
        predicted_noise, v = predict(x, _everywhere(x, kept[i])).float().chunk(2, dim=1)
        z = (x - c["sigma"][i] * predicted_noise) / c["alpha"][i]
        mean = c["posterior_x0"][i] * z + c["posterior_xt"][i] * x
        fraction = (v + 1) / 2
        log_variance = fraction * c["log_beta"][i] + (1 - fraction) * c["posterior_log_variance"][i]
        x = mean + (0.5 * log_variance).exp() * step_noise(i) if i else mean
    return x


def ddim(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, equation 12 with eta = 0) on the timesteps of `ancestral`; needs no fresh noise.

    Raises:
        ValueError: more steps than the schedule has.
    """
    kept, cumulative = _respaced(steps)
    alpha, sigma = cumulative.sqrt().tolist(), (1.0 - cumulative).sqrt().tolist()
    x = noise
    for i in reversed(range(steps)):
        predicted_noise, _ = predict(x, _everywhere(x, kept[i])).float().chunk(2, dim=1)
        z = (x - sigma[i] * predicted_noise) / alpha[i]
        x = alpha[i - 1] * z + sigma[i - 1] * predicted_noise if i else z
    return x


def dpm_solver(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise, kind: str = "sit") -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) as diffusers has it, on a dit's schedule or the linear path of a sit.

    Deterministic; the last step is of first order and ends at the predicted image. The cosine path is none of that scheduler's.

    Raises:
        ValueError: more than 999 steps of a dit's schedule: two would be at one timestep.
    """
    from diffusers import DPMSolverMultistepScheduler

    if kind == "dit" and steps >= ddpm.NUM_STEPS:
        raise ValueError(f"the schedule has room for {ddpm.NUM_STEPS - 1} steps, {steps} were asked for")
    on_path = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=ddpm.NUM_STEPS, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", **(on_path if kind == "sit" else {})
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # or it looks timesteps up by number, of which a sit's are cut to integers
    # What it calls a sigma is t itself on the linear path. It begins at 0.999, where the image is 1/1000 of x.
    times = scheduler.sigmas[:-1].tolist() if kind == "sit" else scheduler.timesteps.tolist()
    x = noise
    for now, step in zip(times, scheduler.timesteps, strict=True):
        out = predict(x, _everywhere(x, now)).float()
        x = scheduler.step(out[:, : x.shape[1]], step, x).prev_sample
    return x


def guided(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    label: Tensor,
    null_label: int,
    guidance: float,
    channels: int,
    interval: tuple[float, float] = (0.0, 1.0),
    unit: float = 1.0,
) -> Predict:
    """Classifier-free guidance: u + g (c - u) on the first `channels` channels, conditional and null halves in one forward.

    Further channels, of an image or of a learned variance, stay the conditional ones.

    Args:
        interval: guide where interval[0] <= t / unit <= interval[1] alone (Kynkaanniemi et al., arXiv 2404.07724); elsewhere the
            conditional half is all there is. All images of a call are at one t.
        unit: the timestep that stands for time 1 (noise): 1 of a sit; 1000 of a dit, whose times are then 0 to 0.999.
    """
    if guidance == 1.0:
        return lambda x, t: network(x, t, label)

    both = torch.cat([label, torch.full_like(label, null_label)])
    always = interval[0] <= 0.0 and interval[1] >= 1.0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        # Compared as tensors: a float32 t of 0.3 is within an interval up to 0.3.
        if not always and not (interval[0] * unit <= t[0] and t[0] <= interval[1] * unit):
            return network(x, t, label)
        # Mixed in float32 also under autocast: the difference of two bfloat16s is scaled up.
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        mixed = unconditional[:, :channels] + guidance * (conditional[:, :channels] - unconditional[:, :channels])
        return torch.cat([mixed, conditional[:, channels:]], dim=1)

    return predict


def _times(steps: int) -> list[float]:
    """From 1 to 0 in equal steps."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()


def _respaced(steps: int) -> tuple[list[int], Tensor]:
    """The timesteps of the schedule that are kept, evenly from 0 to 999, and the cumulative alphas there (float64)."""
    if steps > ddpm.NUM_STEPS:
        raise ValueError(f"the schedule has {ddpm.NUM_STEPS} steps, {steps} were asked for")
    kept = torch.linspace(0, ddpm.NUM_STEPS - 1, steps, dtype=torch.float64).round().long()
    if steps == 1:
        kept[0] = ddpm.NUM_STEPS - 1  # a single step begins at noise
    return kept.tolist(), (1.0 - torch.linspace(1e-4, 2e-2, ddpm.NUM_STEPS, dtype=torch.float64)).cumprod(0)[kept]


def _everywhere(x: Tensor, t: float | int) -> Tensor:
    """One timestep for all rows: int64 of a dit, float32 of a sit."""
    return torch.full((x.shape[0],), t, dtype=torch.long if isinstance(t, int) else torch.float32, device=x.device)
