"""What `d2c plan` prints: the numbers of `d2c_ray.estimate` for every student, and which stages are there already."""

from typing import Any

import numpy as np

from d2c_ray import estimate
from d2c_ray import plan as plans
from d2c_ray.config import Config, arm_configs
from d2c_ray.data import tables
from d2c_ray.errors import UserError
from d2c_ray.models import offline
from d2c_ray.plan import Plan


def collect(config: Config, gpu: str = "", mfu: float = 0.4, images: int = 0) -> dict[str, Any]:
    """The numbers of every student. Nothing is run, fetched or written; without the data, its size is assumed and said.

    Args:
        gpu: name of a device for the hours; empty: none are given.
        mfu: share of its peak that training is assumed to use.
        images: of the source, where it is not at hand; 0: as known or assumed.

    Raises:
        UserError: a device that is not known, or a budget that does not fit.
    """
    plan, why = _plan(config)
    facts, image_bytes = _manifest(plan) if plan else (None, None)
    students = {}
    for arm, own in arm_configs(config).items():
        data, assumed = estimate.known(images, own, facts, image_bytes)
        found = estimate.student(own, data, estimate.of_gpus(own, gpu, mfu) if gpu else None)
        if found["images"] > data.images:
            raise UserError(f"select.budget asks for {found['images']} images; there are {data.images}.")
        students[arm] = {**found, "assumed": [*assumed, *found["assumed"]]}
    stages = [{"stage": node.stage, "folder": node.name, "arms": node.arms, "done": node.dir.done} for node in (plan.nodes if plan else [])]
    return {"name": config.run.name, "students": students, "stages": stages, "no_stages": why}


def _plan(config: Config) -> tuple[Plan | None, str]:
    """The run's plan, as far as data and weights are at hand; or why there is none."""
    if not config.data.path and config.data.source != "digits":
        return None, "data.path is not given"
    try:
        with offline.only_local():
            return plans.make(config, "manifest"), ""
    except UserError as error:
        return None, str(error)


def _manifest(plan: Plan) -> tuple[dict[str, Any] | None, float | None]:
    """What the manifest says where it is finished, and the mean bytes of an image where it knows them."""
    (node,) = plan.of("manifest")
    if not node.dir.done:
        return None, None
    lengths = tables.read(node.dir.parts(), ["length"]).column("length").to_numpy()
    known = len(lengths) and (lengths >= 0).all()
    return node.dir.success()["facts"], float(np.mean(lengths)) if known else None


def lines(found: dict[str, Any]) -> list[str]:
    """The same in words, a line each."""
    out = []
    for arm, student in found["students"].items():
        out += [f"{arm}", *(f"  {line}" for line in _student(student)), ""]
    if found["stages"]:
        out.append("stages")
        out += [f"  {'there ' if stage['done'] else 'to run'}  {stage['folder']} ({', '.join(stage['arms'])})" for stage in found["stages"]]
    else:
        out.append(f"stages: not known yet, {found['no_stages']}")
    return out


def _student(found: dict[str, Any]) -> list[str]:
    model, compute, memory, size = found["model"], found["compute"], found["memory"], found["bytes"]
    each, other, dataset = size["an_image"], size["either_way"], size["dataset"]
    name = f"{model['size']}/{model['patch']}" if model["named"] else f"with patches of {model['patch']}"
    lines = [
        f"model: {model['kind']} {name}, {model['depth']} blocks of {model['width']}, {model['parameters'] / 1e6:,.1f} M parameters ({model['parameters_plain'] / 1e6:,.1f} M without text and alignment head), "
        f"{model['macs_forward'] / 1e9:,.4g} GMACs a forward",
        f"images: {found['images']:,} of {found['of']:,}; training shows {found['shown']:,} in {found['steps']:,} steps of {found['batch_size']:,} ({found['epochs']:,.1f} epochs)",
        f"training: {compute['total']:.3g} FLOPs ({compute['forwards']} forwards, 2 FLOPs a multiply-add)",
    ]
    for name, flops in compute["encoders"].items() if compute["total"] else ():  # nothing has no parts
        lines.append(f"  {flops / compute['total']:.1%} of it {name}, which encodes while training")
    for name in compute["unknown"]:
        lines.append(f"  and {name}, which encodes while training and whose FLOPs are not known")
    hours = compute["assumed"]
    if hours:
        lines.append(
            f"  {hours['hours']:,.1f} GPU-hours on {hours['gpu']}, assumed to use {hours['mfu']:.0%} of its {hours['peak'] / 1e12:,.1f} TFLOP/s in {hours['precision']}"
        )
    lines.append(
        f"memory of a step: {_bytes(memory['total'])}: weights {_bytes(memory['weights'])}, gradients {_bytes(memory['gradients'])}, AdamW {_bytes(memory['moments'])}, "
        f"EMA {_bytes(memory['ema'])}, kept for backward {_bytes(memory['activations'])} at {memory['micro_batch']} images a worker at a time (resources.micro_batch, resources.recompute)"
    )
    kinds = [f"{name} {_bytes(dataset[name])}" for name in ("pixels", "latents", "tokens") if dataset[name]]
    source = f"images {_bytes(dataset['images'])}" if dataset["images"] else "and the images as the source has them"
    lines.append(f"condensed dataset: {', '.join([*kinds, source])}; a node's copy to train from {_bytes(size['cache'])}")
    if found["in_training"]:
        lines.append(f"  encoded while training: {', '.join(found['in_training'])}")
    if each["tokens"]:
        pixels = f"{_bytes(other['pixels'])} of pixels"
        lines.append(
            f"  vision tokens stored: {_bytes(other['tokens_int8'])} in int8, {_bytes(other['tokens_bf16'])} in bf16 ({_bytes(other['tokens_bf16_a_flip'])} a flip); "
            f"encoded while training: none of that, but {pixels} (attach.vision.encode=training)"
        )
    lines.append(
        f"checkpoint: {_bytes(size['checkpoint'])}, {_bytes(size['checkpoints'])} for all that are kept; model folder {_bytes(size['model'])}"
    )
    lines += [f"assumed: {what}" for what in found["assumed"]]
    return lines


def _bytes(count: float) -> str:
    """Bytes in decimal units, as disks are sold and papers count."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.4g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"
