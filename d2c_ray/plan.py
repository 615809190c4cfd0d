"""What a run consists of: its stages for every arm, where each leaves its output, and what is there already.

A stage's folder is named by a hash of the configuration that can change its result and of its inputs' hashes. Knobs of
`resources`, logging and checkpoint intervals are left out: they cannot.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2c_ray.config import FEATURE_SELECTORS, Config, ModelConfig, TrainConfig, arm_configs, encoder_key, in_training, to_dict
from d2c_ray.data import manifest, reference_stats
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, latents, networks, offline, teachers, text, vision
from d2c_ray.rundir import StageDir, run_folder
from d2c_ray.selection import rank
from d2c_ray.training import online
from d2c_ray.training.batches import BLOCK

# In the order they run. Raise a stage's number when the same configuration starts to give another result.
VERSIONS = {
    "manifest": 1,
    "teacher": 1,
    "score": 1,
    "embed": 1,
    "select": 2,
    "attach": 2,
    "train": 1,
    "sample": 3,
    "reference": 4,
    "evaluate": 4,
}
FOLDERS = {
    "score": "scores",
    "embed": "features",
    "select": "selection",
    "attach": "condensed",
    "sample": "samples",
    "unguided": "samples",
    "evaluate": "eval",
}
# A stage that is another one with other settings: the same function, version and hash, so that what one made the other finds.
SAME_AS = {"unguided": "sample"}
READS = {"interval": ("k", "f"), "random": ("seed",), "stratified": ("strata", "cutoff", "seed"), "gadc": ("seed",)}  # of select
TRAIN_KNOBS = ("log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "preview_every")


@dataclass
class Node:
    """One stage with one configuration; arms that agree on it share it."""

    stage: str
    config: Config
    inputs: dict[str, "Node"]
    hash: str
    folder: Path
    arms: list[str] = field(default_factory=list)
    lineage: str = ""  # as `Job` takes it

    @property
    def dir(self) -> StageDir:
        return StageDir(self.folder)

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass
class Plan:
    """All nodes of a run in the order of the stages, and each arm's own by stage."""

    config: Config
    folder: Path
    nodes: list[Node]
    arms: dict[str, dict[str, Node]]

    def of(self, stage: str) -> list[Node]:
        return [node for node in self.nodes if node.stage == stage]

    def needed(self, stage: str) -> list[Node]:
        """The nodes of a stage and all that they read, in the order of the stages."""
        found: dict[str, Node] = {}
        stack = self.of(stage)
        while stack:
            node = stack.pop()
            found[node.name] = node
            stack += node.inputs.values()
        return [node for node in self.nodes if node.name in found]

    def to_json(self) -> dict[str, Any]:
        """plan.json: what will run, what is there, and which arm uses what."""
        return {
            "nodes": [
                {
                    "stage": node.stage,
                    "folder": node.name,
                    "arms": node.arms,
                    "inputs": [given.name for given in node.inputs.values()],
                    "done": node.dir.done,
                }
                for node in self.nodes
            ],
            "arms": {arm: {stage: node.name for stage, node in nodes.items()} for arm, nodes in self.arms.items()},
        }


def source_fingerprint(config: Config) -> str:
    """What tells the source's files from others; lists them."""
    return manifest.fingerprint(manifest.find(config.data, config.storage), config.data, config.storage)


