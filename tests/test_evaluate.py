"""Distances and measures against known answers."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from d2c_ray.evaluate.frechet import frechet_distance, statistics
from d2c_ray.evaluate.measures import measure
from d2c_ray.evaluate.precision_recall import precision_recall
from d2c_ray.evaluate.probe import label_agreement


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real))


@pytest.mark.parametrize(("rows_a", "rows_b"), [(500, 400), (30, 500), (30, 20), (64, 65)])
def test_frechet_equals_sqrtm_also_where_rank_deficient(rows_a: int, rows_b: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(rows_a, 64)) @ rng.normal(size=(64, 64)), rng.normal(size=(rows_b, 64)) * 2 + 1
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(by_sqrtm(a, b), rel=1e-6)


def test_frechet_of_two_gaussians_is_known() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200_000, 3)), rng.normal(size=(200_000, 3)) * [1, 2, 3] + [1, 0, 0]
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(1 + 0 + 1 + 4, rel=0.02)
    assert frechet_distance(statistics(a), statistics(a)) == pytest.approx(0, abs=1e-9)


def test_statistics_refuse_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        statistics(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="not finite"):
        statistics(np.array([[1.0, np.nan], [0, 0]]))


def test_precision_and_recall_by_hand() -> None:
    """Two clusters of real points; the generator makes one of them, and some points nowhere near."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(50, 2)), rng.normal(size=(50, 2)) + 100
    real = np.concatenate([left, right])
    generated = np.concatenate([rng.normal(size=(75, 2)), rng.normal(size=(25, 2)) - 300])
    precision, recall = precision_recall(real, generated, 3)
    assert 0.6 < precision <= 0.75
    assert 0.4 < recall <= 0.5
    assert precision_recall(real, real, 3) == (1.0, 1.0)


def test_precision_recall_equals_the_double_loop() -> None:
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)) * 1.3

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        inside = 0
        for point in points:
            for centre in centres:
                radius = sorted(np.linalg.norm(centre - other) for other in centres)[3]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    assert precision_recall(real, generated, 3) == (share(generated, real), share(real, generated))


def test_label_agreement_sees_right_and_wrong_labels() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 60)
    features = rng.normal(size=(180, 8)) + 6 * np.eye(8)[labels]
    right, accuracy = label_agreement(features, labels, features, labels, features, labels)
    wrong, _ = label_agreement(features, labels, features, labels, features, (labels + 1) % 3)
    assert accuracy > 0.98
    assert right > 0.98
    assert wrong < 0.02
    assert label_agreement(features, np.zeros(180), features, np.zeros(180), features, np.zeros(180)) is None


def test_measures_put_a_copier_at_its_floor_and_noise_above_real() -> None:
    rng = np.random.default_rng(0)
    real, labels = rng.normal(size=(600, 16)), np.arange(600) % 3
    subset = real[:60]

    def of(generated: np.ndarray) -> dict:
        return measure(
            reference=real[200:], reference_labels=labels[200:], held_out=real[:200], held_out_labels=labels[:200],
            generated=generated, asked=np.arange(len(generated)) % 3, subset=subset, neighbours=3,
        )  # fmt: skip

    copied = of(subset[rng.integers(0, 60, 200)])
    assert copied["generated"]["frechet"] == pytest.approx(copied["subset"]["frechet"], rel=0.3)
    distances = [of(rng.normal(size=(200, 16)) * spread)["generated"]["frechet"] for spread in (1.0, 1.5, 2.5)]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(copied["real"]["frechet"], rel=0.3)
    assert copied["counts"] == {"generated": 200, "sampled": 200, "real": 200, "subset": 60, "reference": 400, "width": 16}
