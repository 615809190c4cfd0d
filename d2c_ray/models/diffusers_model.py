"""The transformer as a component of a diffusers pipeline. `export` writes it behind a copy of transformer.py, as one file."""

from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from d2c_ray.models.transformer import TimestepEmbed, Transformer, TransformerSpec, timestep_rates


class D2CTransformer2DModel(ModelMixin, ConfigMixin):
    """A `Transformer` with its classes' text states, in diffusers' way of saving and loading."""

    @register_to_config
    def __init__(
        self,
        spec: dict[str, Any],
        text_strength: float = 1.0,
        num_text_classes: int = 0,
        class_names: list[str] | None = None,
        labels: list[int] | None = None,
        latent_kind: str = "pixels",
    ):
        """
        Args:
            spec: fields of a `TransformerSpec`. text_strength: scales what the text adds.
            num_text_classes: classes with text states; 0: the model has no text side.
            class_names: by class, for callers. labels: the classes it was trained on; None: all.
            latent_kind: pixels, or vae for the latents of one.
        """
        super().__init__()
        self.network = Transformer(TransformerSpec(**spec))
        of = self.network.spec
        if num_text_classes:
            self.register_buffer("text_states", torch.zeros(num_text_classes, of.text_tokens, of.text_width))
            self.register_buffer("text_mask", torch.zeros(num_text_classes, of.text_tokens, dtype=torch.int64))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Noise and variance (dit) or velocity (sit), N x out_channels x H x W float32.

        Args:
            sample: N x C x H x W. timestep: N, 0..999 (dit) or 0 (data) to 1 (noise) (sit).
            class_labels: N; the number of classes stands for none.
        """
        network, settings = self.network, cast(Any, self.config)
        text: dict[str, Any] = {}
        embed = network.timestep_embed
        if embed.rates.dtype != torch.float32:  # .to(dtype) casts them, and they need what they have
            embed.rates = timestep_rates(TimestepEmbed.FREQUENCIES // 2, network.spec.frequency_shift).to(sample.device)
        if settings.num_text_classes:
            known = class_labels.clamp(max=network.spec.num_classes - 1)
            text = {"text": self.text_states[known], "text_mask": self.text_mask[known], "text_strength": settings.text_strength}
        with torch.autocast(sample.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return network(sample.float(), timestep, class_labels, **text).float()
