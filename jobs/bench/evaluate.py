"""What measuring a student takes: Fréchet distances, statistics, neighbours, and the images themselves.

    python jobs/bench/evaluate.py [--quick] [--only frechet,merge,overlap,sampling]

frechet   distances at 2,048 dimensions against the matrix square root of scipy, full rank and of 1,000 images (deficient)
merge     statistics of 32 parts, merged in two orders, against those of all rows at once
overlap   precision, recall, density and coverage of 50,000 generated against 10,000 real rows of 2,048 features, and the nearest
          of 10,000 training rows for each of the 50,000; in a process of its own, whose largest memory is told
sampling  images a second of a small SiT, no VAE

Features are random, skewed and correlated, their spectrum falling like that of pooled activations. The last line is one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # it holds names of Python's own modules

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from typing import Any

import numpy as np
import scipy
import torch
from scipy.linalg import sqrtm

from d2c_ray.config import SampleConfig
from d2c_ray.evaluate import frechet, neighbours, sampling
from d2c_ray.evaluate.precision_recall import overlap
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.models.weights import Student

WIDTH, THREADS, NEIGHBOURS = 2048, 2, 3


def random_features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """n x d float32, never negative."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((256, width), np.float32) * np.geomspace(1, 0.05, 256, dtype=np.float32)[:, None]
    features = np.empty((count, width), np.float32)
    for start in range(0, count, 4096):
        part = features[start : start + 4096]
        part[...] = np.maximum(rng.standard_normal((len(part), 256), np.float32) @ mix * (1 + shift), 0) / 8
        part += rng.standard_normal(part.shape, np.float32) * 0.05
    return features


def timed(run: Any, times: int = 1) -> tuple[Any, float]:
    """What `run` gives, and its median seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return found, statistics.median(seconds)


def by_square_root(a: frechet.Statistics, b: frechet.Statistics) -> float:
    root = sqrtm(a.sigma @ b.sigma)
    return float(np.square(a.mean - b.mean).sum() + a.trace + b.trace - 2 * np.trace(root).real)


def fresh(a: frechet.Statistics) -> frechet.Statistics:
    """The same without what it has worked out before."""
    return frechet.Statistics(a.count, a.mean, a.factor, a.covariance)


def bench_frechet(quick: bool) -> dict[str, Any]:
    width = 512 if quick else WIDTH
    found: dict[str, Any] = {"frechet_width": width}
    reference = frechet.statistics(random_features(5 * width, width, 0))
    for name, rows in (("", 5 * width), ("_deficient", 1000 * width // WIDTH)):
        made = random_features(rows, width, 1, 0.2)
        mine = frechet.statistics(made)
        distance, taken = timed(lambda mine=mine: frechet.frechet_distance(fresh(mine), fresh(reference)), 3)
        theirs, theirs_taken = timed(lambda mine=mine: by_square_root(mine, reference))
        found[f"frechet_2048_seconds{name}"] = taken if not quick else None
        found |= {f"frechet_seconds{name}": taken, f"frechet_sqrtm_seconds{name}": theirs_taken}
        found |= {f"frechet_speedup_over_sqrtm{name}": theirs_taken / taken, f"frechet_relative_error{name}": abs(distance / theirs - 1)}
        found[f"frechet_value{name}"] = distance
        if name:  # as of a published file: the covariance alone, singular
            plain = frechet.Statistics.of(mine.mean, mine.sigma)
            distance, taken = timed(lambda plain=plain: frechet.frechet_distance(fresh(plain), fresh(reference)), 3)
            found |= {
                "frechet_seconds_deficient_covariance": taken,
                "frechet_relative_error_deficient_covariance": abs(distance / theirs - 1),
            }
    return found


def bench_merge(quick: bool) -> dict[str, Any]:
    """Relative to the largest entry of the covariance."""
    width, rows = (256, 8_000) if quick else (WIDTH, 32_000)
    features = random_features(rows, width, 0)
    whole, seconds = timed(lambda: frechet.Moments(width).update(features).statistics())
    parts = np.array_split(features, 32)
    apart = 0.0
    for order in (np.arange(32), np.random.default_rng(0).permutation(32)):
        merged = frechet.Moments(width)
        for part in order:
            merged.merge(frechet.Moments(width).update(parts[part]))
        other = merged.statistics()
        apart = max(apart, abs(other.sigma - whole.sigma).max() / abs(whole.sigma).max(), abs(other.mean / whole.mean - 1).max())
    return {"merge_relative_error": float(apart), "statistics_rows_per_second": rows / seconds}


def _overlap(quick: bool, answer: Any) -> None:
    torch.set_num_threads(THREADS)
    many, few, width = (5_000, 1_000, 512) if quick else (50_000, 10_000, WIDTH)
    generated, real = random_features(many, width, 0, 0.2), random_features(few, width, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, seconds = timed(lambda: overlap(real, generated, NEIGHBOURS))
    _, nearest_seconds = timed(lambda: neighbours.nearest(generated, real, 1))
    answer.put((found._asdict(), seconds, nearest_seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, before / 2**20))


def bench_overlap(quick: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_overlap, args=(quick, answer))
    process.start()
    values, seconds, nearest, peak, before = answer.get()
    process.join()
    names = {"precision_recall_seconds": seconds, "nearest_seconds": nearest, "precision_recall_peak_gib": peak}
    full = {"precision_recall_50k_seconds": seconds, "nearest_50k_seconds": nearest, "peak_gib": peak, "features_gib": before}
    return {
        **names,
        **{key: None if quick else value for key, value in full.items()},
        **{f"overlap_{key}": value for key, value in values.items()},
    }


def bench_sampling(quick: bool) -> dict[str, Any]:
    """8 x 8 pixels, the digits model's shape, guided."""
    torch.manual_seed(0)
    network = Transformer(TransformerSpec("sit", 8, 1, 2, 4, 96, 4, 10)).eval()
    student = Student(network, {}, None, None, 1.0)
    images, steps = (64, 10) if quick else (512, 50)
    sample = SampleConfig(num_images=images, steps=steps, device_batch=64, guidance=1.5, precision="fp32")
    _, seconds = timed(lambda: sampling.generate(student, sample, torch.arange(images), None), 1 if quick else 3)
    return {"sampling_images_per_second": images / seconds, "sampling_steps": steps}


PARTS = {"frechet": bench_frechet, "merge": bench_merge, "overlap": bench_overlap, "sampling": bench_sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    figures: dict[str, Any] = {
        "quick": arguments.quick,
        "cores": len(os.sched_getaffinity(0)),
        "scipy": scipy.__version__,
        "torch": torch.__version__,
    }
    for name in [name for name in PARTS if name in arguments.only.split(",")]:
        found = PARTS[name](arguments.quick)
        figures |= found
        for key, value in found.items():
            print(f"{name:<10} {key:<46} {value:.4g}" if isinstance(value, float) else f"{name:<10} {key:<46} {value}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