def make(config: Config, upto: str = "report", source: str = "") -> Plan:
    """Plans a run, reading no image and starting nothing.

    Args:
        source: as `source_fingerprint` gives it, where it is known; empty: the source is listed.
        upto: the last stage that is wanted; the plan holds it, and else what the report needs, as far as the weights for
            that are at hand.

    Raises:
        UserError: a source, a checkpoint or weights that are not there, shapes that do not fit.
    """
    source = source or source_fingerprint(config)
    folder, last = run_folder(config), upto if upto in STAGES else "evaluate"
    nodes: dict[str, Node] = {}
    arms: dict[str, dict[str, Node]] = {}
    for arm, own in arm_configs(config).items():
        mine: dict[str, Node] = {}
        wanted = needs(last, own)
        known = wanted | needs("evaluate", own)
        for stage, (inputs, hashed) in STAGES.items():
            if stage not in known or any(name not in mine for name in inputs(own)):
                continue
            config_of = unguided(own) if stage == "unguided" else own
            try:
                with nullcontext() if stage in wanted else offline.only_local():
                    settings = hashed(config_of)
            except UserError:
                if stage in wanted:
                    raise
                continue  # its weights are not at hand, and nothing that is asked for needs them
            given = {name: mine[name] for name in inputs(own)}
            facts = {
                "stage": SAME_AS.get(stage, stage),
                "version": VERSIONS[SAME_AS.get(stage, stage)],
                "inputs": {name: node.hash for name, node in given.items()},
                "config": settings,
            }
            if stage == "manifest":
                facts["source"] = source
            digest = _digest(facts)
            name = f"{FOLDERS.get(stage, stage)}-{digest}"
            lineage = _digest(LINEAGE[stage](facts)) if stage in LINEAGE else ""
            node = nodes.setdefault(name, Node(stage, config_of, given, digest, folder / name, lineage=lineage))
            node.arms.append(arm)
            mine[stage] = node
        arms[arm] = mine
    order = list(STAGES)
    return Plan(config, folder, sorted(nodes.values(), key=lambda node: order.index(node.stage)), arms)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def needs(stage: str, config: Config) -> set[str]:
    """A stage and all that it reads, directly or not."""
    return {stage}.union(*(needs(name, config) for name in STAGES[stage][0](config)))


def _pick(section: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}


def _without(section: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in to_dict(section).items() if name not in names}


def _image(config: Config) -> dict[str, Any]:
    return _pick(config.data, "image_column", "image_size", "channels", "max_pixels")


def _latent(config: Config) -> dict[str, Any]:
    return {**_image(config), "latent": latents.latent_facts(config), **_pick(config.vae, "precision", "device_batch")}


def _in_training(config: Config) -> dict[str, Any]:
    """What the dataset holds as pixels alone; nothing is said where it holds all, as before there was a choice."""
    names = in_training(config)
    return {"in_training": names} if names else {}


def _manifest(config: Config) -> dict[str, Any]:
    return _pick(config.data, "source", "image_column", "label_column", "limit_per_class", "rows_per_shard")


def _teacher(config: Config) -> dict[str, Any]:
    if config.teacher.checkpoint:
        folder, _ = checked_checkpoint(config)
        file = Path(config.teacher.classes).expanduser()
        classes = file.read_text() if config.teacher.classes and file.is_file() else ""
        return {"checkpoint": teachers.content_hash(folder), "classes": classes}
    return {
        **_latent(config),
        **({"in_training": ["latent"]} if "latent" in in_training(config) else {}),
        "flip": config.data.flip,
        "model": to_dict(config.teacher.model),
        "train": _training(config.teacher.train),
    }


def _score(config: Config) -> dict[str, Any]:
    return {**_latent(config), "score": _without(config.score, "cache_latents")}


def _embed(config: Config) -> dict[str, Any]:
    return {**_image(config), **to_dict(config.embed), "weights": frozen.file_hash(frozen.weights_file(config.embed.encoder))}


def _select(config: Config) -> dict[str, Any]:
    select = config.select
    if select.selector == "all":
        return _pick(select, "selector")
    found = {**_pick(select, "selector", "budget", "balance"), **_pick(select, *READS.get(select.selector, ()))}
    if select.selector == "gadc":
        # A class that is too large is refused, and a dummy source of one cost for all cancels.
        found["transport"] = _without(select.transport, "max_class", "gamma")
    return found


def _attach(config: Config) -> dict[str, Any]:
    options, grid = config.attach, latents.grid_side(latents.latent_facts(config), config.model)
    return {
        **_latent(config),
        **_in_training(config),
        "flip": config.data.flip,
        "grid": grid,
        "rows_per_part": options.rows_per_part,
        # By what the weights are, not by where they lie.
        "text": _without_name(text.facts(options.text)) if options.text.encoder != "none" else None,
        "vision": {
            column: {**_without_name(vision.facts(own, grid, encoder_key(column))), "storage": own.storage}
            for column, own in options.encoders().items()
            if column not in in_training(config)  # of which the dataset holds nothing: its training is named by them
        },
    }


def _without_name(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "encoder"}


def _train(config: Config) -> dict[str, Any]:
    found = {"model": to_dict(config.model), "train": _training(config.train)}
    column = online.column(config.train.align_with)
    if column in in_training(config) and config.train.align_weight > 0:
        grid = latents.grid_side(latents.latent_facts(config), config.model)
        found["vision"] = _without_name(vision.facts(config.attach.encoders()[column], grid, encoder_key(column)))
    return found


