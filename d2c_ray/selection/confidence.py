"""How sure a classifier is of every image's class: the cross entropy of a linear probe on frozen features."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2c_ray.seeding import derive

BATCH = 1024
EPOCHS = 20
MIN_STEPS, MAX_STEPS = 200, 4000
MOST_FOR_MOMENTS = 100_000  # rows that mean and deviation are taken over


def cross_entropy(features: np.ndarray, labels: np.ndarray, seed: int, device: str = "cpu") -> tuple[np.ndarray, float] | None:
    """-log p(class) of every row, float32 N, and the probe's accuracy; None where there is one class only.

    Two probes are fitted, each on one half of the rows, and each judges the half it has not seen: a probe is sure of
    everything it was fitted on.

    Args:
        features: N x D, any float type, may be memory-mapped. labels: N, in any numbers.
    """
    classes, target = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        return None
    order = np.random.Generator(np.random.Philox(derive(seed, "confidence"))).permutation(len(labels))
    halves = [np.sort(order[0::2]), np.sort(order[1::2])]
    found, right = np.empty(len(labels), np.float32), 0
    for number, (fitted, judged) in enumerate((halves, halves[::-1])):
        probe = _fit(features, target, fitted, len(classes), derive(seed, "confidence", number), device)
        for start in range(0, len(judged), BATCH):
            rows = judged[start : start + BATCH]
            with torch.inference_mode():
                logits, wanted = probe(_batch(features, rows, device)), torch.from_numpy(target[rows]).to(device)
                found[rows] = F.cross_entropy(logits, wanted, reduction="none").cpu().numpy()
                right += int((logits.argmax(1) == wanted).sum())
    return found, right / len(labels)


def _batch(features: np.ndarray, rows: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(features[rows]).to(device).float()  # halves are widened by torch, far faster than by NumPy


def _fit(features: np.ndarray, target: np.ndarray, rows: np.ndarray, classes: int, seed: int, device: str) -> Callable[[Tensor], Tensor]:
    """A softmax probe over standardised features, by Adam with a rate that falls to nothing.

    The penalty is that of a logistic regression with C = 0.01: it matters where rows are few and is nothing where they
    are many.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    some = _batch(features, np.sort(rng.choice(rows, min(len(rows), MOST_FOR_MOMENTS), replace=False)), device)
    mean, deviation = some.mean(0), some.std(0, correction=0) + 1e-6
    weight = torch.zeros(features.shape[1], classes, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)

    def probe(x: Tensor) -> Tensor:
        return ((x - mean) / deviation) @ weight + bias

    batches = -(-len(rows) // BATCH)
    steps = min(MAX_STEPS, max(MIN_STEPS, EPOCHS * batches))
    optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shuffled = rows
    for step in range(steps):
        if step % batches == 0:
            shuffled = rng.permutation(rows)
        taken = np.sort(shuffled[step % batches * BATCH :][:BATCH])
        wanted = torch.from_numpy(target[taken]).to(device)
        loss = F.cross_entropy(probe(_batch(features, taken, device)), wanted) + weight.square().sum() / (2 * 0.01 * len(rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe
