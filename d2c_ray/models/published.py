"""Weights that others published, by our names and in our conventions: DiT and SiT state dicts, and DiTs of diffusers.

The original layout is that of the DiT and SiT papers' own code (x_embedder, t_embedder, y_embedder, blocks, final_layer),
a .pt or .safetensors file, as published or as their trainers write it ({'ema': ..., 'model': ...}). Nothing of a file is
run: torch.load reads tensors alone.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2c_ray.errors import UserError
from d2c_ray.models import dit_folder, hub, weights
from d2c_ray.models.frozen import file_hash
from d2c_ray.models.transformer import Transformer, TransformerSpec, sincos_position
from d2c_ray.wording import first_line

SUFFIXES = (".pt", ".pth", ".safetensors")
_ENDS = ("weight", "bias")
# Ours: theirs, in the original layout and in diffusers'; {i} is a block.
_ORIGINAL = {
    "patch_embed": "x_embedder.proj", "timestep_embed.mlp.0": "t_embedder.mlp.0", "timestep_embed.mlp.2": "t_embedder.mlp.2",
    "class_embed": "y_embedder.embedding_table", "final.linear": "final_layer.linear", "final.modulation": "final_layer.adaLN_modulation.1",
    "blocks.{i}.qkv": "blocks.{i}.attn.qkv", "blocks.{i}.proj": "blocks.{i}.attn.proj", "blocks.{i}.mlp.0": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "blocks.{i}.mlp.fc2", "blocks.{i}.modulation": "blocks.{i}.adaLN_modulation.1",
}  # fmt: skip
_BLOCK, _EMBED = "transformer_blocks.{i}", "transformer_blocks.0.norm1.emb"
_DIFFUSERS = {
    "patch_embed": "pos_embed.proj", "timestep_embed.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
    "timestep_embed.mlp.2": f"{_EMBED}.timestep_embedder.linear_2", "class_embed": f"{_EMBED}.class_embedder.embedding_table",
    "final.linear": "proj_out_2", "final.modulation": "proj_out_1", "blocks.{i}.proj": f"{_BLOCK}.attn1.to_out.0",
    "blocks.{i}.mlp.0": f"{_BLOCK}.ff.net.0.proj", "blocks.{i}.mlp.2": f"{_BLOCK}.ff.net.2", "blocks.{i}.modulation": f"{_BLOCK}.norm1.linear",
}  # fmt: skip
# Of a spec, what weights that start a training must share with the model, and where the configuration says it.
_SHARED = {
    "kind": "model.kind", "path": "model.path", "input_size": "data.image_size and vae.path", "channels": "data.channels and vae.path",
    "patch": "model.patch", "depth": "model.depth", "width": "model.width", "heads": "model.heads", "num_classes": "the data's classes",
    "mlp_ratio": "", "timestep_scale": "", "timestep_offset": "", "frequency_shift": "",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Weights by our names, with the spec that they are of."""

    spec: TransformerSpec
    weights: dict[str, Tensor]  # of the type they are stored in, and perhaps still on the disk
    layout: str  # d2c_ray | original | diffusers


def is_file(path: str | Path) -> bool:
    """Whether a path is a file that may hold weights; what is in it shows when it is read."""
    return Path(path).expanduser().is_file()


def resolve(key: str, name: str) -> Path:
    """The local file or folder of weights: as given, or a hub name's snapshot.

    Raises:
        UserError: neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{key}={name} is a {path.suffix or 'nameless'} file; one of {', '.join(SUFFIXES)} would do.")
        return path.absolute()
    would = (
        "A model folder (train-<hash>/model of a run), a published DiT or SiT (DiT-XL-2-256x256.pt), a diffusers DiT pipeline (model_index.json and "
        f"transformer/), a hub name (facebook/DiT-XL-2-256), or empty{' to train a teacher' if key == 'teacher.checkpoint' else ''}, would do."
    )
    return hub.resolve(key, name, dit_folder.FILES, would)


def absolute(name: str) -> str:
    """A local file or folder by its absolute path; a hub name as it is, since every node has its own snapshot."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def read(path: Path, kind: str = "", heads: int = 0, flow_path: str = "linear", key: str = "model") -> Source:
    """The weights at a local path, and what model they are of.

    Args:
        kind: of a file, dit or sit, whose state dicts look alike; empty: what is certain of the file.
        heads: of a file, which does not say it; 0: the published rule, 64 channels a head, or 16 heads for a width of 1152.
        flow_path: of a file with a sit, which does not say it either.
        key: of the configuration, for messages.

    Raises:
        UserError: no such weights, names or shapes that do not fit, or a kind that is needed or cannot be.
    """
    if path.is_file():
        return _original(path, _state_dict(path, key), kind, heads, flow_path, key)
    if (path / weights.META).is_file():
        spec = TransformerSpec(**weights.read_meta(path)["spec"])
        file = path / "ema.safetensors"
        if not file.is_file():
            raise UserError(f"{key}={path} has no {file.name} beside its {weights.META}.")
        found = _open(file, key)
        _check_shapes(spec, found, {name: name for name in _expected(spec)}, str(file), key)
        return Source(spec, found, "d2c_ray")
    return _diffusers(path, key)


