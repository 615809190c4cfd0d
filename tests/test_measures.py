"""Golden tests of the measures: what each of them must see, and what it must not."""

import ast
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import linalg
from sklearn.datasets import load_digits

from d2c_ray.evaluate.bootstrap import interval
from d2c_ray.evaluate.copying import copying
from d2c_ray.evaluate.frechet import Moments, Statistics, frechet_distance, statistics
from d2c_ray.evaluate.inception_score import inception_score
from d2c_ray.evaluate.kid import discrepancy, kid
from d2c_ray.evaluate.measures import Whole, measure
from d2c_ray.evaluate.neighbours import nearest
from d2c_ray.evaluate.precision_recall import overlap
from d2c_ray.evaluate.probe import Probe


def published(name: str) -> Any:
    """A function of clean-fid, from its source: importing the module would want torchvision."""
    found = find_spec("cleanfid")
    if found is None or found.origin is None:
        pytest.skip("clean-fid is not installed: pip install --no-deps clean-fid==0.1.35")
    tree = ast.parse((Path(found.origin).parent / "fid.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space = {"np": np, "linalg": Linalg}
    exec(compile(tree, "fid.py", "exec"), space)
    return space[name]


class Linalg:
    """Newer SciPy has no `disp`, and gives the root alone."""

    @staticmethod
    def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
        return linalg.sqrtm(matrix) if disp else (linalg.sqrtm(matrix), 0.0)


def correlated(count: int, width: int, seed: int, spread: float = 1.0) -> np.ndarray:
    mix = np.random.default_rng(9).normal(size=(width, width)) * np.geomspace(1, 0.01, width)[:, None]
    return np.random.default_rng(seed).normal(size=(count, width)) @ mix * spread + seed / 10


@pytest.mark.parametrize("rows", [(400, 300), (30, 300), (30, 20)])
def test_frechet_of_any_form_equals_clean_fid(rows: tuple[int, int]) -> None:
    a, b = correlated(rows[0], 64, 0), correlated(rows[1], 64, 1, 1.2)
    wanted = published("frechet_distance")(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    forms = [[statistics(x), Moments(64).update(x).statistics(), Statistics.of(x.mean(0), np.cov(x, rowvar=False), len(x))] for x in (a, b)]
    for left in forms[0]:
        for right in forms[1]:
            assert frechet_distance(left, right) == pytest.approx(wanted, rel=1e-6)


def test_frechet_is_known_between_gaussians() -> None:
    """Commuting covariances: sum (sqrt(a) - sqrt(b))^2; and ill-conditioned ones, where eigenvalues alone would not do."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    for low in (1e-2, 1e-9):
        a, b = np.geomspace(1, low, 40), np.geomspace(low, 2, 40)
        wanted = np.square(np.sqrt(a) - np.sqrt(b)).sum() + 40 * 0.25
        found = frechet_distance(Statistics.of(np.zeros(40), q * a @ q.T), Statistics.of(np.full(40, 0.5), q * b @ q.T))
        assert found == pytest.approx(wanted, rel=1e-7)


def test_features_that_do_not_vary_have_a_distance() -> None:
    point, unit = Statistics.of(np.zeros(3), np.zeros((3, 3))), Statistics.of(np.ones(3), np.eye(3))
    assert frechet_distance(point, point) == 0.0
    assert frechet_distance(point, unit) == frechet_distance(unit, point) == pytest.approx(6.0)


def test_statistics_refuse_what_is_none() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Statistics.of(np.zeros(3), np.eye(4))
    with pytest.raises(ValueError, match="not symmetric"):
        Statistics.of(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="negative eigenvalues"):
        frechet_distance(Statistics.of(np.zeros(2), np.diag([1.0, -1.0])), statistics(np.eye(2)))
    with pytest.raises(ValueError, match="width 3 and 2"):
        frechet_distance(Statistics.of(np.zeros(3), np.eye(3)), statistics(np.eye(2)))
    with pytest.raises(ValueError, match="n x 3"):
        Moments(3).update(np.zeros((4, 2)))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=8), order=st.randoms(use_true_random=False), offset=st.sampled_from([0.0, 1e4]))
def test_moments_merge_in_any_order(cuts: list[int], order: Any, offset: float) -> None:
    """Also parts of no or one row, and features far from zero."""
    features = correlated(200, 6, 0) + offset
    parts = [Moments(6).update(part) for part in np.split(features, sorted(cuts))]
    order.shuffle(parts)
    while len(parts) > 1:  # a tree of any shape
        left, right = parts.pop(order.randrange(len(parts))), parts.pop(order.randrange(len(parts)))
        parts.append(left.merge(right))
    found = parts[0].statistics()
    wanted = np.cov(features, rowvar=False)
    assert found.count == 200
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.sigma, wanted, rtol=0, atol=1e-9 * abs(wanted).max())


def test_kid_equals_clean_fid_on_the_same_rows() -> None:
    x, y = correlated(200, 16, 0), correlated(200, 16, 1, 1.1)
    wanted = published("kernel_distance")(y, x, num_subsets=1, max_subset_size=200)  # all rows, in whichever order
    assert discrepancy(x, y)[0] == pytest.approx(wanted, rel=1e-6)
    assert kid(y, x)[0] == pytest.approx(wanted, rel=1e-6)  # type: ignore[index]


def test_kid_of_equal_distributions_is_nothing_within_its_error() -> None:
    """Over 60 pairs of sets: centred at 0, spread about as its error says (which is sqrt(2) too large here)."""
    rng = np.random.default_rng(0)
    found = np.array([kid(rng.normal(size=(150, 8)), rng.normal(size=(150, 8))) for _ in range(60)])
    assert abs(found[:, 0].mean()) < 3 * found[:, 0].std() / np.sqrt(60)
    assert 1.0 < found[:, 1].mean() / found[:, 0].std() < 2.0
    other, error = kid(rng.normal(size=(400, 8)), rng.normal(size=(400, 8)) * 1.3, 10, 200)  # type: ignore[misc]
    assert other > 4 * error
    assert kid(np.zeros((2, 3)), np.zeros((9, 3))) is None


def test_inception_score_by_hand() -> None:
    """Sure and of c classes in turn: c. Never sure: 1. And by the definition of ADM's evaluator, part by part."""
    sure = np.eye(4)[np.arange(400) % 4]
    assert inception_score(sure) == pytest.approx((4.0, 0.0))
    assert inception_score(np.full((50, 4), 0.25)) == pytest.approx((1.0, 0.0))
    p = np.random.default_rng(0).dirichlet(np.ones(5), 100)
    parts = [np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in p.reshape(10, 10, 5)]
    assert inception_score(p) == pytest.approx((np.mean(parts), np.std(parts)))
    assert inception_score(p[:9]) is None


@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_overlap_equals_the_double_loop(far: float) -> None:
    """With copies across and within the sets, and all far from zero, where float32 products alone are off by as much as the radii."""
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(60, 6)), rng.normal(size=(50, 6)) * 1.2
    real[10:20], made[:5], made[5:10] = real[0], real[30:35], real[0]
    real, made = (real + far).astype(np.float32), (made + far).astype(np.float32)

    def apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.square(x[:, None].astype(np.float64) - y[None]).sum(2)

    radius = [np.sort(apart(x, x), 1)[:, 3] for x in (real, made)]
    of_real, of_made = apart(made, real) <= radius[0], apart(real, made) <= radius[1]
    found = overlap(real, made, 3)
    assert found.precision == of_real.any(1).mean() and found.recall == of_made.any(1).mean()
    assert found.density == pytest.approx(of_real.sum() / 150) and found.coverage == of_real.any(0).mean()


def test_nearest_across_blocks_and_among_many_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    from d2c_ray.evaluate import neighbours

    monkeypatch.setattr(neighbours, "ROWS", 32)
    monkeypatch.setattr(neighbours, "COLUMNS", 40)
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(300, 5))
    keys[100:150] = keys[7] + 1e-9 * rng.normal(size=(50, 5))  # more than there are candidates, and float32 sees no difference
    queries = np.concatenate([rng.normal(size=(90, 5)), keys[[7, 7]]])
    wanted = np.square(queries[:, None] - keys[None]).sum(2)
    squares, rows = nearest(queries, keys, 4)
    np.testing.assert_allclose(squares, np.sort(wanted, 1)[:, :4], rtol=1e-9, atol=1e-30)
    np.testing.assert_allclose(np.take_along_axis(wanted, rows, 1), squares, rtol=1e-9, atol=1e-30)
    assert nearest(keys, keys, 1)[0].max() == 0 and (nearest(keys, keys, 1, same=True)[1][:, 0] != np.arange(300)).all()


def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.data[order] + 0.0, data.target[order]


def of_digits(made: np.ndarray, asked: np.ndarray | None = None, **more: Any) -> dict[str, Any]:
    """600 digits to measure against, 598 held out, 599 to train on."""
    x, y = digits()
    return measure(
        reference=x[:600], reference_labels=y[:600], held_out=x[600:1198], held_out_labels=y[600:1198], generated=made, asked=asked,
        subset=x[1198:], neighbours=3, probe=False, kid_subsets=2, **more,
    )  # fmt: skip


def test_a_copier_is_called_out_by_copying_and_not_by_frechet() -> None:
    x, _ = digits()
    rng = np.random.default_rng(1)
    copies = np.clip(np.round((x[1198:] + rng.normal(size=(599, 64)) * 0.7) / 2) * 2, 0, 16)  # noise, and half the grey levels
    found = of_digits(copies, subset_ids=np.arange(599) + 5000)
    real = of_digits(x[600:1198])
    assert found["generated"]["frechet"] < 1.5 * real["real"]["frechet"]
    assert found["copying"]["share_closer"] > 0.95 and found["copying"]["median_generated"] < 0.5 * found["copying"]["median_real"]
    assert found["copying"]["share_closer_expected"] == pytest.approx(6 / 599)
    assert real["copying"]["share_closer"] <= 0.011
    pairs = found["copying"]["pairs"]
    assert len(pairs) == 16 and all(pair["sample_id"] == 5000 + pair["index"] for pair in pairs)
    assert [pair["distance"] for pair in pairs] == sorted(pair["distance"] for pair in pairs)


def test_a_copier_that_mirrors_is_called_out_too() -> None:
    """Half of what a student sees is mirrored where data.flip is on. Real images get the same second look, and stay as close as they were."""
    x, _ = digits()
    mirrored = x[1198:].reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)
    rng = np.random.default_rng(1)
    copies = np.clip(np.round((mirrored + rng.normal(size=(599, 64)) * 0.7) / 2) * 2, 0, 16)
    ids = np.arange(599) + 5000
    blind = of_digits(copies, subset_ids=ids)["copying"]
    found, real = (of_digits(made, subset_ids=ids, mirrored=mirrored) for made in (copies, x[600:1198]))
    assert blind["share_closer"] < 0.05 and (blind["orientations"], found["copying"]["orientations"]) == (1, 2)
    assert found["copying"]["share_closer"] > 0.95 and found["copying"]["median_generated"] < 0.5 * found["copying"]["median_real"]
    assert real["copying"]["share_closer"] <= found["copying"]["share_closer_expected"] + 1e-9 < 0.011
    assert all(pair["sample_id"] == 5000 + pair["index"] and pair["mirrored"] for pair in found["copying"]["pairs"])
    assert found["subset"] == of_digits(copies)["subset"], "the floor is of the images as they are"
    upright = copying(x[1198:] + 0.2, x[600:1198], x[1198:], mirrored=mirrored)
    assert upright["share_closer"] == 1.0 and not any(pair["mirrored"] for pair in upright["pairs"])
    wanted = np.minimum(*(nearest(x[600:1198], keys, 1)[0][:, 0] for keys in (x[1198:], mirrored)))
    assert upright["median_real"] == pytest.approx(np.median(np.sqrt(wanted)))


