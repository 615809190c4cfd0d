"""What `d2c plan` prints of the numbers of `d2c_ray.forecast`."""

from typing import Any

from d2c_ray.progress import clock
from d2c_ray.report import numbers
from d2c_ray.report.numbers import in_bytes


def lines(found: dict[str, Any]) -> list[str]:
    """What a plan says, a line each."""
    out = [f"one trial of {found['trials']:,}; d2c sweep --dry-run plans all", ""] if found["trials"] else []
    if found["problems"]:
        out += [
            f"it does not fit as it stands: {', '.join(problem['what'] for problem in found['problems'])}; what would do is said below",
            "",
        ]
    for arm, student in found["students"].items():
        out += [f"{arm}", *(f"  {line}" for line in _student(student)), ""]
    out += [f"stages, on {found['cluster']['title']}"]
    if found["no_stages"]:
        out.append(f"  which of them are there already is not known yet: {found['no_stages']}")
    out += [
        *(f"  {line}" for line in _stages(found["stages"])),
        *(f"  {line}" for line in _sources(found["stages"])),
        *_total(found["total"]),
    ]
    out += [found["idle"]] * bool(found["idle"]) + [""]
    out += [*_bytes_left(found), *_memory(found["memory"]), "", *_problems(found["problems"]), *_not_checked(found["not_checked"])]
    assumed = dict.fromkeys(what for student in found["students"].values() for what in student["assumed"])
    return out + [f"assumed: {what}" for what in assumed]


def _stages(rows: list[dict[str, Any]]) -> list[str]:
    """A row a stage: whether it is there, on what it runs, and how long, planned or, of one that is there, planned beside actual."""
    head = ["stage", "", "images", "places", "time", "GPU-hours", "by"]
    if any(row["done"] for row in rows):
        head = [*head[:4], "planned", "took", *head[5:]]
    if any(row["folder"] for row in rows):
        head.append("folder")
    body = []
    for row in rows:
        name = f"{row['stage']} ({', '.join(row['arms'])})" if len({arm for one in rows for arm in one["arms"]}) > 1 else row["stage"]
        line = [name, "there" if row["done"] else "to run", f"{row['images']:,}", str(row["places"] or "")]
        planned = ("-" if row["planned"] is None else _time(row["planned"])) if row["done"] else _time(row["seconds"])
        times = [planned, _time(row["actual"]) if row["done"] else ""] if "took" in head else [planned]
        more = [f"{row['gpu_hours']:,.2f}" if row.get("gpu_hours") else "", row.get("source", ""), row["folder"]]
        body.append([*line, *times, *more][: len(head)])
    return numbers.grid(head, body)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds:,.1f} s" if seconds < 100 else clock(seconds)


