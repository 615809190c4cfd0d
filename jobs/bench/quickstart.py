"""The quickstart as a user runs it: seconds, memory, a rerun, and whether its digits are digits.

    python jobs/bench/quickstart.py [--quick] [--runs N]

Runs `d2c run configs/quickstart.yaml` twice into fresh folders, then once more into the second; --quick does the same once
with configs/debug.yaml. Memory is the largest sum over the process tree of proportional set sizes, read every second.
Digits are judged by a logistic regression on the pixels of real digits, of which a fifth is held out to judge the judge.
The last line is one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # select.py there would hide Python's own

import argparse
import io
import json
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def run(config: Path, folder: Path) -> tuple[float, float]:
    """Seconds and peak GiB of one `d2c run` into `folder`."""
    start, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "d2c_ray.cli", "run", str(config), f"run.dir={folder}"]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(1.0)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text()[-3000:]}")
    return seconds, peak / 2**30


def tree_bytes(pid: int) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()  # one line a process; the full map costs a tenth of a core
                total += 1024 * int(rollup.split("\nPss:")[1].split()[0])
    return total


def label_agreement(run_folder: Path) -> tuple[dict[str, float], float]:
    """Share of each student's images whose digit a probe reads as the one asked, and the probe's own accuracy."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    pixels, labels = digits.images.reshape(len(digits.images), -1) / 16, digits.target
    held_out = np.arange(len(labels)) % 5 == 0
    probe = LogisticRegression(C=0.1, max_iter=2000).fit(pixels[~held_out], labels[~held_out])
    arms = json.loads((run_folder / "plan.json").read_text())["arms"]
    found = {}
    for arm, stages in arms.items():
        asked, read = [], []
        for part in sorted((run_folder / stages["sample"]).glob("part-*.parquet")):
            table = pq.read_table(part)
            asked += table.column("label").to_pylist()
            images = [np.asarray(Image.open(io.BytesIO(image)), np.float64) for image in table.column("image").to_pylist()]
            read += probe.predict(np.stack(images).reshape(len(images), -1) / 255).tolist()
        found[arm] = float(np.mean(np.array(asked) == np.array(read)))
    return found, float(probe.score(pixels[held_out], labels[held_out]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of configs/debug.yaml")
    parser.add_argument("--runs", type=int, default=2, help="fresh runs, of which the fastest counts")
    arguments = parser.parse_args()
    quick = arguments.quick
    config = ROOT / "configs" / ("debug.yaml" if quick else "quickstart.yaml")
    seconds, peaks = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for index in range(1 if quick else arguments.runs):
            folder = Path(temporary) / str(index)
            folder.mkdir()
            taken, peak = run(config, folder)
            seconds.append(round(taken, 1))
            peaks.append(round(peak, 2))
            print(f"run {index + 1}: {taken:.1f} s, peak {peak:.2f} GiB", flush=True)
        again, _ = run(config, folder)
        print(f"rerun: {again:.1f} s")
        agreement, accuracy = label_agreement(folder / config.stem)
        for arm, share in agreement.items():
            print(f"{arm}: {share:.1%} of the digits read as asked")
        print(f"the probe reads {accuracy:.1%} of held-out real digits")
    figures = {
        "config": config.stem, "seconds": min(seconds), "all_seconds": seconds, "peak_gib": max(peaks), "rerun_seconds": round(again, 1),
        "label_agreement": min(agreement.values()), "label_agreement_by_arm": agreement, "probe_accuracy": accuracy, "cpus": psutil.cpu_count(),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
