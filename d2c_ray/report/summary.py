"""What the commands print when they are done."""

from typing import Any

from d2c_ray import logs
from d2c_ray.data import score_parts
from d2c_ray.plan import Node, Plan
from d2c_ray.progress import clock
from d2c_ray.report import gather, html, numbers
from d2c_ray.wording import shown


def print_summary(plan: Plan) -> None:
    """The table of what was measured, what must be known to read it, and where the report is."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    arms = gather.arms(plan)
    network, rows = arms[0].metrics["record"]["network"], html.result_rows(arms)
    logs.table([f"{plan.folder.name}: measured in {network}", *numbers.as_text(rows, brief=True)], numbers.as_fields(rows, network))
    for arm in arms:
        training = arm.seconds["train"] or 0.0
        said = shown(f"{arm.name}: {clock(arm.total_seconds)} in all, {clock(training)} of it training")
        logs.table([said], [(said, {"arm": arm.name, "seconds": arm.total_seconds, "seconds_training": training})])
    for notice in html.notices(plan, arms):
        console.print(shown(f"note: {notice}"), markup=False, soft_wrap=logs.as_json())
    console.print(shown(f"report: {plan.folder / 'report.html'}"), soft_wrap=True, markup=False)


def print_selection(node: Node) -> None:
    """Quota, shortfall and score range by class."""
    count, rows = gather.selection_classes(node, 40)
    if logs.as_json():
        for row in rows:
            logs.say(shown(f"{row['name'] or row['label']}: {row['quota']} of {row['size']} images"), **row)
    else:
        _print_classes(rows)
    if count > len(rows):
        print(f"... and {count - len(rows)} more classes, in {node.folder / score_parts.CLASSES}")


def _print_classes(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("class", "images", "chosen", "nominal f", "deepest rank", "score from", "to", "short by"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in rows:
        table.add_row(
            Text(" ".join(shown(row["name"] or str(row["label"])).split())),  # text alone: a name may look like rich's markup
            str(row["size"]),
            str(row["quota"]),
            _number(row["nominal_f"], 3),
            _number(row["deepest_rank"], 3),
            _number(row["score_min"], 4),
            _number(row["score_max"], 4),
            str(row["shortfall"] or "-"),
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None else "-"
