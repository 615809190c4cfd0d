"""What the selectors by features cost beside their plain forms: GADC, herding and k-center, one thread.

    python jobs/bench/select_transport.py [--quick] [--root FOLDER]

FOLDER holds reference cases of GADC, one class each (NAME.npz: features, ce, objective_refined, seconds_greedy and
seconds_refine of the published search). Without it, features are random and correlated and the recorded figures are
missing; `gadc_features` says which. The last line is one JSON object.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c_ray.config import TransportConfig
from d2c_ray.selection import transport
from d2c_ray.selection.geometry import herding, k_center

OPTIONS = TransportConfig()
CASES = ("cat_500", "ship_1300")
RUNS = 3  # of what takes a second; the fastest counts


def random_features(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Skewed, correlated, in clusters, as pooled activations are; the median squared distance is some 200."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(64, width))
    y = np.maximum((rng.normal(size=(count, 64)) + rng.normal(size=(8, 64))[rng.integers(0, 8, count)]) @ mix, 0)
    return (y * np.sqrt(200 / np.median(np.square(y[:200, None] - y[None, :200]).sum(2)))).astype(np.float32)


def cases(root: Path | None, quick: bool) -> dict[str, dict[str, np.ndarray]]:
    names = CASES[:1] if quick else CASES
    if root and all((root / f"{name}.npz").is_file() for name in names):
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


def bench_gadc(root: Path | None, quick: bool) -> dict[str, Any]:
    """10 images of a class of 500 and of one of 1,300, and 50 and 100 of the latter.

    The plain search's time in the same run is its time for a slice of sets, times the sets that it would look at:
    every insertion, and every swap for each one accepted and once more.
    """
    found: dict[str, Any] = {}
    ratios, speedups, same = [], [], []
    given = cases(root, quick)
    found["gadc_features"] = "real" if next(iter(given)) in CASES else "random"
    for name, case in given.items():
        y, ce = case["features"].astype(np.float32), case["ce"].astype(np.float32)
        n, rows = len(y), np.empty(0, np.int64)
        processor = time.process_time()
        runs = [transport.gadc(y, ce, 10, OPTIONS) for _ in range(RUNS)]
        found[f"gadc_{name}_processor_seconds"] = (time.process_time() - processor) / RUNS
        rows, facts = min(runs, key=lambda run: run[1]["seconds"])
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
        _, facts = transport.gadc(y, ce, count, OPTIONS)
        found |= {f"gadc_{count}_seconds": facts["seconds"], f"gadc_{count}_objective": facts["objective"]}
        found |= {
            f"gadc_{count}_gain_over_greedy": 1 - facts["objective"] / facts["greedy_objective"],
            f"gadc_{count}_swaps": facts["swaps"],
        }
    return found


def plain_herding(y: np.ndarray, count: int) -> list[int]:
    mean, total, rows = y.mean(0), np.zeros_like(y[0]), []
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


def bench_geometry(root: Path | None, quick: bool) -> dict[str, Any]:
    """100 of 1,300 x 2,048 random features (`root` is not needed), both ways in float64: seconds and whether the picks agree."""
    y = random_features(300 if quick else 1300, 2048)
    found: dict[str, Any] = {}
    for name, ours, plain in (("herding", herding, plain_herding), ("kcenter", k_center, plain_k_center)):
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            rows = ours(y, 100)
            seconds.append(time.perf_counter() - started)
        found[f"{name}_seconds"] = min(seconds)
        started = time.perf_counter()
        expected = plain(y.astype(np.float64), 100)
        found[f"{name}_plain_seconds"] = time.perf_counter() - started
        found[f"{name}_same_picks"] = rows.tolist() == expected
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--root", type=Path, help="folder of the reference cases")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"quick": arguments.quick, "torch": torch.__version__}
    figures |= bench_geometry(arguments.root, arguments.quick) | bench_gadc(arguments.root, arguments.quick)
    for key, value in figures.items():
        print(f"{key:<44} {value:.4g}" if isinstance(value, float) else f"{key:<44} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
