"""What a forward costs, counted from the shapes, and what devices could do: together the share of the peak that training uses.

Counted is everything the network multiplies by weights or with itself: patches, timestep and text embeddings, qkv,
attention, MLP, modulation, output. Not counted are elementwise operations and norms. The published figures of the DiT
(arXiv 2212.09748, Table 4, "Gflops", which are multiply-adds) agree to 0.03 %,
but for one (B/4, 0.1 %).
"""

from d2c_ray.models.transformer import TimestepEmbed, TransformerSpec


def forward_macs(spec: TransformerSpec, features: bool = False) -> int:
    """Multiply-adds of one image's forward; a step of training takes three times as many, and two FLOPs each.

    Args:
        features: with the alignment head, as training runs it.
    """
    tokens, width = (spec.input_size // spec.patch) ** 2, spec.width
    patch = spec.patch**2
    condition = TimestepEmbed.FREQUENCIES * width + width**2
    if spec.text_tokens:
        condition += spec.text_tokens * spec.text_width * width + 2 * width**2
    hidden = int(width * spec.mlp_ratio)
    # qkv and proj, scores and their sum over values, MLP; and six vectors an image from the condition.
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden + 6 * width**2
    final = 2 * width**2 + tokens * width * patch * spec.out_channels
    head = 0
    if features and spec.vision_width:
        head = tokens * (width * spec.align_hidden + spec.align_hidden**2 + spec.align_hidden * spec.vision_width)
    return tokens * spec.channels * patch * width + condition + spec.depth * block + final + head


# Words of torch.cuda.get_device_name(), all of which must be there, more special ones first, and dense TFLOP/s by
# precision: fp32 outside of tensor cores, bf16 and fp16 with fp32 accumulation. Data sheets that give figures with
# sparsity give twice these. All are NVIDIA's; MIG slices and unknown devices have none.
_PEAKS: list[tuple[tuple[str, ...], dict[str, float]]] = [
    # H200 data sheet, NVL column: 1,671 bf16 and 835 tf32 with sparsity, 60 fp32.
    (("H200", "NVL"), {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    # H200 data sheet, SXM column, and H100 white paper, SXM5: 1,978.9 bf16 and 989.4 tf32 with sparsity, 66.9 fp32.
    (("H200",), {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # GH200 data sheet: as the H100 SXM.
    (("GH200",), {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # H100 data sheet, NVL column: 1,671 bf16 and 835 tf32 with sparsity, 60 fp32.
    (("H100", "NVL"), {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    # H100 white paper and PCIe data sheet: 1,513 bf16 and 756 tf32 with sparsity, 51.2 fp32.
    (("H100", "PCIe"), {"bf16": 756.5, "fp16": 756.5, "tf32": 378.0, "fp32": 51.2}),
    # H100 white paper, SXM5 (named 'NVIDIA H100 80GB HBM3').
    (("H100",), {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # A100 data sheet, the same for SXM and PCIe.
    (("A100",), {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    # L40S data sheet: 362.05 | 733 bf16, 183 | 366 tf32, 91.6 fp32.
    (("L40S",), {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    # L4 data sheet: 242 bf16 and 120 tf32 with sparsity, 30.3 fp32.
    (("L4",), {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    # A10G data sheet (as AWS hands it out): 70 | 140 bf16, 35 | 70 tf32, 31.52 fp32. Not the A10 of other clouds.
    (("A10G",), {"bf16": 70.0, "fp16": 70.0, "tf32": 35.0, "fp32": 31.52}),
    # A10 data sheet: 125 | 250 bf16, 62.5 | 125 tf32, 31.2 fp32.
    (("A10",), {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    # Ada white paper, appendix A: with fp32 accumulation 165.2 | 330.4 fp16 and bf16, 82.6 | 165.2 tf32, 82.6 fp32.
    (("RTX", "4090"), {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    # V100 data sheet; Volta has neither bf16 nor tf32.
    (("V100", "SXM2"), {"fp16": 125.0, "fp32": 15.7}),
    (("V100", "PCIE"), {"fp16": 112.0, "fp32": 14.0}),
    # T4 data sheet; Turing has neither bf16 nor tf32.
    (("T4",), {"fp16": 65.0, "fp32": 8.1}),
]


def dense_peak(device_name: str, precision: str) -> tuple[str, float] | None:
    """The dense peak of a device, FLOP/s, and its name as the table knows it; None where it is unknown.

    Args:
        device_name: as torch.cuda.get_device_name() says it, in capitals or not. precision: bf16, tf32, fp32 or fp16.
    """
    words = device_name.upper().replace("-", " ").split()
    if any(word in words for word in ("MIG", "LAPTOP", "D", "MOBILE")):
        return None
    for wanted, peaks in _PEAKS:
        if all(word.upper() in words for word in wanted):
            return (" ".join(wanted), peaks[precision] * 1e12) if precision in peaks else None
    return None


def known_devices() -> list[str]:
    """The names that the table has, more special ones first."""
    return [" ".join(words) for words, _ in _PEAKS]
