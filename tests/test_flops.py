"""Multiply-adds against what torch counts and what was published; peaks against the names devices have."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from d2c_ray.config import MODEL_SIZES
from d2c_ray.models.flops import dense_peak, forward_macs
from d2c_ray.models.transformer import Transformer, TransformerSpec

PUBLISHED = {  # arXiv 2212.09748, Table 4: Gflops of a 32 x 32 x 4 latent
    "S/8": 0.36, "S/4": 1.41, "S/2": 6.06, "B/8": 1.42, "B/4": 5.56, "B/2": 23.01,
    "L/8": 5.01, "L/4": 19.70, "L/2": 80.71, "XL/8": 7.39, "XL/4": 29.05, "XL/2": 118.64,
}  # fmt: skip
SIDE = {"text_tokens": 5, "text_width": 24, "vision_width": 20, "align_depth": 1, "align_hidden": 56}


def published(name: str) -> TransformerSpec:
    size, patch = name.split("/")
    return TransformerSpec("dit", 32, 4, int(patch), *MODEL_SIZES[size], 1000)


def counted(spec: TransformerSpec, features: bool) -> float:
    """By torch's own counter. On the meta device, since it does not know the CPU's attention."""
    model = Transformer(spec).to("meta")
    x, t, label = torch.zeros(1, spec.channels, spec.input_size, spec.input_size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    text = {"text": torch.zeros(1, 5, 24, device="meta"), "text_mask": torch.zeros(1, 5, device="meta")} if spec.text_tokens else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x.to("meta"), t.to("meta"), label.to("meta"), features=features, **text)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("kind", "patch", "side"), [*product(("dit", "sit"), (2, 4, 8), ({}, SIDE))])
def test_macs_are_those_that_torch_counts(kind: str, patch: int, side: dict) -> None:
    spec = TransformerSpec(kind, 16, 3, patch, 3, 48, 4, 10, mlp_ratio=3.0, **side)
    assert forward_macs(spec) == counted(spec, False)
    if side:
        assert forward_macs(spec, features=True) == counted(spec, True) > forward_macs(spec)


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_the_published_ones(name: str) -> None:
    """Within 0.03 % or the printed digits; and to the digit once modulation, which is elementwise, counts too.

    One multiply-add for each of x (1 + scale) + shift, twice a block and once at the end, gives every printed figure but
    B/4's: 5.56 is printed, and the multiplications by weights alone make it 5.5652.
    """
    spec = published(name)
    billions, wanted = forward_macs(spec) / 1e9, 5.57 if name == "B/4" else PUBLISHED[name]
    assert billions == pytest.approx(wanted, rel=3e-4, abs=0.005)
    modulated = billions + (2 * spec.depth + 1) * (32 // spec.patch) ** 2 * spec.width / 1e9
    assert round(modulated, 2) == pytest.approx(wanted)


def test_the_largest_published_model() -> None:
    spec = published("XL/2")
    assert forward_macs(spec) / 1e9 == pytest.approx(118.6, abs=0.1)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(spec).parameters())
    assert round(parameters / 1e6) == 675


@pytest.mark.parametrize(
    ("name", "precision", "wanted"),
    [
        ("NVIDIA H200", "bf16", ("H200", 989.4e12)),
        ("NVIDIA H200 NVL", "bf16", ("H200 NVL", 835.5e12)),
        ("NVIDIA GH200 480GB", "bf16", ("GH200", 989.4e12)),
        ("NVIDIA H100 80GB HBM3", "tf32", ("H100", 494.7e12)),
        ("NVIDIA H100 PCIe", "fp32", ("H100 PCIe", 51.2e12)),
        ("NVIDIA A100-SXM4-80GB", "bf16", ("A100", 312e12)),
        ("NVIDIA A100 80GB PCIe", "tf32", ("A100", 156e12)),
        ("NVIDIA L40S", "bf16", ("L40S", 362.05e12)),
        ("NVIDIA L4", "bf16", ("L4", 121e12)),
        ("NVIDIA A10G", "bf16", ("A10G", 70e12)),
        ("NVIDIA A10", "bf16", ("A10", 125e12)),
        ("NVIDIA GeForce RTX 4090", "bf16", ("RTX 4090", 165.2e12)),
        ("Tesla V100-SXM2-16GB", "fp16", ("V100 SXM2", 125e12)),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # emulated
        ("Tesla T4", "fp32", ("T4", 8.1e12)),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),  # a slice of it
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_peaks_by_the_names_of_devices(name: str, precision: str, wanted: tuple[str, float] | None) -> None:
    found = dense_peak(name, precision)
    assert found == (pytest.approx(wanted) if wanted is None else (wanted[0], pytest.approx(wanted[1])))
