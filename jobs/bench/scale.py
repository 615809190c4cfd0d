"""What a large dataset takes outside of the models: manifest, score table, selection, made for real at 1M and 10M images.

    python jobs/bench/scale.py [--quick]

source     Parquet files of 100,000 images of a pixel each, 1,000 classes; not measured
manifest   the plan with the source's fingerprint, the stage itself, and the same command again
bytes      the mean bytes of an image, for which `d2c plan` reads the finished manifest (of Parquet none are known, and its first part says so)
scores     the shard ledger fed with made-up errors, a shard a time: 16 levels an image, no Ray and no model
again      the ledger opened once more, as by the same command, and what the finished table says of itself
select     1 % by `interval`, from the score parts to the selection
chosen     the manifest's rows of these, which attach begins with

Each size is a process of its own, which is the driver: seconds, its largest memory in each part beyond what it had before the first,
bytes and files on disk. The slope between both sizes is what the README extrapolates with. The last line is one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # select.py there would hide Python's own

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from d2c_ray import forecast, pipeline, plan, schema
from d2c_ray.config import SelectConfig, from_dict
from d2c_ray.data import tables
from d2c_ray.data.decode import encode_png
from d2c_ray.data.ledger import Ledger
from d2c_ray.data.units import read_rows, shards
from d2c_ray.distributed.score import _finish
from d2c_ray.selection import difficulty
from d2c_ray.stages.score import summarise
from d2c_ray.stages.select import select

CLASSES, LEVELS, ROWS_A_FILE, THREADS = 1000, 16, 100_000, 2
SIZES, QUICK = (1_000_000, 10_000_000), (100_000, 500_000)
PARTS = ("plan", "manifest", "again", "bytes", "scores", "reopened", "summary", "select", "chosen")
DISKS = ("source", "manifest", "scores", "selection")


def write_source(folder: Path, rows: int) -> None:
    """As dataset hubs have it: an image column of encoded bytes, a label column."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    dots = pa.array([encode_png(np.full((1, 1, 1), level, np.uint8)) for level in range(256)], pa.binary())
    for number, start in enumerate(range(0, rows, ROWS_A_FILE)):
        count = min(ROWS_A_FILE, rows - start)
        images = pa.DictionaryArray.from_arrays(pa.array(rng.integers(0, 256, count, np.int32)), dots)
        table = pa.table({"image": images, "label": rng.integers(0, CLASSES, count)})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=10_000, store_schema=False)


def disk(folder: Path) -> dict[str, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"bytes": sum(sizes), "files": len(sizes)}


def drive(root: Path, rows: int) -> None:
    """One size; prints its figures."""
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    before = psutil.Process().memory_info().rss

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        memory[name] = (peak - before) / 2**20

    config = from_dict(
        {
            "run": {"dir": str(root), "name": "scale"}, "data": {"path": str(root / "source"), "image_size": 8, "channels": 1},
            "score": {"num_timesteps": LEVELS}, "resources": {"progress_interval_sec": 3600.0},
        }
    )  # fmt: skip
    with timed("plan"):
        plan.make(config, "manifest")
    with timed("manifest"):
        (node,) = pipeline.run(config, "manifest", say=lambda text: None).of("manifest")
    with timed("again"):
        pipeline.run(config, "manifest", say=lambda text: None)
    with timed("bytes"):
        forecast._manifest(plan.make(config, "manifest"))
    facts = node.dir.success()["facts"]
    assert facts["rows"] == rows and len(facts["class_names"]) == CLASSES
    out = root / "scores"
    out.mkdir()
    t = difficulty.timesteps("sit", LEVELS, 0.0, 1.0).numpy()
    finish = partial(_finish, t=t, kind="sit", path="linear")
    rng = np.random.default_rng(0)
    with timed("scores"):
        ledger = Ledger(out, shards(node.dir.parts()), finish, {"timesteps": t.tolist()})
        while work := ledger.todo(config.data.rows_per_shard, 65_536):
            for unit in work:
                table = read_rows(unit).select(["sample_id", "key", "label", "shard"])
                errors = pa.FixedSizeListArray.from_arrays(pa.array(rng.gamma(4, 0.05, LEVELS * len(table)).astype(np.float32)), LEVELS)
                ledger.add(unit, table.append_column("errors", errors), [], "none")
        ledger.close()
    with timed("reopened"):
        ledger = Ledger(out, shards(node.dir.parts()), finish, {})
        assert ledger.rows_done == rows and not ledger.todo(config.data.rows_per_shard, 1) and not ledger.rejected()
    parts = sorted(out.glob("part-*.parquet"))
    with timed("summary"):
        found, _ = summarise(parts, t, "sit")
        assert found == rows
    chosen = root / "selection"
    chosen.mkdir()
    with timed("select"):
        _, said = select(parts, facts["class_names"], SelectConfig(budget=0.01, f=0.75), chosen)
    assert said["images"] == rows // 100 and tables.columns(next(chosen.glob("part-*.parquet"))) == list(schema.SELECTION)
    with timed("chosen"):
        ids = tables.read(sorted(chosen.glob("part-*.parquet")), ["sample_id"]).column("sample_id").to_numpy()
        assert len(tables.rows_of(node.dir.parts(), ids)) == len(ids)
    on_disk = {name: disk(folder) for name, folder in zip(DISKS, (root / "source", node.folder, out, chosen), strict=True)}
    print(json.dumps({"rows": rows, "seconds": seconds, "mib": memory, "disk": on_disk}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 and 500,000 images")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        pa.set_cpu_count(THREADS)
        drive(arguments.drive, arguments.rows)
        return
    found = []
    for rows in QUICK if arguments.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_source(Path(folder) / "source", rows)
            done = subprocess.run([sys.executable, __file__, "--drive", folder, "--rows", str(rows)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    small, large = found
    more = large["rows"] - small["rows"]

    def slope(key: str, name: str, inner: str = "") -> float:
        """What a million images more take."""
        values = [(size[key][name][inner] if inner else size[key][name]) for size in found]
        return (values[1] - values[0]) / more * 1e6

    print(f"{'':<10} {small['rows']:>14,} {large['rows']:>14,} {'a million more':>16}")
    for key, unit in (("seconds", "s"), ("mib", "MiB")):
        for name in PARTS:
            print(f"{name:<10} {small[key][name]:>12.2f} {unit} {large[key][name]:>12.2f} {unit} {slope(key, name):>14.3f} {unit}")
    for name in DISKS:
        for inner in ("bytes", "files"):
            each = slope("disk", name, inner)
            print(f"{name:<10} {small['disk'][name][inner]:>14,} {large['disk'][name][inner]:>14,} {each:>14,.1f} {inner}")
    slopes: dict[str, Any] = {key: {name: slope(key, name) for name in PARTS} for key in ("seconds", "mib")}
    slopes["disk"] = {name: {inner: slope("disk", name, inner) for inner in ("bytes", "files")} for name in DISKS}
    versions = {name: version(name) for name in ("numpy", "pyarrow", "ray")}
    print(
        json.dumps({"quick": arguments.quick, "cores": len(os.sched_getaffinity(0)), **versions, "sizes": found, "a_million_more": slopes})
    )


if __name__ == "__main__":
    main()
