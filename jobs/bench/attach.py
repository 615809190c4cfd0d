"""The condensed dataset: what it costs to make it, to open it for training, and to take batches from it.

    python jobs/bench/attach.py [--quick] [--only cache,passes]

cache  an artefact of 10,000 images (--quick: 600), each with 256 x 768 int8 tokens and 4 x 32 x 32 latents of both flips, is opened;
       then batches of 128 random images' tokens, one flip of each, into the reused buffer, against a plain copy of as many bytes

passes a VAE and two vision encoders attached to 96 pictures (--quick: 48) of 500 x 375 at 256 px, both flips, in one pass, against a
       pass for each; through Ray Data with one actor, from reading to the written parts

The cache holds random numbers; one thread, one core while batches are timed. The last line is one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # select.py there would hide Python's own

import argparse
import ctypes
import hashlib
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from d2c_ray import condensed, pipeline
from d2c_ray.config import VaeConfig, from_dict
from d2c_ray.data import tables
from d2c_ray.distributed import attach as distributed
from d2c_ray.distributed import cluster
from d2c_ray.models.frozen import quantise
from d2c_ray.rejects import Rejects
from d2c_ray.training.batches import Gatherer

BATCH, ROWS_PER_PART, WIDTH, FLIPS = 128, 256, 768, 2
PUBLISHED_256 = 393_000  # bytes an image and flip of DINOv2 ViT-B/14 tokens in bf16, as the method's authors store them


def artefact(folder: Path, images: int, tokens: int, side: int) -> Path:
    """A condensed dataset of random tokens and latents, with its provenance."""
    folder.mkdir()
    rng, files = np.random.default_rng(0), {}
    rows = min(images, ROWS_PER_PART)
    drawn = [quantise(rng.standard_normal((FLIPS, tokens, WIDTH), np.float32)) for _ in range(rows)]
    values = {
        "vision": np.stack([vision for vision, _ in drawn]),
        "vision_scale": np.stack([scale for _, scale in drawn]),
        "latent_mean": rng.standard_normal((rows, FLIPS, 4, side, side), np.float32).astype(np.float16),
        "latent_std": rng.random((rows, FLIPS, 4, side, side), np.float32).astype(np.float16),
    }
    del drawn
    kinds = {name: (str(array.dtype), array.shape[1:]) for name, array in values.items()}
    fields = tables.arrow_schema({"sample_id": "int64", "label": "int32", **dict.fromkeys(values, "tensor")}, kinds)
    for number, start in enumerate(range(0, images, ROWS_PER_PART)):
        ids = np.arange(start, min(images, start + ROWS_PER_PART))
        own = {name: np.roll(array, number, 0)[: len(ids)] for name, array in values.items()}  # no two parts alike
        columns = [pa.array(ids), pa.array((ids % 1000).astype(np.int32)), *map(tables.tensor_column, own.values())]
        path = folder / f"part-{number:06d}.parquet"
        tables.write(path, pa.table(columns, schema=fields), {})
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest, "rows": len(ids)}
    facts = {"class_names": [str(label) for label in range(1000)], "flip": True, "latent": {"kind": "vae"}, "fingerprint": folder.name}
    (folder / condensed.PROVENANCE).write_text(json.dumps({"format": condensed.FORMAT, "rows": images, "files": files}))
    (folder / "_SUCCESS.json").write_text(json.dumps({"facts": facts}))
    return folder


def on_disk(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def plain_write(folder: Path, num_bytes: int) -> float:
    """Seconds a GB of writing and flushing as many bytes of memory to the same disk."""
    block = np.random.default_rng(0).integers(0, 255, 64 << 20, np.uint8)
    start, written = time.perf_counter(), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while written < num_bytes:
            written += file.write(block.data)
        os.fsync(file.fileno())
    return (time.perf_counter() - start) / written * 1e9


def anonymous() -> int:
    """Bytes of this process's own memory, that of mapped files apart."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10


