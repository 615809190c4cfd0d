"""Published weights against forwards written out from the papers' formulas, and diffusers' own; what is refused."""

import argparse
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from d2c_ray import cli
from d2c_ray.config import ModelConfig
from d2c_ray.errors import UserError
from d2c_ray.models import latents, published, teachers, weights
from d2c_ray.models.transformer import Transformer, TransformerSpec
from d2c_ray.selection import difficulty

CPU = torch.device("cpu")
WIDTH, DEPTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 64, 2, 4, 2, 8, 4, 5


def table(side: int, width: int) -> Tensor:
    """The published position table, an entry at a time: sines and cosines of the column, then of the row."""
    rows = []
    for token in range(side * side):
        row, column = divmod(token, side)
        angles = [[place * 10_000 ** (-4 * k / width) for k in range(width // 4)] for place in (column, row)]
        rows.append([f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis])
    return torch.tensor(rows, dtype=torch.float64).float()[None]


def state_dict(outputs: int = 2 * CHANNELS, seed: int = 0) -> dict[str, Tensor]:
    """A file of the published names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH), "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256), "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH), "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (PATCH * PATCH * outputs, WIDTH), "final_layer.linear.bias": (PATCH * PATCH * outputs,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH), "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH), ("attn.proj", WIDTH, WIDTH), ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH), ("adaLN_modulation.1", 6 * WIDTH, WIDTH),
        ):  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = (rows, columns), (rows,)
    generator = torch.Generator().manual_seed(seed)
    return {
        "pos_embed": table(SIDE // PATCH, WIDTH),
        **{name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()},
    }


def forward(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The published network, one image at a time, from the papers' formulas."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    out = []
    for image, time, label in zip(x, t.float(), y, strict=True):
        grid = SIDE // PATCH
        cut = image.reshape(CHANNELS, grid, PATCH, grid, PATCH).permute(1, 3, 0, 2, 4).reshape(grid * grid, -1)
        h = cut @ w["x_embedder.proj.weight"].reshape(WIDTH, -1).T + w["x_embedder.proj.bias"] + w["pos_embed"][0]
        angles = time * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))))
        c = c + w["y_embedder.embedding_table.weight"][label]
        for i in range(DEPTH):
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c)).split(WIDTH)
            q, k, v = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale1) + shift1).split(WIDTH, 1)
            heads = []
            for part in torch.arange(WIDTH).reshape(HEADS, -1):
                heads.append((q[:, part] @ k[:, part].T / len(part) ** 0.5).softmax(1) @ v[:, part])
            h = h + gate1 * linear(f"blocks.{i}.attn.proj", torch.cat(heads, 1))
            inner = linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale2) + shift2)
            h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).split(WIDTH)
        pixels = linear("final_layer.linear", norm(h) * (1 + scale) + shift)  # a row: p, q, channel
        out.append(pixels.reshape(grid, grid, PATCH, PATCH, -1).permute(4, 0, 2, 1, 3).reshape(-1, SIDE, SIDE))
    return torch.stack(out)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of weights."""

    def save(found: dict, name: str = "weights.pt") -> Path:
        path = tmp_path / name
        save_file(found, path) if path.suffix == ".safetensors" else torch.save(found, path)
        return path

    return save


def inputs(kind: str, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    t = torch.tensor([0, 120, 700, 999]) if kind == "dit" else torch.tensor([0.0, 0.31, 0.8, 1.0])
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator), t, torch.tensor([0, 3, 4, 5])


def loaded(source: published.Source) -> Transformer:
    network = Transformer(source.spec)
    network.load_state_dict(source.weights)
    return network.eval().requires_grad_(False)


# What is predicted.


def test_a_published_dit_predicts_what_its_formulas_say(saved: Callable[..., Path]) -> None:
    own = state_dict()
    source = published.read(saved(own), "dit", HEADS)
    x, t, label = inputs("dit")
    found, wanted = loaded(source)(x, t, label), forward(own, x, t, label)
    assert wanted.std() > 0.1
    assert torch.allclose(found, wanted, atol=1e-5)
    spec = source.spec
    assert (spec.kind, spec.input_size, spec.channels, spec.patch, spec.depth, spec.width, spec.num_classes) == ("dit", 8, 4, 2, 2, 64, 5)


@pytest.mark.parametrize("outputs", [CHANNELS, 2 * CHANNELS])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_published_sit_predicts_what_its_formulas_say(saved: Callable[..., Path], outputs: int, path: str) -> None:
    """Its time is 1 - t, its velocity goes from noise to data, and a second half of the channels is dropped."""
    own = state_dict(outputs)
    source = published.read(saved(own), "sit", HEADS, path)
    x, t, label = inputs("sit")
    found, theirs = loaded(source)(x, t, label), forward(own, x, 1 - t, label)
    assert found.shape == x.shape and theirs.shape[1] == outputs
    assert torch.allclose(found, -theirs[:, :CHANNELS], atol=1e-5)
    assert (found - loaded(source)(x, 1 - t, label)).abs().mean() > 0.01
    assert source.spec.path == path


def test_the_velocity_of_a_published_sit_is_that_of_its_path_turned_round() -> None:
    """On x = tau data + (1 - tau) noise, as it is trained, d x / d tau = data - noise; ours is minus that at t = 1 - tau."""
    from d2c_ray.diffusion.flow import Flow

    z, eps, tau = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.8])
    at = tau.reshape(-1, 1, 1, 1)
    assert torch.allclose(Flow().add_noise(z, eps, 1 - tau), at * z + (1 - at) * eps, atol=1e-6)
    assert torch.allclose(Flow().target(z, eps, 1 - tau), -(z - eps), atol=1e-6)
    quarter = math.pi / 2
    assert torch.allclose(Flow("cosine").add_noise(z, eps, 1 - tau), (quarter * at).sin() * z + (quarter * at).cos() * eps, atol=1e-6)
    theirs = quarter * ((quarter * at).cos() * z - (quarter * at).sin() * eps)
    assert torch.allclose(Flow("cosine").target(z, eps, 1 - tau), -theirs, atol=1e-6)


def test_every_form_of_a_file_is_the_same_model(saved: Callable[..., Path], tmp_path: Path) -> None:
    own = state_dict()
    known = published.read(saved(own), "dit", HEADS).weights
    trainer = {"model": state_dict(seed=1), "ema": own, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4, results_dir="x")}
    torch.save(own, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (saved(own, "w.safetensors"), saved(trainer, "0400000.pt"), saved({"model": own}, "m.pth"), tmp_path / "old.pt"):
        found = published.read(path, "dit", HEADS).weights
        assert set(found) == set(known)
        assert all(torch.equal(found[name], known[name]) for name in known)


# A DiT of diffusers.


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline without a VAE whose blocks share their embedders, as converted ones do."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=DEPTH,
        sample_size=SIDE, patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
        for block in network.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    folder = tmp_path_factory.mktemp("diffusers") / "pipe"
    network.save_pretrained(folder / "transformer")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    index = DiTPipeline.__name__
    (folder / "model_index.json").write_text(f'{{"_class_name": "{index}", "id2label": {{"0": "cat", "3": "dog, hound"}}}}')
    return folder


def test_a_dit_of_diffusers_predicts_what_diffusers_predicts(pipe: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(pipe / "transformer").eval().requires_grad_(False)
    x, t, label = inputs("dit")
    wanted = network(x, timestep=t, class_labels=label).sample
    for folder in (pipe, pipe / "transformer"):
        found = loaded(published.read(folder))(x, t, label)
        assert wanted.std() > 0.1
        assert torch.allclose(found, wanted, atol=1e-5)
    other = published.read(pipe)
    spread = published.Source(TransformerSpec(**{**other.spec.to_dict(), "frequency_shift": 0}), other.weights, "")
    assert not torch.allclose(loaded(spread)(x, t, label), wanted, atol=1e-3)


def test_blocks_with_their_own_embedders_are_refused(pipe: Path, tmp_path: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(pipe / "transformer")
    with torch.no_grad():
        network.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias[0] += 1
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"another transformer_blocks\.1\.norm1\.emb\.timestep_embedder\.linear_2\.bias than its first"):
        published.read(tmp_path)


# What does not fit.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), r"lacks blocks\.1\.attn\.qkv\.bias"),
        (lambda w: w.pop("pos_embed"), "it lacks pos_embed; it holds x_embedder"),
        (lambda w: w.update({"blocks.0.attn.q_norm.weight": torch.ones(4)}), r"holds besides blocks\.0\.attn\.q_norm\.weight\."),
        (lambda w: w.update({"blocks.1.mlp.fc2.bias": torch.ones(3)}), r"has blocks\.1\.mlp\.fc2\.bias of shape \(3,\); .* wants \(64,\)"),
        (lambda w: w.update({"pos_embed": w["pos_embed"] + 0.01}), r"another pos_embed than the fixed one .*off by 0\.01"),
        (lambda w: w.update({"pos_embed": w["pos_embed"][:, :15]}), r"has pos_embed of \(1, 15, 64\)"),
        (lambda w: w.update({"final_layer.linear.weight": torch.ones(20, WIDTH)}), "final_layer.linear of 20 rows"),
        (lambda w: w.update({"final_layer.linear.bias": torch.ones(20)}), r"final_layer\.linear\.bias of shape \(20,\)"),
        (lambda w: [w.pop(name) for name in list(w) if "embed" in name], "is no DiT or SiT in its original layout"),
    ],
)
@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_files_that_do_not_fit_are_refused(saved: Callable[..., Path], change: Callable, words: str, kind: str) -> None:
    own = state_dict()
    change(own)
    with pytest.raises(UserError, match=words):
        published.read(saved(own), kind, HEADS)