def conventions(name: str, kind: str) -> dict[str, Any]:
    """How the source's network sees the timestep, as fields of a `TransformerSpec`: a model that starts from it must see it so."""
    if not name:
        return {}
    path = resolve("train.start", name)
    if path.is_file():
        return _time(kind)
    if (path / weights.META).is_file():
        spec = TransformerSpec(**weights.read_meta(path)["spec"])
        return {field: getattr(spec, field) for field in ("timestep_scale", "timestep_offset", "frequency_shift")}
    return {"frequency_shift": 1}


def check(key: str, name: str, spec: TransformerSpec) -> None:
    """Refuses weights that a training of `spec` cannot start from; what `start` would say, before anything is spent.

    Raises:
        UserError: as `start`, under the configuration's `key`.
    """
    _check_same(read(resolve(key, name), spec.kind, spec.heads, spec.path, key).spec, spec, name, key)


def start(name: str, spec: TransformerSpec, fresh: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights that a training of `spec` starts from, one for every parameter, float32 on the CPU.

    What the source lacks starts without effect: a text side adds nothing until it is trained. An alignment head is drawn
    anew, since it is nothing but training's. A head that the source has and the model has not is left.

    Args:
        name: a model folder of this project (its EMA), a published file, or a diffusers pipeline or its hub name.
        fresh: initialised weights of the model, by parameter, for what is drawn anew; None: drawn here.

    Raises:
        UserError: no such weights, or of another model: shapes, classes, path or timesteps.
    """
    path = resolve("train.start", name)
    source = read(path, spec.kind, spec.heads, spec.path, "train.start")
    _check_same(source.spec, spec, name, "train.start")
    found = {parameter: value for parameter, value in source.weights.items() if parameter in _expected(spec)}
    if fresh is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = Transformer(replace(spec, depth=0)).state_dict()
    for parameter, value in fresh.items():
        if parameter.startswith("align_head.") and (parameter not in found or found[parameter].shape != value.shape):
            # One layer of another shape makes the others useless.
            found.update({other: fresh[other] for other in fresh if other.startswith("align_head.")})
        elif parameter.startswith("text_embed.") and parameter not in found:
            # Without the convolution nothing enters, and without the MLP's last layer its norm, whose gradient at zero is
            # hundreds of times too large, does not lead back to it.
            found[parameter] = torch.zeros_like(value) if parameter.startswith(("text_embed.conv", "text_embed.mlp.2")) else value
    return _owned({parameter: found[parameter] for parameter in _expected(spec)})


def facts(name: str) -> dict[str, Any]:
    """What a source is known by: 'hash' of all that decides its weights, and 'source', its layout.

    Raises:
        UserError: no such weights.
    """
    path = resolve("train.start", name)
    if path.is_file():
        return {"hash": file_hash(path), "source": "original"}
    if (path / weights.META).is_file():
        return {"hash": weights.content_hash(path), "source": "d2c_ray"}
    transformer = dit_folder.transformer_folder("train.start", path)
    return {"hash": dit_folder.content_hash("train.start", transformer), "source": "diffusers"}


def named_kind(path: Path) -> str:
    """dit or sit where a file's name says so, as the published ones do (DiT-XL-2-256x256.pt); else empty."""
    words = set(re.findall(r"(?<![a-z])(?:dit|sit)(?![a-z])", path.stem.lower()))
    return words.pop() if len(words) == 1 else ""


def import_model(file: str, out: str, kind: str = "", heads: int = 0, classes: str = "", flow_path: str = "linear") -> TransformerSpec:
    """Writes published weights as a model folder of this project, which can be sampled, scored with and fine-tuned.

    Args:
        file: a published file, or a diffusers pipeline. out: the folder to write; it must not hold anything.
        classes: text file of class names, line i for class i; empty: a pipeline's own, or none.

    Raises:
        UserError: as `read`; names that are not as many as classes; a folder that is not empty.
    """
    target = Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"'{out}' is there already; a new folder would do.")
    path = resolve("import-model", file)
    source = read(path, kind, heads, flow_path, "import-model")
    if source.layout == "d2c_ray":
        raise UserError(f"'{file}' is a model folder of this project already.")
    if kind not in ("", source.spec.kind):
        raise UserError(f"--kind {kind}: '{file}' holds a {source.spec.kind}.")
    names: list[str] = []
    if classes:
        given = Path(classes).expanduser()
        if not given.is_file():
            raise UserError(f"--classes {classes}: there is no such file.")
        names = [line.strip() for line in given.read_text().rstrip().splitlines()]
    elif source.layout == "diffusers":
        labels = dit_folder.labels("import-model", path)
        names = [str(labels.get(str(number), "")) for number in range(source.spec.num_classes)] if labels else []
    if names and len(names) != source.spec.num_classes:
        raise UserError(f"--classes {classes} has {len(names)} names; the model has {source.spec.num_classes} classes.")
    known = (
        file_hash(path) if path.is_file() else dit_folder.content_hash("import-model", dit_folder.transformer_folder("import-model", path))
    )
    meta = {"class_names": names, "labels": None, "latent": {}, "text_strength": 1.0, "ema_decay": None, "images": 0,
            "imported": {"name": path.name, "hash": known, "layout": source.layout}}  # fmt: skip
    own = _owned(source.weights)
    weights.save(target, source.spec, {"ema": own, "raw": own}, meta, None)
    return source.spec


