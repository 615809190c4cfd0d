"""`d2c bench`: how fast this machine does what a configuration's run is made of, measured on the networks themselves with made-up images.

Plain torch, without Ray. Weights are random where a network is not at hand or still to be trained, which costs the same. On CPUs several
processes measure side by side, as many as actors would work there, since they share the machine's memory and cores, each with as many
threads as an actor has. What it writes, `rates` reads.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2c_ray import estimate, hardware, rates
from d2c_ray import plan as plans
from d2c_ray.config import Config, arm_configs
from d2c_ray.data import units
from d2c_ray.data.decode import decode
from d2c_ray.errors import UserError
from d2c_ray.estimate import Data, Piece
from d2c_ray.evaluate import sampling
from d2c_ray.evaluate.measures import measure
from d2c_ray.models import frozen, networks, offline, teachers, vision, weights
from d2c_ray.models.flops import dense_peak
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.report.numbers import in_bytes
from d2c_ray.rundir import versions, write_json
from d2c_ray.selection import difficulty
from d2c_ray.training import batches, loop

ROWS = 64  # images read to time decoding
SAMPLE_STEPS = 2  # of a measurement
MOST_MEASURED = 4096  # real images in the features of which measuring is timed; more take longer in proportion
MOST_CALLS = 4  # times the FLOPs of a call that a step of sampling may take on a CPU
MEMORY_SHARE = 0.6  # of the host's memory that trainings may take side by side
Say = Callable[[str], None]
Found = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long measuring may take: calls timed, training steps, and FLOPs of a call on one CPU thread, for which it takes fewer images."""

    times: int
    steps: int
    cpu_flops: float


QUICK, THOROUGH = Effort(2, 3, 2.5e11), Effort(7, 12, 2e12)


def run(config: Config, out: Path, effort: Effort = QUICK, rows: pa.Table | None = None, say: Say = print) -> list[Found]:
    """Measures what a configuration's run is made of, and adds it to a file; what was measured of the same before is replaced.

    Args:
        rows: manifest rows of its images, of which some are read to time decoding; None: a JPEG is made up.

    Returns:
        The entries. What could not be measured is said.

    Raises:
        UserError: the file is there and is none of this.
    """
    if out.is_file():
        rates.from_file(out)  # refuses another file before it has measured for minutes
    wanted: list[tuple[str, Config]] = []
    for own in arm_configs(config).values():
        wanted += [(stage, own) for stage in sorted(plans.needs("evaluate", own), key=list(plans.STAGES).index)]
    here = hardware.here()
    side_by_side = 1 if here.gpus else min(here.places(config.resources), here.cpus)
    data, _ = estimate.known(0, config, None, None)
    classes = min(data.classes, 1000)
    say(f"measuring on {here.title}, in {side_by_side} process{'es' if side_by_side > 1 else ''}")
    found, missing = measured(wanted, replace(data, classes=classes), side_by_side, effort, rows)
    for what, why in missing.items():
        say(f"not measured: {what}: {why}")
    before = rates.from_file(out) if out.is_file() else []  # again: another bench may have ended meanwhile
    write_json(out, {"entries": merged(before, found)})
    return found


def merged(before: list[Found], found: list[Found]) -> list[Found]:
    """Entries with newer ones in place of those of the same work on the same device."""
    fresh = {_name(entry) for entry in found}
    return [entry for entry in before if _name(entry) not in fresh] + found


def _name(entry: Found) -> tuple[Any, ...]:
    return entry["what"], entry["shape"], entry["device"], entry["threads"]


def lines(entries: list[Found]) -> list[str]:
    """What was measured, in words."""
    out = []
    for entry in entries:
        pace = f"{1 / entry['seconds']:,.4g} a second" if entry["what"] not in ("start", "comparing") else f"{entry['seconds']:.3g} s"
        mfu = f", {entry['mfu']:.1%} of its peak" if entry.get("mfu") else ""
        peak = f", {in_bytes(entry['peak_bytes'])}" if entry.get("peak_bytes") else ""
        out.append(f"{WORDS[entry['what']]}: {pace}{mfu}{peak} ({entry['shape']})" if entry["shape"] else f"{WORDS[entry['what']]}: {pace}")
    return out