def test_other_files_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path / "made").mkdir, ()

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Evil()}))
    for name in ("evil.pt", "evil.pth"):
        with pytest.raises(UserError, match=r"is not loaded|cannot be loaded"):
            published.read(tmp_path / name, "dit")
    assert not (tmp_path / "made").exists()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.pt", "text.safetensors"):
        with pytest.raises(UserError, match=r"is not loaded|cannot be loaded"):
            published.read(tmp_path / name, "dit")
    with pytest.raises(UserError, match="holds step, loss; a state dict"):
        published.read(saved({"step": 3, "loss": 0.5}), "dit")
    with pytest.raises(UserError, match="holds a list"):
        published.read(saved([1, 2]), "dit")  # type: ignore[arg-type]
    (tmp_path / "w.txt").write_text("")
    with pytest.raises(UserError, match=r"is a \.txt file; one of \.pt"):
        published.resolve("train.start", str(tmp_path / "w.txt"))


def test_the_kind_is_what_is_certain_or_given(saved: Callable[..., Path]) -> None:
    both, one, untrained = state_dict(), state_dict(CHANNELS), state_dict()
    untrained["final_layer.linear.weight"].reshape(PATCH, PATCH, 2 * CHANNELS, WIDTH)[:, :, CHANNELS:] = 0
    with pytest.raises(UserError, match="may be a dit or a sit"):
        published.read(saved(both))
    assert published.read(saved(one), heads=HEADS).spec.kind == "sit"
    assert published.read(saved(untrained), heads=HEADS).spec.kind == "sit"
    for own in (one, untrained):
        with pytest.raises(UserError, match="is a sit, not a dit"):
            published.read(saved(own), "dit")
    assert [published.named_kind(Path(name)) for name in ("DiT-XL-2-256x256.pt", "SiT-XL-2-256.pt", "composition.pt", "dit_sit.pt")] == [
        "dit", "sit", "", "",
    ]  # fmt: skip


