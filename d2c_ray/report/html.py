"""report.html: one page that needs no other file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray.config import FEATURE_SELECTORS, to_dict
from d2c_ray.data import score_parts
from d2c_ray.plan import Plan
from d2c_ray.progress import clock
from d2c_ray.report import contact_sheet, gather, plots
from d2c_ray.rundir import versions, write_text

VERSION = 3  # raise it when the page changes
MOST_CLASSES = 1000  # of a selection's table that the page shows
FEW_SAMPLES = 10_000  # below this a Fréchet distance is dominated by its own bias


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
    judged = scored or plan.of("embed")[0].dir.success()
    table = gather.candidates(plan)
    ids, labels, scores = (table.column(name).to_numpy() for name in ("sample_id", "label", "score"))
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
        "rows": result_rows(arms),
        "bill": bill(arms),
        "record": arms[0].metrics["record"],
        "differences": gather.differences(plan),
        "histogram": plots.score_histogram(scores, np.maximum(labels, 0), ids, arms, classes) if scored else None,
        "curves": plots.training_curves(arms),
        "sheet": contact_rows(plan, table, arms[0], classes),
        "gallery": gallery_rows(plan, arms, classes, table),
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
        "facts": facts, "folder": attached.name,
    }  # fmt: skip


def notices(plan: Plan, arms: list[gather.Arm]) -> list[str]:
    """What a reader must know before comparing the numbers."""
    found = []
    record = arms[0].metrics["record"]
    if record["generated"] < FEW_SAMPLES:
        found.append(
            f"So small a run decides nothing about methods: {record['generated']:,} generated images against {record['reference']:,} real ones. A Fréchet distance is biased upwards "
            "at such counts, for real images too, so read it only beside the rows of real images and of the subset."
        )
    if record["seeds"] == 1 and len(arms) > 1:
        found.append("One seed: a difference between students can be chance. Nothing here is a claim that one is better.")
    found.append(
        f"Distances are in the features of {record['network']}, not Inception's: none of them is an FID or comparable with a published one."
    )
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


def result_rows(arms: list[gather.Arm]) -> list[dict[str, Any]]:
    """The table of metrics: real images first, then every student and the subset it was trained on."""
    counts, real = arms[0].metrics["counts"], arms[0].metrics["real"]
    rows = [
        {
            "name": "real images, held out",
            "kind": "real",
            "count": counts["real"],
            **real,
            "agreement": arms[0].metrics["probe_accuracy"],
            "colour": None,
        }
    ]
    for index, arm in enumerate(arms):
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        rows.append(
            {
                "name": arm.name,
                "kind": "student",
                "count": arm.metrics["counts"]["generated"],
                **arm.metrics["generated"],
                "agreement": arm.metrics["label_agreement"],
                "colour": colour,
            }
        )
        rows.append(
            {
                "name": f"floor: its subset of {arm.metrics['counts']['subset']:,}",
                "kind": "floor",
                "count": arm.metrics["counts"]["subset"],
                **arm.metrics["subset"],
                "agreement": None,
                "colour": colour,
            }
        )
    return rows


def bill(arms: list[gather.Arm]) -> list[dict[str, Any]]:
    """Seconds a stage for each arm; None where the arm would not have needed it."""
    return [
        {
            "stage": stage,
            "seconds": [arm.seconds[stage] for arm in arms],
            "shared": len({arm.nodes[stage].name for arm in arms if stage in arm.nodes}) < sum(stage in arm.nodes for arm in arms),
        }
        for stage in gather.BILL
        if any(stage in arm.nodes for arm in arms)
    ]


def contact_rows(plan: Plan, table: pa.Table, arm: gather.Arm, classes: list[tuple[int, str]]) -> list[dict[str, str]]:
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
        {"name": name, **{group: contact_sheet.strip([pixels[int(i)] for i in some]) for group, some in groups.items()}}
        for name, groups in picks
    ]


def gallery_rows(plan: Plan, arms: list[gather.Arm], classes: list[tuple[int, str]], table: pa.Table) -> list[dict[str, Any]]:
    """A class a row: real images beside each student's, the first of each, not the best."""
    wanted = plan.config.report.images_per_class
    ids, labels = table.column("sample_id").to_numpy(), np.maximum(table.column("label").to_numpy(), 0)
    real = {label: ids[labels == label][:wanted] for label, _ in classes}
    pixels = gather.images(plan, np.concatenate(list(real.values())))
    generated = [gather.samples(plan, arm, wanted * len(plan.of("manifest")[0].dir.success()["facts"]["class_names"])) for arm in arms]
    rows = []
    for label, name in classes:
        students = [
            contact_sheet.strip([image for asked, image in zip(*made, strict=True) if asked == label][:wanted]) for made in generated
        ]
        rows.append(
            {"name": name, "real": contact_sheet.strip([pixels[int(i)] for i in real[label] if int(i) in pixels]), "students": students}
        )
    return rows
