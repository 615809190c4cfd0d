"""The actors: load once, convert, call the pure function. Importable, with small constructor arguments."""

import json
import platform
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2c_ray import metrics
from d2c_ray.config import (
    DataConfig,
    EmbedConfig,
    EvaluateConfig,
    SampleConfig,
    ScoreConfig,
    StorageConfig,
    VaeConfig,
    VisionConfig,
    encoder_key,
)
from d2c_ray.data import attached, generated, latent_cache, measured, tables, units
from d2c_ray.data.decode import decode
from d2c_ray.distributed.ingest import pack, unpack
from d2c_ray.evaluate import sampling
from d2c_ray.models import frozen, networks, teachers, weights
from d2c_ray.models import vision as encoders_of_images
from d2c_ray.selection import difficulty


class Scorer:
    """Difficulty errors of decoded images; keeps their latents too where it is asked to."""

    def __init__(
        self, teacher: str, class_map: list[int], vae: VaeConfig, score: ScoreConfig, flip: bool, latents: str, device: str, threads: int
    ):
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.score, self.flip = score, flip
        self.latents = Path(latents) if latents else None
        self.class_map = np.asarray(class_map, np.int64)
        target = torch.device(device)
        self.teacher = teachers.load(teachers.resolve(teacher), target, score.precision, score.compile)
        self.vae = frozen.Vae(vae, target) if vae.path else None
        self.t = difficulty.timesteps(self.teacher.kind, score.num_timesteps, score.t_min, score.t_max)
        self.clock = Clock(hardware(target))

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        table = unpack(batch.column("payload"))
        with self.clock.computing(len(table)):
            errors = self._errors(table) if len(table) else np.zeros((0, len(self.t)), np.float32)
        result = table.select(["sample_id", "key", "label", "shard"])
        column = pa.FixedSizeListArray.from_arrays(pa.array(errors.reshape(-1)), len(self.t))
        metadata = {**table.schema.metadata, b"clock": json.dumps(self.clock.facts()).encode()}
        return pack(unit, result.append_column("errors", column).replace_schema_metadata(metadata))

    def _errors(self, table: pa.Table) -> np.ndarray:
        pixels = torch.from_numpy(units.pixels_of(table))
        label = torch.from_numpy(self.class_map[np.maximum(table.column("label").to_numpy(), 0)])
        noise = torch.from_numpy(tables.tensor_values(table, "noise"))  # as it lies in the object store: only read
        if self.vae is not None and self.latents is not None:
            mean, std = attached.posterior(pixels, self.vae, self.flip)
            latent_cache.write(self.latents, table, attached.halved(mean, std))
            z = attached.scaled(mean[:, 0], self.vae)
        else:
            z = attached.model_input(pixels, self.vae)
        return difficulty.errors(self.teacher, z, label, noise, self.t, self.score.device_batch).numpy()


class FeatureExtractor:
    """Pooled features of decoded images."""

    def __init__(self, embed: EmbedConfig, device: str, threads: int):
        torch.set_num_threads(threads)
        target = torch.device(device)
        self.encoder = frozen.VisionEncoder(embed.encoder, embed.image_size, target, embed.device_batch)
        self.clock = Clock(hardware(target))

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        table = unpack(batch.column("payload"))
        with self.clock.computing(len(table)):
            features = self.encoder.pooled(torch.from_numpy(units.pixels_of(table))).numpy().astype(np.float16)
        fields = tables.arrow_schema({"features": "tensor"}, {"features": ("float16", features.shape[1:])})
        result = table.select(["sample_id", "key", "label", "shard"]).append_column(
            fields.field("features"), tables.tensor_column(features)
        )
        metadata = {**table.schema.metadata, b"clock": json.dumps(self.clock.facts()).encode()}
        return pack(unit, result.replace_schema_metadata(metadata))


class Clock:
    """How much of an actor's time it computes, told with every result and as metrics."""

    def __init__(self, hardware: str):
        self.hardware = hardware
        self.actor = uuid.uuid4().hex
        self.first = self.last = self.seconds = 0.0

    @contextmanager
    def computing(self, images: int) -> Iterator[None]:
        start = time.monotonic()
        self.first = self.first or start
        yield
        self.last = time.monotonic()
        self.seconds += self.last - start
        metrics.tell("d2c_images", images)
        metrics.tell("d2c_actor_busy_share", self.seconds / max(self.last - self.first, 1e-9))

    def facts(self) -> dict[str, Any]:
        return {"actor": self.actor, "device": self.hardware, "span": self.last - self.first, "seconds": self.seconds}


