"""Selection from score files to the selection's files: how long it takes, and in how much memory.

    python jobs/bench/select.py [--quick] [--only interval,large,gadc,geometry]

interval  1.28M scores of 1,000 classes in 313 parts, against DuckDB doing the same from the same files
large     100M scores (--quick: 4M) as partitions on Ray: seconds, and the memory of the driver, Ray and its object store

gadc      10 images of a class of 500 and of one of 1,300, and 50 and 100 of the latter, against the plain search
geometry  herding and k-center, 100 of 1,300 x 2,048, against the plain double loops

gadc's classes are reference cases where those are at hand (NAME.npz: features, ce, objective_refined, seconds_greedy and
seconds_refine of the published search), else random correlated features without recorded figures; `gadc_features` says.

Two threads, gadc and geometry one. The last line is one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # this file would hide Python's own

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import torch

from d2c_ray import schema
from d2c_ray.config import ResourcesConfig, SelectConfig, TransportConfig
from d2c_ray.data import tables
from d2c_ray.distributed import cluster
from d2c_ray.selection import transport
from d2c_ray.selection.geometry import herding, k_center
from d2c_ray.stages.select import select

CLASSES, STEPS, THREADS = 1000, 16, 2
SETTINGS = SelectConfig(budget=10_000, f=0.75)
OPTIONS = TransportConfig()
CASES = ("cat_500", "ship_1300")
RUNS = 3  # of what takes a second; the median counts
REFERENCES = Path(__file__).resolve().parents[3] / "shared" / "data" / "gadc"  # where there are some


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


def random_features(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Skewed, correlated, in clusters, as pooled activations are; the median squared distance is some 200."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(64, width))
    y = np.maximum((rng.normal(size=(count, 64)) + rng.normal(size=(8, 64))[rng.integers(0, 8, count)]) @ mix, 0)
    return (y * np.sqrt(200 / np.median(np.square(y[:200, None] - y[None, :200]).sum(2)))).astype(np.float32)


def cases(root: Path, quick: bool) -> dict[str, dict[str, np.ndarray]]:
    names = CASES[:1] if quick else CASES
    if all((root / f"{name}.npz").is_file() for name in names):
        return {name: dict(np.load(root / f"{name}.npz")) for name in names}
    sizes = (500,) if quick else (500, 1300)
    rng = np.random.default_rng(1)
    return {f"random_{n}": {"features": random_features(n, 1280), "ce": rng.exponential(size=n).astype(np.float32) * 0.01} for n in sizes}


def plain_objectives(y: torch.Tensor, ce: torch.Tensor, sets: torch.Tensor, median: float) -> torch.Tensor:
    """The objective of a batch of sets, p x m, as it is published: every set's distances anew, float32."""
    chosen, n, m = y[sets], len(y), sets.shape[1]
    cost = torch.cdist(chosen, y.expand(len(sets), -1, -1)).square()
    full = torch.cat([cost, torch.full((len(sets), 1, n), OPTIONS.gamma * median)], 1)
    kernel = torch.exp(-full / (OPTIONS.epsilon * median))
    source = torch.cat([torch.full((m,), 1 / m), torch.tensor([OPTIONS.kappa - 1])])
    u, v = torch.ones(len(sets), m + 1), torch.ones(len(sets), n)
    for _ in range(OPTIONS.iterations):
        u = source / (kernel @ v[:, :, None])[:, :, 0]
        v = OPTIONS.kappa / n / (u[:, None] @ kernel)[:, 0]
    moved = ((u[:, :, None] * kernel * v[:, None])[:, :-1] * cost).sum((1, 2))
    mean, sd = chosen.mean(1) - y.mean(0), chosen.std(1) - y.std(0)
    moments = OPTIONS.mean_weight * mean.square().sum(1) + sd.square().sum(1)
    return moved + OPTIONS.statistics * moments + OPTIONS.confidence * median * ce[sets].mean(1)