WORDS = {
    "start": "starting a process", "read": "images decoded, a core", "train": "images trained on", "forward": "images and timesteps scored", "sample": "steps of an image sampled",
    "encode": "images encoded by the VAE", "decode": "images decoded by the VAE", "vision": "images seen by an encoder", "network": "images seen by a feature network", "comparing": "measures of features",
}  # fmt: skip


def measured(
    wanted: list[tuple[str, Config]],
    data: Data,
    side_by_side: int,
    effort: Effort = QUICK,
    rows: pa.Table | None = None,
    known: rates.Rates | None = None,
) -> tuple[list[Found], dict[str, str]]:
    """Times the pieces of stages, each kind once, in `side_by_side` processes at once; their mean.

    Args:
        known: of what is measured already, which is not measured again.

    Returns:
        Entries as `rates` takes them, and what could not be measured with the reason.
    """
    if not wanted:
        return [], {}
    here, work = hardware.here(), dict[tuple[str, str], tuple[Piece | None, Config]]()
    had = {(entry["what"], entry["shape"]) for entry in (known.entries if known else []) if _is_mine(entry, here, wanted)}
    for stage, config in wanted:
        for piece in estimate.pieces(stage, config, data, []):
            work.setdefault((piece.what, piece.shape), (piece, config))
        if stage in rates.DECODES:
            work.setdefault(("read", rates.reading(config)), (None, config))
        if stage == "evaluate":
            for piece in estimate.networks(config):
                work.setdefault(("comparing", f"{piece.of}, {config.sample.num_images} generated"), (piece, config))
    todo = [(what, shape, piece, config) for (what, shape), (piece, config) in work.items() if (what, shape) not in had]
    if not todo and ("start", "") in had:
        return [], {}
    side_by_side = min(side_by_side, _most_processes([config for what, _, _, config in todo if what == "train"], data))
    with ProcessPoolExecutor(side_by_side, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = time.time()
        every = [pool.submit(_measure, todo, data, effort, rows, started, index) for index in range(side_by_side)]
        done = [one.result() for one in every]
    entries, missing = [], {}
    said = {
        "threads": wanted[0][1].resources.threads,
        "processes": side_by_side,
        "host_gpu": here.gpu,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
    }
    every_kind: list[tuple[str, str, Piece | None]] = [("start", "", None), *(one[:3] for one in todo)]
    for what, shape, made in every_kind:
        own = [one[what, shape] for one in done]
        if reason := next((one["error"] for one in own if "error" in one), None):
            missing[f"{what} of {shape}"] = reason
            continue
        on_gpu = bool(here.gpus) and what not in ("start", "read", "comparing")
        seconds, flops = float(np.mean([one["seconds"] for one in own])), made.flops if made and what != "comparing" else None
        precision = made.precision if made else "fp32"
        peak = dense_peak(here.gpu, precision) if on_gpu else None
        own_flops = (flops or 0.0) * (
            3 / 4 if what == "train" and "recomputing" in shape else 1.0
        )  # a forward that is made again is no model's
        entries.append({
            **own[0], "raw": [one["raw"] for one in own], "what": what, "shape": shape, "seconds": seconds, "precision": precision, "flops": flops,
            "device": here.gpu if on_gpu else here.cpu, "gpu": on_gpu, "mfu": own_flops / seconds / peak[1] if peak and flops else None, **said,
        })  # fmt: skip
    return entries, missing


def _is_mine(entry: Found, here: hardware.Cluster, wanted: list[tuple[str, Config]]) -> bool:
    device = hardware.Device(here.gpu if entry["gpu"] else here.cpu, entry["gpu"])
    return device.is_same(entry["device"], entry["gpu"]) and (entry["gpu"] or entry["threads"] == wanted[0][1].resources.threads)


def _most_processes(training: list[Config], data: Data) -> int:
    """As many as the host's memory lets train side by side; training is what takes most."""
    memory = hardware.host_memory()
    if not training or memory is None:
        return 10**6
    largest = max(16 * estimate.parameters(estimate.transformer_spec(config, data.classes, [])) for config in training)
    return max(1, int(MEMORY_SHARE * memory / largest))


def _measure(
    todo: list[tuple[str, str, Piece | None, Config]], data: Data, effort: Effort, rows: pa.Table | None, started: float, index: int
) -> dict[tuple[str, str], Found]:
    """All work in one process: seconds and their raw timings by kind and shape, or the error."""
    start = time.time() - started  # importing what a worker does
    found: dict[tuple[str, str], Found] = {("start", ""): {"seconds": start, "raw": [start]}}
    device = torch.device("cuda", index % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    for what, shape, piece, config in todo:
        torch.set_num_threads(config.resources.threads)
        torch.manual_seed(0)
        try:
            with offline.only_local():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                if what == "read":
                    own = _reading(config, rows, effort)
                elif what == "comparing":
                    own = _comparing(config, piece.of if piece else "", data, effort)
                else:
                    assert piece is not None
                    own = WAYS[what](config, piece, data, device, effort)
                if device.type == "cuda" and what not in ("read", "comparing"):
                    own["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        except (UserError, ImportError, torch.OutOfMemoryError) as error:  # its weights are not at hand, or it does not fit
            own = {"error": str(error)}
        found[what, shape] = own
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _timed(work: Callable[[], Any], device: torch.device, units: float, effort: Effort) -> Found:
    """Seconds of a unit of a call's `units`: the median of some calls, behind one that warms up."""
    work()
    raw = []
    for _ in range(effort.times):
        _wait(device)
        before = time.perf_counter()
        work()
        _wait(device)
        raw.append((time.perf_counter() - before) / units)
    return {"seconds": float(np.median(raw)), "raw": raw, "images": units}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count(wanted: int, flops: float | None, device: torch.device, config: Config, effort: Effort) -> int:
    """Images of a call: as a run has them, on a CPU fewer where that would take long."""
    if device.type == "cuda" or not flops:
        return wanted
    return max(1, min(wanted, int(effort.cpu_flops * config.resources.threads / flops)))


def _pixels(config: Config, count: int) -> torch.Tensor:
    size = config.data.image_size
    return torch.randint(0, 256, (count, size, size, config.data.channels), dtype=torch.uint8)


def _training(config: Config, piece: Piece, data: Data, device: torch.device, effort: Effort) -> Found:
    own = estimate.teacher_training(config) if piece.of == "teacher" else config
    spec, train = estimate.transformer_spec(own, data.classes, []), own.train
    rows, sides, tokens = 64, 1 + config.data.flip, (spec.input_size // spec.patch) ** 2
    rng = np.random.default_rng(0)
    shape = (spec.channels, spec.input_size, spec.input_size)
    given = batches.TrainingSet(
        labels=rng.integers(0, data.classes, rows), num_classes=data.classes, flip=config.data.flip,
        vision=rng.integers(-127, 128, (rows, sides, tokens, spec.vision_width), np.int8) if spec.vision_width else None,
        vision_scale=np.ones((rows, sides, tokens), np.float32) if spec.vision_width else None,
        text_states=torch.randn(data.classes, spec.text_tokens, spec.text_width) if spec.text_tokens else None,
        text_mask=torch.ones(data.classes, spec.text_tokens, dtype=torch.long) if spec.text_tokens else None,
        **(
            {"latent_mean": rng.standard_normal((rows, sides, *shape)).astype(np.float16), "latent_std": np.ones((rows, sides, *shape), np.float16)}
            if config.vae.path else {"pixels": rng.integers(0, 256, (rows, spec.input_size, spec.input_size, spec.channels), np.uint8)}
        ),
    )  # fmt: skip
    batch = _count(train.batch_size, piece.flops, device, config, effort)
    micro = min(config.resources.micro_batch or train.batch_size, train.batch_size)
    if batch == train.batch_size:
        raw, micro = _steps(own, spec, given, device, batch, micro, effort)
        return {"seconds": float(np.median(raw)) / batch, "raw": [one / batch for one in raw], "images": batch, "micro_batch": micro}
    # Of fewer images a step the optimizer takes too large a part: two sizes tell it from what each image takes.
    few, more = (_steps(own, spec, given, device, count, micro, effort)[0] for count in (batch, 2 * batch))
    each = (min(more) - min(few)) / batch
    optimizer = max(0.0, min(few) - batch * each)
    seconds = each + optimizer / train.batch_size if each > 0 else min(more) / (2 * batch)
    return {"seconds": float(seconds), "raw": [few, more], "images": batch, "from_steps_of": [batch, 2 * batch]}


def _steps(
    config: Config, spec: TransformerSpec, given: batches.TrainingSet, device: torch.device, batch: int, micro: int, effort: Effort
) -> tuple[list[float], int]:
    """Seconds of training steps of `batch` images, and how many of them at a time: as many as fit, `micro` at most."""
    options = replace(
        config.train, start="", batch_size=batch, num_images=(1 + effort.steps) * batch, log_every=batch, checkpoint_every=10**12, keep_every=0, preview_every=0
    )  # fmt: skip
    micro = min(micro, batch)
    while True:
        log: list[dict[str, Any]] = []
        try:
            loop.train(
                spec, options, given, device=device, micro_batch=micro, recompute=config.resources.recompute, log=log.append,
                checkpoint=lambda step, save: None,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if micro == 1:
                raise UserError(f"a step of one image takes more memory than {device} has") from None
            micro = -(-micro // 2)
            continue
        return [batch / record["images_per_sec"] for record in log[1:]], micro


def _forward(config: Config, piece: Piece, data: Data, device: torch.device, effort: Effort) -> Found:
    spec = estimate.teacher_spec(config, data.classes, [])
    model, score = _network(spec, device), config.score
    t = difficulty.timesteps(spec.kind, score.num_timesteps, score.t_min, score.t_max)
    batch = _count(score.device_batch, piece.flops, device, config, effort)
    t = t[:batch]
    count = max(1, batch // len(t))
    shape = (spec.channels, spec.input_size, spec.input_size)
    with TemporaryDirectory() as folder:
        latent = {"kind": "vae" if config.vae.path else "pixels", "channels": spec.channels, "side": spec.input_size}
        states = {"raw": model.state_dict(), "ema": model.state_dict()}
        weights.save(Path(folder), replace(spec, text_tokens=0), states, {"class_names": [""] * spec.num_classes, "latent": latent}, None)
        teacher = teachers.load(Path(folder), device, score.precision, score.compile)
    z, noise, label = torch.randn(count, *shape), torch.randn(count, len(t), *shape), torch.zeros(count, dtype=torch.int64)
    pairs = -(-count * len(t) // batch) * batch  # the last batch is filled up
    return _timed(lambda: difficulty.errors(teacher, z, label, noise, t, batch), device, pairs, effort)


def _network(spec: TransformerSpec, device: torch.device) -> Transformer:
    return Transformer(spec).eval().requires_grad_(False).to(device)


def _encoding(config: Config, piece: Piece, data: Data, device: torch.device, effort: Effort) -> Found:
    count = _count(config.vae.device_batch, piece.flops, device, config, effort)
    vae, pixels = frozen.Vae(replace(config.vae, device_batch=count), device), _pixels(config, count)
    return _timed(lambda: vae.encode(pixels), device, count, effort)


def _decoding(config: Config, piece: Piece, data: Data, device: torch.device, effort: Effort) -> Found:
    count = _count(config.vae.device_batch, piece.flops, device, config, effort)
    vae = frozen.Vae(replace(config.vae, device_batch=count), device)
    z = torch.randn(count, *vae.latent_shape(config.data.image_size))
    return _timed(lambda: vae.decode(z), device, count, effort)


def _seeing(config: Config, piece: Piece, data: Data, device: torch.device, effort: Effort) -> Found:
    own, grid = config.attach.encoders()[piece.of], estimate.latents_grid(config, [])
    count = _count(own.device_batch, piece.flops, device, config, effort)
    encoder, pixels = vision.load(replace(own, device_batch=count), grid, device, f"attach.{piece.of}"), _pixels(config, count)
    return _timed(lambda: encoder.tokens(pixels, grid), device, count, effort)


def _looking(config: Config, piece: Piece, data: Data, device: torch.device, effort: Effort) -> Found:
    if piece.of == "embed":
        embed = config.embed
        count = _count(embed.device_batch, piece.flops, device, config, effort)
        encoder, pixels = frozen.VisionEncoder(embed.encoder, embed.image_size, device, count), _pixels(config, count)
        return _timed(lambda: encoder.pooled(pixels), device, count, effort)
    count = _count(config.evaluate.device_batch, piece.flops, device, config, effort)
    network, pixels = networks.load(piece.of, replace(config.evaluate, device_batch=count), device), _pixels(config, count)
    return _timed(lambda: network.features(pixels), device, count, effort)


def _sampling(config: Config, piece: Piece, data: Data, device: torch.device, effort: Effort) -> Found:
    spec = estimate.transformer_spec(config, data.classes, [])
    states = mask = None
    if spec.text_tokens:
        states = torch.randn(data.classes, spec.text_tokens, spec.text_width).to(device)
        mask = torch.ones(data.classes, spec.text_tokens, dtype=torch.long).to(device)
    sample = replace(config.sample, steps=min(SAMPLE_STEPS, config.sample.steps))
    indices = torch.arange(sampling.forward_batch(sample, device.type))  # fewer would be filled up
    if device.type == "cpu" and len(indices) * (piece.flops or 0.0) > MOST_CALLS * effort.cpu_flops * config.resources.threads:
        raise UserError("it would take minutes on this CPU; d2c plan counts it by the FLOPs of scoring")
    student = weights.Student(_network(spec, device), {}, states, mask, 1.0)
    return _timed(lambda: sampling.generate(student, sample, indices, None), device, len(indices) * sample.steps, effort)


def _reading(config: Config, rows: pa.Table | None, effort: Effort) -> Found:
    """Of decoding on one core, reading included."""
    cpu = torch.device("cpu")
    if rows is not None:
        some = rows.slice(0, ROWS)
        return _timed(lambda: units.decode_rows(some, config.data, config.storage), cpu, len(some), effort)
    import io

    from PIL import Image

    rng, out = np.random.default_rng(0), io.BytesIO()  # of a photograph's size and, smooth with some noise, about its bytes
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(picture, np.int16) + rng.integers(-8, 9, (375, 500, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(out, format="JPEG", quality=90)
    content, data = out.getvalue(), config.data
    return {
        **_timed(lambda: decode(content, data.image_size, data.channels, data.max_pixels), cpu, 1, replace(effort, times=9)),
        "made_up": True,
    }


def _comparing(config: Config, network: str, data: Data, effort: Effort) -> Found:
    """Of features without meaning, which take as long; of fewer than there are where they are many."""
    evaluate, rng = config.evaluate, np.random.default_rng(0)
    width = networks.facts(network, evaluate)["width"]
    all_real = estimate.images("reference", config, data)
    few = max(2 * data.classes, min(all_real, MOST_MEASURED))
    made = min(config.sample.num_images, MOST_MEASURED)

    def features(count: int) -> np.ndarray:
        return rng.standard_normal((count, width), np.float32)

    started = time.perf_counter()
    measure(
        reference=features(few), reference_labels=np.arange(few) % data.classes, held_out=features(made), held_out_labels=np.arange(made) % data.classes,
        generated=features(made), asked=np.arange(made) % data.classes, subset=features(min(few, 1000)), neighbours=evaluate.neighbours,
        kid_subsets=evaluate.kid_subsets, kid_subset_size=evaluate.kid_subset_size, bootstrap=evaluate.bootstrap, pairs=0,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "raw": [seconds], "images": made, "made": made, "real": few}


# By kind of a piece, what gives its seconds.
WAYS: dict[str, Callable[[Config, Piece, Data, torch.device, Effort], Found]] = {
    "train": _training, "forward": _forward, "sample": _sampling, "encode": _encoding, "decode": _decoding, "vision": _seeing, "network": _looking,
}  # fmt: skip
