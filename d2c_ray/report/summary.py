"""What the commands print when they are done."""

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
    print(f"{plan.folder.name}: measured in {arms[0].metrics['record']['network']}")
    print("\n".join(numbers.as_text(html.result_rows(arms), brief=True)))
    for arm in arms:
        console.print(
            shown(f"{arm.name}: {clock(arm.total_seconds)} in all, {clock(arm.seconds['train'] or 0)} of it training"), markup=False
        )
    for notice in html.notices(plan, arms):
        console.print(shown(f"note: {notice}"), markup=False)
    console.print(shown(f"report: {plan.folder / 'report.html'}"), soft_wrap=True, markup=False)


def print_selection(node: Node) -> None:
    """Quota, shortfall and score range by class."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("class", "images", "chosen", "nominal f", "deepest rank", "score from", "to", "short by"):
        table.add_column(name, justify="left" if name == "class" else "right")
    count, rows = gather.selection_classes(node, 40)
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
    if count > len(rows):
        print(f"... and {count - len(rows)} more classes, in {node.folder / score_parts.CLASSES}")


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None else "-"
