"""report.html: one page that needs no other file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray.config import FEATURE_SELECTORS, in_training, to_dict
from d2c_ray.data import score_parts
from d2c_ray.plan import Plan
from d2c_ray.progress import clock
from d2c_ray.report import compare, contact_sheet, gather, numbers, plots
from d2c_ray.rundir import versions, write_text
from d2c_ray.tracking import PREVIEWS

VERSION = 9  # raise it when the page changes
MOST_CLASSES = 1000  # of a selection's table that the page shows
SHOWN_PREVIEWS = 4  # of a training
SHOWN_PAIRS = 16  # of a student, generated and nearest training image


def write(plan: Plan) -> Path:
    """Writes the report of a finished plan into its folder and returns its path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(**context(plan)) + _stamp(plan) + "\n"
    path = plan.folder / "report.html"
    write_text(path, page)
    return path


def is_current(plan: Plan) -> bool:
    """Whether the report in the run's folder was made from the same folders by the same version."""
    path = plan.folder / "report.html"
    return path.is_file() and _stamp(plan) in path.read_text()[-200:]


def _stamp(plan: Plan) -> str:
    content = json.dumps([VERSION, to_dict(plan.config.report), plan.to_json()["arms"]])
    return f"<!-- d2c report {hashlib.sha256(content.encode()).hexdigest()[:16]} -->"


def context(plan: Plan) -> dict[str, Any]:
    """Everything the page's template shows."""
    arms, classes = gather.arms(plan), gather.shown_classes(plan)
    data = plan.of("manifest")[0].dir.success()
    scored = plan.of("score")[0].dir.success() if plan.of("score") else None
    judged = scored or (plan.of("embed") or plan.of("attach"))[0].dir.success()
    table = gather.candidates(plan)
    shown = shown_samples(arms)
    side, wanted = plan.config.data.image_size, plan.config.report.images_per_class
    ids, scores = (table.column(name).to_numpy() for name in ("sample_id", "score"))
    if scored:
        for arm in arms:
            arm.chosen = gather.with_ranks(arm.chosen, table)
    return {
        "name": plan.folder.name,
        "source": data["facts"]["source"],
        "num_images": data["facts"]["rows"],
        "num_classes": len(data["facts"]["class_names"]),
        "arms": arms,
        "notices": notices(plan, arms),
        "measured": measured(arms),
        "per_class": per_class(arms, data["facts"]["class_names"]),
        "copying": copying(plan, arms),
        "equal": equal_rows(arms),
        "equal_words": compare.trained_alike([(arm.name, _images_seen(arm), arm.seconds["train"]) for arm in arms]),
        "bill": bill(arms),
        "planned": any(value is not None for arm in arms for value in arm.planned.values()),
        "record": arms[0].metrics["record"],
        "differences": gather.differences(plan),
        "histogram": plots.score_histogram(scores, ids, arms, classes) if scored else None,
        "curves": plots.training_curves(arms),
        "trainings": [training(arm) for arm in arms],
        "sheet": contact_rows(plan, table, arms[0], classes),
        "gallery": gallery_rows(plan, shown, classes, table),
        "shown": shown,
        "sheet_layout": contact_sheet.layout(side, wanted, 3 if scored else 2),
        "gallery_layout": contact_sheet.layout(side, wanted, 1 + len(shown)),
        "preview_pixels": contact_sheet.PREVIEW_ROWS * (contact_sheet.shown_pixels(side) + contact_sheet.GAP),
        "enlarged": contact_sheet.is_enlarged(side),
        "score": scored["facts"] if scored else None,
        "rejected": judged["rows_rejected"],
        "subsets": [subset(arm) for arm in arms],
        "versions": versions(),
        "nodes": plan.nodes,
        "clock": clock,
        "colours": plots.COLOURS,
    }  # fmt: skip


