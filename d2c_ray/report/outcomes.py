"""What came of a sweep's trials: read back from the run folder, as one table, and what it says when trials are compared."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import trials
from d2c_ray.config import Config, dotted, to_yaml
from d2c_ray.data import tables
from d2c_ray.evaluate import paired
from d2c_ray.evaluate import record as records_of
from d2c_ray.report import compare
from d2c_ray.rundir import place_seconds, write_json
from d2c_ray.trials import BUDGET, SELECTOR

DONE, STOPPED, FAILED, RUNNING, WAITING = "done", "stopped", "failed", "running", "waiting"
SECONDS = "seconds"  # folder of what equal seconds allowed
MAKING = ("manifest", "teacher", "score", "embed", "select", "attach", "train")  # of the bill; the rest is measuring
Row = dict[str, Any]


def read_record(folder: Path, name: str) -> Row:
    """How far a trial came; one that has not begun is waiting."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads((folder / "trials" / f"{name}.json").read_text())
    return {"id": name, "state": WAITING, "error": "", "folders": {}, "reports": []}


def write_record(folder: Path, record: Row) -> None:
    write_json(folder / "trials" / f"{record['id']}.json", record)


def records(folder: Path) -> list[Row]:
    """Of all trials that have begun."""
    return [read_record(folder, path.stem) for path in sorted((folder / "trials").glob("*.json"))]


def measures(evaluation: Path) -> dict[str, float]:
    """A trial's numbers by the names of `trials.METRICS`, and the images it was trained on; those that were not measured are left out."""
    student = compare.find(str(evaluation))[0]
    generated = {**student.metrics["generated"], "agreement": student.metrics.get("label_agreement")}
    found = {name: generated.get(name) for name in trials.METRICS} | {"cost_seconds": cost(evaluation), "images": student.seen}
    return {name: float(value) for name, value in found.items() if value is not None}


def cost(folder: Path) -> float:
    """What making a student took, up to a finished stage: seconds of GPUs, or of cores where there are none. Measuring it is left out."""
    return sum(place_seconds(success) for stage, success in compare.needed_by(folder).items() if stage in MAKING)


def seconds(folder: Path) -> float:
    """The same as passed on a clock, one stage after the other."""
    return sum(success["seconds"] for stage, success in compare.needed_by(folder).items() if stage in MAKING)


def pace(curve: Sequence[Mapping[str, Any]]) -> float:
    """Images a second of a training, by its log: without starting its workers, and without the first record where there are more."""
    images = [0, *(point["images"] for point in curve)]
    shown = [(after - before, point["images_per_sec"]) for before, after, point in zip(images, images[1:], curve, strict=False)]
    shown = shown[1:] or shown
    return sum(count for count, _ in shown) / sum(count / rate for count, rate in shown)


def gather(folder: Path, config: Config) -> list[Row]:
    """A row a trial: what it is, what was measured, what it cost; in the order in which the sweep lists them."""
    listed = list(json.loads((folder / "sweep.json").read_text())["trials"])
    order = {name: i for i, name in enumerate(listed)}
    known = [record for record in records(folder) if not listed or record["id"] in order]
    found = sorted(known, key=lambda record: (order.get(record["id"], len(order)), record["label"]))
    return [_row(folder, config, record) for record in found]


def _row(folder: Path, config: Config, record: Row) -> Row:
    own = trials.configured(config, record["point"], record["seed"])
    row: Row = {
        "id": record["id"], "label": record["label"], "point": record["point"], "seed": record["seed"], "twin": record["twin"], "also": record["also"],
        "state": record["state"], "error": record["error"], "reports": record["reports"], "folders": record["folders"],
        "selector": own.select.selector, "kept": None, "seen": None, "measures": {}, "floor": None, "real": None, "seconds": {}, "cost_seconds": None,
        "gpu_hours": None, "device": "", "record": None, "config": own,
    }  # fmt: skip
    evaluation = folder.parent / record["folders"].get("evaluate", "none")
    if (evaluation / compare.METRICS).is_file():
        student = compare.find(str(evaluation))[0]
        decided = folder / SECONDS / f"{record['id']}.json"
        if decided.is_file():  # the images that equal seconds allowed
            own = replace(own, train=replace(own.train, num_images=json.loads(decided.read_text())["images"]))
        row |= {
            "kept": student.kept, "seen": student.seen, "measures": measures(evaluation), "seconds": student.seconds, "cost_seconds": cost(evaluation),
            "gpu_hours": student.gpu_hours, "device": student.device, "record": student.metrics["record"], "floor": (student.metrics.get("subset") or {}).get("frechet"),
            "real": (student.metrics.get("real") or {}).get("frechet"), "config": own,
        }  # fmt: skip
    return row


