"""How long work takes on this machine, measured on the networks themselves with made-up images: what a sweep's hours are planned by.

Weights are random where a network is still to be trained, which costs the same. Several processes measure side by side where as
many will work side by side, since they share the machine's memory and cores.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from d2c_ray import estimate
from d2c_ray.config import Config, ModelConfig, TrainConfig, to_dict
from d2c_ray.evaluate import sampling
from d2c_ray.evaluate.measures import measure
from d2c_ray.models import frozen, latents, networks, teachers, vision, weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.selection import difficulty
from d2c_ray.training import batches, loop

MEASURED = {"unguided": "sample", "reference": "evaluate"}  # stages that do the work of another
ON_ALL = ("score", "embed", "attach", "reference")  # stages that run on all places
TRAIN_STEPS, SAMPLE_STEPS = 3, 2  # of a measurement, behind one that warms up
MOST_MEASURED = 4096  # real images in the features of which measuring is timed; more take longer in proportion
# What a stage takes besides its images, in times that Python takes to import what its workers do: starting Ray's workers, writing,
# waiting. Fitted to finished runs of the presets on two CPU cores.
STARTS = {"manifest": 0.2, "teacher": 3.5, "score": 2.5, "embed": 2.0, "select": 0.2, "union": 0.1, "attach": 2.5, "train": 3.0, "sample": 1.5, "unguided": 1.5, "reference": 2.0, "evaluate": 2.0}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Seconds, of one process of those that work side by side.

    Attributes:
        start: to start Python with all that a worker imports.
        each: an image, by `key`: scored, embedded, attached to, trained on, sampled, looked at by the networks that measure.
        measuring: to compute the measures of one student.
    """

    start: float
    each: dict[str, float]
    measuring: float

    def stage(self, stage: str, config: Config, images: int, places: int = 1) -> float:
        """Seconds of a whole stage; those that all trials wait for have `places` processes."""
        each = self.each.get(key(config, MEASURED.get(stage, stage)), 0.0) / (places if stage in ON_ALL else 1)
        return self.start * STARTS[stage] + images * each + (self.measuring if stage == "evaluate" else 0.0)