def bench_gadc(_: Path, quick: bool) -> dict[str, Any]:
    """10 images of a class of 500 and of one of 1,300, and 50 and 100 of the latter.

    The plain search's time in the same run is its time for a slice of sets, times the sets that it would look at:
    every insertion, and every swap for each one accepted and once more.
    """
    found: dict[str, Any] = {}
    ratios, speedups, same = [], [], []
    given = cases(REFERENCES, quick)
    found["gadc_features"] = "real" if next(iter(given)) in CASES else "random"
    for name, case in given.items():
        y, ce = case["features"].astype(np.float32), case["ce"].astype(np.float32)
        n, rows = len(y), np.empty(0, np.int64)
        processor = time.process_time()
        runs = [transport.gadc(y, ce, 10, OPTIONS) for _ in range(RUNS)]
        found[f"gadc_{name}_processor_seconds"] = (time.process_time() - processor) / RUNS
        rows, facts = sorted(runs, key=lambda run: run[1]["seconds"])[RUNS // 2]
        found[f"gadc_{name}_seconds"], found[f"gadc_{name}_objective"] = facts["seconds"], facts["objective"]
        if "seconds_refine" in case:
            speedups.append(float(case["seconds_greedy"] + case["seconds_refine"]) / facts["seconds"])
            ratios.append(facts["objective"] / float(case["objective_refined"]))
        rng = np.random.default_rng(0)
        others = rng.permutation(np.setdiff1d(np.arange(n), rows))[: 64 if quick else 256]
        sets = torch.from_numpy(np.stack([np.append(rows[:9], other) for other in others]))
        started = time.perf_counter()
        values = torch.cat([plain_objectives(torch.from_numpy(y), torch.from_numpy(ce), part, facts["median"]) for part in sets.split(64)])
        each = (time.perf_counter() - started) / len(sets)
        problem = transport.prepare(y, ce, OPTIONS)
        ours = torch.tensor([transport.objective(problem, chosen).total for chosen in sets[:16]])
        found[f"gadc_{name}_evaluator_difference"] = float((values[:16] / ours - 1).abs().max())
        found[f"gadc_{name}_plain_seconds_256_sets"] = 256 * each
        looked = sum(n - k for k in range(10)) + (facts["swaps"] + 1) * 10 * (n - 10)
        same.append(looked * each / facts["seconds"])
    found |= {"gadc_speedup": min(speedups, default=None), "gadc_objective_ratio": max(ratios, default=None)}
    found["gadc_speedup_same_run"] = min(same)
    for count in (50, 100):
        facts = transport.gadc(y, ce, count, OPTIONS)[1]
        found |= {f"gadc_{count}_seconds": facts["seconds"], f"gadc_{count}_objective": facts["objective"]}
        found |= {
            f"gadc_{count}_gain_over_greedy": 1 - facts["objective"] / facts["greedy_objective"],
            f"gadc_{count}_swaps": facts["swaps"],
        }
    return found


def plain_herding(y: np.ndarray, count: int) -> list[int]:
    mean, total = y.mean(0), np.zeros_like(y[0])
    rows: list[int] = []
    for k in range(1, count + 1):
        gaps = np.linalg.norm(mean - (total + y) / k, axis=1)
        gaps[rows] = np.inf
        rows.append(int(gaps.argmin()))
        total = total + y[rows[-1]]
    return rows


def plain_k_center(y: np.ndarray, count: int) -> list[int]:
    rows = [int(np.linalg.norm(y - y.mean(0), axis=1).argmin())]
    nearest = np.full(len(y), np.inf)
    while len(rows) < count:
        nearest = np.minimum(nearest, np.linalg.norm(y - y[rows[-1]], axis=1))
        rows.append(int(nearest.argmax()))
    return rows


def bench_geometry(_: Path, quick: bool) -> dict[str, Any]:
    """100 of 1,300 x 2,048 random features, both ways in float64: seconds and whether the picks agree."""
    y = random_features(300 if quick else 1300, 2048)
    found: dict[str, Any] = {}
    for name, ours, plain in (("herding", herding, plain_herding), ("kcenter", k_center, plain_k_center)):
        seconds = []
        for _run in range(RUNS):
            started = time.perf_counter()
            rows = ours(y, 100)
            seconds.append(time.perf_counter() - started)
        found[f"{name}_seconds"] = statistics.median(seconds)
        started = time.perf_counter()
        expected = plain(y.astype(np.float64), 100)
        found[f"{name}_plain_seconds"] = time.perf_counter() - started
        found[f"{name}_same_picks"] = rows.tolist() == expected
    return found


PARTS = {"interval": bench_interval, "large": bench_large, "gadc": bench_gadc, "geometry": bench_geometry}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    pa.set_cpu_count(THREADS)
    torch.set_num_threads(1)
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
