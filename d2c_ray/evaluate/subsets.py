"""What a subset keeps of a dataset, without training on it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from d2c_ray.evaluate import frechet, precision_recall
from d2c_ray.seeding import derive

MOST = 5000  # rows of either side that precision and recall are taken over
MOST_IN_STATISTICS = 100_000
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def coverage(features: np.ndarray, subset: np.ndarray, neighbours: int, seed: int, whole: frechet.Statistics) -> dict[str, float | None]:
    """Fréchet distance, precision and recall of a subset against the whole.

    Precision and recall compare as many rows of both: the subset (at most `MOST` of it) and a random sample of the
    whole, the same for every subset of that size. None where there are too few rows for them.

    Args:
        features: N x D of the whole, any float type, may be memory-mapped. subset: its rows, increasing.
        whole: `statistics` of the whole.
    """
    count = min(len(subset), MOST)
    rng = np.random.Generator(np.random.Philox(derive(seed, "coverage")))
    sample = np.sort(rng.permutation(len(features))[:count])
    kept = np.sort(np.random.Generator(np.random.Philox(derive(seed, "kept"))).permutation(subset)[:count])
    found: dict[str, float | None] = {"frechet": None, "precision": None, "recall": None}
    if len(subset) >= 2:
        found["frechet"] = frechet.frechet_distance(statistics(features, subset, seed), whole)
    if count > neighbours:
        found["precision"], found["recall"] = precision_recall.precision_recall(features[sample], features[kept], neighbours)
    return found


def statistics(features: np.ndarray, rows: np.ndarray, seed: int) -> frechet.Statistics:
    """Mean and covariance of some rows; of a random part of them where they are very many."""
    if len(rows) > MOST_IN_STATISTICS:
        rows = np.sort(np.random.Generator(np.random.Philox(derive(seed, "statistics"))).permutation(rows)[:MOST_IN_STATISTICS])
    return frechet.statistics(features[rows])


def jaccard(subsets: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Overlap of every two subsets: images in both over images in either."""
    found: dict[str, dict[str, float]] = {}
    for name, a in subsets.items():
        found[name] = {}
        for other, b in subsets.items():
            both = len(np.intersect1d(a, b, assume_unique=True))
            found[name][other] = both / max(1, len(a) + len(b) - both)
    return found


def balance(labels: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """Images of the least and the most frequent of `classes`, and the entropy over the largest possible."""
    counts = np.bincount(labels, minlength=int(classes.max()) + 1)[classes]
    share = counts[counts > 0] / max(1, counts.sum())
    entropy = float(-(share * np.log(share)).sum() / np.log(len(classes))) if len(classes) > 1 else 1.0
    return {"least": int(counts.min()), "most": int(counts.max()), "evenness": entropy}


def quantiles(scores: np.ndarray) -> list[float]:
    """The scores at `QUANTILES`."""
    return np.quantile(scores, QUANTILES).tolist()