def _owned(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float().clone().contiguous() for name, value in values.items()}


def _time(kind: str) -> dict[str, Any]:
    # SiT's own time runs from noise at 0 to data at 1 and is embedded as it is; ours runs the other way.
    return {"timestep_scale": -1.0, "timestep_offset": 1.0} if kind == "sit" else {}


def _state_dict(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file, by its own names; the EMA of a trainer's checkpoint."""
    found = _open(path, key)
    if not all(isinstance(value, Tensor) for value in found.values()):
        inner = next((found[name] for name in ("ema", "model", "state_dict") if isinstance(found.get(name), dict)), None)
        if inner is None or not all(isinstance(value, Tensor) for value in inner.values()):
            raise UserError(
                f"{key}: '{path}' holds {', '.join(map(str, list(found)[:5])) or 'nothing'}; a state dict, or one under 'ema' or 'model', would do."
            )
        found = inner
    return found


def _open(path: Path, key: str) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The published trainers keep their arguments in a Namespace, which holds values and no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipfile.is_zipfile(path) else None)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{key}: '{path}' cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    except Exception as error:  # code in the file, which is not run
        raise UserError(f"{key}: '{path}' holds more than tensors, and is not loaded: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: '{path}' holds a {type(found).__name__}; a state dict would do.")
    return found


