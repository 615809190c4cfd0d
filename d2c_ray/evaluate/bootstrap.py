"""Intervals of Fréchet distances, by resampling the images that were measured."""

import numpy as np
import torch

from d2c_ray.evaluate.frechet import Statistics, frechet_distance, statistics
from d2c_ray.seeding import derive


def interval(features: np.ndarray, against: Statistics, resamples: int, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The interval that the Fréchet distance of n x d features lies in, were other n images drawn from where they come.

    Resamples hold some 63 % of the images, others twice, and so score higher, as fewer images do. Their spread is that of the
    distance all the same, so their quantiles are shifted to have their mean at the distance itself. The bias of few images is
    in the distance, in other n images' as much, and no matter of the interval.

    One product with the reference's factor serves all resamples. Each then costs the eigenvalues of a matrix as wide as
    its distinct images, or as the features where those are fewer; float64.
    """
    rng = np.random.Generator(np.random.Philox(derive(seed, "bootstrap")))
    n = len(features)
    x = np.asarray(features, np.float64)
    distance = frechet_distance(statistics(x), against)
    mean = x.mean(0)
    x = x - mean
    norms = np.square(x).sum(1)
    projected = torch.from_numpy(x @ against.root.T)  # n x r
    few = n <= projected.shape[1]
    gram = projected @ projected.T if few else None
    values = []
    for _ in range(resamples):
        times = rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64)
        drawn = np.flatnonzero(times)
        weight = torch.from_numpy(times[drawn])
        if gram is not None:  # n' x n', of the same nonzero eigenvalues
            part = gram[drawn][:, drawn]
            row = part @ weight / n
            product = (part - row - row[:, None] + weight @ row / n) * (weight[:, None] * weight).sqrt()
        else:
            rows = projected[drawn]
            shift = weight @ rows / n
            rows = (rows - shift) * weight.sqrt()[:, None]
            product = rows.T @ rows
        cross = torch.linalg.eigvalsh(product).clamp_(min=0).sqrt().sum() / np.sqrt(n - 1)
        moved = times @ x / n
        trace = (times @ norms - n * np.square(moved).sum()) / (n - 1)
        values.append(float(np.square(mean + moved - against.mean).sum() + trace + against.trace - 2.0 * float(cross)))
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail]) - np.mean(values) + distance
    return max(0.0, float(low)), max(0.0, float(high))