def test_heads_follow_the_published_rule(saved: Callable[..., Path]) -> None:
    assert published.read(saved(state_dict()), "dit").spec.heads == 1
    assert [published._heads("", width) for width in (384, 768, 1024, 1152)] == [6, 12, 16, 16]
    with pytest.raises(UserError, match="from which the number of heads cannot be told; --heads"):
        published._heads("model", 96)
    with pytest.raises(UserError, match="5 heads do not divide"):
        published.read(saved(state_dict()), "dit", 5)


# Where a training starts.


def of(file: Path, kind: str, **fields: object) -> TransformerSpec:
    """The spec of a model that is to start from a file, as the training makes it."""
    model = ModelConfig(kind=kind, depth=DEPTH, width=WIDTH, heads=HEADS, align_hidden=16)
    spec = latents.transformer_spec(model, {"side": SIDE, "channels": CHANNELS}, CLASSES, None, 0, str(file))
    return TransformerSpec(**{**spec.to_dict(), **fields})


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_a_training_starts_where_the_published_model_ended(saved: Callable[..., Path], kind: str) -> None:
    own = state_dict()
    file = saved(own)
    spec = of(file, kind, text_tokens=3, text_width=6, vision_width=7, align_depth=1, align_hidden=16)
    network = Transformer(spec)
    network.load_state_dict(published.start(str(file), spec))
    x, t, label = inputs(kind)
    text, mask = torch.randn(4, 3, 6), torch.ones(4, 3)
    out, tokens = network(x, t, label, text, mask, features=True)
    wanted = forward(own, x, t, label) if kind == "dit" else -forward(own, x, 1 - t, label)[:, :CHANNELS]
    assert torch.allclose(out, wanted, atol=1e-5)
    assert tokens.std() > 0
    # The text side learns at once, and with gradients like those of the rest.
    (out.square().mean() + tokens.square().mean()).backward()
    gradient = network.text_embed.conv.weight.grad
    assert gradient is not None and 0 < gradient.norm() < 10 * network.class_embed.weight.grad.norm()
    again = published.start(str(file), spec)
    assert all(torch.equal(again[name], value) for name, value in published.start(str(file), spec).items())
    assert all(value.dtype == torch.float32 for value in again.values())


