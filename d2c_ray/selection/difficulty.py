"""The diffusion difficulty score (D2C, section 3.2): how badly a trained diffusion model predicts an image's noise.

    s(x) = 1/|T| sum over t of mean over elements (eps_t - eps_theta(alpha_t z + sigma_t eps_t, t, c))^2

Higher is harder. Equation 7 of the paper has the sign the other way round; its Algorithm 2 is the one meant.
Shapes: N images, T timesteps, C x H x W latents.
"""

import numpy as np
import torch
from torch import Tensor

from d2c_ray import diffusion
from d2c_ray.diffusion import flow
from d2c_ray.models.frozen import in_batches
from d2c_ray.models.teachers import Teacher

CONVENTIONS = {"dit": "noise", "sit": "velocity"}


def timesteps(kind: str, count: int, t_min: float, t_max: float) -> Tensor:
    """T: midpoints of equal strata, integers for a DiT, floats in [0, 1] for a SiT."""
    return diffusion.objective(kind).score_timesteps(count, t_min, t_max)


def errors(teacher: Teacher, z: Tensor, label: Tensor, draws: Tensor, t: Tensor, device_batch: int) -> Tensor:
    """The mean squared error of each image at each timestep, in the teacher's own convention: N x T float32, on the CPU.

    (image, timestep) pairs fill batches of one fixed size, the last one padded, so that the bits do not depend on how
    rows arrive.

    Args:
        z: N x C x H x W clean latents. label: N, the teacher's classes. draws: N x T x C x H x W noise. t: T.
        device_batch: pairs a forward, always.
    """
    z, label, draws, t = (_on(teacher.device, part) for part in (z, label, draws, t))  # once, not a batch at a time
    count, steps = draws.shape[:2]
    objective = diffusion.objective(teacher.kind, teacher.path)

    def run(pair: Tensor) -> Tensor:
        image, step = pair // steps, pair % steps
        clean, eps, at = z[image], draws[image, step], t[step]
        prediction = teacher.predict(objective.add_noise(clean, eps, at), at, label[image])
        return (prediction - objective.target(clean, eps, at)).square().flatten(1).mean(1)

    if not count:
        return torch.zeros(0, steps)
    with torch.inference_mode():
        # No result is waited for before the last forward has been asked for.
        return in_batches(run, device_batch, torch.arange(count * steps, device=teacher.device)).cpu().reshape(count, steps)


def _on(device: torch.device, values: Tensor) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def score(errors: np.ndarray, t: np.ndarray, kind: str, path: str = "linear") -> np.ndarray:
    """s(x): the mean over timesteps of the noise-prediction error, float32 N.

    A velocity error e_v weighs timesteps differently; the comparable noise error is `Flow.noise_error`, (1 - t)^2 e_v on
    the linear path.
    """
    ones = torch.ones(len(t), dtype=torch.float64)
    weights = (ones if kind == "dit" else flow.Flow(path).noise_error(ones, torch.as_tensor(t, dtype=torch.float64))).numpy()
    return (errors.astype(np.float64) * weights).mean(1).astype(np.float32)


def half_scores(errors: np.ndarray, t: np.ndarray, kind: str, path: str = "linear") -> tuple[np.ndarray, np.ndarray]:
    """Scores of the even and of the odd timesteps alone, float32 N each: what `rank_stability` compares."""
    return score(errors[:, 0::2], t[0::2], kind, path), score(errors[:, 1::2], t[1::2], kind, path)


def rank_stability(even: np.ndarray, odd: np.ndarray, labels: np.ndarray) -> float | None:
    """How reproducible the ranks are: Spearman between odd and even timesteps within each class, corrected to the full |T|.

    Spearman-Brown: r = 2 r_half / (1 + r_half). 0.9 and above is enough. None where no class has three images, or one
    has no order at all. Takes up to some 35 bytes a row.
    """
    order = np.argsort(labels, kind="stable").astype(np.int32)
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels.min(initial=0) - 1))
    found, weights = [], []
    for start, stop in zip(starts, [*starts[1:], len(labels)], strict=True):
        rows = order[start:stop]
        if len(rows) >= 3:
            a, b = (_centred(ranks) for ranks in [_ranks(half[rows]) for half in (even, odd)])
            spread = np.sqrt((a @ a) * (b @ b))
            if not spread:
                return None
            found.append(float(a @ b / spread))
            weights.append(len(rows))
    if not found:
        return None
    half = float(np.average(found, weights=weights))
    return 2 * half / (1 + half) if half > -1 else -1.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Twice the ranks from 1, int32, ties at their mean: what scipy.stats.rankdata gives, in a third of its memory."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])).astype(np.int32)
    del ordered
    sizes = np.diff(starts, append=np.int32(len(values)))
    starts *= 2
    starts += sizes + 1
    ranks = np.empty(len(values), np.int32)
    ranks[order] = np.repeat(starts, sizes)
    return ranks


def _centred(ranks: np.ndarray) -> np.ndarray:
    values = ranks.astype(np.float64)
    values -= values.mean()
    return values


def needed_timesteps(stability: float, count: int, wanted: float = 0.9) -> int | None:
    """|T| at which the stability would reach `wanted`, by Spearman-Brown; None where the score shows no signal."""
    if stability <= 0:
        return None
    single = stability / (count - (count - 1) * stability)  # reliability of one timestep
    return int(np.ceil(wanted * (1 - single) / (single * (1 - wanted)) - 1e-9))
