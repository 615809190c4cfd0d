"""The condensed dataset as a thing one holds: its provenance, card, checks and exports, and that other tools read it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from d2c_ray import schema
from d2c_ray.config import DataConfig, StorageConfig, VaeConfig
from d2c_ray.data import attached, decode, export, manifest, provenance, tables, units, verify
from d2c_ray.errors import UserError
from d2c_ray.models import frozen
from d2c_ray.report import card

from d2c_ray.training.batches import dequantise

CPU = torch.device("cpu")
GRID, SEEN, ROWS_PER_PART, DEVICE_BATCH = 4, 64, 9, 8


def read_rows(source: Path, count: int, pattern: str = "train-000.parquet", size: int = 32) -> tuple[pa.Table, list[str]]:
    """The first decoded rows of a source, with their encoded images, and the class names."""
    data = DataConfig(path=str(source), pattern=pattern, image_size=size)
    options, silent, listing = StorageConfig(), type("Silent", (), {"advance": lambda self, n: None})(), manifest.Listing()
    found = manifest.find(data, options)
    table = pa.concat_tables(list(manifest.scan(found, data, options, listing, 10_000, silent)))
    return units.decode_rows(table.slice(0, count), data, options, keep_bytes=True)[0], listing.class_names(found, data, options)


def write_artefact(
    folder: Path, rows: pa.Table, names: list[str], *, flip: bool = True, vae: Path | None = None, storage: str = "int8",
    encoder: str = "efficientnet-lite0", text: bool = True,
) -> Path:  # fmt: skip
    """A condensed dataset in exactly the form that attach leaves, of real images and real encodings."""
    folder.mkdir(parents=True)
    pixels = torch.from_numpy(units.pixels_of(rows))
    sides = [pixels, pixels.flip(2)] if flip else [pixels]
    tensors: dict[str, np.ndarray] = {}
    latent: dict[str, Any] = {"kind": "pixels", "channels": pixels.shape[3], "side": pixels.shape[1]}
    if vae is None:
        tensors["pixels"] = pixels.numpy()
    else:
        network = frozen.Vae(VaeConfig(path=str(vae), device_batch=DEVICE_BATCH), CPU)
        mean, std = attached.posterior(pixels, network, flip)
        tensors["latent_mean"], tensors["latent_std"] = mean.half().numpy(), std.half().numpy()
        facts = frozen.vae_facts(str(vae), "")
        latent = {"kind": "vae", "channels": mean.shape[2], "side": mean.shape[3], "scale": facts["scale"], "shift": facts["shift"]}
        latent |= {"vae": facts["hash"], "encoder": facts["encoder"]}
    vision, cosine = {}, {}
    if encoder != "none":
        model = frozen.VisionEncoder(encoder, SEEN, CPU, DEVICE_BATCH)
        tokens = torch.stack([model.tokens(side, GRID) for side in sides], 1)
        if storage == "int8":
            tensors["vision"], tensors["vision_scale"] = frozen.quantise(tokens.numpy())
        else:
            tensors["vision"] = tokens.bfloat16().view(torch.int16).numpy().view(np.uint16)
        stored = dequantise(tensors["vision"], tensors.get("vision_scale"))
        cosine = {"vision": float(F.cosine_similarity(stored, tokens, dim=-1).min())}
        vision["vision"] = {
            "encoder": encoder, "weights": frozen.file_hash(frozen.weights_file(encoder)), "width": model.width, "image_size": SEEN,
            "precision": "fp32", "device_batch": DEVICE_BATCH, "storage": storage, "cosine_min": cosine["vision"],
        }  # fmt: skip
    kinds = {name: (str(values.dtype), values.shape[1:]) for name, values in tensors.items()}
    plain = [pa.field("sample_id", pa.int64()), pa.field("key", pa.string()), pa.field("label", pa.int64())]
    image = pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))
    fields = pa.schema([*plain, image, *tables.arrow_schema(dict.fromkeys(tensors, "tensor"), kinds)])
    fields = fields.with_metadata({provenance.HUB: provenance.hub_features(fields, names)})
    keys = rows.column("key").to_pylist()
    images = [{"bytes": content, "path": key} for content, key in zip(rows.column("image").to_pylist(), keys, strict=True)]
    whole = pa.table(
        [*(rows.column(field.name).cast(field.type) for field in plain), pa.array(images, image.type)]
        + [tables.tensor_column(values) for values in tensors.values()],
        schema=fields,
    )
    for part, start in enumerate(range(0, len(whole), ROWS_PER_PART)):
        some = whole.slice(start, ROWS_PER_PART)
        facts = {"rows": len(some), "rejected": [], "device": "cpu", "cosine": cosine}
        tables.write(folder / f"part-{part:06d}.parquet", some, facts)
    prompts = [f"a photo of a {name}" if text else "" for name in names]
    states = frozen.encode_text("minilm", prompts, 8) if text else None
    attached.write_classes(folder / "classes.parquet", names, prompts, states)
    labels = rows.column("label").to_numpy()
    chosen = {"images": len(rows), "selector": "interval", "budget": len(rows), "f": 0.75, "share": len(rows) / 5000}
    chosen |= {"scores": "scores-01234567", "num_classes": len(set(labels.tolist())), "shortfall": 0}
    position = [int((labels[:row] == label).sum()) for row, label in enumerate(labels)]
    selection = {
        "sample_id": rows.column("sample_id"), "key": rows.column("key"), "label": rows.column("label"), "rank": pa.array(position),
        "score": pa.array(np.linspace(0.1, 0.9, len(rows)).astype(np.float32)), "class_size": pa.array([500] * len(rows)), "position": pa.array(position),
    }  # fmt: skip
    wanted = tables.arrow_schema(schema.SELECTION)
    tables.write(
        folder / "selection.parquet",
        pa.table(
            [
                pa.chunked_array(selection[n]).cast(wanted.field(n).type)
                if isinstance(selection[n], pa.ChunkedArray)
                else selection[n].cast(wanted.field(n).type)
                for n in wanted.names
            ],
            schema=wanted,
        ),
        chosen,
    )
    tables.write(folder / "rows.parquet", rows.select(["sample_id", "key"]), {})
    described = provenance.write(
        folder, fingerprint="0123abcd", rows=len(rows), class_names=names, flip=flip, latent=latent, grid=GRID, vision=vision, selection=chosen,
        data={"source": "parquet", "path": "/data/cifar10", "image_size": 32, "channels": 3},
        vae={"path": str(vae), "subfolder": "", "precision": "fp32", "device_batch": DEVICE_BATCH} if vae else None,
        text={
            "encoder": "minilm", "weights": frozen.file_hash(frozen.weights_file("minilm")), "width": 384, "tokens": 8,
            "template": "a photo of a {name}", "precision": "fp32", "device_batch": 8,
        } if text else None,
        cost_seconds={"teacher": 3600.0, "score": 120.5, "select": 0.4, "attach": 61.0},
        versions={"python": "3.11", "pillow": __import__("PIL").__version__, "commit": "abc1234"},
    )  # fmt: skip
    facts = {"class_names": names, "labels": sorted(set(labels.tolist())), "flip": flip, "latent": latent, "fingerprint": "0123abcd"}
    success = {
        "stage": "attach",
        "fingerprint": "0123abcd",
        "rows_in": len(rows),
        "rows_done": len(rows),
        "rows_rejected": 0,
        "seconds": 61.0,
        "facts": facts,
    }
    card.write(folder, described)
    (folder / "_SUCCESS.json").write_text(json.dumps(success))
    return folder