def _training(options: TrainConfig) -> dict[str, Any]:
    """What of a training's options can change its result; where it starts by what the weights are, not by where they lie."""
    found = _without(options, *TRAIN_KNOBS)
    if options.start:
        from d2c_ray.models import published

        found["start"] = published.facts(options.start)["hash"]
    return found


def _sample(config: Config) -> dict[str, Any]:
    found = to_dict(config.sample)
    if config.sample.keep == "none":  # features are made with the images
        found |= {"networks": list(networks.every(config.evaluate).values()), "networks_batch": config.evaluate.device_batch}
    return found


def unguided(config: Config) -> Config:
    """The configuration that samples the same images without guidance."""
    return replace(config, sample=replace(config.sample, guidance=1.0, guidance_interval=(0.0, 1.0), guidance_channels="all"))


def _reference(config: Config) -> dict[str, Any]:
    evaluate = config.evaluate
    return {
        **_image(config), **_pick(evaluate, "max_reference", "device_batch", "seed"), "held_out": config.sample.num_images,
        "networks": list(networks.every(evaluate).values()),
    }  # fmt: skip


def _evaluate(config: Config) -> dict[str, Any]:
    evaluate = config.evaluate
    found = _pick(evaluate, "neighbours", "kid_subsets", "kid_subset_size", "bootstrap", "pairs", "seed")
    # By what the file holds, not by where it lies.
    if evaluate.reference:
        width = networks.facts(evaluate.network, evaluate)["width"]
        given = reference_stats.read("evaluate.reference", Path(evaluate.reference), width, evaluate.network)
        found["reference"] = reference_stats.content_hash(given)
    return found


def _reads(*stages: str) -> Callable[[Config], tuple[str, ...]]:
    return lambda config: stages


def _selects_from(*stages: str) -> Callable[[Config], tuple[str, ...]]:
    def reads(config: Config) -> tuple[str, ...]:
        if config.select.selector == "all":  # attach finds out which images can be decoded
            return stages
        # A random choice needs no table, but is made among the images that can be decoded.
        return ("embed" if config.select.selector in FEATURE_SELECTORS else "score", *stages)

    return reads


def _measured(config: Config) -> tuple[str, ...]:
    # Without guidance (a scale of 1) the images are unguided already.
    twice = config.evaluate.unguided and config.sample.guidance != 1.0
    return ("manifest", "attach", "sample", *(("unguided",) if twice else ()), "reference")


# Stage: (its inputs, what of the configuration can change its result).
STAGES: dict[str, tuple[Callable[[Config], tuple[str, ...]], Callable[[Config], dict[str, Any]]]] = {
    "manifest": (_reads(), _manifest),
    "teacher": (_reads("manifest"), _teacher),
    "score": (_reads("manifest", "teacher"), _score),
    "embed": (_reads("manifest"), _embed),
    "select": (_selects_from("manifest"), _select),
    "attach": (_selects_from("manifest", "select"), _attach),  # the score table may have kept latents
    "train": (_reads("manifest", "attach"), _train),
    "sample": (_reads("train"), _sample),
    "unguided": (_reads("train"), _sample),  # of the configuration `unguided` gives
    "reference": (_reads("manifest"), _reference),
    "evaluate": (_measured, _evaluate),
}


def _of_any_length(facts: dict[str, Any]) -> dict[str, Any]:
    """What trainings share one of which goes on where the other ended."""
    options = {name: value for name, value in facts["config"]["train"].items() if name != "num_images"}
    return {**facts, "config": {**facts["config"], "train": options}}


def _of_any_choice(facts: dict[str, Any]) -> dict[str, Any]:
    """What condensed datasets share whose images have the same attachments, whichever were chosen."""
    return {**facts, "inputs": {"manifest": facts["inputs"]["manifest"]}}


# Stage: what of its facts folders share one of which can be made from another.
LINEAGE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"train": _of_any_length, "attach": _of_any_choice}