def test_mirrored_copies_of_real_images_are_called_out(cifar10: Path) -> None:
    """In a network's features, where an image and its mirror image are far apart."""
    from d2c_ray.models.frozen import VisionEncoder

    rows = pq.read_table(cifar10 / "train-000.parquet", columns=["image"]).slice(0, 300).column("image").to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows])
    encoder = VisionEncoder("efficientnet-lite2", 64, torch.device("cpu"), 50)
    features = encoder.pooled(torch.from_numpy(images)).numpy()
    mirrored = encoder.pooled(torch.from_numpy(images[:80, :, ::-1].copy())).numpy()
    noise = np.random.default_rng(0).normal(size=(80, 32, 32, 3)) * 4
    made = encoder.pooled(torch.from_numpy(np.clip(images[:80, :, ::-1] + noise, 0, 255).astype(np.uint8))).numpy()
    blind, found = (copying(made, features[80:], features[:80], mirrored=other) for other in (None, mirrored))
    assert blind["share_closer"] < 0.2 and found["share_closer"] > 0.4, (blind, found)
    assert copying(mirrored, features[80:], features[:80], mirrored=mirrored)["share_closer"] == 1.0


def test_real_images_that_are_in_the_training_set_hide_no_copier() -> None:
    x, _ = digits()
    subset, held_out = x[1198:], x[600:1198].copy()
    held_out[:100] = subset[:100]  # chosen for training though held out of the reference
    held_out[100:103] = subset[100:103] + 0.1  # near-copies, as real datasets hold
    found = copying(subset + 0.2, held_out, subset)
    assert found["real_duplicates"] == 100 and found["real"] == 498 and found["share_closer"] == 1.0
    assert copying(subset, subset, subset)["share_closer"] is None
    assert copying(subset, None, subset)["median_real"] is None


