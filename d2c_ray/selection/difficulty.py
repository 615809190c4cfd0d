"""The diffusion difficulty score (D2C, section 3.2): how badly a trained diffusion model predicts an image's noise.

    s(x) = 1/|T| sum over t of mean over elements (eps_t - eps_theta(alpha_t z + sigma_t eps_t, t, c))^2

Higher is harder. Equation 7 of the paper has the sign the other way round; its Algorithm 2 is the one meant.
Shapes: N images, T timesteps, C x H x W latents.
"""

import numpy as np
import torch
from torch import Tensor

from d2c_ray.diffusion import ddpm, flow
from d2c_ray.models.frozen import in_batches
from d2c_ray.models.weights import Student

CONVENTIONS = {"dit": "noise", "sit": "velocity"}


def timesteps(kind: str, count: int, t_min: float, t_max: float) -> Tensor:
    """T: midpoints of equal strata, integers for a DiT, floats in [0, 1] for a SiT."""
    return (ddpm if kind == "dit" else flow).score_timesteps(count, t_min, t_max)


def errors(teacher: Student, z: Tensor, label: Tensor, draws: Tensor, t: Tensor, device_batch: int, bf16: bool) -> Tensor:
    """The mean squared error of each image at each timestep, in the teacher's own convention: N x T float32.

    Args:
        z: N x C x H x W clean latents. label: N, true classes. draws: N x T x C x H x W noise. t: T.
        device_batch: (image, timestep) pairs a forward, always.
    """
    device = next(teacher.network.parameters()).device
    kind = teacher.spec.kind
    count, steps = draws.shape[:2]
    channels = teacher.spec.channels

    def run(z: Tensor, label: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        z, label, eps, t = (part.to(device) for part in (z, label, eps, t))
        objective = ddpm if kind == "dit" else flow
        x_t = objective.add_noise(z, eps, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            prediction = teacher.predict(x_t, t, label)[:, :channels]  # a DiT's learned variance is dropped
        target = eps if kind == "dit" else eps - z
        return (prediction.float() - target).square().flatten(1).mean(1).cpu()

    with torch.inference_mode():
        pairs = in_batches(
            run, device_batch, z.repeat_interleave(steps, 0), label.repeat_interleave(steps), draws.flatten(0, 1), t.repeat(count)
        )
    return pairs.reshape(count, steps)


def score(errors: np.ndarray, t: np.ndarray, kind: str) -> np.ndarray:
    """s(x): the mean over timesteps of the noise-prediction error, float32 N.

    A velocity error e_v weighs timesteps differently; the comparable noise error is e_eps = (1 - t)^2 e_v.
    """
    ones = torch.ones(len(t), dtype=torch.float64)
    weights = (ones if kind == "dit" else flow.noise_error(ones, torch.as_tensor(t, dtype=torch.float64))).numpy()
    return (errors.astype(np.float64) * weights).mean(1).astype(np.float32)


def rank_stability(errors: np.ndarray, labels: np.ndarray, t: np.ndarray, kind: str) -> float | None:
    """How reproducible the ranks are: Spearman between odd and even timesteps within each class, corrected to the full |T|.

    Spearman-Brown: r = 2 r_half / (1 + r_half). 0.9 and above is enough. None with fewer than two timesteps or where
    no class has three images.
    """
    from scipy.stats import spearmanr

    if errors.shape[1] < 2:
        return None
    even, odd = (score(errors[:, half::2], t[half::2], kind) for half in (0, 1))
    found, weights = [], []
    for label in np.unique(labels):
        rows = labels == label
        if rows.sum() >= 3:
            found.append(float(spearmanr(even[rows], odd[rows]).statistic))
            weights.append(int(rows.sum()))
    if not found or not np.isfinite(found).all():
        return None
    half = float(np.average(found, weights=weights))
    return 2 * half / (1 + half) if half > -1 else -1.0


def needed_timesteps(stability: float, count: int, wanted: float = 0.9) -> int | None:
    """|T| at which the stability would reach `wanted`, by Spearman-Brown; None where the score shows no signal."""
    if stability <= 0:
        return None
    single = stability / (count - (count - 1) * stability)  # reliability of one timestep
    return int(np.ceil(wanted * (1 - single) / (single * (1 - wanted)) - 1e-9))
