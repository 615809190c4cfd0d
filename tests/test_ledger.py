"""The shard ledger: killed between any two files it writes, it goes on with what is missing and nothing else."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from d2c_ray.data import ledger as ledgers
from d2c_ray.data import tables
from d2c_ray.data.ledger import Ledger
from d2c_ray.data.units import Shard
from d2c_ray.errors import UserError

SHARDS = [Shard(0, "m", 0, 10), Shard(1, "m", 1, 10), Shard(2, "m", 2, 4)]


def opened(out: Path) -> Ledger:
    out.mkdir(exist_ok=True)
    return Ledger(out, SHARDS, lambda table: table.sort_by("sample_id"), {"seed": 3})


def result(unit: dict) -> tuple[pa.Table, list[dict[str, str]]]:
    """Row 3 of every shard is rejected."""
    rows = [10 * unit["shard"] + row for row in range(unit["start"], unit["stop"])]
    good = [row for row in rows if row % 10 != 3]
    bad = [{"key": str(row), "uri": "", "reason": "broken"} for row in rows if row % 10 == 3]
    return pa.table({"sample_id": pa.array(good, pa.int64()), "score": np.float32(good) / 3}), bad


def work(ledger: Ledger, units: list[dict]) -> None:
    for unit in units:
        ledger.add(unit, *result(unit), "cpu x")


def whole(out: Path) -> tuple[list[int], list[str]]:
    parts = sorted(out.glob("part-*.parquet"))
    return tables.read(parts).column("sample_id").to_pylist(), [row["key"] for part in parts for row in tables.metadata(part)["rejected"]]


EXPECTED = ([row for row in range(24) if row % 10 != 3], ["3", "13", "23"])


@pytest.mark.parametrize("order", [1, -1])
def test_units_in_any_order_make_whole_shards(tmp_path: Path, order: int) -> None:
    ledger = opened(tmp_path / "t")
    units = ledger.todo(4)
    assert [(unit["shard"], unit["start"], unit["stop"]) for unit in units][:4] == [(0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4)]
    work(ledger, units[::order])
    ledger.close()
    assert whole(tmp_path / "t") == EXPECTED
    assert tables.metadata(ledger.part(1)) == {"seed": 3, "rejected": [{"key": "13", "uri": "", "reason": "broken"}], "device": "cpu x"}
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [f"part-00000{shard}.parquet" for shard in range(3)]


def test_a_resume_with_other_units_asks_for_what_is_missing_only(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "t")
    units = ledger.todo(3)
    work(ledger, [units[0], units[2], *units[4:6]])  # rows 0-3 and 6-9 of shard 0, 0-6 of shard 1
    ledger = opened(tmp_path / "t")
    assert ledger.rows_done == 12
    assert [row["key"] for row in ledger.rejected()] == ["13"]
    assert [(unit["shard"], unit["start"], unit["stop"]) for unit in ledger.todo(7)] == [(0, 3, 6), (0, 9, 10), (1, 6, 10), (2, 0, 4)]
    work(ledger, ledger.todo(7))
    ledger.close()
    assert whole(tmp_path / "t") == EXPECTED
    assert opened(tmp_path / "t").todo(1) == []


def test_units_are_asked_for_some_shards_at_a_time(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "t")
    turns = []
    while units := ledger.todo(4, 4):
        turns.append([unit["shard"] for unit in units])
        work(ledger, units)
    assert turns == [[0, 0, 0, 1, 1, 1], [2]]
    ledger.close()
    assert whole(tmp_path / "t") == EXPECTED


class Killed(BaseException):
    pass


@pytest.mark.parametrize("turn", range(24))
def test_killed_at_any_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """Dies before its nth write or removal; what had been kept is asked for no second time, and the table is the same."""
    count = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == turn + 1:
                raise Killed
            return function(*args, **kwargs)

        return call

    ledger = opened(tmp_path / "t")
    kept: list[tuple[int, int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write", deadly(tables.write))
        patch.setattr(Path, "unlink", deadly(Path.unlink))
        try:
            for unit in ledger.todo(4):
                ledger.add(unit, *result(unit), "cpu x")
                kept.append((unit["shard"], unit["start"], unit["stop"]))
        except Killed:
            pass
        else:
            assert count <= turn, "every turn must kill"
    ledger = opened(tmp_path / "t")
    again = [(unit["shard"], unit["start"], unit["stop"]) for unit in ledger.todo(4)]
    assert not set(again) & set(kept)
    work(ledger, ledger.todo(4))
    ledger.close()
    assert whole(tmp_path / "t") == EXPECTED
    assert not list((tmp_path / "t").glob(".*"))


def test_half_a_file_is_swept_away(tmp_path: Path) -> None:
    opened(tmp_path / "t")
    folder = tmp_path / "t" / "unfinished"
    folder.mkdir()
    (folder / ".000000-000000-000004.parquet.abc").write_bytes(b"half")
    (tmp_path / "t" / ".part-000000.parquet.xyz").write_bytes(b"half")
    ledger = opened(tmp_path / "t")
    assert not list(folder.iterdir())
    assert not list((tmp_path / "t").glob(".*"))
    assert ledger.rows_done == 0


@pytest.mark.parametrize("left", [0, 300], ids=["empty", "half"])
def test_a_part_that_a_power_cut_left_cut_off_is_made_again(tmp_path: Path, left: int) -> None:
    """A rename may reach the disk before what the file holds."""
    ledger = opened(tmp_path / "t")
    units = ledger.todo(4)
    work(ledger, units[:4])  # the first shard and a run of the second
    (run,) = (tmp_path / "t" / "unfinished").iterdir()
    for path in (ledger.part(0), run):
        path.write_bytes(path.read_bytes()[:left])
    ledger = opened(tmp_path / "t")
    assert ledger.rows_done == 0 and ledger.rejected() == [] and len(ledger.todo(4)) == len(units)
    work(ledger, ledger.todo(4))
    ledger.close()
    assert whole(tmp_path / "t") == EXPECTED


def test_what_was_rejected_is_asked_for_again_where_it_ended_the_last_attempt(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "t")
    units = ledger.todo(4)
    work(ledger, [*units[:3], *units[3:5]])  # shard 0, and rows 0-8 of shard 1 in two runs; row 3 of both is rejected
    ledger = opened(tmp_path / "t")
    ledger.forget_rejected()
    assert ledger.rejected() == [] and ledger.rows_done == 4
    again = [(unit["shard"], unit["start"], unit["stop"]) for unit in ledger.todo(10)]
    assert again == [(0, 0, 10), (1, 0, 4), (1, 8, 10), (2, 0, 4)]
    work(ledger, ledger.todo(10))
    ledger.close()
    assert whole(tmp_path / "t") == EXPECTED


def test_rows_that_never_came_are_no_finished_table(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "t")
    work(ledger, ledger.todo(4)[1:])
    with pytest.raises(RuntimeError, match="4 rows of 3 shards never came back"):
        ledger.close()


def test_one_table_is_made_on_one_kind_of_hardware(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "t")
    first, second, *_ = ledger.todo(4)
    work(ledger, [first])
    with pytest.raises(UserError, match="was begun on cpu x, and this result comes from H200"):
        opened(tmp_path / "t").add(second, *result(second), "H200")
    assert ledgers.Ledger(tmp_path / "t", SHARDS, lambda table: table, {}).device == "cpu x"