def test_lost_classes_move_recall_and_coverage_and_not_precision() -> None:
    x, y = digits()
    pool, labels = x[600:], y[600:]
    all_classes, some = of_digits(pool[:500]), of_digits(pool[labels < 5][:500])
    assert some["generated"]["recall"] < all_classes["generated"]["recall"] - 0.25
    assert some["generated"]["coverage"] < all_classes["generated"]["coverage"] - 0.25
    assert some["generated"]["precision"] > all_classes["generated"]["precision"] - 0.1
    assert some["generated"]["frechet"] > 2 * all_classes["generated"]["frechet"]


def test_distances_a_class_where_each_has_enough() -> None:
    x, y = digits()
    small = x @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:8].T
    whole = measure(
        reference=small[:900], reference_labels=y[:900], held_out=None, held_out_labels=None, generated=small[900:], asked=y[900:],
        subset=None, neighbours=3, probe=False, kid_subsets=2,
    )  # fmt: skip
    assert whole["per_class"] is not None and set(whole["per_class"]) == {str(label) for label in range(10)}
    wanted = frechet_distance(statistics(small[900:][y[900:] == 3]), statistics(small[:900][y[:900] == 3]))
    assert whole["per_class"]["3"] == pytest.approx(wanted)
    assert whole["too_few"] is None and whole["copying"] is None and whole["real"]["frechet"] is None and whole["label_agreement"] is None
    few = of_digits(x[600:650], y[600:650])
    assert few["per_class"] is None and "50 generated images give 64 features" in few["too_few"] and "floor" in few["too_few"]