def _original(path: Path, found: dict[str, Tensor], kind: str, heads: int, flow_path: str, key: str) -> Source:
    where = f"{key}: '{path}'"
    first = {
        "x_embedder.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "pos_embed": 3,
        "final_layer.linear.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
    }
    _require(where, found, first)
    width, channels, patch, _ = found["x_embedder.proj.weight"].shape
    outputs = found["final_layer.linear.weight"].shape[0]
    out_channels, rest = divmod(outputs, patch * patch)
    if rest or out_channels not in (channels, 2 * channels):
        raise UserError(
            f"{where} has final_layer.linear of {outputs} rows, which are not {channels} or {2 * channels} channels of {patch} x {patch} pixels."
        )
    # p, q and then channels, as the rows of a patch lie.
    rows = found["final_layer.linear.weight"].reshape(patch, patch, out_channels, width)
    # A SiT may have outputs for a variance which nothing trains, so they are still zero; those of a DiT are not.
    certain = "sit" if out_channels == channels or (not rows[:, :, channels:].any() and rows.any()) else ""
    if kind and certain and kind != certain:
        raise UserError(f"{where} is a {certain}, not a {kind}: it has no learned variance.")
    if not (kind or certain):
        raise UserError(
            f"{where} may be a dit or a sit, whose files look alike. Import it as one (d2c import-model FILE OUT --kind dit), and give the folder that this leaves."
        )
    kind = kind or certain
    tokens = found["pos_embed"].shape[1]
    side = int(tokens**0.5)
    position = found["pos_embed"].float()
    if side * side != tokens or found["pos_embed"].shape[2] != width or width % 4:
        raise UserError(f"{where} has pos_embed of {tuple(found['pos_embed'].shape)}; 1 x side^2 x {width} would do.")
    off = float((position - sincos_position(width, side)).abs().max())
    if off > 1e-3:
        raise UserError(
            f"{where} has another pos_embed than the fixed one of sines and cosines (off by {off:.2g}), which this model cannot take."
        )
    spec = TransformerSpec(
        kind=kind, input_size=side * patch, channels=channels, patch=patch, depth=_depth(found, "blocks."), width=width, heads=heads or _heads(where, width),
        num_classes=len(found["y_embedder.embedding_table.weight"]) - 1, mlp_ratio=found["blocks.0.mlp.fc1.weight"].shape[0] / width,
        path=flow_path if kind == "sit" else "linear", **_time(kind),
    )  # fmt: skip
    if spec.width % spec.heads:
        raise UserError(f"{where} is {width} wide, which {spec.heads} heads do not divide.")
    names = _names(spec, _ORIGINAL)
    stored = {ours: found[theirs] for ours, theirs in names.items() if theirs in found}
    if kind == "sit":
        for end in _ENDS:
            name, theirs = f"final.linear.{end}", f"final_layer.linear.{end}"
            if theirs in found and len(found[theirs]) == outputs:
                kept = found[theirs].reshape(patch, patch, out_channels, -1)[:, :, :channels].reshape(patch * patch * channels, -1)
                # Its velocity, data - noise, is minus ours.
                stored[name] = -(kept if end == "weight" else kept[:, 0])
    _check_names(where, found, set(names.values()), {"pos_embed"})
    _check_shapes(spec, stored, names, str(path), key)
    return Source(spec, stored, "original")


