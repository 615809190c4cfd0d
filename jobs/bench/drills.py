"""What it costs a run to be disturbed: actors, nodes, drivers, workers and trials killed, storage that fails, a full disk, and more.

    python jobs/bench/drills.py [--quick] [--only WORDS]

Runs the tests with the mark `drill`, each on a real Ray of this machine, of several raylets where nodes come and go. A drill
survives if the run ends with the content of one that nothing happened to, or refuses in words and has changed nothing (no rows are
counted then). rows_lost and rows_twice are counted in the tables it left. redone_share is work that was begun a second time, as its own logs have
it, over all the work of the stage that was disturbed; 1 where a stage of seconds begins anew. --quick: the drills that a plain
`pytest` runs too. --only: pytest's -k. The last line is one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # select.py there would hide Python's own

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the drills that a plain pytest runs too")
    parser.add_argument("--only", default="", help="an expression for pytest's -k")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "drills.jsonl"
        words = [
            "-n",
            "0",
            "-q",
            "--drills",
            "quick" if args.quick else "all",
            "--drills-out",
            str(out),
            *(["-k", args.only] if args.only else []),
        ]
        done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=sys.stderr)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    if done.returncode not in (0, 1) or not rows:
        sys.exit(f"the drills could not be run: pytest ended with {done.returncode}")
    print("| drill | survived | rows lost | rows twice | done again | seconds |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        again = "-" if row["redone_share"] is None else f"{row['redone_share']:.1%}"
        lost, twice = ("-" if row[name] is None else row[name] for name in ("rows_lost", "rows_twice"))
        print(f"| {row['name']} | {'yes' if row['survived'] else 'NO'} | {lost} | {twice} | {again} | {row['seconds']} |")
    print(json.dumps({"drills": rows, "survived": sum(row["survived"] for row in rows), "cpus": os.cpu_count()}))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