def test_fewer_held_out_images_take_a_fair_part_of_images_in_class_order() -> None:
    """1,000 real digits sorted by class, against 200 held-out ones sorted too: a prefix of them would be two classes."""
    x, y = digits()
    made, held_out = (rows[np.argsort(y[rows], kind="stable")] for rows in (np.arange(600, 1600), np.arange(1600, 1797)))
    odds = np.eye(10)[y] * 0.9 + 0.01

    def of(rows: np.ndarray, **more: Any) -> dict[str, Any]:
        return measure(
            reference=x[:600], reference_labels=y[:600], held_out=x[held_out], held_out_labels=y[held_out], generated=x[rows], asked=y[rows],
            subset=x[made[900:]], neighbours=3, kid_subsets=2, probabilities=odds[rows], held_out_probabilities=odds[held_out], **more,
        )  # fmt: skip

    found = of(made, pairs=100)
    assert found["counts"] == {"generated": 197, "sampled": 1000, "real": 197, "subset": 100, "reference": 600, "width": 64}
    assert found["generated"]["frechet"] < 1.3 * found["real"]["frechet"], "as real images of all classes"
    assert found["generated"]["recall"] > found["real"]["recall"] - 0.1
    assert found["generated"]["inception_score"] == pytest.approx(found["real"]["inception_score"], rel=0.1)
    assert found["notes"] == ["measured 197 of 1,000 generated images: so many real images are held out"]
    # What needs no equal counts is of all 1,000: the last 100 are the training set, where the caller has them.
    assert sorted(pair["index"] for pair in found["copying"]["pairs"]) == list(range(900, 1000))
    assert found["copying"]["share_closer"] >= 0.1
    every = of(made[::-1], probe=False)["copying"]
    assert {key: every[key] for key in every if key != "pairs"} == {key: found["copying"][key] for key in every if key != "pairs"}
    assert found["label_agreement"] > 0.9
    wrong = np.r_[np.zeros(200, int), y[made][200:]]
    agreement = measure(
        reference=x[:600], reference_labels=y[:600], held_out=x[held_out], held_out_labels=y[held_out], generated=x[made], asked=wrong,
        subset=None, neighbours=3, kid_subsets=2,
    )["label_agreement"]  # fmt: skip
    changed = (y[made] != wrong).mean()
    assert agreement == pytest.approx(found["label_agreement"] - changed, abs=0.02)


