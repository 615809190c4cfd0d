"""What is held of tables of any length: a file at a time, and a sample where the driver would need all rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from d2c_ray import schema
from d2c_ray.data import tables
from d2c_ray.selection import difficulty
from d2c_ray.stages import score

LEVELS = 4


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three score parts of 1,000 rows, one of none and one of 500."""
    rng = np.random.default_rng(0)
    fields = tables.arrow_schema(schema.SCORES, lists=LEVELS)
    start = 0
    for number, rows in enumerate((1000, 1000, 0, 1000, 500)):
        ids = np.arange(start, start + rows)
        start += rows
        errors = pa.array((ids[:, None] % 7 + 1 + rng.random((rows, LEVELS))).astype(np.float32).ravel())
        columns = {
            "sample_id": ids, "key": [f"a#{row:06d}" for row in ids], "label": ids % 3, "score": np.zeros(rows), "shard": np.full(rows, number),
            "errors": pa.FixedSizeListArray.from_arrays(errors, LEVELS),
        }  # fmt: skip
        tables.write(tmp_path / f"part-{number:06d}.parquet", pa.table(columns).select(fields.names).cast(fields), {"device": "x"})
    return sorted(tmp_path.glob("part-*.parquet"))


@pytest.mark.parametrize("ids", [[], [0], [3499], [999, 1000, 2000, 2999, 3000], list(range(3500)), list(range(1, 3500, 11))])
def test_rows_of_some_images_are_those_that_a_filter_finds(parts: list[Path], ids: list[int]) -> None:
    everything = tables.read(parts)
    assert tables.rows_of(parts, np.asarray(ids, np.int64)).equals(everything.filter(pa.array(np.isin(np.arange(3500), ids))))


def test_stability_of_many_images_is_that_of_a_sample_of_them(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    t = np.linspace(0.1, 0.9, LEVELS)
    rows, whole = score.summarise(parts, t, "sit")
    monkeypatch.setattr(score, "STABILITY_ROWS", 1000)
    again, sampled = score.summarise(parts, t, "sit")
    assert rows == again == 3500
    assert {**sampled, "rank_stability": 0, "needed_timesteps": 0} == {**whole, "rank_stability": 0, "needed_timesteps": 0}
    table = tables.read(parts).filter(pa.array(np.arange(3500) % 4 == 0))
    errors = table.column("errors").combine_chunks().flatten().to_numpy().reshape(-1, LEVELS)
    halves = difficulty.half_scores(errors, t, "sit", "linear")
    assert sampled["rank_stability"] == difficulty.rank_stability(*halves, table.column("label").to_numpy())
    assert sampled["rank_stability"] != whole["rank_stability"]
    assert sampled["rank_stability"] == pytest.approx(whole["rank_stability"], abs=0.05)
