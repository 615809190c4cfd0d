"""Scoring as it runs: is the actor kept busy, what costs what, and does the table stay the same to the bit?

    python jobs/bench/score.py [--quick] [--only pool,precision,bits,decode,manifest,memory]

pool       one actor on one core, decoding on the other, against a bare loop of the same model over decoded tensors
precision  timesteps batched, and bf16, against one image and one timestep a forward in fp32; rank correlation
bits       the table for other numbers of actors, rows a task, orders of work, and after an interruption
decode     what reading a picture costs, how many cores an accelerator needs, and whether DCT-scaled decoding is as good
manifest   1.3M rows from tar headers against `tar -t` on the same tars, and from Parquet
memory     the driver's largest memory over 10M rows of scores

Pictures are crops of scikit-learn's two photographs. Everything is one thread a process. The last line is one JSON object.
"""

import os
import sys

sys.path = [path for path in sys.path if path != os.path.dirname(os.path.realpath(__file__))]  # select.py there would hide Python's own

import argparse
import io
import json
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from d2c_ray.config import Config, from_dict
from d2c_ray.data import manifest, tables, units
from d2c_ray.data.decode import centre_crop, decode
from d2c_ray.data.ledger import Ledger
from d2c_ray.distributed import actors, cluster, filling, ingest
from d2c_ray.distributed import score as scoring
from d2c_ray.models import teachers, weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.rejects import Rejects
from d2c_ray.selection import difficulty
from d2c_ray.selection.noise import noise
from d2c_ray.stages.score import summarise

SIZE, STEPS = 64, 8  # pixels a side; noise levels
DRIVER_ROWS_PER_TASK = 1024  # an actor that computes nothing is served by the driver alone
SILENT: Any = SimpleNamespace(advance=lambda *_: None, at=lambda *_: None, done=0)
TIMED_CORE, OTHER_CORE = max(os.sched_getaffinity(0)), min(os.sched_getaffinity(0))


def pictures(count: int, size: int, seed: int = 0) -> list[bytes]:
    """JPEGs of `size` pixels a side cut from real photographs."""
    from sklearn.datasets import load_sample_images

    photographs, rng = load_sample_images().images, np.random.default_rng(seed)
    found = []
    for index in range(count):
        photograph = photographs[index % 2]
        side = int(rng.integers(size, min(photograph.shape[:2])))
        top, left = rng.integers(0, photograph.shape[0] - side + 1), rng.integers(0, photograph.shape[1] - side + 1)
        found.append(jpeg(Image.fromarray(photograph[top : top + side, left : left + side]).resize((size, size), Image.Resampling.LANCZOS)))
    return found


def jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=90)
    return out.getvalue()


