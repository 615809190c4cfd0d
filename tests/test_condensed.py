"""The condensed dataset: what is stored equals a fresh encoding, and opens for training."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from d2c_ray.config import DataConfig, StorageConfig, TextConfig, VaeConfig
from d2c_ray.data import attached, condensed, manifest, tables, units
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, text
from d2c_ray.training.batches import dequantise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    )
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder


def real_rows(cifar10: Path, count: int) -> tuple[pa.Table, DataConfig]:
    data = DataConfig(path=str(cifar10), pattern="train-000.parquet", image_size=32)
    options, silent = StorageConfig(), type("Silent", (), {"advance": lambda self, n: None})()
    table = next(manifest.scan(manifest.find(data, options), data, options, manifest.Listing(), 10_000, silent))
    return units.decode_rows(table.slice(0, count), data, options, keep_bytes=True)[0], data


def write(
    folder: Path, rows: pa.Table, vae: frozen.Vae | None = None, vision: frozen.VisionEncoder | None = None, storage: str = "int8"
) -> None:
    """Two parts, both flips on a grid of 4 x 4, and the mark of a finished stage."""
    half = len(rows) // 2
    for index, part in enumerate((rows.slice(0, half), rows.slice(half))):
        pixels = torch.from_numpy(units.pixels_of(part))
        if vae is not None:
            part = attached.add(part.drop_columns("pixels"), attached.latents(pixels, vae, True))
        if vision is not None:
            found, cosine = attached.tokens(pixels, vision, 4, True, storage == "int8", "vision", 4)
            part = attached.add(part, found, {"vision": cosine})
        attached.write(folder / f"part-{index:06d}.parquet", part, {"rejected": []}, [str(i) for i in range(10)])
    facts = {"class_names": [str(i) for i in range(10)], "flip": True, "latent": {"kind": "pixels"}, "fingerprint": folder.name}
    (folder / "_SUCCESS.json").write_text(json.dumps({"facts": facts}))


@pytest.mark.parametrize(("storage", "least"), [("int8", 0.999), ("bf16", 0.99999)])
def test_tokens_read_back_equal_a_fresh_encoding_of_both_flips(cifar10: Path, tmp_path: Path, storage: str, least: float) -> None:
    rows, _ = real_rows(cifar10, 10)
    encoder = frozen.VisionEncoder("efficientnet-lite0", 64, CPU, 4)
    write(tmp_path, rows, vision=encoder, storage=storage)
    opened = condensed.open(tmp_path, tmp_path / "cache")
    pixels = torch.from_numpy(units.pixels_of(rows))
    assert opened.arrays["vision"].shape == (10, 2, 16, 1280)
    for side, image in enumerate((pixels, pixels.flip(2))):
        scale = opened.arrays["vision_scale"][:, side] if storage == "int8" else None
        stored = dequantise(np.array(opened.arrays["vision"][:, side]), scale)
        fresh = encoder.tokens(image, 4)
        assert F.cosine_similarity(stored, fresh, dim=-1).min() > least
        assert (stored - fresh).abs().max() <= fresh.abs().max() / 127
    assert np.array_equal(opened.arrays["pixels"], pixels.numpy())
    assert opened.labels.tolist() == rows.column("label").to_pylist()


class Given:
    """An encoder that says what it is told."""

    width = 4

    def __init__(self, tokens: torch.Tensor):
        self.given = tokens

    def tokens(self, pixels: torch.Tensor, side: int) -> torch.Tensor:
        return self.given[pixels[:, 0, 0, 0].long()]


def test_tokens_that_are_no_numbers_are_refused_wherever_they_come() -> None:
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 2, 2, 3)
    tokens = torch.randn(6, 1, 4)
    attached.tokens(pixels, Given(tokens), 1, True, True, "vision", 2)
    for row in (0, 5):
        bad = tokens.clone()
        bad[row, 0, 1] = float("nan")
        with pytest.raises(UserError, match=r"attach\.also\.large are not finite for 1 of 2 images; attach\.also\.large\.precision=fp32"):
            attached.tokens(pixels, Given(bad), 1, True, True, "vision_large", 2)
    with pytest.raises(UserError, match=r"posterior \(latent_std\) are not finite for 1 of 6 images; vae\.precision=fp32"):
        attached.halved(torch.zeros(6, 2), torch.tensor([0.0] * 5 + [1e6])[:, None].expand(6, 2))


def test_a_token_of_zeros_loses_nothing() -> None:
    pixels = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    found, cosine = attached.tokens(pixels, Given(torch.zeros(1, 1, 4)), 1, False, True, "vision", 1)
    assert cosine == 1.0
    assert not found["vision"].any()


def test_latents_read_back_equal_a_fresh_encoding(cifar10: Path, tmp_path: Path, tiny_vae: Path) -> None:
    rows, _ = real_rows(cifar10, 6)
    vae = frozen.Vae(VaeConfig(path=str(tiny_vae), device_batch=4), CPU)
    write(tmp_path, rows, vae=vae)
    arrays = condensed.open(tmp_path, tmp_path / "cache").arrays
    pixels = torch.from_numpy(units.pixels_of(rows))
    for side, image in enumerate((pixels, pixels.flip(2))):
        mean, std = vae.encode(image)
        assert np.allclose(arrays["latent_mean"][:, side], mean, atol=2e-3)
        assert np.allclose(arrays["latent_std"][:, side], std, rtol=2e-3)
    assert vae.decode((vae.encode(pixels)[0] - vae.shift) * vae.scale).shape == pixels.shape


def test_parquet_is_readable_without_this_package(cifar10: Path, tmp_path: Path) -> None:
    rows, _ = real_rows(cifar10, 4)
    write(tmp_path, rows)
    table = pq.read_table(tmp_path / "part-000000.parquet")
    field = table.schema.field("pixels")
    shape = json.loads(field.metadata[b"shape"])
    first = np.frombuffer(table.column("pixels")[0].as_py(), field.metadata[b"dtype"].decode()).reshape(shape)
    assert np.array_equal(first, units.pixels_of(rows)[0])
    assert table.column("image")[0].as_py()["bytes"][:2] == b"\xff\xd8", "the encoded bytes as the source had them"


def test_cache_is_built_once_and_dropped(cifar10: Path, tmp_path: Path) -> None:
    rows, _ = real_rows(cifar10, 4)
    write(tmp_path / "data", rows) if (tmp_path / "data").mkdir() is None else None
    first = condensed.open(tmp_path / "data", tmp_path / "cache").arrays["pixels"]
    (cache,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    built = (cache / "pixels.npy").stat().st_mtime_ns
    condensed.open(tmp_path / "data", tmp_path / "cache")
    assert (cache / "pixels.npy").stat().st_mtime_ns == built
    condensed.drop_cache(tmp_path / "data", tmp_path / "cache")
    assert not cache.exists()
    assert np.array_equal(first, units.pixels_of(rows)), "what is open stays readable"


def test_an_unfinished_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished condensed dataset"):
        condensed.open(tmp_path)


def test_class_table_reads_back(tmp_path: Path) -> None:
    states, mask = text.encode(TextConfig(encoder="minilm"), ["a photo of a cat", "a photo of a dog"], CPU)
    assert states.shape == (2, 16, 384)
    assert mask.sum(1).tolist() == [7, 7]
    attached.write_classes(tmp_path / "classes.parquet", ["cat", "dog"], ["a", "b"], (states, mask))
    again, again_mask = condensed.read_text(tmp_path / "classes.parquet")
    assert F.cosine_similarity(again.flatten(1), states.flatten(1)).min() > 0.9999
    assert torch.equal(again_mask, mask)
    attached.write_classes(tmp_path / "none.parquet", ["cat"], [""], None)
    assert condensed.read_text(tmp_path / "none.parquet") is None


def test_tensor_columns_survive_slices_and_chunks() -> None:
    values = np.arange(24, dtype=np.int16).reshape(6, 2, 2)
    fields = tables.arrow_schema({"x": "tensor"}, {"x": ("int16", (2, 2))})
    table = pa.table([tables.tensor_column(values)], schema=fields)
    assert np.array_equal(tables.tensor_values(table.slice(2, 3), "x"), values[2:5])
    assert np.array_equal(tables.tensor_values(pa.concat_tables([table.slice(4), table.slice(0, 2)]), "x"), values[[4, 5, 0, 1]])