def write(path: Path, rows: list[Row]) -> None:
    """The rows as a table, one column a number; points, records, folders and configurations as JSON and YAML text."""
    stages = sorted({stage for row in rows for stage in row["seconds"]})
    axes = sorted({key for row in rows for key in row["point"]})
    columns: dict[str, Any] = {
        "trial": [row["id"] for row in rows], "label": [row["label"] for row in rows], "seed": [row["seed"] for row in rows], "twin": [row["twin"] for row in rows],
        "state": [row["state"] for row in rows], "error": [row["error"] for row in rows], "selector": [row["selector"] for row in rows],
        **{key: _column([row["point"].get(key) for row in rows]) for key in axes},
        "images_kept": pa.array([row["kept"] for row in rows], pa.int64()), "images_seen": pa.array([row["seen"] for row in rows], pa.int64()),
        **{name: pa.array([row["measures"].get(name) for row in rows], pa.float64()) for name in trials.METRICS},
        "frechet_floor": pa.array([row["floor"] for row in rows], pa.float64()), "frechet_real": pa.array([row["real"] for row in rows], pa.float64()),
        **{f"seconds_{stage}": pa.array([row["seconds"].get(stage) for row in rows], pa.float64()) for stage in stages},
        "gpu_hours": pa.array([row["gpu_hours"] for row in rows], pa.float64()),
        "point": [json.dumps(row["point"]) for row in rows], "reports": [json.dumps(row["reports"]) for row in rows], "record": [json.dumps(row["record"]) for row in rows],
        "folders": [json.dumps(row["folders"]) for row in rows], "config": [to_yaml(row["config"]) for row in rows],
    }  # fmt: skip
    tables.write(path, pa.table(columns), {"trials": len(rows)})