def test_without_held_out_images_the_reference_shows_its_own_floor() -> None:
    x, y = digits()
    order = np.argsort(y[:600], kind="stable")  # class by class

    def of(made: np.ndarray, **more: Any) -> dict[str, Any]:
        given = {
            "reference": x[:600][order],
            "reference_labels": None,
            "held_out": None,
            "held_out_labels": None,
            "asked": None,
            "subset": None,
        }
        return measure(**{**given, "generated": made, "neighbours": 3, "kid_subsets": 2, **more})

    found = of(x[600:660])
    assert found["counts"]["real"] == 60
    # Sixty real digits score 130 to 210, and the first sixty in class order 1,077.
    assert 0.6 < found["real"]["frechet"] / found["generated"]["frechet"] < 1.6
    assert found["real"]["kid"] is not None and found["real"]["recall"] is not None and found["real"]["inception_score"] is None
    assert f"Its floor is what 60 reference images score against the other 540: {found['real']['frechet']:.4g}." in found["too_few"]
    assert found["notes"] == ["no real images are held out: the real ones shown are 60 of the reference, measured against its other 540"]
    few = of(x[600:630], reference=x[:59])
    assert few["real"]["frechet"] is None and few["counts"]["real"] == 0 and few["notes"] == []
    assert "Its floor is not known: no real images are held out, and the reference is not twice 30 images" in few["too_few"]
    published_ = of(x[600:630], statistics=statistics(x[:600]))
    assert published_["real"]["frechet"] is None and published_["too_few"].endswith("Its floor is not known: no real images are held out.")
    assert of(x[600:800])["real"]["frechet"] is None and of(x[600:800])["too_few"] is None, "nothing is taken where there are enough"


