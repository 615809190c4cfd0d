"""Teachers: the models that judge difficulty, ours, published or a pretrained DiT of diffusers, behind one `predict`.

A published teacher is a file in the layout of the DiT and SiT papers' code; a diffusers teacher is a pipeline folder
(model_index.json, transformer/, scheduler/) or hub name such as facebook/DiT-XL-2-256, or a bare transformer folder.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2c_ray.errors import UserError
from d2c_ray.models import dit_folder, hub, published, weights
from d2c_ray.models.frozen import DTYPES, encoder_hash, file_hash
from d2c_ray.models.transformer import Transformer

KEY = "teacher.checkpoint"
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Facts:
    """What is known of a teacher before its weights are loaded."""

    kind: str  # dit | sit
    channels: int
    side: int  # of the latents
    num_classes: int
    class_names: list[str]  # by class; empty where nothing is known
    source: str  # d2c_ray | original | diffusers
    latent: dict[str, Any]  # of its VAE, as far as known: 'vae' and 'encoder' hashes
    vae_folder: str = ""  # a VAE that came with it
    path: str = "linear"  # of a sit


@dataclass
class Teacher:
    """A loaded teacher."""

    kind: str
    channels: int
    num_classes: int
    device: torch.device
    network: nn.Module
    _forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    path: str = "linear"  # of a sit

    def predict(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Noise (dit) or velocity (sit), N x channels x H x W float32; the learned variance of a DiT is dropped.

        Args:
            x: noisy latents. t: N timesteps. label: N, the teacher's classes.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._forward(x, t, label)[:, : self.channels].float()


def resolve(checkpoint: str) -> Path:
    """The local folder (or published file) of a checkpoint: as given, or a hub name's snapshot, which is fetched where the hub is in reach.

    Raises:
        UserError: neither a folder or file nor a hub name that can be had.
    """
    return published.resolve(KEY, checkpoint)


def facts(folder: Path) -> Facts:
    """What a teacher's folder says of it, or a published file.

    A file's name says its kind (DiT-XL-2-256x256.pt) where its tensors do not.

    Raises:
        UserError: no teacher there, or one that predicts something else on another schedule.
    """
    if folder.is_file():
        of = published.read(folder, published.named_kind(folder), key=KEY).spec
        return Facts(of.kind, of.channels, of.input_size, of.num_classes, [], "original", {}, path=of.path)
    if (folder / weights.META).is_file():
        meta = weights.read_meta(folder)
        spec, latent = meta["spec"], meta.get("latent", {})
        for needed in ("ema.safetensors", weights.TEXT) if spec.get("text_tokens") else ("ema.safetensors",):
            if not (folder / needed).is_file():
                raise UserError(f"teacher.checkpoint={folder} has no {needed} beside its {weights.META}.")
        return Facts(
            spec["kind"], spec["channels"], spec["input_size"], spec["num_classes"], meta.get("class_names", []), "d2c_ray", latent,
            path=spec.get("path", "linear"),
        )  # fmt: skip
    transformer = dit_folder.transformer_folder(KEY, folder)
    config = hub.read_json(KEY, transformer / "config.json")
    dit_folder.check_transformer(KEY, folder, config)
    labels = dit_folder.labels(KEY, folder) if transformer != folder else {}
    names = [str(labels.get(str(number), "")) for number in range(config["num_embeds_ada_norm"])] if labels else []
    if transformer != folder:
        dit_folder.check_schedule(KEY, folder)
    vae = folder / "vae"
    with_weights = transformer != folder and any((vae / f"diffusion_pytorch_model.{suffix}").is_file() for suffix in ("safetensors", "bin"))
    return Facts(
        "dit", config["in_channels"], config["sample_size"], config["num_embeds_ada_norm"], names, "diffusers",
        {"encoder": encoder_hash(str(vae), "")} if with_weights else {}, str(vae) if (vae / "config.json").is_file() and transformer != folder else "",
    )  # fmt: skip


def content_hash(folder: Path) -> str:
    """A hash of all that scoring with this teacher depends on."""
    if folder.is_file():
        return "-".join(filter(None, [file_hash(folder), published.named_kind(folder)]))
    if (folder / weights.META).is_file():
        return weights.content_hash(folder)
    return dit_folder.content_hash(KEY, folder)


def load(folder: Path, device: torch.device, precision: str = "fp32", compile: bool = False) -> Teacher:
    """Loads a teacher, frozen.

    Args:
        precision: fp32, or bf16 or fp16 by autocast.
        compile: through torch.compile; the batch must then always have one shape.

    Raises:
        UserError: weights missing, unreadable or of other shapes than the folder says.
    """
    known, dtype = facts(folder), DTYPES[precision]
    if known.source == "d2c_ray":
        student = weights.load(folder, device=device)
        network: nn.Module = student.network
    elif known.source == "original":
        source = published.read(folder, known.kind, key=KEY)
        network = Transformer(source.spec)
        network.load_state_dict(source.weights)
        network.eval().requires_grad_(False).to(device)
    else:
        network = dit_folder.load(KEY, dit_folder.transformer_folder(KEY, folder)).eval().requires_grad_(False).to(device)
    if dtype != torch.float32:
        # Autocast would cast these anew at every forward. It would not touch norms, embeddings and the timestep's rates,
        # which need the float32 they have: frequencies of a timestep of 999 are lost in bf16.
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.to(dtype)
    if known.source == "d2c_ray":
        if compile:
            student.network = torch.compile(student.network, dynamic=False)  # type: ignore[assignment]
        forward: Callable[..., Tensor] = student.predict
    elif known.source == "original":
        forward = torch.compile(network, dynamic=False) if compile else network
    else:
        called: Any = torch.compile(network, dynamic=False) if compile else network

        def forward(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return called(x, timestep=t, class_labels=label, return_dict=False)[0]

    return Teacher(known.kind, known.channels, known.num_classes, device, network, forward, dtype, known.path)


def class_map(names: Sequence[str], counts: Sequence[int], known: Facts, file: str = "") -> list[int]:
    """The teacher's class of every label of the data.

    By the file if one is given; else label by label where both count the same and no name speaks against it (WordNet
    ids stand for ImageNet's order, and a few names that belong to no other class are other spellings: lists of
    ImageNet's classes differ in them); else by name, synonyms split at commas.

    Args:
        names: of the data's labels. counts: images of each label; labels without images need no class.
        file: text, line i for label i: the teacher's class as a number or a name.

    Raises:
        UserError: names the labels that have no class or several, and the nearest ones.
    """
    theirs = known.class_names
    if file:
        return _from_file(file, len(names), known)
    named = any(names) and any(theirs)
    by_name: dict[str, set[int]] = {}
    by_whole_name: dict[str, set[int]] = {}
    for number, name in enumerate(theirs):
        by_whole_name.setdefault(_plain(name), set()).add(number)
        for word in _synonyms(name):
            by_name.setdefault(word, set()).add(number)
    # The whole name decides first: 'crane' is two of ImageNet's classes, 'crane, bird' is none.
    all_matches = [
        (by_whole_name.get(_plain(name)) or set().union(*(by_name.get(word, set()) for word in _synonyms(name)), set())) if name else set()
        for name in names
    ]
    apart = [label for label, (a, b) in enumerate(zip(names, theirs, strict=False)) if a and b and not _synonyms(a) & _synonyms(b)]
    agree = len(apart) <= 0.05 * len(names) and not any(all_matches[label] for label in apart)
    ids, other_ids = (len(side) == 1000 and all(_WORDNET_ID.fullmatch(name) for name in side) for side in (names, theirs))
    wordnet = ids and not other_ids and list(names) == sorted(names)  # ids on both sides are names as others are
    if len(names) == known.num_classes and (not named or agree or wordnet):
        return list(range(len(names)))
    how = "teacher.classes takes a text file whose line i holds the teacher's class (number or name) of label i."
    if not named:
        raise UserError(
            f"teacher.checkpoint knows {known.num_classes} classes; the data has {len(names)}, and without names on both sides they cannot be matched. {how}"
        )
    found, problems = [], []
    for label, (name, matches) in enumerate(zip(names, all_matches, strict=True)):
        if not counts[label]:
            found.append(min(matches) if len(matches) == 1 else 0)
        elif len(matches) == 1:
            found.append(min(matches))
        elif matches:
            problems.append(f"label {label} '{name}' is several of them ({', '.join(map(str, sorted(matches)))})")
        else:
            near = get_close_matches(_plain(name), list(by_name), 2, 0.6) if len(problems) < 5 else []  # slow, and no more are told
            problems.append(f"label {label} '{name}' is none of them" + (f" (near: {', '.join(near)})" if near else ""))
    used = [number for label, number in enumerate(found) if counts[label]] if not problems else []
    if len(set(used)) < len(used):
        twice = next(number for number in used if used.count(number) > 1)
        both = [names[label] for label, number in enumerate(found) if number == twice and counts[label]]
        problems.append(f"'{both[0]}' and '{both[1]}' are both its class {twice}")
    if problems:
        raise UserError(
            f"the classes of teacher.checkpoint ({known.num_classes}) do not fit the data's ({len(names)}): {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}. {how}"
        )
    return found


def _from_file(file: str, count: int, known: Facts) -> list[int]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"teacher.classes={file}: there is no such file.")
    lines = [line.strip() for line in path.read_text().rstrip().splitlines()]
    if len(lines) != count:
        raise UserError(f"teacher.classes={file} has {len(lines)} lines; the data has {count} classes, and line i is for label i.")
    found = []
    for number, line in enumerate(lines, start=1):
        if line.isdecimal():
            matches = [int(line)] if int(line) < known.num_classes else []
        else:
            matches = [index for index, name in enumerate(known.class_names) if _plain(name) == _plain(line)] or [
                index for index, name in enumerate(known.class_names) if _plain(line) in _synonyms(name)
            ]
        if len(matches) != 1:
            raise UserError(
                f"teacher.classes={file}, line {number}: '{line}' is {len(matches)} of the teacher's {known.num_classes} classes; a number from 0 or a name of one would do."
            )
        found.append(matches[0])
    return found


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-]+", " ", name.casefold()).split())


def _synonyms(name: str) -> set[str]:
    return {_plain(word) for word in name.split(",")} - {""}
