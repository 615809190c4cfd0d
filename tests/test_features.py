"""Embedding a dataset, and what is done with its features: classes side by side, a probe's confidence, subsets compared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from d2c_ray import pipeline, schema
from d2c_ray.config import Config
from d2c_ray.data import tables, units
from d2c_ray.data.features import embedded
from d2c_ray.evaluate import frechet, subsets
from d2c_ray.models import frozen
from d2c_ray.selection import confidence

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time


def parts(folder: Path, features: np.ndarray, labels: np.ndarray, rows: int) -> list[Path]:
    """Feature parts as the embed stage leaves them; sample_id is the row, keys are as wide."""
    fields = tables.arrow_schema(schema.EMBEDDINGS, {"features": ("float16", features.shape[1:])})
    paths = []
    for start in range(0, len(features), rows):
        ids = np.arange(start, min(len(features), start + rows))
        columns = [
            pa.array(ids), pa.array([f"x/{i:06d}.png" for i in ids]), pa.array(labels[ids].astype(np.int32)), tables.tensor_column(features[ids]),
            pa.array(np.full(len(ids), start // rows, np.int32)),
        ]  # fmt: skip
        paths.append(folder / f"part-{start // rows:06d}.parquet")
        tables.write(paths[-1], pa.table(columns, schema=fields), {})
    return paths


def test_features_lie_class_by_class_and_leave_nothing_behind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(57, 5)).astype(np.float16), rng.choice([0, 2, 5], 57)
    paths = parts(tmp_path, features, labels, 20)
    (tmp_path / ".features-of-a-killed-run").mkdir()
    with embedded(paths, tmp_path) as data:
        assert data.classes.tolist() == [0, 2, 5]
        for label in range(7):
            rows = data.of(label)
            wanted = np.flatnonzero(labels == label)
            assert data.sample_ids[rows].tolist() == wanted.tolist()
            np.testing.assert_array_equal(data.features[rows], features[wanted])
    assert sorted(tmp_path.iterdir()) == paths


def test_unlabelled_data_is_one_class(tmp_path: Path) -> None:
    with embedded(parts(tmp_path, np.zeros((9, 3), np.float16), np.full(9, -1), 4), tmp_path) as data:
        assert data.classes.tolist() == [0]
        assert data.of(0) == slice(0, 9)


def test_a_probe_is_unsure_of_what_lies_among_another_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 7, 9], 200)
    features = rng.normal(size=(600, 16)) * 3 + 10 * (labels[:, None] == np.array([3, 7, 9]).repeat(2)[np.arange(16) % 6])
    swapped = np.arange(0, 600, 60)
    wrong = labels.copy()
    wrong[swapped] = np.where(labels[swapped] == 3, 7, 3)
    found = confidence.cross_entropy(features.astype(np.float16), wrong, 0)
    assert found is not None
    ce, accuracy = found
    assert ce.shape == (600,) and ce.dtype == np.float32 and np.isfinite(ce).all()
    rest = np.setdiff1d(np.arange(600), swapped)
    assert ce[swapped].min() > 1 > 4 * np.median(ce[rest])
    assert 0.95 < accuracy < 1
    again, _ = confidence.cross_entropy(features.astype(np.float16), wrong, 0) or (None, 0)
    np.testing.assert_array_equal(ce, again)


def test_a_probe_judges_no_row_that_it_was_fitted_on() -> None:
    """Labels at random: a probe that had seen its rows would know many of them, at more features than rows."""
    rng = np.random.default_rng(0)
    found = confidence.cross_entropy(rng.normal(size=(100, 300)), rng.integers(0, 2, 100), 0)
    assert found is not None and 0.3 < found[1] < 0.7


def test_one_class_has_no_confidence() -> None:
    assert confidence.cross_entropy(np.zeros((5, 3)), np.zeros(5, int), 0) is None


def test_a_subset_that_is_the_whole_covers_it() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 8))
    whole = frechet.statistics(features)
    everything = subsets.coverage(features, np.arange(400), 3, 0, whole)
    corner = subsets.coverage(features, np.argsort(features[:, 0])[:100], 3, 0, whole)
    spread = subsets.coverage(features, np.arange(100), 3, 0, whole)
    assert everything["frechet"] == pytest.approx(0, abs=1e-9) and everything["recall"] == everything["precision"] == 1
    assert spread["frechet"] < corner["frechet"] / 2 and spread["recall"] > corner["recall"] + 0.1  # type: ignore[operator]
    assert subsets.coverage(features, np.arange(2), 3, 0, whole)["recall"] is None


def test_overlap_and_balance() -> None:
    found = subsets.jaccard({"a": np.array([1, 2, 3]), "b": np.array([2, 3, 4]), "c": np.array([9])})
    assert found["a"] == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert subsets.balance(np.array([0, 0, 2, 2]), np.array([0, 2])) == {"least": 2, "most": 2, "evenness": pytest.approx(1)}
    assert subsets.balance(np.array([0, 0]), np.array([0, 2])) == {"least": 0, "most": 2, "evenness": pytest.approx(0)}


@pytest.fixture
def embedding(debug_config: Callable[..., Config]) -> Config:
    return debug_config("embed.image_size=32", "embed.device_batch=16", "resources.rows_per_task=7", "data.rows_per_shard=50")


def test_the_embed_stage_gives_what_its_encoder_gives(embedding: Config) -> None:
    plan = pipeline.run(embedding, "embed", say=lambda text: None)
    (node,) = plan.of("embed")
    found = tables.read(node.dir.parts())
    assert list(found.column_names) == list(schema.EMBEDDINGS) and len(node.dir.parts()) == 3
    rows, _ = units.decode_rows(tables.read(plan.of("manifest")[0].dir.parts()), embedding.data, embedding.storage)
    encoder = frozen.VisionEncoder("efficientnet-lite0", 32, torch.device("cpu"), 16)
    wanted = encoder.pooled(torch.from_numpy(units.pixels_of(rows))).numpy().astype(np.float16)
    assert found.column("sample_id").to_pylist() == rows.column("sample_id").to_pylist()
    np.testing.assert_array_equal(tables.tensor_values(found, "features"), wanted)
    assert not list(node.folder.glob("unfinished*")) and node.dir.success()["rows_done"] == 120
    assert not list(plan.folder.glob("scores-*")), "features need no scores"
