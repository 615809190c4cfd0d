"""The space a model is trained in: pixels, or a VAE's latents."""

from typing import Any

from d2c_ray.config import Config, ModelConfig, model_shape
from d2c_ray.diffusion import align
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, published
from d2c_ray.models.transformer import TransformerSpec


def latent_facts(config: Config) -> dict[str, Any]:
    """Shape (channels, side) of the space, its scaling, and the VAE it belongs to.

    Raises:
        UserError: the VAE cannot be loaded, or does not divide the image size.
    """
    if not config.vae.path:
        return {"kind": "pixels", "channels": config.data.channels, "side": config.data.image_size}
    vae = frozen.vae_facts(config.vae.path, config.vae.subfolder)
    if config.data.image_size % vae["reduction"]:
        raise UserError(f"data.image_size={config.data.image_size} is no multiple of the VAE's reduction by {vae['reduction']}.")
    return {
        "kind": "vae", "channels": vae["channels"], "side": config.data.image_size // vae["reduction"],
        "scale": vae["scale"], "shift": vae["shift"], "vae": vae["hash"], "encoder": vae["encoder"],
    }  # fmt: skip


def grid_side(latent: dict[str, Any], model: ModelConfig) -> int:
    """Side of the model's token grid.

    Raises:
        UserError: a patch that does not divide the latent.
    """
    if latent["side"] % model.patch:
        raise UserError(f"model.patch={model.patch} does not divide the latent's side of {latent['side']}.")
    return latent["side"] // model.patch


def transformer_spec(
    model: ModelConfig, latent: dict[str, Any], num_classes: int, text: tuple[int, int] | None, vision_width: int, start: str = ""
) -> TransformerSpec:
    """The network a configuration asks for; `text` is (tokens, width), `start` the weights it starts from, whose timesteps it takes."""
    depth, width, heads = model_shape(model)
    grid_side(latent, model)
    return TransformerSpec(
        kind=model.kind, input_size=latent["side"], channels=latent["channels"], patch=model.patch, depth=depth, width=width, heads=heads,
        num_classes=num_classes, text_tokens=text[0] if text else 0, text_width=text[1] if text else 0, vision_width=vision_width,
        align_depth=(model.align_depth or align.default_depth(depth)) if vision_width else 0, align_hidden=model.align_hidden, path=model.path if model.kind == "sit" else "linear",
        **published.conventions(start, model.kind),
    )  # fmt: skip
