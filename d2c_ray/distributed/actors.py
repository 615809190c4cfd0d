"""The actors: load once, convert, call the pure function. Importable, with small constructor arguments."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2c_ray.config import AttachConfig, DataConfig, EvaluateConfig, SampleConfig, ScoreConfig, VaeConfig
from d2c_ray.data import condensed, tables, units
from d2c_ray.data.decode import decode, encode_png
from d2c_ray.distributed.ingest import pack, unpack
from d2c_ray.evaluate import sampling
from d2c_ray.models import frozen, weights
from d2c_ray.selection import difficulty


class Scorer:
    """Difficulty errors of decoded images."""

    def __init__(self, teacher: str, vae: VaeConfig, score: ScoreConfig, device: str, threads: int):
        torch.set_num_threads(threads)
        self.score, self.device = score, torch.device(device)
        self.teacher = weights.load(Path(teacher), device=self.device)
        self.vae = frozen.Vae(vae, self.device) if vae.path else None
        self.t = difficulty.timesteps(self.teacher.spec.kind, score.num_timesteps, score.t_min, score.t_max)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        table = unpack(batch.column("payload")[0])
        z = condensed.model_input(torch.from_numpy(units.pixels_of(table)), self.vae)
        label = torch.from_numpy(table.column("label").to_numpy().astype(np.int64)).clamp(min=0)
        noise = torch.from_numpy(np.array(tables.tensor_values(table, "noise")))
        if len(table):
            errors = difficulty.errors(
                self.teacher, z, label, noise, self.t, self.score.device_batch, self.score.precision == "bf16"
            ).numpy()
        else:
            errors = np.zeros((0, len(self.t)), np.float32)
        result = table.select(["sample_id", "key", "label", "shard"])
        column = pa.FixedSizeListArray.from_arrays(pa.array(errors.reshape(-1)), len(self.t))
        return pack(unit, result.append_column("errors", column).replace_schema_metadata(table.schema.metadata))


class Attacher:
    """Latents and vision tokens of decoded images, written as one Parquet part a unit."""

    def __init__(self, out: str, vae: VaeConfig, attach: AttachConfig, grid: int, flip: bool, keep_images: bool, device: str, threads: int):
        torch.set_num_threads(threads)
        self.out, self.attach, self.grid, self.flip, self.keep_images = Path(out), attach, grid, flip, keep_images
        target = torch.device(device)
        vision = attach.vision
        self.vae = frozen.Vae(vae, target) if vae.path else None
        self.vision = (
            frozen.VisionEncoder(vision.encoder, vision.image_size, target, vision.device_batch) if vision.encoder != "none" else None
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        table = unpack(batch.column("payload")[0])
        rejected = json.loads(table.schema.metadata[b"rejected"])
        facts = condensed.write_part(
            self.out / f"part-{json.loads(unit)['unit']:06d}.parquet", table, torch.from_numpy(units.pixels_of(table)), rejected,
            vae=self.vae, vision=self.vision, grid=self.grid, flip=self.flip, storage=self.attach.vision.storage, keep_images=self.keep_images,
        )  # fmt: skip
        return pack(unit, pa.table({"facts": [json.dumps(facts)]}))


class Sampler:
    """Generated images, written as one Parquet part a unit."""

    def __init__(self, model: str, out: str, sample: SampleConfig, vae: VaeConfig, device: str, threads: int):
        torch.set_num_threads(threads)
        self.out, self.sample = Path(out), sample
        self.student = weights.load(Path(model), sample.weights, torch.device(device))
        self.vae = frozen.Vae(vae, torch.device(device)) if vae.path else None

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        indices = torch.arange(unit["start"], unit["stop"])
        labels, pixels = sampling.generate(self.student, self.sample, indices, self.vae)
        table = pa.table(
            {
                "index": pa.array(indices.numpy()),
                "label": pa.array(labels.numpy().astype(np.int32)),
                "image": pa.array([encode_png(image) for image in pixels.numpy()], pa.binary()),
            }
        )
        tables.write(self.out / f"part-{unit['unit']:06d}.parquet", table, {"unit": unit})
        return {"rows": len(table)}


class Embedder:
    """Pooled features of images in the network that measures them."""

    def __init__(self, evaluate: EvaluateConfig, data: DataConfig, device: str, threads: int):
        torch.set_num_threads(threads)
        self.data = data
        self.encoder = frozen.VisionEncoder(evaluate.network, evaluate.image_size, torch.device(device), evaluate.device_batch)

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Features of a unit of manifest-shaped rows, or of a part of generated images: ids, labels, features, rejected."""
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
            table, rejected = units.decode_rows(units.read_rows(unit), self.data)
            pixels, ids = units.pixels_of(table), table.column("sample_id")
        features = self.encoder.pooled(torch.from_numpy(pixels)).numpy() if len(pixels) else np.zeros((0, self.encoder.width), np.float32)
        return {"id": ids.to_numpy(), "label": table.column("label").to_numpy(), "features": features, "rejected": rejected}
