"""Whether generated images show the class that was asked: a linear probe on frozen features, trained on real images."""

import numpy as np


def label_agreement(
    real: np.ndarray, real_labels: np.ndarray, held_out: np.ndarray, held_out_labels: np.ndarray, generated: np.ndarray, asked: np.ndarray
) -> tuple[float, float] | None:
    """Share of generated images whose probed class is the one asked, and the probe's accuracy on held-out real images.

    None where the real images have one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(real_labels)) < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(real, real_labels)
    return float((probe.predict(generated) == asked).mean()), float((probe.predict(held_out) == held_out_labels).mean())
