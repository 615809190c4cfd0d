"""The backbone: published sizes, the condition, and where it starts."""

import pytest
import torch

from d2c_ray.config import MODEL_SIZES
from d2c_ray.models.transformer import TextEmbed, Transformer, TransformerSpec


def tiny(**fields: object) -> TransformerSpec:
    base = {"kind": "sit", "input_size": 8, "channels": 2, "patch": 2, "depth": 2, "width": 32, "heads": 2, "num_classes": 3}
    return TransformerSpec(**{**base, **fields})  # type: ignore[arg-type]


def awake(spec: TransformerSpec) -> Transformer:
    """A model whose zero-initialised layers are not zero, so that everything shows in the output."""
    torch.manual_seed(0)
    model = Transformer(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_published_ones(size: str, millions: int) -> None:
    depth, width, heads = MODEL_SIZES[size]
    with torch.device("meta"):
        model = Transformer(TransformerSpec("dit", 32, 4, 2, depth, width, heads, 1000))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_output_starts_at_zero_and_has_the_right_shape() -> None:
    for kind, channels in (("sit", 2), ("dit", 4)):
        model = Transformer(tiny(kind=kind))
        out = model(torch.randn(5, 2, 8, 8), torch.rand(5), torch.tensor([0, 1, 2, 3, 0]))
        assert out.shape == (5, channels, 8, 8)
        assert not out.any()


def test_patches_come_back_where_they_were() -> None:
    spec = tiny()
    model = Transformer(spec)
    x = torch.randn(2, 2, 8, 8)
    cut = x.reshape(2, 2, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 8)  # N x L x (p q c), rows first
    assert torch.equal(model._unpatch(cut), x)


def test_class_and_text_are_dropped_together() -> None:
    model = awake(tiny(text_tokens=4, text_width=6))
    x, t, mask = torch.randn(2, 2, 8, 8), torch.rand(2), torch.ones(2, 4)
    one, other = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    label, null = torch.tensor([0, 1]), torch.tensor([3, 3])
    assert torch.equal(model(x, t, null, one, mask), model(x, t, null, other, mask))
    assert not torch.allclose(model(x, t, label, one, mask), model(x, t, label, other, mask))
    assert torch.equal(model(x, t, label, one, mask, text_strength=0.0), model(x, t, label, other, mask, text_strength=0.0))


def test_masked_tokens_do_not_count() -> None:
    model = awake(tiny(text_tokens=4, text_width=6))
    x, t, label = torch.randn(1, 2, 8, 8), torch.rand(1), torch.tensor([0])
    states, mask = torch.randn(1, 4, 6), torch.tensor([[1, 1, 0, 0]])
    changed = states.clone()
    changed[:, 2:] = 9.0
    assert torch.equal(model(x, t, label, states, mask), model(x, t, label, changed, mask))


def test_text_pooling_is_the_convolution() -> None:
    embed, states = TextEmbed(4, 6, 8), torch.randn(3, 4, 6)
    pooled = embed.conv(states.transpose(1, 2)).squeeze(2)
    assert torch.allclose(embed(states, torch.ones(3, 4)), embed.mlp(embed.norm(pooled)) + pooled, atol=1e-6)


def test_features_come_from_the_asked_block() -> None:
    model = awake(tiny(vision_width=5, align_depth=1, align_hidden=16))
    x, t, label = torch.randn(2, 2, 8, 8), torch.rand(2), torch.tensor([0, 1])
    out, projected = model(x, t, label, features=True)
    assert projected.shape == (2, 16, 5)
    with torch.no_grad():
        model.blocks[1].mlp[0].weight.add_(1.0)  # a later block changes the output and not the features
    after, same = model(x, t, label, features=True)
    assert torch.equal(same, projected)
    assert not torch.allclose(after, out)


def test_a_model_with_text_asks_for_it() -> None:
    with pytest.raises(ValueError, match="text"):
        Transformer(tiny(text_tokens=4, text_width=6))(torch.randn(1, 2, 8, 8), torch.rand(1), torch.tensor([0]))