def measured(wanted: list[tuple[str, Config]], classes: int, real: int, side_by_side: int) -> Rates:
    """Times stages of configurations, each kind once, in `side_by_side` processes at once; their mean.

    Args:
        classes: of the data. real: images in the reference, which measuring takes time for.
    """
    kinds = {key(config, MEASURED.get(stage, stage)): (MEASURED.get(stage, stage), config) for stage, config in wanted}
    ways = [(name, stage, config) for name, (stage, config) in kinds.items() if stage in WAYS]
    with ProcessPoolExecutor(side_by_side, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = time.perf_counter()
        every = [pool.submit(_measure, ways, classes, real, started, index) for index in range(side_by_side)]
        found = [one.result() for one in every]
    return Rates(
        float(np.mean([one.start for one in found])), {name: float(np.mean([one.each[name] for one in found])) for name, *_ in ways},
        float(np.mean([one.measuring for one in found])),
    )  # fmt: skip


def key(config: Config, stage: str) -> str:
    """What the pace of a stage depends on: configurations with the same have the same."""
    of, data = to_dict(config), _pick(config.data, "image_size", "channels", "flip")
    train = config.train
    said: dict[str, list[Any]] = {
        "teacher": [data, of["vae"], of["teacher"]["model"], _pace(config.teacher.train)],
        "score": [data, of["vae"], of["teacher"]["model"], {**of["score"], "seed": 0}],
        "embed": [data, of["embed"]],
        "attach": [data, of["vae"], of["attach"], config.model.patch],
        "train": [data, of["vae"], of["model"], of["attach"], _pace(train), train.align_weight > 0, train.align_with],
        "sample": [
            data,
            of["vae"],
            of["model"],
            config.attach.text.encoder,
            {**of["sample"], "guidance": config.sample.guidance > 1, "seed": 0},
        ],
        "evaluate": [data, {**of["evaluate"], "seed": 0}, config.sample.num_images],
    }
    return repr(said.get(stage))


def _pace(train: TrainConfig) -> dict[str, Any]:
    return _pick(train, "batch_size", "precision", "compile", "ema_also")


def _pick(section: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}


def _measure(ways: list[tuple[str, str, Config]], classes: int, real: int, started: float, index: int) -> Rates:
    start = time.perf_counter() - started  # the clock is the system's
    device = torch.device("cuda", index % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    each, measuring = {}, 0.0
    for name, stage, config in ways:
        torch.set_num_threads(config.resources.threads)
        torch.manual_seed(0)
        each[name] = WAYS[stage](config, classes, device)
        if stage == "evaluate":
            measuring = max(measuring, _measuring(config, classes, real))
    return Rates(start, each, measuring)


def _timed(work: Callable[[], Any], device: torch.device, times: int = 2) -> float:
    """Seconds of one call: the least of some, behind one that warms up."""
    work()
    least = math.inf
    for _ in range(times):
        _wait(device)
        before = time.perf_counter()
        work()
        _wait(device)
        least = min(least, time.perf_counter() - before)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pixels(config: Config, count: int) -> torch.Tensor:
    size = config.data.image_size
    return torch.randint(0, 256, (count, size, size, config.data.channels), dtype=torch.uint8)


def _spec(config: Config, model: ModelConfig, classes: int, alone: bool) -> TransformerSpec:
    if alone:
        return latents.transformer_spec(model, latents.latent_facts(config), classes, None, 0)
    return estimate.transformer_spec(replace(config, model=model), classes, [])


def _training(config: Config, model: ModelConfig, train: TrainConfig, classes: int, device: torch.device, alone: bool = False) -> float:
    spec = _spec(config, model, classes, alone)
    rows, sides, tokens = 64, 1 + config.data.flip, (spec.input_size // spec.patch) ** 2
    rng = np.random.default_rng(0)
    shape = (spec.channels, spec.input_size, spec.input_size)
    data = batches.TrainingSet(
        labels=rng.integers(0, classes, rows), num_classes=classes, flip=config.data.flip,
        vision=rng.integers(-127, 128, (rows, sides, tokens, spec.vision_width), np.int8) if spec.vision_width else None,
        vision_scale=np.ones((rows, sides, tokens), np.float32) if spec.vision_width else None,
        text_states=torch.randn(classes, spec.text_tokens, spec.text_width) if spec.text_tokens else None,
        text_mask=torch.ones(classes, spec.text_tokens, dtype=torch.long) if spec.text_tokens else None,
        **(
            {"latent_mean": rng.standard_normal((rows, sides, *shape)).astype(np.float16), "latent_std": np.ones((rows, sides, *shape), np.float16)}
            if config.vae.path else {"pixels": rng.integers(0, 256, (rows, spec.input_size, spec.input_size, spec.channels), np.uint8)}
        ),
    )  # fmt: skip
    batch = train.batch_size
    options = replace(
        train, start="", num_images=(1 + TRAIN_STEPS) * batch, log_every=batch, checkpoint_every=10**12, keep_every=0, preview_every=0
    )
    log: list[dict[str, Any]] = []
    loop.train(
        spec, options, data, device=device, micro_batch=config.resources.micro_batch, recompute=config.resources.recompute, log=log.append,
        checkpoint=lambda step, save: None,
    )  # fmt: skip
    return float(np.median([1.0 / record["images_per_sec"] for record in log[1:]]))


def _scoring(config: Config, classes: int, device: torch.device) -> float:
    model = _network(_spec(config, config.teacher.model, classes, alone=True), device)
    t = difficulty.timesteps(model.spec.kind, config.score.num_timesteps, config.score.t_min, config.score.t_max)
    count = max(1, config.score.device_batch // len(t))
    shape = (model.spec.channels, model.spec.input_size, model.spec.input_size)
    with TemporaryDirectory() as folder:
        weights.save(
            Path(folder),
            model.spec,
            {"raw": model.state_dict(), "ema": model.state_dict()},
            {"class_names": [""] * classes, "latent": latents.latent_facts(config)},
            None,
        )
        teacher = teachers.load(Path(folder), device, config.score.precision, config.score.compile)
    z, noise, label = torch.randn(count, *shape), torch.randn(count, len(t), *shape), torch.zeros(count, dtype=torch.int64)
    return _timed(lambda: difficulty.errors(teacher, z, label, noise, t, config.score.device_batch), device) / count + _encoding(
        config, device
    )


def _network(spec: TransformerSpec, device: torch.device) -> Transformer:
    return Transformer(spec).eval().requires_grad_(False).to(device)


def _encoding(config: Config, device: torch.device) -> float:
    if not config.vae.path:
        return 0.0
    vae, pixels = frozen.Vae(config.vae, device), _pixels(config, config.vae.device_batch)
    return _timed(lambda: vae.encode(pixels), device) / len(pixels)


def _embedding(config: Config, classes: int, device: torch.device) -> float:
    embed = config.embed
    encoder, pixels = frozen.VisionEncoder(embed.encoder, embed.image_size, device, embed.device_batch), _pixels(config, embed.device_batch)
    return _timed(lambda: encoder.pooled(pixels), device) / len(pixels)


def _attaching(config: Config, classes: int, device: torch.device) -> float:
    grid, sides = latents.grid_side(latents.latent_facts(config), config.model), 1 + config.data.flip
    total = _encoding(config, device) * sides
    for column, options in config.attach.encoders().items():
        if options.encode == "ahead":
            encoder, pixels = vision.load(options, grid, device, f"attach.{column}"), _pixels(config, options.device_batch)
            total += sides * _timed(partial(encoder.tokens, pixels, grid), device) / len(pixels)
    return total


def _sampling(config: Config, classes: int, device: torch.device) -> float:
    spec = _spec(config, config.model, classes, alone=False)
    text = (
        (torch.randn(classes, spec.text_tokens, spec.text_width), torch.ones(classes, spec.text_tokens, dtype=torch.long))
        if spec.text_tokens
        else (None, None)
    )
    states, mask = (None if part is None else part.to(device) for part in text)
    student = weights.Student(_network(spec, device), {}, states, mask, 1.0)
    steps = min(SAMPLE_STEPS, config.sample.steps)
    vae = frozen.Vae(config.vae, device) if config.vae.path else None
    indices = torch.arange(sampling.forward_batch(config.sample, device.type))
    few = _timed(lambda: sampling.generate(student, replace(config.sample, steps=steps), indices, vae), device)
    none = 0.0
    if vae is not None:
        z = torch.randn(len(indices), spec.channels, spec.input_size, spec.input_size)
        none = _timed(lambda: vae.decode(z), device)  # once an image, however many steps there are
    return (none + (few - none) * config.sample.steps / steps) / len(indices)


def _looking(config: Config, classes: int, device: torch.device) -> float:
    total = 0.0
    for name in networks.names(config.evaluate):
        network, pixels = networks.load(name, config.evaluate, device), _pixels(config, config.evaluate.device_batch)
        total += _timed(partial(network.features, pixels), device) / len(pixels)
    return total


def _measuring(config: Config, classes: int, real: int) -> float:
    """Of features without meaning, which take as long; of fewer real images than there are where they are many."""
    evaluate, rng = config.evaluate, np.random.default_rng(0)
    width = networks.facts(evaluate.network, evaluate)["width"]
    few = max(2 * classes, min(real, MOST_MEASURED))
    made = min(config.sample.num_images, MOST_MEASURED)

    def features(count: int) -> np.ndarray:
        return rng.standard_normal((count, width), np.float32)

    started = time.perf_counter()
    measure(
        reference=features(few), reference_labels=np.arange(few) % classes, held_out=features(made), held_out_labels=np.arange(made) % classes,
        generated=features(made), asked=np.arange(made) % classes, subset=features(min(few, 1000)), neighbours=evaluate.neighbours,
        kid_subsets=evaluate.kid_subsets, kid_subset_size=evaluate.kid_subset_size, bootstrap=evaluate.bootstrap, pairs=0,
    )  # fmt: skip
    more = max(real / few, config.sample.num_images / made)
    return (time.perf_counter() - started) * len(networks.names(evaluate)) * max(1.0, more)


def _teaching(config: Config, classes: int, device: torch.device) -> float:
    return _training(config, config.teacher.model, config.teacher.train, classes, device, alone=True)


def _learning(config: Config, classes: int, device: torch.device) -> float:
    return _training(config, config.model, config.train, classes, device)


# By stage, what gives its seconds an image.
WAYS: dict[str, Callable[[Config, int, torch.device], float]] = {
    "teacher": _teaching,
    "score": _scoring,
    "embed": _embedding,
    "attach": _attaching,
    "train": _learning,
    "sample": _sampling,
    "evaluate": _looking,
}