def test_a_training_starts_from_our_own_and_from_diffusers(saved: Callable[..., Path], pipe: Path, tmp_path: Path) -> None:
    x, t, label = inputs("dit")
    spec = of(pipe, "dit")
    network = Transformer(spec)
    network.load_state_dict(published.start(str(pipe), spec))
    theirs = DiTTransformer2DModel.from_pretrained(pipe / "transformer").eval()
    assert torch.allclose(network(x, t, label), theirs(x, timestep=t, class_labels=label).sample, atol=1e-5)

    folder = tmp_path / "ours"
    side = TransformerSpec(**{**spec.to_dict(), "vision_width": 7, "align_depth": 1, "align_hidden": 16, "text_tokens": 3, "text_width": 6})
    torch.manual_seed(1)
    state = Transformer(side).state_dict()
    weights.save(folder, side, {"ema": state, "raw": {name: value + 1 for name, value in state.items()}}, {}, None)
    found = published.start(str(folder), side)
    assert all(torch.equal(found[name], state[name]) for name in state)
    other = published.start(str(folder), TransformerSpec(**{**side.to_dict(), "vision_width": 9}))
    assert other["align_head.4.weight"].shape == (9, 16) and not torch.equal(other["align_head.0.weight"], state["align_head.0.weight"])
    without = published.start(str(folder), TransformerSpec(**{**side.to_dict(), "vision_width": 0}))
    assert not [name for name in without if name.startswith("align_head")]
    with pytest.raises(UserError, match=r"text states of 3 x 6 \(not 0 x 0, which attach\.text gives\)"):
        published.start(str(folder), spec)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_classes": 4}, r"num_classes=5 \(not 4, which the data's classes gives\)"),
        ({"depth": 3, "width": 128}, r"depth=2 \(not 3, which model\.depth gives\); width=64 \(not 128"),
        ({"input_size": 16}, r"input_size=8 \(not 16, which data\.image_size"),
        ({"timestep_scale": 1000.0, "timestep_offset": 0.0}, r"timestep_scale=-1\.0 \(not 1000\.0\)"),
    ],
)
def test_a_start_from_another_model_is_refused(saved: Callable[..., Path], fields: dict, words: str) -> None:
    file = saved(state_dict())
    with pytest.raises(UserError, match=words):
        published.start(str(file), of(file, "sit", **fields))


def test_what_is_drawn_anew_is_the_models_own(saved: Callable[..., Path]) -> None:
    """Two seeds of a fine-tuning have two alignment heads."""
    file = saved(state_dict())
    spec = of(file, "sit", vision_width=7, align_depth=1, align_hidden=8)
    torch.manual_seed(3)
    fresh = Transformer(spec).state_dict()
    found = published.start(str(file), spec, fresh)
    assert torch.equal(found["align_head.0.weight"], fresh["align_head.0.weight"])
    assert not torch.equal(found["align_head.0.weight"], published.start(str(file), spec)["align_head.0.weight"])


