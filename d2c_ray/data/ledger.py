"""The shard ledger of a score table: what is finished, row by row, so that nothing finished is read again.

    scores-<hash>/
      part-000012.parquet                      a finished shard
      unfinished/000013-000256-000512.parquet  rows 256 to 511 of a shard that is not finished yet

One process writes it. Every file appears whole, so that it can be killed at any moment: a run of rows is there or not,
and what is lost is what had not come back yet.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from d2c_ray.data import tables
from d2c_ray.data.units import Shard, cut
from d2c_ray.errors import UserError

_RUN = re.compile(r"(\d+)-(\d+)-(\d+)\.parquet")
Finish = Callable[[pa.Table], pa.Table]


class Ledger:
    """What of a table over manifest shards is there.

    Args:
        out: the table's folder.
        shards: all shards of the manifest.
        finish: makes a shard's final table of its rows in order.
        metadata: stored in every finished part, with the `rejected` rows of the shard and the `device` it was made on.

    Attributes:
        rows_done: rows that are there, rejected ones included.
    """

    def __init__(self, out: Path, shards: list[Shard], finish: Finish, metadata: dict[str, Any]):
        self.out, self._finish, self._metadata = out, finish, metadata
        self._unfinished = out / "unfinished"
        self._shards = {shard.number: shard for shard in shards}
        self._runs: dict[int, list[tuple[int, int]]] = {}  # of shards that are not whole
        self.device = ""
        for folder in (out, self._unfinished):
            for path in folder.glob(".*.parquet.*"):  # what a killed process was writing
                path.unlink(missing_ok=True)
        for path in (*out.glob("part-*.parquet"), *self._unfinished.glob("*.parquet")):
            if not tables.is_whole(path):  # a power cut: the file's name reached the disk before its content
                path.unlink()
        self._whole = {shard.number for shard in shards if self.part(shard.number).is_file()}
        for path in sorted(self._unfinished.glob("*.parquet")):
            match = _RUN.fullmatch(path.name)
            shard, start, stop = (int(digits) for digits in match.groups()) if match else (-1, 0, 0)
            if shard in self._whole or shard not in self._shards:
                path.unlink()  # killed between the part and its runs
            else:
                self._runs.setdefault(shard, []).append((start, stop))
        for shard in list(self._runs):
            self._close(shard)  # killed between the last run and the part
        some = next((self.part(shard) for shard in self._whole), None) or next(iter(sorted(self._unfinished.glob("*.parquet"))), None)
        if some is not None:
            self.device = tables.metadata(some)["device"]
        self.rows_done = sum(self._shards[shard].rows for shard in self._whole) + sum(
            stop - start for runs in self._runs.values() for start, stop in runs
        )

    def part(self, shard: int) -> Path:
        """Where a finished shard lies."""
        return self.out / f"part-{shard:06d}.parquet"

    def todo(self, rows_per_unit: int, most: int = 0) -> list[dict[str, Any]]:
        """Units that cover the rows that are not there, those of the first shards where `most` (0: all) do not cover them all."""
        return cut((shard for shard in self._shards.values() if shard.number not in self._whole), rows_per_unit, self._runs, most)

    def rejected(self) -> list[dict[str, str]]:
        """The rejected rows of all that is there."""
        paths = [self.part(shard) for shard in sorted(self._whole)] + sorted(self._unfinished.glob("*.parquet"))
        return [row for path in paths for row in tables.metadata(path)["rejected"]]

    def forget_rejected(self) -> None:
        """Removes what holds rejected rows, so that `todo` asks for it again: they may have been mended since."""
        for shard in [shard for shard in self._whole if tables.metadata(self.part(shard))["rejected"]]:
            self.part(shard).unlink()
            self._whole.remove(shard)
            self.rows_done -= self._shards[shard].rows
        for shard, runs in self._runs.items():
            for start, stop in [run for run in runs if tables.metadata(self._run(shard, *run))["rejected"]]:
                self._run(shard, start, stop).unlink()
                runs.remove((start, stop))
                self.rows_done -= stop - start

    def add(self, unit: dict[str, Any], table: pa.Table, rejected: list[dict[str, str]], device: str) -> None:
        """Keeps the result of a unit, and writes its shard's part if it is the last that was missing.

        Raises:
            UserError: made on other hardware than what is there; bits hold for one kind.
        """
        self.device = self.device or device
        if device != self.device:
            raise UserError(
                f"'{self.out}' was begun on {self.device}, and this result comes from {device}: one table is made on one kind of hardware, "
                "since the last bits of a score differ between kinds. Go on where it was begun, or move the folder away to begin anew."
            )
        shard, start, stop = unit["shard"], unit["start"], unit["stop"]
        tables.write(self._run(shard, start, stop), table, {"rejected": rejected, "device": device})
        self._runs.setdefault(shard, []).append((start, stop))
        self.rows_done += stop - start
        self._close(shard)

    def close(self) -> None:
        """Ends the ledger of a whole table.

        Raises:
            RuntimeError: rows are missing.
        """
        missing = sum(unit["stop"] - unit["start"] for unit in self.todo(1 << 30))
        if missing:
            raise RuntimeError(f"{self.out}: {missing} rows of {len(self._shards)} shards never came back")
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def _run(self, shard: int, start: int, stop: int) -> Path:
        return self._unfinished / f"{shard:06d}-{start:06d}-{stop:06d}.parquet"

    def _close(self, number: int) -> None:
        runs, shard = sorted(self._runs[number]), self._shards[number]
        if sum(stop - start for start, stop in runs) < shard.rows:
            return
        paths = [self._run(number, start, stop) for start, stop in runs]
        rejected = [row for path in paths for row in tables.metadata(path)["rejected"]]
        device = tables.metadata(paths[0])["device"]
        table = self._finish(tables.read(paths).replace_schema_metadata(None))
        tables.write(self.part(number), table, {**self._metadata, "rejected": rejected, "device": device})
        self._whole.add(number)
        del self._runs[number]
        for path in paths:
            path.unlink()