def checked_checkpoint(config: Config) -> tuple[Path, teachers.Facts]:
    """The teacher's folder and what it says, its latent space compared with the data's.

    Raises:
        UserError: no teacher there, or one of another latent space.
    """
    given, latent = config.teacher.checkpoint, latents.latent_facts(config)
    folder = teachers.resolve(given)
    known = teachers.facts(folder)
    if known.source == "diffusers" and not config.vae.path:
        where = f"vae.path={given} vae.subfolder=vae" if known.vae_folder else "vae.path of its AutoencoderKL (stabilityai/sd-vae-ft-ema)"
        raise UserError(f"teacher.checkpoint={given} works on the latents of a VAE, and the data is pixels: set {where}.")
    which = "encoder" if known.latent.get("encoder") and latent.get("encoder") else "vae"
    # Our own say it all; of a transformer that came alone nothing is known.
    theirs = known.latent.get(which, None if "kind" in known.latent else latent.get(which))
    if theirs != latent.get(which):
        raise UserError(
            f"teacher.checkpoint={given} was trained in the latents of another VAE (weights {theirs}) than vae.path={config.vae.path or '(pixels)'} ({latent.get(which)})."
        )
    if (known.channels, known.side) != (latent["channels"], latent["side"]):
        raise UserError(
            f"teacher.checkpoint={given} works on {known.channels} x {known.side} x {known.side} latents; "
            f"data.image_size, data.channels and vae.path give {latent['channels']} x {latent['side']} x {latent['side']}."
        )
    return folder, known


def check_against_data(plan: Plan, data: dict[str, Any]) -> None:
    """Refuses what only the manifest can show to be wrong, before a cluster is asked for anything.

    Args:
        data: the manifest stage's facts.

    Raises:
        UserError: a budget that does not fit, a class without a name while text is on, a teacher of other classes, too
            few images to evaluate with, a batch of fewer blocks than workers.
    """
    config, rows, names, sizes = plan.config, data["rows"], data["class_names"], np.asarray(data["class_counts"])
    for arm, own in arm_configs(config).items():
        try:
            if own.select.selector != "all":
                rank.quotas(sizes, rank.budget_images(own.select.budget, rows), own.select.balance)
        except UserError as error:
            raise UserError(str(error) if len(plan.arms) == 1 else f"arm '{arm}': {error}") from None
        if own.select.selector == "gadc" and sizes.max() > own.select.transport.max_class:
            largest = int(sizes.argmax())
            raise UserError(
                f"{f'arm {arm!r}: ' if len(plan.arms) > 1 else ''}select.selector=gadc holds the distances of a class's images to each other: label {largest} "
                f"has {sizes[largest]}, select.transport.max_class={own.select.transport.max_class} allows that for fewer ({8 * int(sizes[largest]) ** 2 / 2**30:.1f} GiB would be needed)."
            )
        if own.train.start and "train" in plan.arms[arm]:  # which is planned only where the encoders are at hand
            states = text.facts(own.attach.text) if own.attach.text.encoder != "none" else None
            shape = (states["tokens"], states["width"]) if states else None
            _check_start("train.start", own, own.model, own.train.start, len(names), shape)
        check_batch("train.batch_size", own.train.batch_size, config.resources.train_workers)
        if own.attach.text.encoder != "none":
            nameless = [label for label, size in enumerate(sizes) if size and not names[label]]
            if nameless:
                raise UserError(
                    f"attach.text.encoder={own.attach.text.encoder} needs a name for every class; {len(nameless)} of {len(sizes)} have none, the first label {nameless[0]}. "
                    "Give a text file with one name a line as data.classes, or switch text off (attach.text.encoder=none)."
                )
    if config.teacher.checkpoint:
        _, known = checked_checkpoint(config)
        teachers.class_map(names, data["class_counts"], known, config.teacher.classes)
    elif config.teacher.train.start:
        _check_start("teacher.train.start", config, config.teacher.model, config.teacher.train.start, len(names), None)
    check_batch("teacher.train.batch_size", config.teacher.train.batch_size, config.resources.teacher_workers)
    if min(rows // 2, config.sample.num_images) <= config.evaluate.neighbours + 1:
        raise UserError(
            f"{rows} images and sample.num_images={config.sample.num_images} are too few to evaluate with evaluate.neighbours={config.evaluate.neighbours}."
        )


def _check_start(key: str, config: Config, model: ModelConfig, start: str, classes: int, text: tuple[int, int] | None) -> None:
    from d2c_ray.models import published

    spec = latents.transformer_spec(model, latents.latent_facts(config), max(1, classes), text, 0, start)
    published.check(key, start, spec)


def check_batch(key: str, batch: int, workers: int) -> None:
    """Refuses a batch of fewer blocks than workers, which take whole ones."""
    blocks = -(-batch // BLOCK)
    if blocks < workers:
        raise UserError(
            f"{key}={batch} is {blocks} blocks of {BLOCK} images, too few for {workers} workers, which take whole ones; {BLOCK * workers} would do."
        )
