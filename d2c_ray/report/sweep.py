"""A sweep's page: quality against budget and against cost, what seeds tell apart, strengths, and what to try next."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2c_ray import logs, trials
from d2c_ray.config import Config, to_yaml
from d2c_ray.evaluate import paired
from d2c_ray.progress import clock
from d2c_ray.report import numbers, outcomes, plots
from d2c_ray.report.outcomes import DONE, FAILED, STOPPED, Comparison, Group, Row
from d2c_ray.rundir import versions, write_text
from d2c_ray.trials import BUDGET, METRICS, SELECTOR, STRENGTHS
from d2c_ray.wording import shown

PAGE, BEST = "report.html", "best.yaml"


def write(folder: Path, config: Config, rows: list[Row]) -> None:
    """Writes report.html, and best.yaml with the best point's configuration, into a sweep's folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = summary(config, rows)
    if found["best"] is not None:
        write_text(folder / BEST, best_yaml(found["best"], found["metric"]))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    more = [name for name in dict.fromkeys([*config.sweep.metrics[1:], "precision", "recall"]) if name != found["metric"]]

    def cells(group: Group) -> list[str]:
        return [
            *(_number(_mean([row["measures"] for row in group.rows], name), name) for name in more),
            _number(_mean(group.rows, "floor"), "frechet"),
        ]

    page = environment.get_template("sweep.html.jinja").render(
        name=folder.parent.name, sweep=folder.name, config=config, versions=versions(), clock=clock, words=trials.label, number=_number, LEAST=paired.LEAST,
        figures=_figures(config, found), BEST=BEST, cells=cells, columns=[*(numbers.COLUMNS.get(name, name) for name in more), "floor"], **found,
    )  # fmt: skip
    write_text(folder / PAGE, page + "\n")


def summary(config: Config, rows: list[Row]) -> dict[str, Any]:
    """All that the page and the command say of a sweep's rows."""
    metric = config.sweep.metrics[0]
    alike, apart = outcomes.comparable(rows)
    every = outcomes.groups(alike, metric)
    tuned = [group for group in every if not group.twin] or every
    # Trials that were ended early have been chosen among already: what is left of them compares with nothing.
    compared = outcomes.comparisons(every, metric) if not config.sweep.asha else []
    best = outcomes.best(tuned, metric) if tuned else None
    return {
        "metric": metric, "heading": numbers.COLUMNS.get(metric, metric), "rows": rows, "groups": sorted(every, key=lambda group: _order(group, metric)),
        "best": best, "tuned": len(tuned), "better_twin": _better_twin(every, best, metric), "more_is_better": METRICS[metric], "front": outcomes.front(every, metric), "comparisons": compared, "apart": apart,
        "counts": {state: sum(row["state"] == state for row in rows) for state in (DONE, STOPPED, FAILED)},
        "failed": [row for row in rows if row["state"] == FAILED], "real": _mean(alike, "real"), "notices": notices(config, every, alike, apart),
        "next": what_next(config, every, compared, best, metric), "seconds": sum(row["cost_seconds"] or 0.0 for row in rows),
        "record": alike[0]["record"] if alike else None,
    }  # fmt: skip


def _better_twin(every: Sequence[Group], best: Group | None, metric: str) -> Group | None:
    """The best random twin, where it is better than the best of the points that were asked for."""
    twins = [group for group in every if group.twin]
    found = outcomes.best(twins, metric) if twins and best is not None else None
    return found if found is not None and best is not None and _order(found, metric) < _order(best, metric) else None


def _order(group: Group, metric: str) -> float:
    return -group.mean if METRICS[metric] else group.mean


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None


def best_yaml(best: Group, metric: str) -> str:
    """The configuration of the best point's first seed, for `d2c run`."""
    row = min(best.rows, key=lambda row: row["seed"])
    spread = f" ± {best.deviation:.4g}" if best.deviation is not None else ""
    head = f"# The best point of a sweep: {trials.label(best.point)}; {metric} {best.mean:.4g}{spread} over {len(best.values)} seeds. Seed {row['seed']}.\n"
    return head + to_yaml(row["config"])


