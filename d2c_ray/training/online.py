"""Encoding while training: the frozen encoders that a training needs, since its condensed dataset holds pixels in their place."""

from dataclasses import dataclass
from typing import Any

import torch

from d2c_ray.config import Config, ModelConfig, TrainConfig, VaeConfig, VisionConfig, encoder_key
from d2c_ray.models import frozen, latents
from d2c_ray.models import vision as encoders_of_images

LATENT = "latent"


@dataclass(frozen=True)
class Online:
    """Which encoders run while a model trains; plain values, to be sent to its workers.

    Attributes:
        vae: of latents that are not stored; None: they are, or there are none.
        vision: of the tokens to align with, where they are not stored; None: they are, or none are wanted.
        key: where the configuration speaks of it. grid: side of the model's token grid. width: of its tokens, 0 without.
        weights: hashes as planned, by 'latent' and 'vision': a node may hold another snapshot of a hub name.
    """

    vae: VaeConfig | None = None
    vision: VisionConfig | None = None
    key: str = ""
    grid: int = 0
    width: int = 0
    weights: tuple[tuple[str, str], ...] = ()

    def load(self, device: torch.device) -> tuple[frozen.Vae | None, encoders_of_images.Encoder | None]:
        """The encoders on a device.

        Raises:
            UserError: encoders that are not there, or have other weights than planned.
        """
        planned = dict(self.weights)
        if self.vae is not None:
            frozen.check_weights("vae.path", frozen.encoder_hash(self.vae.path, self.vae.subfolder), planned[LATENT])
        if self.vision is not None:
            frozen.check_weights(
                f"{self.key}.encoder", encoders_of_images.facts(self.vision, self.grid, self.key)["weights"], planned["vision"]
            )
        return (
            frozen.Vae(self.vae, device) if self.vae is not None else None,
            encoders_of_images.load(self.vision, self.grid, device, self.key) if self.vision is not None else None,
        )


def column(align_with: str) -> str:
    """The column that the tokens of `train.align_with` have, or would have."""
    return f"vision_{align_with}" if align_with else "vision"


def of(config: Config, facts: dict[str, Any], model: ModelConfig, train: TrainConfig) -> Online:
    """What a training on a condensed dataset encodes itself.

    Args:
        facts: what the dataset says of itself; `in_training` names what it does not hold.

    Raises:
        UserError: encoders that are not there.
    """
    missing, mine = facts.get("in_training", []), column(train.align_with)
    vae = config.vae if LATENT in missing else None
    chosen = config.attach.encoders().get(mine) if mine in missing and train.align_weight > 0 else None
    weights = {LATENT: frozen.encoder_hash(vae.path, vae.subfolder)} if vae is not None else {}
    if chosen is None:
        return Online(vae, weights=tuple(weights.items()))
    grid, key = latents.grid_side(facts["latent"], model), encoder_key(mine)
    known = encoders_of_images.facts(chosen, grid, key)
    return Online(vae, chosen, key, grid, known["width"], tuple({**weights, "vision": known["weights"]}.items()))