def subset(arm: gather.Arm) -> dict[str, Any]:
    """What is said of an arm's condensed dataset."""
    selected, attached = arm.nodes["select"], arm.nodes["attach"]
    count, classes = gather.selection_classes(selected, MOST_CLASSES)
    facts = attached.dir.success()["facts"]
    return {
        "arm": arm, "images": len(arm.chosen), "share": selected.dir.success()["facts"]["share"], "bytes": facts["bytes"],
        "classes": classes, "more_classes": count - len(classes), "table": f"{selected.name}/{score_parts.CLASSES}",
        "facts": facts, "folder": attached.name, "online": _online(arm),
    }  # fmt: skip


def training(arm: gather.Arm) -> dict[str, Any]:
    """How an arm's training went: losses, rates (medians over its log records), and the samples it made on the way."""
    curve, folder = arm.curve, arm.nodes["train"].folder

    def median(key: str) -> float | None:
        values = [point[key] for point in curve if point.get(key) is not None]
        return float(np.median(values)) if values else None

    made = sorted((folder / PREVIEWS).glob("images-*.png"))
    return {
        "arm": arm, "images": curve[-1]["images"] if curve else 0,
        "first_loss": curve[0]["loss"] if curve else None, "last_loss": curve[-1]["loss"] if curve else None,
        "rate": median("images_per_sec"), "wait": median("data_wait_share"), "mfu": median("mfu"),
        "peak": next((point["mfu_peak"] for point in curve if point.get("mfu_peak")), None),
        "previews": [
            {"images": int(path.stem.rpartition("-")[2]), "picture": contact_sheet.data_uri(path.read_bytes())}
            for path in (made[i] for i in contact_sheet.evenly(len(made), SHOWN_PREVIEWS))
        ],
    }  # fmt: skip


def _online(arm: gather.Arm) -> str:
    """What an arm's training encodes of the images it shows, in words; empty where all is stored."""
    config = arm.nodes["train"].config
    names = {
        "latent": f"latents by {config.vae.path}",
        **{column: f"{column} by {own.encoder}" for column, own in config.attach.encoders().items()},
    }
    found = [names[name] for name in in_training(config)]
    return f" while training: {', '.join(found)}" if found else ""


def notices(plan: Plan, arms: list[gather.Arm]) -> list[str]:
    """What a reader must know before comparing the numbers."""
    found = []
    record = arms[0].metrics["record"]
    if record["generated"] < numbers.FEW_SAMPLES:
        real = "the statistics given" if record["reference"] is None else f"{record['reference']:,} real ones"
        found.append(
            f"So small a run decides nothing about methods: {record['generated']:,} generated images against {real}. A Fréchet distance is biased upwards "
            "at such counts, for real images too, so read it only beside the rows of real images and of the subset."
        )
    if record["seeds"] == 1 and len(arms) > 1:
        found.append("One seed: a difference between students can be chance. Nothing here is a claim that one is better.")
    found += dict.fromkeys(caveat for arm in arms for caveat in numbers.caveats(arm.metrics))
    for network in (record["network"], *(arms[0].metrics.get("more") or {})):
        every = [own for arm in arms if (own := compare.in_network(arm.metrics, network)) is not None]
        found += dict.fromkeys(note for own in every for note in numbers.network_notes(network, own))
    chosen_by = sorted({arm.selector for arm in arms if arm.selector in FEATURE_SELECTORS})
    if chosen_by:
        found.append(
            f"{' and '.join(chosen_by)} selected in the features of {plan.config.embed.encoder}, a space close to the one the distances are measured in; part of what it gains there may be the measure's."
        )
    agreement = arms[0].metrics["probe_accuracy"]
    if agreement is not None:
        found.append(
            f"Label agreement is judged by a linear probe that is right on {agreement:.1%} of held-out real images; it cannot honestly show more than that."
        )
    return found


def result_rows(arms: list[gather.Arm], network: str = "") -> list[numbers.Row]:
    """The table of metrics: real images first, then every student, its images without guidance, and the subset it was trained on.

    Args:
        network: one of evaluate.more_networks; empty: the main one.
    """
    main = arms[0].metrics["record"]["network"]
    rows: list[numbers.Row] = []
    for index, arm in enumerate(arms):
        own = compare.in_network(arm.metrics, network or main)
        if own is None:
            continue
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        rows += (numbers.real_row(own) if not rows else []) + numbers.rows(arm.name, own, colour, own.get("unguided"))
    return rows


