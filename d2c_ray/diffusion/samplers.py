"""Samplers, all of one signature: `sampler(predict, noise, steps, step_noise) -> z`.

`predict(x, t)` is the guided network output at timesteps t (N); `noise` N x C x H x H is the starting point;
`step_noise(i)` gives fresh noise of that shape for step i, so that the caller decides where randomness comes from.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from d2c_ray.diffusion import ddpm

Predict = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]


def euler(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise) -> Tensor:
    """Euler's method on the probability-flow ODE of the linear path, from t = 1 to t = 0 at equal steps; needs no fresh noise."""
    x = noise
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    for now, then in pairwise(times):
        t = torch.full((x.shape[0],), now, dtype=torch.float32, device=x.device)
        x = x + (then - now) * predict(x, t).float()  # dx = v dt
    return x


def ancestral(predict: Predict, noise: Tensor, steps: int, step_noise: StepNoise) -> Tensor:
    """DDPM with the learned variance on `steps` of the 1000 timesteps, betas respaced (Nichol and Dhariwal, section 4).

    Raises:
        ValueError: more steps than the schedule has.
    """
    if steps > ddpm.NUM_STEPS:
        raise ValueError(f"the schedule has {ddpm.NUM_STEPS} steps, {steps} were asked for")
    kept = torch.linspace(0, ddpm.NUM_STEPS - 1, steps, dtype=torch.float64).round().long()
    cumulative = (1.0 - torch.linspace(1e-4, 2e-2, ddpm.NUM_STEPS, dtype=torch.float64)).cumprod(0)[kept]
    betas = 1.0 - cumulative / torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    c = {name: value.tolist() for name, value in ddpm.constants(betas).items()}
    if steps == 1:
        c["posterior_log_variance"] = c["log_beta"]
    x = noise
    for i in reversed(range(steps)):
        t = torch.full((x.shape[0],), int(kept[i]), dtype=torch.long, device=x.device)
        predicted_noise, v = predict(x, t).float().chunk(2, dim=1)
        z = (x - c["sigma"][i] * predicted_noise) / c["alpha"][i]
        mean = c["posterior_x0"][i] * z + c["posterior_xt"][i] * x
        fraction = (v + 1) / 2
        log_variance = fraction * c["log_beta"][i] + (1 - fraction) * c["posterior_log_variance"][i]
        x = mean + (0.5 * log_variance).exp() * step_noise(i) if i else mean
    return x


SAMPLERS: dict[str, Callable[[Predict, Tensor, int, StepNoise], Tensor]] = {"euler": euler, "ddpm": ancestral}


def guided(network: Callable[[Tensor, Tensor, Tensor], Tensor], label: Tensor, null_label: int, guidance: float, channels: int) -> Predict:
    """Classifier-free guidance: u + g (c - u) on the first `channels` channels, conditional and null halves in one forward.

    A learned variance in further channels stays the conditional one.
    """
    if guidance == 1.0:
        return lambda x, t: network(x, t, label)

    both = torch.cat([label, torch.full_like(label, null_label)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        mixed = unconditional[:, :channels] + guidance * (conditional[:, :channels] - unconditional[:, :channels])
        return torch.cat([mixed, conditional[:, channels:]], dim=1)

    return predict
