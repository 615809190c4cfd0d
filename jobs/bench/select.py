"""Selection from score files to the selection's files: how long it takes, and in how much memory.

    python jobs/bench/select.py [--quick] [--only interval,large]

interval  1.28M scores of 1,000 classes in 313 parts, against DuckDB doing the same from the same files
large     100M scores (--quick: 4M) as partitions on Ray: seconds, and the memory of the driver, Ray and its object store

Two threads. The last line is one JSON object.
"""

import os
import sys

sys.path.remove(os.path.dirname(os.path.realpath(__file__)))  # this file would hide Python's own select

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import psutil
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import ResourcesConfig, SelectConfig
from d2c_ray.data import tables
from d2c_ray.distributed import cluster
from d2c_ray.stages.select import select

CLASSES, STEPS, THREADS = 1000, 16, 2
SETTINGS = SelectConfig(budget=10_000, f=0.75)


def write_scores(folder: Path, rows: int, rows_per_part: int) -> list[Path]:
    """Score parts as the score stage writes them, labels in the order of class folders shuffled."""
    rng = np.random.default_rng(0)
    fields = tables.arrow_schema(schema.SCORES, lists=STEPS)
    errors = pa.array(rng.gamma(4, 0.05, STEPS * rows_per_part).astype(np.float32))
    for part, start in enumerate(range(0, rows, rows_per_part)):
        ids = np.arange(start, min(rows, start + rows_per_part))
        columns = {
            "sample_id": ids, "key": [f"train-{row // 10_000:05d}.tar#{row:012d}.jpg" for row in ids.tolist()],
            "label": rng.integers(0, CLASSES, len(ids), np.int32), "score": rng.gamma(4, 0.05, len(ids)).astype(np.float32),
            "errors": pa.FixedSizeListArray.from_arrays(errors[: STEPS * len(ids)], STEPS), "shard": np.full(len(ids), part, np.int32),
        }  # fmt: skip
        tables.write(folder / f"part-{part:06d}.parquet", pa.table(columns).select(fields.names).cast(fields), {})
    return sorted(folder.glob("part-*.parquet"))


def with_duckdb(scores: Path, out: Path) -> None:
    """Ranks and class sizes by window functions; floor(i f N / n) in integers, for quotas that are all the same."""
    quota = int(SETTINGS.budget) // CLASSES
    connection = duckdb.connect()
    connection.execute(f"SET threads = {THREADS}")
    connection.execute(
        f"""
        COPY (
            WITH ranked AS (
                SELECT sample_id, key, label, score, row_number() OVER (PARTITION BY label ORDER BY score, sample_id) - 1 AS rank,
                       count(*) OVER (PARTITION BY label) AS class_size
                FROM read_parquet('{scores}/part-*.parquet')
            ), steps AS (SELECT range AS position FROM range({quota}))
            SELECT sample_id, key, label, score, rank, class_size, position::INTEGER AS position
            FROM ranked JOIN steps ON rank = position * 3 * class_size // (4 * {quota})
            ORDER BY sample_id
        ) TO '{out}' (FORMAT parquet, COMPRESSION zstd)
        """
    )
    connection.close()


def bench_interval(root: Path, quick: bool) -> dict:
    """Turn by turn, the files in the page cache."""
    parts = write_scores(root / "interval", 1_280_000, 4096)
    out = root / "chosen"
    taken: dict[str, list[float]] = {"ours": [], "duckdb": []}
    for turn in range(4 if quick else 10):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        start = time.perf_counter()
        select(parts, [f"class {label}" for label in range(CLASSES)], SETTINGS, out)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        with_duckdb(root / "interval", out / "duckdb.parquet")
        theirs = time.perf_counter() - start
        if turn:  # the first warms up
            taken["ours"].append(ours)
            taken["duckdb"].append(theirs)
    mine = tables.read(sorted(out.glob("part-*.parquet")))
    other = tables.read(out / "duckdb.parquet").select(mine.schema.names).cast(mine.schema)
    assert mine.replace_schema_metadata(None).equals(other.replace_schema_metadata(None)), "DuckDB chose other rows"
    shutil.rmtree(root / "interval")
    median = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "interval_1280k_seconds": median["ours"], "interval_1280k_duckdb_seconds": median["duckdb"],
        "interval_speedup_over_duckdb": median["duckdb"] / median["ours"], "interval_rows_equal": True,
        "interval_1280k_each": {name: [round(value, 3) for value in values] for name, values in taken.items()},
    }  # fmt: skip


class Memory:
    """The largest memory of this process and all it started, shared pages counted once; sampled every half second.

    The object store's pages are counted where they lie: those that no process has mapped just now are in none's share.
    """

    def __init__(self) -> None:
        self.peak, self._done, self._before = 0, threading.Event(), shutil.disk_usage("/dev/shm").used
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.5):
            total = shutil.disk_usage("/dev/shm").used - self._before
            for process in (me, *me.children(recursive=True)):
                with suppress(psutil.Error, OSError):
                    shares = dict(line.split(":") for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:])
                    total += 1024 * (int(shares["Pss"].split()[0]) - int(shares["Pss_Shmem"].split()[0]))
            self.peak = max(self.peak, total)


def bench_large(root: Path, quick: bool) -> dict:
    """As many partitions as the default gives 100M rows, or four."""
    rows, limit, rows_per_part = (4_000_000, 1_000_000, 65_536) if quick else (100_000_000, ResourcesConfig().rows_per_partition, 65_536)
    parts = write_scores(root / "large", rows, rows_per_part)
    (root / "chosen_large").mkdir()
    options = SelectConfig(budget=0.008, f=0.75)
    notes: list[tuple[str, float]] = []
    with Memory() as memory:
        start = time.perf_counter()
        cluster.connect(ResourcesConfig())
        begun = time.perf_counter() - start
        names = [f"class {label}" for label in range(CLASSES)]

        def say(text: str) -> None:
            notes.append((text.split(" ")[0], time.perf_counter() - start))

        _, facts = select(parts, names, options, root / "chosen_large", "", limit, rows_per_part, say)
        taken = time.perf_counter() - start
        time.sleep(0.6)
    cluster.disconnect()
    shutil.rmtree(root / "large")
    return {
        "interval_100m_seconds": None if quick else taken, "interval_100m_peak_gib": None if quick else memory.peak / 2**30,
        "large_rows": rows, "large_seconds": taken, "large_peak_gib": memory.peak / 2**30, "large_rows_per_partition": limit,
        "large_chosen": facts["images"], "large_ray_start_seconds": begun, "large_done_at_seconds": {word: round(at, 1) for word, at in notes},
    }  # fmt: skip


PARTS = {"interval": bench_interval, "large": bench_large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    pa.set_cpu_count(THREADS)
    chosen = [name for name in PARTS if name in arguments.only.split(",")]
    figures: dict = {"quick": arguments.quick, "cores": len(os.sched_getaffinity(0)), "numpy": np.__version__, "duckdb": duckdb.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            found = PARTS[name](Path(folder), arguments.quick)
            figures |= found
            for key, value in found.items():
                print(f"{name:<10} {key:<46} {value:.4g}" if isinstance(value, float) else f"{name:<10} {key:<46} {value}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