def measured(arms: list[gather.Arm]) -> list[dict[str, Any]]:
    """A table for each network: its headings, and its rows with their cells."""
    found = []
    for network in (arms[0].metrics["record"]["network"], *(arms[0].metrics.get("more") or {})):
        rows = result_rows(arms, network)
        keys = numbers.columns(rows)
        counts = {row.count for row in rows if row.kind != "floor"}
        found.append(
            {
                "network": network,
                "headings": [numbers.COLUMNS[key] for key in keys],
                "rows": [{"row": row, "cells": [numbers.value_and_error(row.values, key) for key in keys]} for row in rows],
                "interval": any(row.values.get("frechet_interval") for row in rows),
                "equal": len(counts) == 1,  # as many real as generated images
            }
        )
    return found


def per_class(arms: list[gather.Arm], class_names: list[str]) -> list[dict[str, Any]]:
    """Each student's best and worst classes in each network, with their Fréchet distances; none where no class has enough images."""

    def named(some: list[tuple[str, float]]) -> str:
        known = {str(label): name for label, name in enumerate(class_names)}
        return ", ".join(f"{known.get(label) or f'label {label}'} {numbers.distance(value)}" for label, value in some)

    rows = []
    for network in (arms[0].metrics["record"]["network"], *(arms[0].metrics.get("more") or {})):
        for index, arm in enumerate(arms):
            found = (compare.in_network(arm.metrics, network) or {}).get("per_class")
            if found:
                best, worst = numbers.per_class(found)
                colour = plots.COLOURS[index % len(plots.COLOURS)]
                rows.append(
                    {"arm": arm, "network": network, "colour": colour, "classes": len(found), "best": named(best), "worst": named(worst)}
                )
    return rows


def shown_samples(arms: list[gather.Arm]) -> list[dict[str, Any]]:
    """Every sampling of the report, guided and unguided, with its student's colour."""
    return [
        {
            "arm": arm,
            "name": arm.name if stage == "sample" else f"{arm.name}, without guidance",
            "node": arm.nodes[stage],
            "metrics": arm.metrics if stage == "sample" else arm.metrics.get("unguided") or {},
            "colour": plots.COLOURS[index % len(plots.COLOURS)],
        }
        for index, arm in enumerate(arms)
        for stage in ("sample", "unguided")
        if stage in arm.nodes
    ]


def copying(plan: Plan, arms: list[gather.Arm]) -> dict[str, Any] | None:
    """How close samples come to the images they were trained on, and the closest of them beside those; None where nobody measured it."""
    every = [own for own in shown_samples(arms) if own["metrics"].get("copying")]
    if not every:
        return None
    closest = [own["metrics"]["copying"].get("pairs", [])[:SHOWN_PAIRS] for own in every]
    nearest = gather.images(plan, np.asarray([pair["sample_id"] for pairs in closest for pair in pairs], np.int64))
    samplings = []
    for own, pairs in zip(every, closest, strict=True):
        made = gather.samples_at(plan, own["node"], {pair["index"] for pair in pairs})
        shown = [
            {**pair, "picture": contact_sheet.strip([made[pair["index"]], _turned(nearest[pair["sample_id"]], pair)])}
            for pair in pairs
            if pair["index"] in made and pair["sample_id"] in nearest
        ]
        samplings.append({**own, "pairs": shown, "kept": bool(made) or not pairs, "lines": numbers.copying(own["metrics"]["copying"])})
    mirrored = any(own["metrics"]["copying"].get("orientations") == 2 for own in samplings)
    return {"samplings": samplings, "labels": [label for label, _ in samplings[0]["lines"]], "mirrored": mirrored}


def _turned(image: np.ndarray, pair: dict[str, Any]) -> np.ndarray:
    """A training image (H x W x C) in the orientation in which a generated one is near it."""
    return image[:, ::-1] if pair.get("mirrored") else image


