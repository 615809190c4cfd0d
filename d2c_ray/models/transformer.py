"""One diffusion transformer for DiT and SiT, with the text+class condition and the alignment head of D2C.

Shapes: N images, C channels, H height and width of the latent, P patch side, L = (H/P)^2 patch tokens, D width,
K text tokens, E text width, V vision width. Everything float32 unless autocast says otherwise.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class TransformerSpec:
    """All that is needed to build a `Transformer`; stored beside its weights."""

    kind: str  # sit | dit
    input_size: int  # H
    channels: int  # C of the latent
    patch: int
    depth: int
    width: int
    heads: int
    num_classes: int  # the null class is one more
    text_tokens: int = 0  # K; 0: class condition alone
    text_width: int = 0  # E
    vision_width: int = 0  # V; 0: no alignment head
    align_depth: int = 0  # blocks before the alignment head
    align_hidden: int = 2048
    timestep_scale: float = 1000.0  # a flow's t in [0, 1] is embedded as timestep_offset + timestep_scale t
    timestep_offset: float = 0.0  # the published SiT embed 1 - t: scale -1, offset 1
    frequency_shift: int = 0  # frequencies of the timestep's embedding are spread over 128 - shift; 1 in diffusers' DiT
    mlp_ratio: float = 4.0
    path: str = "linear"  # of a sit: linear | cosine, from image to noise

    @property
    def out_channels(self) -> int:
        """A DiT predicts noise and the learned variance, a SiT the velocity."""
        return 2 * self.channels if self.kind == "dit" else self.channels

    def to_dict(self) -> dict:
        return asdict(self)


class Transformer(nn.Module):
    """Diffusion transformer with adaLN-Zero blocks (Peebles and Xie, arXiv 2212.09748; SiT: arXiv 2401.08740)."""

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.spec = spec
        self.recompute = False  # keep no activations inside blocks for the backward pass: less memory, a second forward
        width = spec.width
        tokens = (spec.input_size // spec.patch) ** 2
        self.patch_embed = nn.Conv2d(spec.channels, width, kernel_size=spec.patch, stride=spec.patch)
        self.register_buffer("position", sincos_position(width, spec.input_size // spec.patch), persistent=False)
        self.timestep_embed = TimestepEmbed(width, spec.frequency_shift)
        self.class_embed = nn.Embedding(spec.num_classes + 1, width)  # last row: the null class of guidance
        self.text_embed = TextEmbed(spec.text_tokens, spec.text_width, width) if spec.text_tokens else None
        self.blocks = nn.ModuleList(Block(width, spec.heads, spec.mlp_ratio) for _ in range(spec.depth))
        self.final = FinalLayer(width, spec.patch, spec.out_channels)
        self.align_head = (
            nn.Sequential(
                nn.Linear(width, spec.align_hidden), nn.SiLU(),
                nn.Linear(spec.align_hidden, spec.align_hidden), nn.SiLU(),
                nn.Linear(spec.align_hidden, spec.vision_width),
            ) if spec.vision_width else None
        )  # fmt: skip
        assert self.position.shape == (1, tokens, width)
        self._initialise()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_strength: float = 1.0,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The network's prediction.

        Args:
            x: noisy latents, N x C x H x H.
            t: N timesteps: 0..999 for a DiT, [0, 1] for a SiT.
            label: N class indices; `num_classes` drops the condition, text and class together.
            text: N x K x E text states of each image's class, where the model has a text side.
            text_mask: N x K, 1 for real tokens.
            text_strength: scales what the text adds to the class embedding.
            features: also return the alignment head's tokens (training only).

        Returns:
            N x out_channels x H x H, and with `features` the projected tokens, N x L x V.
        """
        spec = self.spec
        h = self.patch_embed(x).flatten(2).transpose(1, 2) + self.position  # N x L x D
        scaled = spec.timestep_offset + t * spec.timestep_scale if spec.kind == "sit" else t
        condition = self.timestep_embed(scaled) + self.class_embed(label)  # N x D
        if self.text_embed is not None:
            if text is None or text_mask is None:
                raise ValueError("this model was built with a text side: text and text_mask are needed")
            kept = (label != spec.num_classes).to(condition.dtype)[:, None]
            # y_text = MLP(t) + t + e_c (D2C, section 3.3); class and text are dropped by one coin, not two.
            condition = condition + kept * text_strength * self.text_embed(text, text_mask)
        condition = F.silu(condition)
        projected = None
        for index, block in enumerate(self.blocks, start=1):
            # Nothing random happens in a block, so no generator's state need be kept for its second run.
            recompute = self.recompute and torch.is_grad_enabled()
            h = checkpoint(block, h, condition, use_reentrant=False, preserve_rng_state=False) if recompute else block(h, condition)
            if features and index == spec.align_depth:
                if self.align_head is None:
                    raise ValueError("this model was built without an alignment head")
                projected = self.align_head(h)  # N x L x V
        out = self.final(h, condition)  # N x L x (P*P*out)
        out = self._unpatch(out)
        if features:
            assert projected is not None
            return out, projected
        return out

    def _unpatch(self, h: Tensor) -> Tensor:
        spec = self.spec
        side = spec.input_size // spec.patch
        h = h.reshape(h.shape[0], side, side, spec.patch, spec.patch, spec.out_channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(h.shape[0], spec.out_channels, spec.input_size, spec.input_size)

    def _initialise(self) -> None:
        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(xavier)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.spec.width, -1))
        nn.init.zeros_(self.patch_embed.get_parameter("bias"))
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(self.timestep_embed.mlp.get_parameter(f"{index}.weight"), std=0.02)
        # adaLN-Zero: every block starts as the identity, and the output as zero.
        for layer in (*(block.get_submodule("modulation") for block in self.blocks), self.final.modulation, self.final.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


class TimestepEmbed(nn.Module):
    """Sinusoidal embedding of t (256 frequencies' cosines and sines), then Linear, SiLU, Linear."""

    FREQUENCIES = 256
    rates: Tensor

    def __init__(self, width: int, shift: int = 0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("rates", timestep_rates(self.FREQUENCIES // 2, shift), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.rates  # N x 128
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class TextEmbed(nn.Module):
    """MLP(t) + t with t = Conv1d(states * mask), one vector a class (D2C, section 3.3)."""

    def __init__(self, tokens: int, text_width: int, width: int):
        super().__init__()
        self.conv = nn.Conv1d(text_width, width, kernel_size=tokens, stride=tokens)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        masked = states * mask[..., None].to(states.dtype)  # N x K x E
        # One window covers all tokens, so the convolution is one matrix product, whose backward is 20 times faster on a CPU.
        pooled = F.linear(masked.transpose(1, 2).flatten(1), self.conv.weight.flatten(1), self.conv.bias)  # N x D
        return self.mlp(self.norm(pooled)) + pooled


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning: shift, scale and gate of attention and MLP from the condition."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)  # N x 1 x D
        h = h + gate1 * self.attend(self.norm1(h) * (1 + scale1) + shift1)
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)

    def attend(self, h: Tensor) -> Tensor:
        n, tokens, width = h.shape
        q, k, v = self.qkv(h).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # N x heads x L x D/heads
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width))


class FinalLayer(nn.Module):
    """adaLN, then one Linear to the pixels of each patch."""

    def __init__(self, width: int, patch: int, out_channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(h) * (1 + scale) + shift)


def timestep_rates(count: int, shift: int) -> Tensor:
    """The frequencies of the timestep's embedding, from 1 to about 1/10000 in equal ratios over count - shift."""
    return torch.exp(-np.log(10_000.0) * torch.arange(count) / (count - shift))


def sincos_position(width: int, side: int) -> Tensor:
    """Fixed two-dimensional sine-cosine position embedding, 1 x side*side x width: columns first, as in MAE and DiT."""

    def one_axis(positions: np.ndarray) -> np.ndarray:
        rates = 1.0 / 10_000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
        angles = positions.reshape(-1)[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # side*side x width/2

    row, column = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64), indexing="ij")
    return torch.from_numpy(np.concatenate([one_axis(column), one_axis(row)], axis=1)).float()[None]
