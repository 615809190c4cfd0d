"""Selectors side by side, without training on what they choose: a table, a plot and a record."""

from pathlib import Path
from typing import Any

import numpy as np

from d2c_ray.config import EmbedConfig
from d2c_ray.data import tables
from d2c_ray.data.features import embedded
from d2c_ray.evaluate import subsets
from d2c_ray.plan import Node, Plan
from d2c_ray.report import plots
from d2c_ray.rundir import write_json, write_text


def compare(plan: Plan, measured: Node, space: EmbedConfig, out: Path) -> dict[str, Any]:
    """Compares the selections of a plan's arms, each named by its selector, and writes selectors.json and selectors.html.

    Args:
        measured: the finished embed stage of a space that nothing was selected in. space: its configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = plan.config
    chosen = {name: tables.read(nodes["select"].dir.parts()) for name, nodes in plan.arms.items()}
    ids = {name: np.sort(table.column("sample_id").to_numpy()) for name, table in chosen.items()}
    scores = {}
    for node in plan.of("score"):
        table = tables.read(node.dir.parts(), ["sample_id", "score"])
        all_ids, all_scores = table.column("sample_id").to_numpy(), table.column("score").to_numpy()
        order = np.argsort(all_ids)
        for name, mine in ids.items():
            scores[name] = subsets.quantiles(all_scores[order[np.searchsorted(all_ids[order], mine)]])
        scores["all images"] = subsets.quantiles(all_scores)
    rows: dict[str, dict[str, Any]] = {}
    with embedded(measured.dir.parts(), out) as data:
        by_id = np.argsort(data.sample_ids)
        whole = subsets.statistics(data.features, np.arange(len(by_id)), config.evaluate.seed)
        for name, mine in ids.items():
            subset = np.sort(by_id[np.searchsorted(data.sample_ids[by_id], mine)])
            rows[name] = {
                "images": len(mine),
                **subsets.coverage(data.features, subset, config.evaluate.neighbours, config.evaluate.seed, whole),
                **subsets.balance(data.labels[subset], data.classes),
                "score_quantiles": scores.get(name),
                "seconds": plan.arms[name]["select"].dir.success()["seconds"],
            }
    found = {
        "selectors": rows, "jaccard": subsets.jaccard(ids), "score_quantiles_of_all": scores.get("all images"), "quantiles": subsets.QUANTILES,
        "record": {
            "network": space.encoder, "image_size": space.image_size, "neighbours": config.evaluate.neighbours, "seed": config.evaluate.seed,
            "rows": len(by_id), "selected_in": config.embed.encoder,
        },
    }  # fmt: skip
    write_json(out / "selectors.json", found)
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("selectors.html.jinja").render(name=plan.folder.name, plot=plots.selectors(found), **found)
    write_text(out / "selectors.html", page + "\n")
    return found


def print_comparison(found: dict[str, Any], out: Path) -> None:
    """The table, and the overlaps below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    record = found["record"]
    table = Table(title=f"subsets against all {record['rows']:,} images, in {record['network']}", title_justify="left")
    for column in ("selector", "images", "Fréchet", "precision", "recall", "a class", "evenness", "median score", "seconds"):
        table.add_column(column, justify="left" if column == "selector" else "right")
    for name, row in found["selectors"].items():
        middle = row["score_quantiles"][len(subsets.QUANTILES) // 2] if row["score_quantiles"] else None
        table.add_row(
            name, f"{row['images']:,}", _number(row["frechet"], "4g"), _number(row["precision"], "3f"), _number(row["recall"], "3f"),
            f"{row['least']}-{row['most']}", f"{row['evenness']:.3f}", _number(middle, "4f"), f"{row['seconds']:.1f}",
        )  # fmt: skip
    console.print(table)
    overlap = Table(title="overlap (Jaccard)", title_justify="left")
    for column in ("", *found["jaccard"]):
        overlap.add_column(column, justify="left" if not column else "right")
    for name, others in found["jaccard"].items():
        overlap.add_row(name, *(f"{value:.2f}" for value in others.values()))
    console.print(overlap)
    console.print(f"page: {out / 'selectors.html'}", soft_wrap=True)


def _number(value: float | None, digits: str) -> str:
    return f"{value:.{digits}}" if value is not None else "-"