def equal_rows(arms: list[gather.Arm]) -> list[dict[str, Any]]:
    """What each student saw and took, and how many images it had seen when the fastest was done."""
    least = min((arm.seconds["train"] or 0.0) for arm in arms)
    rows = []
    for arm in arms:
        seconds, seen = arm.seconds["train"] or 0.0, _images_seen(arm)
        rows.append(
            {
                "arm": arm, "kept": len(arm.chosen), "seen": seen, "epochs": seen / max(1, len(arm.chosen)), "seconds": seconds,
                "at_equal_seconds": round(seen * min(1.0, least / seconds)) if seconds else None, "all_seconds": arm.total_seconds,
            }
        )  # fmt: skip
    return rows


def _images_seen(arm: gather.Arm) -> int:
    return arm.nodes["train"].dir.success()["facts"]["images"]


def bill(arms: list[gather.Arm]) -> list[dict[str, Any]]:
    """Seconds a stage for each arm, None where the arm would not have needed it; and those planned before it began, None where there are none."""
    return [
        {
            "stage": stage,
            "seconds": [arm.seconds[stage] for arm in arms],
            "planned": [arm.planned.get(stage) for arm in arms],
            "shared": len({arm.nodes[stage].name for arm in arms if stage in arm.nodes}) < sum(stage in arm.nodes for arm in arms),
        }
        for stage in gather.BILL
        if any(stage in arm.nodes for arm in arms)
    ]


def contact_rows(plan: Plan, table: pa.Table, arm: gather.Arm, classes: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """A class a row: images the arm kept, images it skipped, and the hardest ones, each from easy to hard."""
    wanted = plan.config.report.images_per_class
    ids, labels, scores = (table.column(name).to_numpy() for name in ("sample_id", "label", "score"))
    kept = set(arm.chosen.column("sample_id").to_pylist())
    picks: list[tuple[str, dict[str, np.ndarray]]] = []
    for label, name in classes:
        mine = np.flatnonzero(np.maximum(labels, 0) == label)
        order = ids[mine[np.lexsort((ids[mine], scores[mine]))]]
        chosen = np.asarray([i for i in order if i in kept], np.int64)
        skipped = np.asarray([i for i in order if i not in kept], np.int64)
        picks.append(
            (
                name,
                {
                    "kept": chosen[contact_sheet.evenly(len(chosen), wanted)],
                    "skipped": skipped[contact_sheet.evenly(len(skipped), wanted)],
                    "hardest": order[-wanted // 2 :] if plan.of("score") else order[:0],
                },
            )
        )
    pixels = gather.images(plan, np.concatenate([some for _, groups in picks for some in groups.values()]))
    return [
        {"name": name, **{group: [contact_sheet.picture(pixels[int(i)]) for i in some] for group, some in groups.items()}}
        for name, groups in picks
    ]


def gallery_rows(plan: Plan, shown: list[dict[str, Any]], classes: list[tuple[int, str]], table: pa.Table) -> list[dict[str, Any]]:
    """A class a row: real images beside each student's, the first of each, not the best.

    Args:
        shown: of `shown_samples`.
    """
    wanted = plan.config.report.images_per_class
    ids, labels = table.column("sample_id").to_numpy(), np.maximum(table.column("label").to_numpy(), 0)
    real = {label: ids[labels == label][:wanted] for label, _ in classes}
    pixels = gather.images(plan, np.concatenate(list(real.values())))
    count = wanted * len(plan.of("manifest")[0].dir.success()["facts"]["class_names"])
    generated = [gather.samples(plan, own["node"], count) for own in shown]
    rows = []
    for label, name in classes:
        students = [
            [contact_sheet.picture(image) for asked, image in zip(*made, strict=True) if asked == label][:wanted] for made in generated
        ]
        found = [contact_sheet.picture(pixels[int(i)]) for i in real[label] if int(i) in pixels]
        rows.append({"name": name, "real": found, "students": students})
    return rows