def test_a_start_on_another_path_or_of_another_kind_is_refused(pipe: Path, tmp_path: Path) -> None:
    spec = of(tmp_path, "sit") if (tmp_path / weights.META).exists() else TransformerSpec("sit", 8, 4, 2, 1, 16, 2, 5, path="cosine")
    state = Transformer(spec).state_dict()
    weights.save(tmp_path / "own", spec, {"ema": state, "raw": state}, {}, None)
    with pytest.raises(UserError, match=r"path=cosine \(not linear, which model\.path gives\)"):
        published.start(str(tmp_path / "own"), TransformerSpec("sit", 8, 4, 2, 1, 16, 2, 5))
    with pytest.raises(UserError, match=r"kind=dit \(not sit"):
        published.start(str(pipe), of(pipe, "sit"))


def test_facts_follow_the_weights(saved: Callable[..., Path], pipe: Path, tmp_path: Path) -> None:
    one, other = saved(state_dict(), "a.pt"), saved(state_dict(seed=1), "b.pt")
    shutil.copy(one, tmp_path / "copy.pt")
    assert published.facts(str(one))["hash"] == published.facts(str(tmp_path / "copy.pt"))["hash"] != published.facts(str(other))["hash"]
    assert published.facts(str(pipe))["hash"] == published.facts(str(pipe / "transformer"))["hash"]
    with pytest.raises(UserError, match=r"train\.start=nothing: there is no such folder"):
        published.facts("nothing")


# Teachers and folders of our own.


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_a_published_file_is_a_teacher(saved: Callable[..., Path], kind: str) -> None:
    own = state_dict(2 * CHANNELS)
    file = teachers.resolve(str(saved(own, f"{kind.title()}-tiny.pt")))
    known = teachers.facts(file)
    assert (known.kind, known.channels, known.side, known.num_classes, known.class_names) == (kind, CHANNELS, SIDE, CLASSES, [])
    teacher = teachers.load(file, CPU)
    x, t, label = inputs(kind)
    one_head = {**own}
    wanted = difficulty.errors(teacher, x, label, torch.ones(4, 2, *x.shape[1:]), difficulty.timesteps(kind, 2, 0, 1), 8)
    assert wanted.shape == (4, 2) and torch.isfinite(wanted).all() and wanted.std() > 0
    network = loaded(published.read(file, kind))
    assert torch.equal(teacher.predict(x, t, label), network(x, t, label)[:, :CHANNELS])
    assert teachers.content_hash(file) == teachers.content_hash(file) != teachers.content_hash(saved(one_head, "sit-dit.pt"))
    with pytest.raises(UserError, match=r"may be a dit or a sit.*Import it as one"):
        teachers.facts(saved(own, "teacher.pt"))


def test_an_imported_model_is_a_folder_of_ours(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = state_dict()
    file, out, names = saved(own), tmp_path / "model", tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\nhen\nfox\n")
    cli.app(["import-model", str(file), str(out), "--kind", "sit", "--heads", str(HEADS), "--classes", str(names)], standalone_mode=False)
    assert "sit" in capsys.readouterr().out
    student = weights.load(out)
    x, t, label = inputs("sit")
    assert torch.allclose(student.predict(x, t, label), -forward(own, x, 1 - t, label)[:, :CHANNELS], atol=1e-5)
    assert student.meta["class_names"] == ["cat", "dog", "owl", "hen", "fox"]
    known = teachers.facts(out)
    assert known.class_names[3] == "hen" and known.kind == "sit"
    spec = of(out, "sit")
    assert (spec.timestep_scale, spec.timestep_offset) == (-1.0, 1.0)
    assert torch.equal(published.start(str(out), spec)["final.linear.bias"], student.network.final.linear.bias)
    with pytest.raises(UserError, match="is there already"):
        published.import_model(str(file), str(out), "sit", HEADS)
    names.write_text("cat\ndog\n")
    with pytest.raises(UserError, match="has 2 names; the model has 5 classes"):
        published.import_model(str(file), str(tmp_path / "other"), "sit", HEADS, str(names))


def test_a_pipeline_is_imported_with_its_labels(pipe: Path, tmp_path: Path) -> None:
    published.import_model(str(pipe), str(tmp_path / "model"))
    assert weights.read_meta(tmp_path / "model")["class_names"] == ["cat", "", "", "dog, hound", ""]
    with pytest.raises(UserError, match=r"--kind sit: .* holds a dit"):
        published.import_model(str(pipe), str(tmp_path / "other"), "sit")