def test_published_statistics_take_the_place_of_the_reference() -> None:
    x, _ = digits()
    given_ = Statistics.of(x.mean(0), np.cov(x, rowvar=False))
    found = of_digits(x[:700], statistics=given_, bootstrap=20)
    assert found["counts"] == {"generated": 700, "sampled": 700, "real": 598, "subset": 599, "reference": None, "width": 64}
    assert found["generated"]["frechet"] == pytest.approx(frechet_distance(statistics(x[:700]), given_))
    low, high = found["generated"]["frechet_interval"]
    assert low < found["generated"]["frechet"] < high and found["subset"]["frechet_interval"] is None


def test_a_reference_is_measured_against_whole_and_held_in_part() -> None:
    """Fréchet distances are to all of it, by class too, and the rest is of the rows that are held, as many real as generated ones."""
    x, y = digits()
    small = x @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:8].T
    held = np.sort(np.random.default_rng(0).permutation(900)[:200])
    classes = {label: statistics(small[:900][y[:900] == label]) for label in range(10)}
    merged = Moments(8)
    for part in np.array_split(small[:900], 7):
        merged.merge(Moments(8).update(part))
    given = {
        "held_out": small[900:1200], "held_out_labels": y[900:1200], "generated": small[1200:1500], "asked": y[1200:1500], "subset": small[1500:],
        "neighbours": 3, "kid_subsets": 2,
    }  # fmt: skip
    every = measure(reference=small[:900], reference_labels=y[:900], **given)
    part = measure(reference=small[held], reference_labels=y[held], whole=Whole(900, merged.statistics(), classes), **given)
    alone = measure(reference=small[held], reference_labels=y[held], **given)
    for name in ("generated", "real", "subset"):
        assert part[name]["frechet"] == pytest.approx(every[name]["frechet"], rel=1e-9)
        for key in ("kid", "precision", "recall", "density", "coverage", "precision_recall_count"):
            assert part[name][key] == alone[name][key], (name, key)
        assert (part[name]["kid_count"], every[name]["kid_count"]) == (200, 900)
    assert part["counts"] == every["counts"] and part["counts"]["reference"] == 900
    assert part["per_class"] == pytest.approx(every["per_class"]) and len(part["per_class"]) == 10
    assert part["generated"]["precision_recall_count"] == 200 and every["generated"]["precision_recall_count"] == 300
    assert part["notes"] == [
        "KID, precision, recall, density, coverage and the label probe look at 200 of the 900 reference images, drawn once; Fréchet distances at all"
    ]
    assert every["notes"] == []


def test_a_subset_has_a_floor_of_all_and_copies_are_sought_in_part() -> None:
    x, _ = digits()
    found = of_digits(x[600:1198], subset_whole=Whole(1797, statistics(x)))
    assert found["counts"]["subset"] == 1797 and found["copying"]["training"] == 599
    assert found["subset"]["frechet"] == pytest.approx(frechet_distance(statistics(x), statistics(x[:600])))
    assert found["notes"] == ["copies are sought among 599 of the 1,797 training images, drawn once"]


def test_a_probe_is_fitted_on_so_many_rows_and_once() -> None:
    x, y = digits()
    few = Probe.fit(x[:600], y[:600], most=100)
    assert few is not None and few.rows == 100 and few.accuracy(x[600:1198], y[600:1198]) > 0.5
    every = Probe.fit(x[:600], y[:600])
    assert every is not None and every.rows == 600 and Probe.fit(x[:600], np.zeros(600)) is None
    given = {
        "reference": x[:600], "reference_labels": y[:600], "held_out": x[600:1198], "held_out_labels": y[600:1198], "generated": x[1198:],
        "asked": y[1198:], "subset": None, "neighbours": 3, "kid_subsets": 2,
    }  # fmt: skip
    own, same, other = (measure(**given, probe=probe) for probe in (True, every, few))
    assert own["probe_rows"] == 600 and other["probe_rows"] == 100
    assert own["label_agreement"] == same["label_agreement"] != other["label_agreement"]
    assert own["probe_accuracy"] == every.accuracy(x[600:1198], y[600:1198])


