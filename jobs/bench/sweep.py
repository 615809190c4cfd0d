"""What a sweep adds to its trials: its wall time against that of the same students trained by hand, one command after the other.

    python jobs/bench/sweep.py [--quick]

Both begin with what students share made (teacher, scores, selections, attachments, reference), in a run folder of their own, and
have the same cores. By hand is `d2c evaluate` for each trial's own configuration, the shortest way to the same numbers.
overhead_share is the sweep's seconds over those by hand, minus 1: below 0 where trials run side by side. The sweep is also run once
more with one trial at a time, which leaves what Tune and the sweep's own work cost. --quick: 4 trials of 12. The last line is
one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # select.py there would hide Python's own

import argparse
import json
import math
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/sweep_digits.yaml"
SMALL = ["teacher.train.num_images=6400", "train.num_images=6400", "sample.num_images=100"]


def d2c(folder: Path, *words: str) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    with (folder / "log").open("a") as log:
        done = subprocess.run([sys.executable, "-m", "d2c_ray.cli", *words], cwd=ROOT, stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"d2c {' '.join(words)} failed:\n{(folder / 'log').read_text()[-3000:]}")
    return time.perf_counter() - start


def prepared(root: Path, sweep: list[str]) -> dict[str, Path]:
    """Run folders in which what trials share is finished, made once: what a sweep does before its first trial."""
    from d2c_ray import pipeline
    from d2c_ray import sweep as sweeps
    from d2c_ray.config import load

    folder = root / "sweep"
    folder.mkdir()
    made = sweeps.make(load(ROOT / CONFIG, [*SMALL, *sweep, f"run.dir={folder}"]))
    status = pipeline.Status(made.plan, record=False)
    pipeline.run_all(made.plan.of("manifest"), 1, status, lambda text: None)
    with pipeline.connected(made.config, [], status, lambda text: None) as slots:
        sweeps.share(made, slots, status, lambda text: None)
    folders = {name: root / name for name in ("sweep", "one", "hand")}
    for other in list(folders.values())[1:]:
        shutil.copytree(folder, other)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 trials instead of 12")
    quick = parser.parse_args().quick
    from d2c_ray import sweep as sweeps
    from d2c_ray.config import load, to_yaml
    from d2c_ray.report import outcomes

    sweep = ["sweep.random_twins=false", f"sweep.seeds={[0] if quick else [0, 1, 2]}"]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = prepared(root, sweep)
        trials = sweeps.make(load(ROOT / CONFIG, [*SMALL, *sweep, f"run.dir={folders['hand']}"])).trials
        figures["sweep_seconds"] = d2c(root, "sweep", CONFIG, *SMALL, *sweep, f"run.dir={folders['sweep']}")
        figures["one_at_a_time_seconds"] = d2c(root, "sweep", CONFIG, *SMALL, *sweep, "sweep.concurrent=1", f"run.dir={folders['one']}")
        by_hand = 0.0
        for trial in trials:
            file = root / f"{trial.id}.yaml"
            file.write_text(to_yaml(trial.config))
            by_hand += d2c(root, "evaluate", str(file))
        figures["by_hand_seconds"] = by_hand
        values = []
        for name in ("sweep", "one"):
            made = sweeps.make(load(ROOT / CONFIG, [*SMALL, *sweep, f"run.dir={folders[name]}"]))
            rows = outcomes.gather(made.folder, made.config)
            values.append({row["id"]: row["measures"]["frechet"] for row in rows})
        alone = {trial.id: outcomes.measures(trial.plan.of("evaluate")[0].folder)["frechet"] for trial in trials}
        scorings = len(list(folders["sweep"].glob("*/scores-*")))
        # A trial's process has other threads for its linear algebra than a command, which rounds its distance otherwise.
        if not all(
            own.keys() == alone.keys() and all(math.isclose(own[name], alone[name], rel_tol=1e-9) for name in own) for own in values
        ):
            sys.exit(f"the sweep and the commands give other numbers: {values} against {alone}")
    figures["overhead_share"] = figures["sweep_seconds"] / by_hand - 1
    figures["overhead_share_one_at_a_time"] = figures["one_at_a_time_seconds"] / by_hand - 1
    print(
        f"{len(trials)} trials: {figures['sweep_seconds']:.0f} s as a sweep, {figures['one_at_a_time_seconds']:.0f} s as one of one trial at a time, {by_hand:.0f} s by hand"
    )
    print(
        json.dumps(
            {
                "trials": len(trials),
                "scorings": scorings,
                **{name: round(value, 3) for name, value in figures.items()},
                "cpus": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