def _sources(rows: list[dict[str, Any]]) -> list[str]:
    """Where the paces are from, each once, of what takes a tenth of a stage or more, or is not known."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for part in row.get("parts", ()):
            if part["source"] == "not known" or part["seconds"] >= 0.1 * (row["seconds"] or 0.0) > 0:
                found.setdefault(f"{part['source']}: {part['said']}", []).append(f"{row['stage']}'s {part['what']}")
    return [f"{said} ({', '.join(dict.fromkeys(what))})" for said, what in found.items()]


def _total(total: dict[str, Any]) -> list[str]:
    out = []
    if total["seconds"] is None:
        out.append(f"in all: not known, for want of {', '.join(dict.fromkeys(total['not_known']))}")
    elif total["seconds"]:
        hours = f"{total['seconds'] / 3600:,.2f} hours ({clock(total['seconds'])}) from the first stage to the last that is to run"
        busy = (
            f"; {total['gpu_hours']:,.2f} GPU-hours of work, {total['rented_gpu_hours']:,.2f} with those that GPUs wait"
            if total["gpus"]
            else ""
        )
        out.append(f"in all: {hours}{busy}")
    if total["actual_seconds"] is not None:
        planned, took = _time(total["planned_seconds"]), _time(total["actual_seconds"])
        out.append(
            f"what is there and was planned: planned {planned}, took {took}, over {total['planned_stages']} stage{'s' if total['planned_stages'] != 1 else ''}"
        )
    if total.get("price") is not None:
        out.append(
            f"price: {total['price']:,.2f}, at {total['price_an_hour']:g} a GPU-hour for {total['gpus']} GPUs from the first stage to the last"
        )
    return out


def _bytes_left(found: dict[str, Any]) -> list[str]:
    source, left = found["source_bytes"], found["leaves"]
    said = (
        f"{in_bytes(source['bytes'])} ({source['source']}: {source['said']})"
        if source["bytes"] is not None
        else f"not known ({source['said']})"
    )
    parts = ", ".join(f"{name} {in_bytes(value)}" for name, value in left.items() if value)
    without = f", without {found['leaves_without']}" if found["leaves_without"] else ""
    return [f"bytes: source {said}", f"  left in the run folder: {in_bytes(sum(left.values()))}{f' ({parts})' if parts else ''}{without}"]


# By the stage, or what else computes on a device.
MEMORY_OF = {"train": "a training step", "teacher": "a training step of the teacher", "score": "scoring", "attach": "encoding images", "text": "encoding class names", "sample": "sampling", "decode": "decoding with the VAE"}  # fmt: skip


def _memory(memory: dict[str, dict[str, Any]]) -> list[str]:
    if not memory:
        return []
    largest = max(memory, key=lambda what: memory[what]["bytes"])
    each = [
        f"{MEMORY_OF[what]} {in_bytes(size['bytes'])} ({size['knob']}={size['value']}, {size['source']})" for what, size in memory.items()
    ]
    return [f"memory of the largest step: {in_bytes(memory[largest]['bytes'])}, {MEMORY_OF[largest]}", f"  {'; '.join(each)}"]


def _problems(problems: list[dict[str, Any]]) -> list[str]:
    out = []
    for problem in problems:
        wants, has = (in_bytes(value) if isinstance(value, float | int) else value for value in (problem["wants"], problem["has"]))
        would = (
            f"{' '.join(problem['would'])} would do" if problem["would"] else f"{problem['else_would'] or 'nothing known here'} would do"
        )
        there = (
            f" of the {has} that are planned with ({problem['where']})"
            if problem["planned_with"]
            else (f"; {has} {problem['where']}" if problem["where"] else f"; the cluster has {has}")
        )
        out.append(f"does not fit: {problem['what']} wants {wants}{there}: {would}")
    return out


def _not_checked(options: list[str]) -> list[str]:
    of = {"--disk": "the run folder's disk", "--cache": "the disk of a node's copies"}
    given = " and ".join(f"{option} GB" for option in options)
    return (
        [
            f"not checked: {' and '.join(of[option] for option in options)} ({given} say{'s' if len(options) == 1 else ''} what is free there)"
        ]
        if options
        else []
    )


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
    encoders = f"encoders {in_bytes(memory['encoders'])}, " if memory["encoders"] else ""
    lines.append(
        f"memory of a step: {in_bytes(memory['total'])}: weights {in_bytes(memory['weights'])}, gradients {in_bytes(memory['gradients'])}, AdamW {in_bytes(memory['moments'])}, "
        f"EMA {in_bytes(memory['ema'])}, {encoders}kept for backward {in_bytes(memory['activations'])} at {memory['micro_batch']} images a worker at a time (resources.micro_batch, resources.recompute)"
    )
    kinds = [f"{name} {in_bytes(dataset[name])}" for name in ("pixels", "latents", "tokens") if dataset[name]]
    source = f"images {in_bytes(dataset['images'])}" if dataset["images"] else "and the images as the source has them"
    lines.append(f"condensed dataset: {', '.join([*kinds, source])}; a node's copy to train from {in_bytes(size['cache'])}")
    if found["in_training"]:
        lines.append(f"  encoded while training: {', '.join(found['in_training'])}")
    if each["tokens"]:
        pixels = f"{in_bytes(other['pixels'])} of pixels"
        lines.append(
            f"  vision tokens stored: {in_bytes(other['tokens_int8'])} in int8, {in_bytes(other['tokens_bf16'])} in bf16 ({in_bytes(other['tokens_bf16_a_flip'])} a flip); "
            f"encoded while training: none of that, but {pixels} (attach.vision.encode=training)"
        )
    lines.append(
        f"checkpoint: {in_bytes(size['checkpoint'])}, {in_bytes(size['checkpoints'])} for all that are kept; model folder {in_bytes(size['model'])}"
    )
    return lines