def test_given_statistics_measure_real_and_generated_images_at_one_count_too() -> None:
    """All generated images, as a published distance is; and both at the count of the fewer real ones, since fewer images score higher."""
    x, _ = digits()
    given_ = statistics(x[:600])
    found = of_digits(x[600:1198].repeat(2, 0), statistics=given_)
    equal = found["at_equal_counts"]
    assert (found["counts"]["generated"], found["counts"]["real"], equal["count"]) == (1196, 598, 598)
    assert equal["real"] == found["real"]["frechet"] and equal["generated"] > found["generated"]["frechet"]
    assert found["notes"] == [
        f"1,196 generated images and 598 held-out real ones are measured, and fewer images score higher: at 598 each the Fréchet distance is "
        f"{equal['generated']:.4g} of generated images and {equal['real']:.4g} of real ones"
    ]
    fewer = of_digits(x[600:900], statistics=given_)
    assert (fewer["counts"]["generated"], fewer["counts"]["real"], fewer["at_equal_counts"], fewer["notes"]) == (300, 300, None, [])
    assert of_digits(x[600:1196])["at_equal_counts"] is None


def test_a_student_of_every_image_has_no_real_images_to_be_held_against() -> None:
    x, _ = digits()
    found = of_digits(x[600:1198], subset_whole=None)
    assert found["copying"]["share_closer"] is not None
    every = measure(
        reference=x[:600], reference_labels=None, held_out=x[600:1198], held_out_labels=None, generated=x[1198:], asked=None, subset=x[:1198],
        neighbours=3, kid_subsets=2,
    )  # fmt: skip
    assert every["copying"]["share_closer"] is None and every["copying"]["real_duplicates"] == 598
    assert every["notes"][1:] == ["every held-out real image is a training image as well: how near new ones come to those is not known"]


@pytest.mark.parametrize("rows", [6, 120])
def test_intervals_spread_as_new_images_do(rows: int) -> None:
    """Fewer and more rows than features: the interval is about as wide as 95 % of the distances of fresh draws."""
    rng = np.random.default_rng(0)
    width = 10
    against = Statistics.of(np.zeros(width), np.eye(width))
    fresh = [frechet_distance(statistics(rng.normal(size=(rows, width)) * 1.5 + 0.5), against) for _ in range(300)]
    ends = np.array([interval(rng.normal(size=(rows, width)) * 1.5 + 0.5, against, 60, seed) for seed in range(20)])
    wide = np.diff(np.quantile(fresh, [0.025, 0.975]))[0]
    assert 0.6 < np.median(ends[:, 1] - ends[:, 0]) / wide < 1.4
    inside = [(low <= np.mean(fresh) <= high) for low, high in ends]
    assert np.mean(inside) >= 0.75


def test_noise_and_blur_move_frechet_on_real_images(cifar10: Path) -> None:
    from d2c_ray.models.frozen import VisionEncoder

    rows = pq.read_table(cifar10 / "test-000.parquet", columns=["image"]).slice(0, 300).column("image").to_pylist()
    images = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows]
    encoder = VisionEncoder("efficientnet-lite2", 64, torch.device("cpu"), 50)

    def features(some: list[Image.Image] | np.ndarray) -> np.ndarray:
        return encoder.pooled(torch.from_numpy(np.stack([np.asarray(image) for image in some]))).numpy()

    reference = statistics(features(images[150:]))
    clean, rng = images[:150], np.random.default_rng(0)
    grain = rng.normal(size=(150, 32, 32, 3))
    stack = np.stack([np.asarray(image) for image in clean])
    noisy = [features(np.clip(stack + grain * level, 0, 255).astype(np.uint8)) for level in (0, 12, 30)]
    blurred = [features([image.filter(ImageFilter.GaussianBlur(radius)) for image in clean]) for radius in (0.8, 1.8)]
    for made in (noisy, [noisy[0], *blurred]):
        distances = [frechet_distance(statistics(some), reference) for some in made]
        assert distances == sorted(distances) and distances[-1] > 1.3 * distances[0]
