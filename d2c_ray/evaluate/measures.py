"""The measures of one student, each beside its floor and what real images score at the same counts."""

from typing import Any

import numpy as np

from d2c_ray.evaluate.frechet import frechet_distance, statistics
from d2c_ray.evaluate.precision_recall import precision_recall
from d2c_ray.evaluate.probe import label_agreement


def measure(
    *, reference: np.ndarray, reference_labels: np.ndarray, held_out: np.ndarray, held_out_labels: np.ndarray,
    generated: np.ndarray, asked: np.ndarray, subset: np.ndarray, neighbours: int,
) -> dict[str, Any]:  # fmt: skip
    """Measures generated images, held-out real ones and the subset against one reference.

    Args:
        reference, held_out: features of disjoint real images. generated, asked: features and the classes asked for.
        subset: features of the images the student was trained on.

    Returns:
        For each of generated, real and subset: frechet, precision, recall. Generated and real have the same count, the
        subset its own, which is what a model that copies it would draw from. label_agreement and probe_accuracy.
    """
    count = min(len(generated), len(held_out))
    against = statistics(reference)
    found: dict[str, Any] = {"counts": {"generated": count, "real": count, "subset": len(subset), "reference": len(reference)}}
    for name, features in (("generated", generated[:count]), ("real", held_out[:count]), ("subset", subset)):
        shared = min(len(features), len(reference))  # precision and recall want as many real images as measured ones
        pair = precision_recall(_some(reference, shared), _some(features, shared), neighbours) if shared > neighbours else (None, None)
        distance = frechet_distance(statistics(features), against) if len(features) > 1 else None
        found[name] = {"frechet": distance, "precision": pair[0], "recall": pair[1], "precision_recall_count": shared}
    agreement = label_agreement(reference, reference_labels, held_out, held_out_labels, generated, asked)
    found["label_agreement"], found["probe_accuracy"] = agreement if agreement else (None, None)
    return found


def _some(features: np.ndarray, count: int) -> np.ndarray:
    """`count` rows, always the same ones; not the first, since rows often come class by class."""
    return features[np.random.Generator(np.random.Philox(0)).permutation(len(features))[:count]]