def peak_over(work: Callable[[], object]) -> int:
    """The most that anonymous memory rises above its start while `work` runs 20 times, looked at all the time by another thread."""
    ctypes.CDLL(None).malloc_trim(0)  # what malloc kept of earlier work would hide what this takes
    start, highest, done = anonymous(), 0, threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous() - start)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(20):
        work()
    done.set()
    thread.join()
    return highest


def alternating(ways: dict[str, Callable[[np.ndarray, np.ndarray], object]], images: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, in turns, each time for other rows."""
    rng = np.random.default_rng(1)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rows, flipped = rng.integers(0, images, BATCH), rng.integers(0, FLIPS, BATCH)
            start = time.perf_counter()
            way(rows, flipped)
            taken[name].append(1000 * (time.perf_counter() - start))
    return taken


def bench_cache(root: Path, quick: bool) -> dict:
    images, rounds = (600, 60) if quick else (10_000, 300)
    cache = root / "cache"
    folder = artefact(root / "256", images, 256, 32)
    start = time.perf_counter()
    data = condensed.open(folder, cache)
    built = time.perf_counter() - start
    start = time.perf_counter()
    condensed.open(folder, cache)
    again = time.perf_counter() - start
    num_bytes = sum(array.nbytes for array in data.arrays.values())
    plain = plain_write(cache, min(num_bytes, 2 * 10**9))

    vision, gatherer = data.arrays["vision"], Gatherer(torch.device("cpu"))
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(everywhere)})
    for first in range(0, images, BATCH):  # every page is in memory, and mapped
        for side in range(FLIPS):
            rows = np.arange(first, min(images, first + BATCH))
            gatherer.fill("vision", vision, rows, np.full(len(rows), side))
    source, target = np.random.default_rng(2).integers(-127, 127, (BATCH, 256, WIDTH), np.int8), np.ones((BATCH, 256, WIDTH), np.int8)
    taken = alternating(
        {
            "memcpy": lambda rows, flipped: np.copyto(target, source),
            "gather": lambda rows, flipped: gatherer.fill("vision", vision, rows, flipped),
            "fancy": lambda rows, flipped: vision[rows, flipped],
        },
        images,
        rounds,
    )
    floats = alternating({"float": lambda rows, flipped: gatherer.take("vision", vision, rows, flipped)}, images, rounds // 5)
    os.sched_setaffinity(0, everywhere)
    middle = {name: statistics.median(times) for name, times in (taken | floats).items()}

    rows, flipped = np.random.default_rng(3).permutation(images)[:BATCH], np.arange(BATCH) % FLIPS
    peaks = {
        "gather": peak_over(lambda: gatherer.fill("vision", vision, rows, flipped)),
        "fancy": peak_over(lambda: vision[rows, flipped]),
    }
    grown: list[int] = []
    for _ in range(51):  # tokens, latents and labels, to float32, as they go to a model
        data.batch(rows, flipped == 1)
        grown.append(anonymous())

    parquet, copied = {"256": on_disk(folder, "part-*.parquet") / images}, {"256": on_disk(cache, "*.npy") / images}
    condensed.drop_cache(folder, cache)
    shutil.rmtree(folder)
    large = artefact(root / "512", 64, 1024, 64)
    condensed.open(large, cache)
    parquet["512"], copied["512"] = on_disk(large, "part-*.parquet") / 64, on_disk(cache, "*.npy") / 64
    return {
        "cache_read_over_memcpy": middle["gather"] / middle["memcpy"], "batch_gather_ms": middle["gather"], "memcpy_ms": middle["memcpy"],
        "fancy_over_memcpy": middle["fancy"] / middle["memcpy"], "batch_to_float32_ms": middle["float"], "batch_bytes": source.nbytes,
        "anonymous_growth_over_batch": (grown[-1] - grown[0]) / source.nbytes,
        "anonymous_peak_over_batch": peaks["gather"] / source.nbytes, "anonymous_peak_over_batch_fancy": peaks["fancy"] / source.nbytes,
        "cache_build_seconds_per_gb": built / num_bytes * 1e9, "plain_write_seconds_per_gb": plain, "cache_reopen_seconds": again,
        "cache_gb": num_bytes / 1e9, "images": images,
        "bytes_per_image_256": parquet["256"], "bytes_per_image_512": parquet["512"],
        "cache_bytes_per_image_256": copied["256"], "cache_bytes_per_image_512": copied["512"],
        "bytes_per_image_256_tokens_bf16_published": FLIPS * PUBLISHED_256,
        "bytes_per_image_256_over_published": parquet["256"] / (FLIPS * PUBLISHED_256),
        "raw_ms": {name: [round(time, 3) for time in times[:60]] for name, times in taken.items()},
    }  # fmt: skip


def bench_passes(root: Path, quick: bool) -> dict:
    from diffusers import AutoencoderKL

    count, turns = (48, 1) if quick else (96, 2)
    photographs, rng = [Image.fromarray(image) for image in load_sample_images().images], np.random.default_rng(0)
    (root / "source" / "photographs").mkdir(parents=True)
    for index in range(count):
        left, top = int(rng.integers(640 - 500)), int(rng.integers(427 - 375))
        path = root / "source" / "photographs" / f"{index:04d}.jpg"
        photographs[index % 2].crop((left, top, left + 500, top + 375)).save(path, quality=90)
    torch.manual_seed(0)
    kinds: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae: Any = AutoencoderKL(block_out_channels=(16,) * 4, norm_num_groups=4, **kinds)
    vae.save_pretrained(root / "vae")
    config = from_dict(
        {
            "run": {"dir": str(root), "name": "passes"}, "data": {"source": "folder", "path": str(root / "source"), "image_size": 256},
            "vae": {"path": str(root / "vae")}, "resources": {"actors": 1},
            "attach": {"vision": {"encoder": "efficientnet-lite0"}, "also": {"large": {"encoder": "efficientnet-lite0", "image_size": 192}}},
        }
    )  # fmt: skip
    (manifest,) = pipeline.run(config, "manifest", say=lambda text: None).of("manifest")
    encoders, without = config.attach.encoders(), replace(config, vae=VaeConfig())
    passes = {"all": (config, encoders), "latents": (config, {}), **{name: (without, {name: own}) for name, own in encoders.items()}}
    taken: dict[str, list[float]] = {name: [] for name in passes}
    cluster.connect(config.resources)
    silent: Any = Silent()
    for turn in range(turns + 1):  # the first warms workers and the page cache
        for name, (own, vision) in passes.items():
            out = root / f"{name}-{turn}"
            out.mkdir()
            start = time.perf_counter()
            distributed.attach(
                own, vision, manifest.dir.parts(), 16, out, cluster.share(own.resources, 1), Rejects("attach", count, 0.0), silent, 24, keep_images=True
            )  # fmt: skip
            if turn:
                taken[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    cluster.disconnect()
    middle = {name: statistics.median(times) for name, times in taken.items()}
    apart = sum(seconds for name, seconds in middle.items() if name != "all")
    return {
        "one_pass_speedup": apart / middle["all"], "one_pass_seconds": middle["all"], "pass_an_encoder_seconds": apart, "passes_images": count,
        "passes_raw_seconds": {name: [round(each, 2) for each in times] for name, times in taken.items()},
    }  # fmt: skip


class Silent:
    """Progress that nobody sees."""

    done = 0

    def at(self, done: int, note: str = "") -> None: ...

    def advance(self, count: int, note: str = "") -> None: ...


PARTS = {"cache": bench_cache, "passes": bench_passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict = {"quick": arguments.quick, "torch": torch.__version__, "numpy": np.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in PARTS if name in arguments.only.split(",")]:
            found = PARTS[name](Path(folder), arguments.quick)
            figures |= found
            for key, value in found.items():
                if not isinstance(value, dict):
                    print(f"{name:<10} {key:<46} {value:.4g}" if isinstance(value, float) else f"{name:<10} {key:<46} {value}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