def _diffusers(folder: Path, key: str) -> Source:
    transformer = dit_folder.transformer_folder(key, folder)
    where = f"{key}: '{transformer}'"
    config = hub.read_json(key, transformer / "config.json")
    dit_folder.check_transformer(key, folder, config)
    if transformer != folder:
        dit_folder.check_schedule(key, folder)
    network = dit_folder.load(key, transformer)
    stated = network.config
    if stated.out_channels != 2 * stated.in_channels:
        raise UserError(f"{where} predicts no variance, which a dit of this project does; as teacher.checkpoint it would do.")
    other = [
        f"{name}={stated[name]}"
        for name, wanted in (("activation_fn", "gelu-approximate"), ("attention_bias", True), ("norm_elementwise_affine", False))
        if stated[name] != wanted
    ]
    if other or stated.norm_eps > 1e-5:
        raise UserError(f"{where} is no DiT as published: {', '.join([*other, f'norm_eps={stated.norm_eps}'])}.")
    found = network.state_dict()
    width = stated.num_attention_heads * stated.attention_head_dim
    # diffusers spreads the 128 frequencies of the timestep's embedding over 127, where the original code has 128. What
    # counts here is that the same folder predicts the same numbers here and in diffusers, so its spread is kept. The
    # published DiT-XL/2 in this layout were trained with 128, though, and their original files are the truer source. (The
    # norm before the MLP also differs: an epsilon of 1e-5 there, of 1e-6 here and in the original, at a variance around 1.)
    spec = TransformerSpec(
        kind="dit", input_size=stated.sample_size, channels=stated.in_channels, patch=stated.patch_size, depth=stated.num_layers, width=width,
        heads=stated.num_attention_heads, num_classes=stated.num_embeds_ada_norm,
        mlp_ratio=found["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / width, frequency_shift=1,
    )  # fmt: skip
    names = _names(spec, _DIFFUSERS)
    stored = {ours: found[theirs] for ours, theirs in names.items()}
    used = set(names.values())
    for index in range(spec.depth):
        block = f"transformer_blocks.{index}"
        for end in _ENDS:
            parts = [f"{block}.attn1.to_{part}.{end}" for part in "qkv"]
            stored[f"blocks.{index}.qkv.{end}"] = torch.cat([found[part] for part in parts])
            used.update(parts)
        # Every block holds a copy of the embedders, of which diffusers' own forward uses each block's.
        for name in [name for name in found if name.startswith(f"{block}.norm1.emb.")]:
            if not torch.equal(found[name], found[name.replace(f"{block}.", "transformer_blocks.0.", 1)]):
                raise UserError(f"{where} has another {name} than its first block; a model with one for all blocks would do.")
            used.add(name)
    _check_names(where, found, used, set())
    _check_shapes(spec, stored, names, str(transformer), key)
    return Source(spec, stored, "diffusers")


def _names(spec: TransformerSpec, layout: dict[str, str]) -> dict[str, str]:
    """Their name of each of our parameters, as far as the layout has them one by one."""
    found = {}
    for ours, theirs in layout.items():
        for index in range(spec.depth) if "{i}" in ours else (0,):
            for end in _ENDS if ours != "class_embed" else ("weight",):
                found[f"{ours.format(i=index)}.{end}"] = f"{theirs.format(i=index)}.{end}"
    return found


def _depth(found: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in found if re.match(rf"{re.escape(prefix)}\d+\.", name))


def _heads(where: str, width: int) -> int:
    if width == 1152:  # XL, with 72 channels a head
        return 16
    if width % 64:
        raise UserError(f"{where} is {width} wide, from which the number of heads cannot be told; --heads of d2c import-model says it.")
    return width // 64


def _require(where: str, found: dict[str, Tensor], shapes: dict[str, int]) -> None:
    missing = [name for name in shapes if name not in found]
    if missing:
        raise UserError(
            f"{where} is no DiT or SiT in its original layout: it lacks {', '.join(missing)}; it holds {', '.join(list(found)[:4]) or 'nothing'}. "
            "A DiT of diffusers is given by its folder."
        )
    for name, dimensions in shapes.items():
        if found[name].ndim != dimensions:
            raise UserError(f"{where} has {name} of shape {tuple(found[name].shape)}; {dimensions} dimensions would do.")


def _check_names(where: str, found: dict[str, Tensor], wanted: set[str], besides: set[str]) -> None:
    for words, names in (("lacks", wanted - set(found)), ("holds besides", set(found) - wanted - besides)):
        if names:
            raise UserError(f"{where} {words} {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}.")


def _expected(spec: TransformerSpec) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in Transformer(spec).state_dict().items()}


def _check_shapes(spec: TransformerSpec, stored: dict[str, Tensor], names: dict[str, str], where: str, key: str) -> None:
    expected = _expected(spec)
    if set(stored) != set(expected):
        odd = sorted(set(stored) ^ set(expected))
        raise UserError(f"{key}: '{where}' has other parameters than its model: {', '.join(odd[:3])}.")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{key}: '{where}' has {names.get(name, name)} of shape {tuple(stored[name].shape)}; the rest of it wants {tuple(shape)}."
            )


def _check_same(theirs: TransformerSpec, ours: TransformerSpec, name: str, key: str) -> None:
    fields = [field for field in _SHARED if ours.kind == "sit" or field not in ("path", "timestep_scale", "timestep_offset")]
    other = [
        f"{field}={getattr(theirs, field)} (not {getattr(ours, field)}{f', which {_SHARED[field]} gives' if _SHARED[field] else ''})"
        for field in fields
        if getattr(theirs, field) != getattr(ours, field)
    ]
    sides = [(spec.text_tokens, spec.text_width) for spec in (theirs, ours)]
    if theirs.text_tokens and sides[0] != sides[1]:
        other.append(f"text states of {sides[0][0]} x {sides[0][1]} (not {sides[1][0]} x {sides[1][1]}, which attach.text gives)")
    if other:
        raise UserError(f"{key}={name} is another model: {'; '.join(other)}.")