def notices(config: Config, every: Sequence[Group], rows: Sequence[Row], apart: Sequence[str]) -> list[str]:
    """What a reader must know before comparing the numbers."""
    said = list(apart)
    if rows and rows[0]["record"]["generated"] < numbers.FEW_SAMPLES:
        said.append(
            f"{rows[0]['record']['generated']:,} images are measured of each student: Fréchet distances are biased upwards at such counts, for real images too. "
            "Read them beside the rows of real images and of the floor, and only against each other."
        )
    least = min((len(group.values) for group in every), default=0)
    if every and least < paired.LEAST:
        said.append(
            f"Some points have {least} of the {paired.LEAST} seeds that a comparison needs: nothing is called better where there are fewer."
        )
    if config.sweep.asha:
        said.append("ASHA ended trials early by what they measured: this sweep tunes, and compares nothing with anything.")
    if config.sweep.equal == "seconds":
        said.append(
            f"Students had {config.sweep.seconds:,.0f} s each for making their data and training, by the pace of their first images; the seconds they took stand in the table."
        )
    if rows:
        said.append(numbers.what_it_is(rows[0]["record"]["network"]))
    return said


def what_next(config: Config, every: Sequence[Group], compared: Sequence[Comparison], best: Group | None, metric: str) -> list[str]:
    """What the numbers suggest to try, each with its reason."""
    if best is None:
        return []
    said = []
    for key, value in best.point.items():
        values = config.sweep.axes.get(key)
        tried = sorted(
            {
                group.point[key]
                for group in every
                if isinstance(group.point.get(key), int | float) and not isinstance(group.point.get(key), bool)
            }
        )
        if len(tried) > 1 and isinstance(value, int | float) and value in (tried[0], tried[-1]) and not (value == 0 and tried[0] == 0):
            side, factor = ("below", 0.5) if value == tried[0] else ("above", 2)
            said.append(
                f"{key}={trials.in_words(value)} is the {'lowest' if value == tried[0] else 'highest'} that was tried: values {side} it, such as {trials.in_words(value * factor)}, may do better."
            )
        elif isinstance(values, list) and len(tried) > 2 and value in tried[1:-1]:
            place = tried.index(value)
            said.append(
                f"{key}: between {trials.in_words(tried[place - 1])} and {trials.in_words(tried[place + 1])} a finer search may find more."
            )
    open_ = [one for one in compared if one.verdict == "not told apart" and one.axis == SELECTOR and one.told.deviation > 0]
    for one in open_[:3]:
        needed = _seeds_for(one)
        if needed is not None:
            at = f" at {one.where}" if one.where else ""
            said.append(
                f"{one.a} and {one.b}{at} differ by {abs(one.told.mean):.3g} with a spread of {one.told.deviation:.3g}: some {needed} seeds would tell a difference of this size apart."
            )
    cheaper = [group for group in outcomes.front(every, metric) if group.cost_seconds < best.cost_seconds]
    if cheaper:
        near = cheaper[-1]
        said.append(
            f"{trials.label(near.point)} comes to {_number(near.mean, metric)} against {_number(best.mean, metric)} at {near.cost_seconds / best.cost_seconds:.0%} of the cost: enough, if that is good enough for the use."
        )
    return said


def _seeds_for(one: Comparison) -> int | None:
    """Seeds at which a difference of this size and spread would have a t of 3; None of those that are no difference."""
    if one.told.mean == 0:
        return None
    needed = int(np.ceil((3 * one.told.deviation / abs(one.told.mean)) ** 2))
    return needed if one.told.pairs < needed <= 100 else None


