"""Whether generated images are copies of training images: nearer to them than real images of the same data ever are."""

from typing import Any

import numpy as np

from d2c_ray.evaluate import neighbours
from d2c_ray.evaluate.frechet import BLOCK

SAME = 1e-3  # of the root mean square distance of two training images: nearer than that are two readings of one image


def copying(
    generated: np.ndarray,
    held_out: np.ndarray | None,
    subset: np.ndarray,
    pairs: int = 16,
    subset_ids: np.ndarray | None = None,
    mirrored: np.ndarray | None = None,
) -> dict[str, Any]:
    """Distances of generated and held-out real images to their nearest training image, in a frozen feature space.

    `share_closer` is the share of generated images nearer to a training image than real images are. One real image must
    not decide that: real datasets hold near-copies across their parts (CIFAR-10 does), and with one of them held out, "nearer
    than any real image" would hold for nothing. So held-out images that are training images (held out of the reference,
    yet chosen for training; or exact duplicates) are left out and counted, and of the n others the closest 1 % are
    passed over: the limit is the distance of number j = 1 + n // 100. Of further real images j / (n + 1) are expected
    below it, `share_closer_expected`: 1 / (n + 1) under 100 images, 1 % for many. A model that copies comes near 1.

    A model that was trained with flips has seen both orientations, and a network sees an image and its mirror image far apart:
    with `mirrored` the distance to a training image is that to the nearer of the two, for real images as for generated ones.

    Args:
        generated, held_out, subset: features, rows x d; the subset is what the model was trained on.
        pairs: how many of the closest pairs to list. subset_ids: what to call the training images; else their rows.
        mirrored: features of the subset's mirror images, in its order.

    Returns:
        median_generated, median_real (distances), limit, share_closer, share_closer_expected, real (n), real_duplicates,
        training (images in the subset), orientations (of each that were looked at), and pairs: index (row of generated),
        sample_id, mirrored (whether the mirror image is what is near), distance, the closest first. What needs real images is
        None without any.
    """
    distances, rows, turned = _nearest(generated, subset, mirrored)
    order = np.argsort(distances, kind="stable")[:pairs]
    named = rows if subset_ids is None else np.asarray(subset_ids)[rows]
    found: dict[str, Any] = {
        "median_generated": float(np.median(distances)), "median_real": None, "limit": None, "share_closer": None,
        "share_closer_expected": None, "real": 0, "real_duplicates": 0, "training": len(subset), "orientations": 1 if mirrored is None else 2,
        "pairs": [
            {"index": int(i), "sample_id": named[i].item(), "mirrored": bool(turned[i]), "distance": float(distances[i])} for i in order
        ],
    }  # fmt: skip
    if held_out is None or not len(held_out):
        return found
    real = np.sort(_nearest(held_out, subset, mirrored)[0])
    apart = np.sqrt(2.0 * _variance(subset))
    others = real[real > SAME * apart]
    found |= {"real": len(others), "real_duplicates": len(real) - len(others)}
    if len(others):
        passed = len(others) // 100
        limit = float(others[passed])
        found |= {
            "median_real": float(np.median(others)), "limit": limit, "share_closer": float((distances < limit).mean()),
            "share_closer_expected": (1 + passed) / (len(others) + 1),
        }  # fmt: skip
    return found


def _variance(features: np.ndarray) -> float:
    """The summed variance of all features; some rows at a time, so that no float64 copy is made of all."""
    mean, total = features.mean(0, dtype=np.float64), 0.0
    for start in range(0, len(features), BLOCK):
        total += float(np.square(features[start : start + BLOCK] - mean).sum())
    return total / len(features)


def _nearest(queries: np.ndarray, subset: np.ndarray, mirrored: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each query: the distance to the nearest training image, its row, and whether it is the mirror image that is so near."""
    squares, rows = (found[:, 0] for found in neighbours.nearest(queries, subset, 1))
    turned = np.zeros(len(queries), bool)
    if mirrored is not None:
        others, places = (found[:, 0] for found in neighbours.nearest(queries, mirrored, 1))
        turned = others < squares
        squares, rows = np.where(turned, others, squares), np.where(turned, places, rows)
    return np.sqrt(squares), rows, turned