def _column(values: list[Any]) -> pa.Array:
    """An axis as numbers or words where all of its values are of one kind, else as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds == {str} or kinds == {bool}:
        return pa.array([float(value) if kinds == {int, float} and value is not None else value for value in values])
    return pa.array([json.dumps(value) for value in values])


# What the table says


@dataclass(frozen=True)
class Group:
    """Trials that differ in their seed alone.

    Attributes:
        values: the measure by seed. mean, deviation: of those (deviation of n - 1; None of one seed).
        cost_seconds: the mean of what they cost.
    """

    point: dict[str, Any]
    twin: bool
    rows: list[Row]
    values: dict[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    @property
    def deviation(self) -> float | None:
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None

    @property
    def cost_seconds(self) -> float:
        return float(np.mean([row["cost_seconds"] for row in self.rows]))

    @property
    def kept(self) -> int:
        return int(self.rows[0]["kept"] or 0)


def comparable(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """The finished trials that were measured alike, and what keeps others from being compared with them."""
    finished = [row for row in rows if row["state"] == DONE and row["record"] is not None]
    alike: list[list[Row]] = []
    for row in finished:
        for group in alike:
            if not records_of.differences([group[0]["record"], row["record"]]):
                group.append(row)
                break
        else:
            alike.append([row])
    if not alike:
        return [], []
    most = max(alike, key=len)
    said = []
    for group in alike:
        if group is not most:
            keys = [key for key, _ in records_of.differences([most[0]["record"], group[0]["record"]])]
            words = ", ".join(records_of.DIFFERENT[key] for key in keys)
            said.append(
                f"{len(group)} trials are measured otherwise than the {len(most)} shown ({words}), and are in results.parquet alone"
            )
    return most, said


def groups(rows: Iterable[Row], metric: str) -> list[Group]:
    """Points with the measure of every seed, in the order of the rows."""
    found: dict[str, Group] = {}
    for row in rows:
        if metric in row["measures"] and math.isfinite(row["measures"][metric]):
            group = found.setdefault(json.dumps(row["point"], sort_keys=True), Group(row["point"], row["twin"], [], {}))
            group.rows.append(row)
            group.values[row["seed"]] = row["measures"][metric]
    return list(found.values())


def best(found: Sequence[Group], metric: str) -> Group:
    """The point with the best mean; of equal ones the cheapest."""
    sign = -1.0 if trials.METRICS[metric] else 1.0
    return min(found, key=lambda group: (sign * group.mean, group.cost_seconds))


def front(found: Sequence[Group], metric: str) -> list[Group]:
    """The points that no other beats in both the measure and the cost, cheapest first (a Pareto front)."""
    sign = -1.0 if trials.METRICS[metric] else 1.0
    kept: list[Group] = []
    for group in sorted(found, key=lambda group: (group.cost_seconds, sign * group.mean)):
        if not kept or sign * group.mean < sign * kept[-1].mean:
            kept.append(group)
    return kept


@dataclass(frozen=True)
class Comparison:
    """One value of an axis against another, everything else alike; `where` says what else was fixed.

    Attributes:
        a, b: the values, in words.
        means: of both, over all that is paired.
        told: of the differences a - b, a seed a pair: each is the mean over all other axes.
        p: of `told`, as it stands among all comparisons of the table; None where there are too few seeds.
        verdict: 'better', 'worse' (of a) or 'not told apart' or 'too few seeds'.
    """

    axis: str
    where: str
    a: str
    b: str
    means: tuple[float, float]
    told: paired.Paired
    p: float | None
    verdict: str


def comparisons(found: Sequence[Group], metric: str) -> list[Comparison]:
    """Every two values of every axis, paired by seed and all else; selectors at every budget of their own."""
    # A point stands for all that come to the same, and says its selector also where that is no axis: a twin has another.
    every = [({SELECTOR: group.rows[0]["selector"], **point}, group) for group in found for point in (group.point, *group.rows[0]["also"])]
    axes = list(dict.fromkeys(key for point, _ in every for key in point))
    raw: list[tuple[str, str, Any, Any, tuple[float, float], paired.Paired]] = []
    for axis in axes:
        values = distinct(point[axis] for point, _ in every)
        budgets: list[Any] = distinct(point[BUDGET] for point, _ in every) if axis == SELECTOR and BUDGET in axes else [None]
        for budget, (a, b) in itertools.product(budgets, itertools.combinations(values, 2)):
            inside = [(point, group) for point, group in every if budget is None or point[BUDGET] == budget]
            pairs = _pairs(inside, axis, a, b)
            if pairs:
                by_seed = {seed: [pair for own, *pair in pairs if own == seed] for seed in sorted({own for own, *_ in pairs})}
                mine, theirs = ([float(np.mean([pair[i] for pair in own])) for own in by_seed.values()] for i in (0, 1))
                where = f"{BUDGET.rsplit('.', 1)[-1]}={trials.in_words(budget)}" if budget is not None else ""
                raw.append((axis, where, a, b, (float(np.mean(mine)), float(np.mean(theirs))), paired.paired(mine, theirs)))
    tested = [i for i, one in enumerate(raw) if one[-1].pairs >= paired.LEAST]
    adjusted = dict(zip(tested, paired.holm([raw[i][-1].p or 0.0 for i in tested]), strict=True))
    return [
        Comparison(
            axis, where, trials.in_words(a), trials.in_words(b), means, told, adjusted.get(i), _verdict(told, adjusted.get(i), metric)
        )
        for i, (axis, where, a, b, means, told) in enumerate(raw)
    ]


def _pairs(found: Sequence[tuple[dict[str, Any], Group]], axis: str, a: Any, b: Any) -> list[tuple[int, float, float]]:
    """(seed, value with a, value with b) of points that are alike in all but the axis."""
    first, second = ({_without(point, axis): group for point, group in found if point[axis] == value} for value in (a, b))
    pairs = []
    for others, group in first.items():
        other = second.get(others)
        if other is not None and other is not group:  # an axis that means nothing there
            pairs += [(seed, value, other.values[seed]) for seed, value in group.values.items() if seed in other.values]
    return pairs


def _without(point: dict[str, Any], axis: str) -> str:
    return json.dumps({key: value for key, value in point.items() if key != axis}, sort_keys=True)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Values of axes, each once, in order; they need not be hashable."""
    return list({json.dumps(value): value for value in values}.values())


def _verdict(told: paired.Paired, p: float | None, metric: str) -> str:
    if p is None:
        return "too few seeds"
    if p >= paired.LEVEL:
        return "not told apart"
    return "better" if (told.mean > 0) == trials.METRICS[metric] else "worse"


def track(config: Config, folder: Path, rows: Sequence[Row]) -> None:
    """Sends every finished trial's point and measures to the trackers that are on: TensorBoard's HParams, and runs of MLflow and W&B."""
    from d2c_ray import tracking

    finished = [row for row in rows if row["state"] == DONE]
    known = dotted(config)
    for row in finished:
        parameters = {**{key: known[key] for key in config.sweep.axes}, **row["point"], "seed": row["seed"], "selector": row["selector"]}
        tracking.trial(
            config.tracking,
            folder,
            row["id"],
            row["label"],
            parameters,
            {**row["measures"], **({"frechet_floor": row["floor"]} if row["floor"] else {})},
        )