def _figures(config: Config, found: dict[str, Any]) -> dict[str, str | None]:
    every: list[Group] = found["groups"]
    heading = found["heading"]
    if not every:
        return {"budget": None, "cost": None, "strengths": None}
    selectors = list(dict.fromkeys(_selector(group) for group in every))
    lines = {name: _by_budget([group for group in every if _selector(group) == name]) for name in selectors}
    floors = (
        {name: _floors([group for group in every if _selector(group) == name]) for name in selectors}
        if found["metric"] == "frechet"
        else {}
    )
    real = found["real"] if found["metric"] == "frechet" else None
    budgets = {x for line in lines.values() for x, *_ in line}
    cost = plots.against_cost(
        [(group.cost_seconds, group.mean, group.deviation, _selector(group)) for group in every], selectors,
        [(group.cost_seconds, group.mean) for group in found["front"]], heading,
    )  # fmt: skip
    axes = strength_axes(config, every)
    return {
        "budget": plots.against_budget(lines, floors, real, heading) if len(budgets) > 1 else None,
        "cost": cost,
        "strengths": plots.heat_maps(_maps(every, axes), axes, heading, METRICS[found["metric"]]) if axes else None,
    }


def _selector(group: Group) -> str:
    return str(group.rows[0]["selector"])


def _by_budget(every: Sequence[Group]) -> list[tuple[int, float, float, list[float]]]:
    """(images kept, mean, deviation over seeds, all values) a budget: a seed's value is its mean over all other axes."""
    found = []
    for kept in sorted({group.kept for group in every}):
        mine = [group for group in every if group.kept == kept]
        seeds = sorted(set.intersection(*(set(group.values) for group in mine)))
        if seeds:
            means = [float(np.mean([group.values[seed] for group in mine])) for seed in seeds]
            spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
            found.append((kept, float(np.mean(means)), spread, [value for group in mine for value in group.values.values()]))
    return found


def _floors(every: Sequence[Group]) -> list[tuple[int, float]]:
    found = []
    for kept in sorted({group.kept for group in every}):
        values = [row["floor"] for group in every if group.kept == kept for row in group.rows if row["floor"] is not None]
        if values:
            found.append((kept, float(np.mean(values))))
    return found


def strength_axes(config: Config, every: Sequence[Group]) -> tuple[str, str] | None:
    """The two axes of the heat maps: strengths first, then any other of several values; None where there are not two."""
    several = [key for key in config.sweep.axes if key != SELECTOR and len(outcomes.distinct(group.point[key] for group in every)) > 1]
    ordered = sorted(several, key=lambda key: (key not in STRENGTHS, key == BUDGET))
    return (ordered[0], ordered[1]) if len(ordered) > 1 and ordered[0] in STRENGTHS else None


def _maps(every: Sequence[Group], axes: tuple[str, str] | None) -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """For each selector the values of both axes, in words, and the mean of the measure at each pair of them (NaN where there is none)."""
    if axes is None:
        return {}
    found = {}
    columns, lines = (
        sorted(outcomes.distinct(group.point[axis] for group in every), key=lambda value: (isinstance(value, str), value)) for axis in axes
    )
    for name in dict.fromkeys(_selector(group) for group in every):
        grid = np.full((len(lines), len(columns)), np.nan)
        for i, line in enumerate(lines):
            for j, column in enumerate(columns):
                values = [
                    group.mean
                    for group in every
                    if _selector(group) == name and group.point[axes[0]] == column and group.point[axes[1]] == line
                ]
                if values:
                    grid[i, j] = np.mean(values)
        found[name] = ([trials.in_words(value) for value in columns], [trials.in_words(value) for value in lines], grid)
    return found


def show(config: Config, folder: Path, rows: list[Row]) -> None:
    """Prints what a sweep that is done found: its points, what they tell apart, and what is next."""
    found = summary(config, rows)
    logs.table([shown(line) for line in _points(found)], [(shown(said), fields) for said, fields in _points_as_fields(found)])
    print(shown("\n".join(_remarks(found, folder))))