class Busy:
    """The driver's side of `Clock`: over all actors, the share of time they computed."""

    def __init__(self) -> None:
        self._actors: dict[str, dict[str, Any]] = {}

    def add(self, result: pa.Table) -> dict[str, Any]:
        """Reads the clock that came with a result."""
        facts = json.loads(result.schema.metadata[b"clock"])
        self._actors[facts["actor"]] = facts
        return facts

    def share(self) -> float:
        """Seconds computed over seconds between the first and the last batch, of all actors."""
        span = sum(facts["span"] for facts in self._actors.values())
        return sum(facts["seconds"] for facts in self._actors.values()) / span if span else 0.0

    def note(self) -> str:
        return f"{len(self._actors)} actor{'s' if len(self._actors) != 1 else ''}, {self.share():.0%} busy"


def hardware(device: torch.device) -> str:
    """The kind of hardware that the last bits of a result depend on: the GPU, or the CPU's instruction set that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


class Attacher:
    """Adds what some encoders say of decoded images; the last of a chain writes one Parquet part a unit."""

    def __init__(
        self,
        encoders: tuple[str, ...],
        writes: bool,
        out: str,
        vae: VaeConfig,
        vision: dict[str, VisionConfig],
        int8: dict[str, bool],
        grid: int,
        flip: bool,
        latents: str,
        latents_device: str,
        weights: dict[str, str],
        keep_pixels: bool,
        class_names: list[str] | None,
        device: str,
        threads: int,
    ):
        """
        Args:
            encoders: 'latent' and columns of `vision` that this actor adds.
            writes: the rows as a part under `out`; otherwise they go on with what was added.
            int8: by column, whether tokens are stored in int8.
            grid: side of the student's token grid.
            latents: folder of latents that scoring kept, on `latents_device`; empty: encode.
            weights: hashes of the encoders' weights as planned: a node may hold another snapshot of a hub name.
            keep_pixels: write the decoded pixels too: they are what the model sees, or encoded while it trains.
            class_names: of parts that ship; None: of a teacher's.
        """
        torch.set_num_threads(threads)
        target = torch.device(device)
        self.writes, self.out, self.class_names, self.hardware = writes, Path(out), class_names, hardware(target)
        self.keep_pixels = keep_pixels
        self.grid, self.flip, self.int8, self.options = grid, flip, int8, vision
        self.latents, self.latents_device = Path(latents) if latents else None, latents_device
        self.vae, self.vision = None, {}
        for column in encoders:
            if column == "latent":
                frozen.check_weights("vae.path", frozen.encoder_hash(vae.path, vae.subfolder), weights[column])
                self.vae = frozen.Vae(vae, target)
            else:
                key = encoder_key(column)
                frozen.check_weights(f"{key}.encoder", encoders_of_images.facts(vision[column], grid, key)["weights"], weights[column])
                self.vision[column] = encoders_of_images.load(vision[column], grid, target, key)
        self.clock = Clock(self.hardware)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        table = unpack(batch.column("payload"))
        with self.clock.computing(len(table)):
            table = self._add(table)
        if not self.writes:
            return pack(unit, table)
        storage = {column: "int8" if int8 else "bf16" for column, int8 in self.int8.items()}
        facts = {"rejected": json.loads(table.schema.metadata[b"rejected"]), "storage": storage}
        kept = table if self.keep_pixels else table.drop_columns("pixels")
        facts = attached.write(self.out / f"part-{json.loads(unit)['unit']:06d}.parquet", kept, facts, self.class_names)
        return pack(unit, pa.table({"rows": [facts["rows"]]}).replace_schema_metadata({b"clock": json.dumps(self.clock.facts()).encode()}))

    def _add(self, table: pa.Table) -> pa.Table:
        pixels = torch.from_numpy(units.pixels_of(table))
        if self.vae is not None:
            kept = latent_cache.read(self.latents, table, self.flip) if self.latents else None
            found = kept or attached.latents(pixels, self.vae, self.flip)
            table = attached.add(table, found, devices=[self.latents_device if kept else self.hardware])
        for column, encoder in self.vision.items():
            found, cosine = attached.tokens(
                pixels, encoder, self.grid, self.flip, self.int8[column], column, self.options[column].device_batch
            )
            table = attached.add(table, found, {column: cosine}, [self.hardware])
        return table


class Sampler:
    """Generated images, or what the networks that measure see in them, written as one Parquet part a unit."""

    def __init__(
        self,
        model: str,
        out: str,
        sample: SampleConfig,
        vae: VaeConfig,
        evaluate: EvaluateConfig,
        networks: dict[str, str],
        device: str,
        threads: int,
    ):
        """
        Args:
            networks: to keep the features of in place of images, as `Measurers` takes them; none: images are kept.
        """
        torch.set_num_threads(threads)
        target = torch.device(device)
        self.out, self.sample = Path(out), sample
        self.student = weights.load(Path(model), sample.weights, target)
        self.vae = frozen.Vae(vae, target) if vae.path else None
        self.networks = Measurers(networks, evaluate, target) if networks else None
        self.clock = Clock(hardware(target))

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        with self.clock.computing(unit["stop"] - unit["start"]):
            return self._run(unit)

    def _run(self, unit: dict[str, Any]) -> dict[str, Any]:
        indices = torch.arange(unit["start"], unit["stop"])
        labels, pixels = sampling.generate(self.student, self.sample, indices, self.vae)
        if self.networks is None:
            table = generated.part(indices.numpy(), labels.numpy(), pixels.numpy())
        else:
            table = generated.part_of_features(indices.numpy(), labels.numpy(), self.networks.see(pixels.numpy()))
        tables.write(self.out / f"part-{unit['unit']:06d}.parquet", table, {"unit": unit})
        return {"rows": len(table)}


class Embedder:
    """Features of images in the networks that measure them, written as one Parquet part a unit; an image is decoded once for all networks."""

    def __init__(
        self, evaluate: EvaluateConfig, data: DataConfig, storage: StorageConfig, weights: dict[str, str], device: str, threads: int
    ):
        """
        Args:
            weights: of the networks, as `Measurers` takes them.
        """
        torch.set_num_threads(threads)
        self.data, self.storage, self.hardware = data, storage, hardware(torch.device(device))
        self.networks = Measurers(weights, evaluate, torch.device(device))
        self.clock = Clock(self.hardware)

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """A unit of manifest-shaped rows, their mirror images, or a part of generated images; gives the facts of the part it wrote."""
        rejected: list[dict[str, str]] = []
        if "samples" in unit:
            table = tables.read(Path(unit["samples"]))
            pixels = np.stack(
                [
                    decode(image, self.data.image_size, self.data.channels, self.data.max_pixels)
                    for image in table.column("image").to_pylist()
                ]
            )
            ids = table.column("index")
        else:
            table, rejected = units.decode_rows(units.read_rows(unit), self.data, self.storage)
            pixels, ids = units.pixels_of(table), table.column("sample_id")
            if unit["mirrored"]:  # N x H x W x C
                pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        with self.clock.computing(len(pixels)):
            features = self.networks.see(pixels)
        seen = measured.table(ids.to_numpy(), table.column("label").to_numpy(), features)
        facts = {"unit": unit, "rows": len(seen), "rejected": rejected, "device": self.hardware}
        tables.write(Path(unit["part"]), seen, facts)
        return facts


class Measurers:
    """The networks that images are measured in, loaded."""

    def __init__(self, weights: dict[str, str], evaluate: EvaluateConfig, device: torch.device):
        """
        Args:
            weights: hash of each network's weights as planned: a node may hold another snapshot of a hub name.
        """
        self._networks = {}
        for name, planned in weights.items():
            facts = networks.facts(name, evaluate)
            frozen.check_weights(f"evaluate: {name}", facts["weights"], planned)
            self._networks[facts["network"]] = networks.load(name, evaluate, device)

    def see(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Features of uint8 N x H x W x C by what the network is called, and probabilities where one gives them: N x D float32 each."""
        tensors: dict[str, np.ndarray] = {}
        for name, network in self._networks.items():
            tensors[name], probabilities = network.both(pixels)
            if probabilities is not None:
                tensors[measured.PROBABILITIES] = probabilities
        return tensors
