"""Whether generated images show the class that was asked: a linear probe on frozen features, trained on real images."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from d2c_ray.evaluate.rows import drawn

# Real images a probe is fitted on, at most: twenty of each of ImageNet's classes. Each iteration multiplies rows x width x classes, and a
# probe that is right less often is no less fair, since what it is right on of real images stands beside it.
MOST_ROWS = 20_000


@dataclass(frozen=True)
class Probe:
    """A fitted probe. rows: real images it was fitted on."""

    rows: int
    _model: Any

    @classmethod
    def fit(cls, real: np.ndarray, labels: np.ndarray, most: int = MOST_ROWS) -> "Probe | None":
        """Fits n x d features of real images, or `most` of them, drawn once; None where they have one class only."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows = drawn(len(real), most)
        real, labels = real[rows], labels[rows]
        if len(np.unique(labels)) < 2:
            return None
        return cls(len(real), make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(real, labels))

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Share of images whose probed class is their label."""
        return float((self._model.predict(features) == labels).mean())


def label_agreement(
    real: np.ndarray, real_labels: np.ndarray, held_out: np.ndarray, held_out_labels: np.ndarray, generated: np.ndarray, asked: np.ndarray
) -> tuple[float, float] | None:
    """Share of generated images whose probed class is the one asked, and the probe's accuracy on held-out real images.

    None where the real images have one class only.
    """
    probe = Probe.fit(real, real_labels)
    return None if probe is None else (probe.accuracy(generated, asked), probe.accuracy(held_out, held_out_labels))