def pack(path: Path, images: list[bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for index, image in enumerate(images):
            for name, content in ((f"{index:06d}.jpg", image), (f"{index:06d}.cls", b"%d" % (index % 10))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def own_teacher(folder: Path, spec: TransformerSpec) -> Path:
    """A model with random weights that are zero nowhere: what it costs does not depend on what it has learned."""
    torch.manual_seed(0)
    network = Transformer(spec)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    state = network.state_dict()
    weights.save(folder, spec, {"ema": state, "raw": state}, {"class_names": []}, None)
    return folder


def configured(root: Path, rows_per_shard: int = 256, **score: object) -> Config:
    return from_dict(
        {
            "data": {"path": str(root / "images"), "image_size": SIZE, "rows_per_shard": rows_per_shard},
            "score": {"num_timesteps": STEPS, "device_batch": 64, **score},
        }
    )


def listed(config: Config, folder: Path) -> tuple[list[Path], int]:
    """Writes the manifest as the stage does, 64 shards a file."""
    folder.mkdir(parents=True, exist_ok=True)
    source, listing = manifest.find(config.data, config.storage), manifest.Listing()
    rows = config.data.rows_per_shard
    for part, table in enumerate(manifest.scan(source, config.data, config.storage, listing, rows * 64, SILENT)):
        tables.write(folder / f"part-{part:05d}.parquet", table, {}, rows)
    return sorted(folder.glob("part-*.parquet")), listing.rows


class PinnedScorer(actors.Scorer):
    """A scorer on the timed core."""

    def __init__(self, **arguments: object):
        os.sched_setaffinity(0, {TIMED_CORE})
        super().__init__(**arguments)  # type: ignore[arg-type]


def leave_the_timed_core() -> None:
    """Moves this process and all of its Ray, the pinned actor apart, to the other core; what Ray starts later follows."""
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess, OSError):
            for thread in process.threads():
                if os.sched_getaffinity(thread.id) != {TIMED_CORE}:
                    os.sched_setaffinity(thread.id, {OTHER_CORE})


def bench_pool(root: Path, quick: bool) -> dict:
    """Steady state, after the first unit, on the Ray that a user of two cores gets. The bare loop runs before and after it."""
    count = 1536 if quick else 5120
    images = root / "pool"
    (images / "images").mkdir(parents=True)
    pack(images / "images" / "a.tar", pictures(256, SIZE) * (count // 256))
    model = own_teacher(images / "teacher", TransformerSpec("sit", SIZE, 3, 8, 2, 96, 2, 10))
    config = configured(images)
    paths, _ = listed(config, images / "manifest")
    teacher, t = teachers.load(model, torch.device("cpu")), difficulty.timesteps("sit", STEPS, 0, 1)
    table, _ = units.decode_rows(tables.read(paths[0]).slice(0, 256), config.data, config.storage)
    table = ingest.AddNoise(0, STEPS, (3, SIZE, SIZE))(table)
    z = torch.from_numpy(units.pixels_of(table)).permute(0, 3, 1, 2).float() / 127.5 - 1
    label = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
    draws = torch.from_numpy(np.array(tables.tensor_values(table, "noise")))

    def bare(repeats: int) -> list[float]:
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {TIMED_CORE})
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            difficulty.errors(teacher, z, label, draws, t, config.score.device_batch)
            taken.append((time.perf_counter() - start) / 256)
        os.sched_setaffinity(0, everywhere)
        return taken

    bare(1)
    before = bare(3 if quick else 8)
    scoring.Scorer = PinnedScorer  # type: ignore[misc,assignment]
    clocks: list[dict] = []
    first: list[float] = []

    class Kept(actors.Busy):
        def add(self, result: pa.Table) -> dict:
            first.append(time.perf_counter())
            if len(first) == 1:
                leave_the_timed_core()
            clocks.append(super().add(result))
            return clocks[-1]

    filling.Busy = Kept  # type: ignore[misc]
    start = time.perf_counter()
    out = images / "out"
    out.mkdir()
    scoring.score(
        config, paths, str(model), "sit", list(range(10)), (3, SIZE, SIZE), out, cluster.Share(1, 0, 256, 1), Rejects("score", count, 0), SILENT, {}
    )  # fmt: skip
    filling.Busy, scoring.Scorer = actors.Busy, actors.Scorer  # type: ignore[misc]
    os.sched_setaffinity(0, {TIMED_CORE, OTHER_CORE})
    after = bare(3 if quick else 8)
    # The actor's own clock, from the end of its first unit to the end of its last.
    span, seconds = (clocks[-1][name] - clocks[0][name] for name in ("span", "seconds"))
    steady, compute, alone = span / (count - 256), seconds / (count - 256), statistics.median(before + after)
    return {
        "pool_efficiency": alone / steady, "busy_share": seconds / span, "startup_seconds": first[0] - start - 256 * compute,
        "pool_images_per_second": 1 / steady, "bare_images_per_second": 1 / alone, "milliseconds_an_image": 1000 * alone,
        "rest_idle": 1 - seconds / span, "rest_compute_slower_beside_decoding": 1 - alone / compute,
        "bare_milliseconds": [round(1000 * taken, 3) for taken in before + after],
    }  # fmt: skip


def bench_precision(root: Path, quick: bool) -> dict:
    """A DiT of depth 6 and width 384 on 16 x 16 x 4 latents, |T| = 8."""
    count = 4 if quick else 16
    model = own_teacher(root / "dit", TransformerSpec("dit", 16, 4, 2, 6, 384, 6, 10))
    generator = torch.Generator().manual_seed(0)
    many = 4 * count
    z, label = torch.randn(many, 4, 16, 16, generator=generator), torch.arange(many) % 10
    z *= torch.linspace(0.2, 1.5, many)[:, None, None, None]
    draws = torch.from_numpy(np.stack([noise(0, str(index), STEPS, (4, 16, 16)) for index in range(many)]))
    t = difficulty.timesteps("dit", STEPS, 0, 1)
    ways = {
        "one_at_a_time_fp32": ("fp32", 1),
        "images_batched_fp32": ("fp32", 8),
        "batched_fp32": ("fp32", 64),
        "batched_bf16": ("bf16", 64),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    loaded = {precision: teachers.load(model, torch.device("cpu"), precision) for precision in ("fp32", "bf16")}
    for _ in range(1 if quick else 3):
        for name, (precision, batch) in ways.items():
            start = time.perf_counter()
            difficulty.errors(loaded[precision], z[:count], label[:count], draws[:count], t, batch)
            rates[name].append(count / (time.perf_counter() - start))
    scores = [difficulty.score(difficulty.errors(loaded[name], z, label, draws, t, 64).numpy(), t.numpy(), "dit") for name in loaded]
    from scipy.stats import spearmanr

    median = {name: statistics.median(values) for name, values in rates.items()}
    native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return {
        "batched_bf16_speedup": median["batched_bf16"] / median["one_at_a_time_fp32"],
        "batched_fp32_speedup": median["batched_fp32"] / median["one_at_a_time_fp32"], "rank_correlation": float(spearmanr(*scores).statistic),
        "bf16_native": native, "precision_images_per_second": {name: round(rate, 2) for name, rate in median.items()},
        "bf16_relative_difference": float(np.abs(scores[1] / scores[0] - 1).max()),
    }  # fmt: skip


def dying(units: int) -> Any:
    """A ledger's `add` that ends the run after so many units, as if it had been killed there."""
    add, left = Ledger.add, iter(range(units))

    def call(self: Any, *arguments: Any) -> None:
        next(left)
        add(self, *arguments)

    return call


def bench_bits(root: Path, quick: bool) -> dict:
    """The whole table of one setting against that of others."""
    import random

    count = 96 if quick else 256
    images = root / "bits"
    (images / "images").mkdir(parents=True)
    pack(images / "images" / "a.tar", pictures(count, SIZE, 1))
    model = own_teacher(images / "teacher", TransformerSpec("sit", SIZE, 3, 8, 2, 96, 2, 10))
    todo, add = Ledger.todo, Ledger.add
    equal = {}
    for precision in ("fp32", "bf16"):
        config = configured(images, 48, precision=precision, device_batch=16, num_timesteps=4)
        paths, _ = listed(config, images / precision / "manifest")
        expected = None
        for name, workers, rows in (("1x64", 1, 64), ("2x7", 2, 7), ("4x1", 4, 1), ("shuffled", 2, 7), ("resumed", 1, 7)):
            out = images / precision / name
            out.mkdir()
            if name == "shuffled":
                Ledger.todo = lambda self, *most: random.Random(0).sample(found := todo(self, *most), len(found))  # type: ignore[method-assign]
            if name == "resumed":
                Ledger.add = dying(5)  # type: ignore[method-assign]
            for _ in range(2):
                try:
                    scoring.score(
                        config, paths, str(model), "sit", list(range(10)), (3, SIZE, SIZE), out, cluster.Share(workers, 0, rows, 1),
                        Rejects("score", count, 0), SILENT, {},
                    )  # fmt: skip
                    break
                except StopIteration:
                    assert list(out.glob("unfinished/*.parquet"))
                    Ledger.add = add  # type: ignore[method-assign]
            Ledger.todo, Ledger.add = todo, add  # type: ignore[method-assign]
            table = tables.read(sorted(out.glob("part-*.parquet"))).combine_chunks()
            expected = expected or table
            equal[f"{precision} {name}"] = table.equals(expected)
    return {"bit_equal": all(equal.values()), "bit_equal_each": equal}


def bench_decode(root: Path, quick: bool) -> dict:
    """One core. Draft lets libjpeg leave out high frequencies, down to twice the size that is wanted."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    repeats = 20 if quick else 60

    def timed(work: Any, contents: list[bytes]) -> float:
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            for index in range(repeats):
                work(contents[index % len(contents)])
            taken.append((time.perf_counter() - start) / repeats)
        return 1000 * statistics.median(taken)

    def drafted(content: bytes, size: int) -> np.ndarray:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (2 * size, 2 * size))
            return centre_crop(image.convert("RGB"), size)

    typical = [jpeg(image.resize((500, 375), Image.Resampling.LANCZOS)) for image in photographs]
    large = [jpeg(image) for image in photographs]
    draws = timed(lambda _: noise(0, "key", 16, (4, 32, 32)), typical)
    at_256 = timed(lambda content: decode(content, 256, 3, 10**8), typical)
    at_64 = timed(lambda content: decode(content, 64, 3, 10**8), large)
    scaled = timed(lambda content: drafted(content, 64), large)
    differences = [np.abs(decode(c, 64, 3, 10**8).astype(int) - drafted(c, 64).astype(int)) for c in large]
    error = statistics.mean(float((difference**2).mean()) for difference in differences)
    return {
        "decode_256_milliseconds": at_256, "noise_16_milliseconds": draws,
        "decode_cores_for_100_images_per_second_at_256": 100 * (at_256 + draws) / 1000,
        "draft_64_speedup": at_64 / scaled, "draft_64_psnr": float(10 * np.log10(255**2 / error)),
        "draft_64_largest_difference": int(max(difference.max() for difference in differences)),
    }  # fmt: skip


def bench_manifest(root: Path, quick: bool) -> dict:
    """Samples of an image and a label, 100,000 a tar; three runs each, turn by turn."""
    files, each = (2, 50_000) if quick else (13, 100_000)
    tars, parquet = root / "tars", root / "parquet"
    tars.mkdir()
    parquet.mkdir()
    content = b"\xff\xd8 no picture, but as many bytes as a header's block needs"
    for number in range(files):
        with (tars / f"{number:05d}.tar").open("wb", buffering=1 << 22) as file:
            for index in range(each):
                for extension, body in (("jpg", content), ("cls", b"%d" % (index % 1000))):
                    file.write(ustar(f"{index:08d}.{extension}", len(body)))
                    file.write(body.ljust(512, b"\0"))
            file.write(bytes(1024))
        column = pa.array([{"bytes": content, "path": None}] * each)
        labels = pa.array(np.arange(each) % 1000)
        pq.write_table(pa.table({"image": column, "label": labels}), parquet / f"{number:05d}.parquet", row_group_size=1000)
    taken: dict[str, list[float]] = {"tar -t": [], "tars": [], "parquet": []}
    for _ in range(3):
        start = time.perf_counter()
        for path in sorted(tars.glob("*.tar")):
            subprocess.run(["tar", "-tf", path], stdout=subprocess.DEVNULL, check=True)
        taken["tar -t"].append(time.perf_counter() - start)
        for name, folder in (("tars", tars), ("parquet", parquet)):
            config = from_dict({"data": {"path": str(folder)}})
            shutil.rmtree(root / "listed", ignore_errors=True)
            start = time.perf_counter()
            _, rows = listed(config, root / "listed")
            taken[name].append(time.perf_counter() - start)
            assert rows == files * each
    shutil.rmtree(tars)
    median = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "manifest_over_tar_t": median["tars"] / median["tar -t"], "manifest_parquet_over_tar_t": median["parquet"] / median["tar -t"],
        "manifest_rows": files * each, "manifest_seconds": {name: [round(value, 2) for value in values] for name, values in taken.items()},
    }  # fmt: skip


def ustar(name: str, size: int) -> bytes:
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[100:108], header[124:136], header[136:148] = b"0000644\0", b"%011o\0" % size, b"00000000000\0"
    header[148:156], header[156:157], header[257:265] = b"        ", b"0", b"ustar\00000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


class NoScorer:
    """Answers with errors drawn at random, as many as a scorer gives."""

    def __init__(self, **_: object):
        self.rng = np.random.default_rng(0)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        table = ingest.unpack(batch.column("payload"))
        column = pa.FixedSizeListArray.from_arrays(pa.array(self.rng.random(16 * len(table), np.float32)), 16)
        clock = {"actor": "one", "device": "none", "span": 1.0, "seconds": 1.0}
        metadata = {b"rejected": b"[]", b"clock": json.dumps(clock).encode()}
        result = table.select(["sample_id", "key", "label", "shard"]).append_column("errors", column)
        return ingest.pack(unit, result.replace_schema_metadata(metadata))


def rows_alone(batch: pa.Table, **_: object) -> Any:
    """Stands for reading and decoding: the manifest's rows and no images."""
    (task,) = batch.column("units").to_pylist()
    for unit in json.loads(task):
        yield ingest.pack(json.dumps(unit), units.read_rows(unit).replace_schema_metadata(None))


def bench_memory(root: Path, quick: bool) -> dict:
    """In a process of its own, which is the driver: everything but the images and the model is real."""
    rows = 500_000 if quick else 10_000_000
    command = [sys.executable, __file__, "--driver", str(root / "memory"), "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def drive(folder: Path, rows: int) -> None:
    (folder / "out").mkdir(parents=True)
    config = from_dict({"score": {"num_timesteps": 16}})
    per_part = config.data.rows_per_shard * 64
    fields = None
    for part, start in enumerate(range(0, rows, per_part)):
        ids = np.arange(start, min(rows, start + per_part))
        columns = {
            "key": [f"train-{row // 10_000:05d}.tar#{row:012d}.jpg" for row in ids], "sample_id": ids, "label": (ids % 1000).astype(np.int32),
            "uri": [f"train-{row // 10_000:05d}.tar" for row in ids], "offset": ids, "length": ids, "row_group": np.full(len(ids), -1, np.int32),
            "row": np.full(len(ids), -1, np.int32), "shard": (ids // config.data.rows_per_shard).astype(np.int32),
        }  # fmt: skip
        table = pa.table(columns)
        fields = fields or table.schema
        tables.write(folder / f"part-{part:05d}.parquet", table, {}, config.data.rows_per_shard)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    cluster.connect(config.resources)
    scoring.Scorer, ingest._decode = NoScorer, rows_alone  # type: ignore[assignment,misc]
    began = time.perf_counter()
    scoring.score(
        config, sorted(folder.glob("part-*.parquet")), "", "sit", [], (1, 1, 1), folder / "out", cluster.Share(1, 0, DRIVER_ROWS_PER_TASK, 1),
        Rejects("score", rows, 0), SILENT, {},
    )  # fmt: skip
    scored = time.perf_counter() - began
    found, summary = summarise(sorted((folder / "out").glob("part-*.parquet")), np.linspace(0, 1, 16), "sit")
    assert found == rows and summary["rank_stability"] is not None
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    figures = {"driver_gib_10m_rows": round(peak, 3), "driver_rows": rows, "driver_rows_per_task": DRIVER_ROWS_PER_TASK}
    print(json.dumps(figures | {"driver_rows_per_second": round(rows / scored)}))


PARTS = {
    "pool": bench_pool, "precision": bench_precision, "bits": bench_bits, "decode": bench_decode, "manifest": bench_manifest, "memory": bench_memory,
}  # fmt: skip
ON_RAY = {"pool": 0, "bits": 6}  # logical CPUs; 0: as many as a user gets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--driver", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.driver:
        return drive(arguments.driver, arguments.rows)
    chosen = [name for name in PARTS if name in arguments.only.split(",")]
    figures: dict = {"quick": arguments.quick, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            if cluster.ray.is_initialized():
                cluster.disconnect()  # one Ray at a time, and none beside what is timed without
            if name in ON_RAY:
                cluster.connect(from_dict({"resources": {"num_cpus": ON_RAY[name]}}).resources)
            found = PARTS[name](Path(folder), arguments.quick)
            figures |= found
            for key, value in found.items():
                print(f"{name:<10} {key:<46} {value:.4g}" if isinstance(value, float) else f"{name:<10} {key:<46} {value}", flush=True)
    print(json.dumps(figures))
    return None


if __name__ == "__main__":
    main()