def _points(found: dict[str, Any]) -> list[str]:
    """The table of points."""
    metric = found["metric"]
    body = [
        [
            trials.label(group.point), f"{group.kept:,}", f"{_number(group.mean, metric)}{f' ± {_number(group.deviation, metric)}' if group.deviation is not None else ''}",
            str(len(group.values)), _number(_mean(group.rows, "floor"), "frechet"), clock(group.cost_seconds),
        ]
        for group in found["groups"]
    ]  # fmt: skip
    return numbers.grid(["", "images", found["heading"], "seeds", "floor", "cost"], body) if body else ["no trial is finished"]


def _points_as_fields(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The same for machines: of each point a text, and fields."""
    metric = found["metric"]
    rows = [
        (
            f"{trials.label(group.point)}: {metric} {_number(group.mean, metric)} over {len(group.values)} seeds",
            {
                "point": group.point, "twin": group.twin, "images": group.kept, "metric": metric, "mean": group.mean, "deviation": group.deviation,
                "seeds": len(group.values), "floor": _mean(group.rows, "floor"), "cost_seconds": group.cost_seconds,
            },
        )
        for group in found["groups"]
    ]  # fmt: skip
    return rows or [("no trial is finished", {})]


def _remarks(found: dict[str, Any], folder: Path) -> list[str]:
    """What is said below the table of points."""
    metric = found["metric"]
    said = [in_words(one, metric) for one in found["comparisons"]]
    said += [f"note: {notice}" for notice in found["notices"]]
    said += [f"next: {text}" for text in found["next"]]
    if found["best"] is not None:
        said.append(f"best: {trials.label(found['best'].point)}, as {folder / BEST}, which d2c run takes")
    return [*said, f"report: {folder / PAGE}"]


def in_words(one: Comparison, metric: str) -> str:
    """A comparison as a sentence."""
    at = f" at {one.where}" if one.where else ""
    p = f", p = {one.p:.2g}" if one.p is not None else ""
    means = " against ".join(_number(value, metric) for value in one.means)
    return f"{one.axis.rsplit('.', 1)[-1]} {one.a} against {one.b}{at}: {one.verdict} ({means}, {one.told.pairs} seeds{p})"


def _number(value: float | None, metric: str) -> str:
    return (
        numbers.value_and_error({metric: value}, metric)[0]
        if metric in numbers.COLUMNS
        else numbers.NONE
        if value is None
        else f"{value:,.1f}"
    )


def forecast_lines(found: dict[str, Any]) -> list[str]:
    """What `d2c sweep --dry-run` prints."""
    said = [
        f"{found['trials']} trials of {found['points']} points, {found['twins']} of them random twins; {found['concurrent']} at once; {found['finished']} are finished"
    ]
    body = [[stage, str(count["folders"]), str(count["to_make"])] for stage, count in found["stages"].items()]
    said += numbers.grid(["stage", "folders", "to make"], body)
    said.append(f"what trials share: {clock(found['shared_seconds'])}; their own: {clock(found['trial_seconds'])}")
    by = (
        "by what d2c bench, or just now this dry run, measured on this machine"
        if found["measured"]
        else f"on {found['cluster']}, by what d2c plan goes by"
    )
    said.append(f"hours: {found['seconds'] / 3600:.2f} ({clock(found['seconds'])}), {by}:")
    said += [
        f"  {stage}: {' to '.join(f'{rate:,.1f}' for rate in dict.fromkeys((every[0], every[-1])))} images/s a process"
        for stage, every in found["images_per_second"].items()
    ]
    size = found["bytes"]
    said.append(
        f"bytes: {numbers.in_bytes(sum(size.values()))} ({', '.join(f'{name} {numbers.in_bytes(value)}' for name, value in size.items() if value)})"
    )
    return said + [f"assumed: {text}" for text in found["assumed"]]
