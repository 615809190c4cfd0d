"""What a sweep consists of: points of its axes, a seed each, and the run of every one of them. Reads and starts nothing.

A point gives each axis a value; a trial is a point with a seed, as a whole configuration of its own.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from d2c_ray import plan as plans
from d2c_ray.config import INCEPTION, Config, SweepConfig, dotted, from_dict, merged, to_dict
from d2c_ray.errors import UserError
from d2c_ray.plan import Plan
from d2c_ray.wording import nearest

SELECTOR = "select.selector"
BUDGET = "select.budget"
STRENGTHS = ("train.align_weight", "train.text_strength", "train.align_until")
# Measure: whether more of it is better. The first of sweep.metrics decides.
METRICS = {
    "frechet": False, "kid": False, "precision": True, "recall": True, "density": True, "coverage": True, "inception_score": True,
    "agreement": True, "cost_seconds": False,
}  # fmt: skip
NO_AXES = ("run", "storage", "report", "tracking", "log", "resources", "sweep", "arms")  # sections of what cannot change a result
RANGE = "a range such as {low: 0.1, high: 2.0, log: true}"


@dataclass
class Trial:
    """One point with one seed.

    Attributes:
        id: a hash of what it is, the same in every sweep of the same run folder.
        twin: whether it is there for comparison alone: a random choice in place of another selector's.
        plan: its stages, those of other trials among them.
        also: other points that come to the same, as where an axis means nothing to a selector.
    """

    id: str
    point: dict[str, Any]
    seed: int
    twin: bool
    config: Config
    plan: Plan
    also: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{label(self.point)} seed={self.seed}"


def label(point: dict[str, Any]) -> str:
    """A point in words: the last part of each field, and its value."""
    names = [key.rsplit(".", 1)[-1] for key in point]
    return " ".join(
        f"{key if names.count(name) > 1 else name}={in_words(value)}" for name, (key, value) in zip(names, point.items(), strict=True)
    )


def in_words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check(config: Config) -> None:
    """Refuses a sweep that means nothing.

    Raises:
        UserError: names the field, what was found and what would do.
    """
    sweep = config.sweep
    if not sweep.axes:
        raise UserError(
            "sweep.axes is empty: fields and their values would do, for example {select.budget: [0.02, 0.08], train.align_weight: [0, 0.5]}."
        )
    if config.arms:
        raise UserError("a sweep has no arms: what they change are its axes, for example {select.selector: [random, interval]}.")
    known = dotted(replace(config, sweep=SweepConfig()))
    for key in sweep.axes:
        _check_field("sweep.axes", key, known)
    for key in sweep.seed_of:
        _check_field("sweep.seed_of", key, known)
        if type(known[key]) is not int:
            raise UserError(f"sweep.seed_of: {key} is no seed; fields such as {', '.join(SweepConfig().seed_of)} would do.")
    for key, values in sweep.axes.items():
        _check_values(key, values, sweep)
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"sweep.seeds={sweep.seeds}: one seed or more, each once, would do.")
    clash = set(sweep.seed_of) & set(sweep.axes)
    if clash:
        raise UserError(f"{min(clash)} is an axis and in sweep.seed_of; one of the two would do.")
    for name in sweep.metrics:
        if name not in METRICS:
            raise UserError(f"sweep.metrics: {name!r} is unknown; of {', '.join(METRICS)}{nearest(name, list(METRICS))}")
    networks = {config.evaluate.network, *(sweep.axes.get("evaluate.network") or [])}
    if "inception_score" in sweep.metrics and networks != {INCEPTION}:
        raise UserError(f"sweep.metrics: inception_score is of evaluate.network={INCEPTION}, and {config.evaluate.network} gives none.")
    if not sweep.metrics or len(set(sweep.metrics)) < len(sweep.metrics):
        raise UserError(f"sweep.metrics={sweep.metrics}: one measure or more, each once, would do.")
    if sweep.metrics[0] == "cost_seconds":
        raise UserError(
            "sweep.metrics begins with cost_seconds, so that the cheapest point would be the best; name a measure of quality first."
        )
    if sweep.search == "optuna" and find_spec("optuna") is None:
        raise UserError(
            "sweep.search=optuna, and the package 'optuna' is not installed: pip install 'd2c-ray[optuna]', or sweep.search=random."
        )
    if sweep.search == "optuna" and sweep.asha:
        raise UserError(
            "sweep.search=optuna measures each point with all its seeds, and sweep.asha ends single trials; one of the two would do."
        )
    if sweep.equal == "seconds":
        if not sweep.seconds > 0:
            raise UserError("sweep.equal=seconds needs sweep.seconds, those that every student may take.")
        if sweep.asha:
            raise UserError("sweep.asha compares students at equal images, sweep.equal=seconds at equal seconds; one of the two would do.")
    if sweep.asha:
        if sweep.asha >= config.train.num_images:
            raise UserError(
                f"sweep.asha={sweep.asha:,} is not below train.num_images={config.train.num_images:,}: there is nothing to end early."
            )
        if sweep.asha < config.train.batch_size:
            raise UserError(f"sweep.asha={sweep.asha} is less than the {config.train.batch_size} images of a step (train.batch_size).")
        if "train.num_images" in sweep.axes:
            raise UserError("sweep.asha with train.num_images as an axis: trials that are compared at a rung see equally many images.")
        if len(sweep.metrics) > 1:
            raise UserError(f"sweep.asha goes by one measure; sweep.metrics={sweep.metrics} are {len(sweep.metrics)}.")


def _check_field(where: str, key: str, known: dict[str, Any]) -> None:
    if key not in known or key.split(".")[0] in NO_AXES:
        usual = [BUDGET, SELECTOR, "train.align_weight", "train.seed"]
        why = "cannot change a result" if key in known else "is no field of the configuration"
        raise UserError(
            f"{where}: {key} {why}{nearest(key, [name for name in known if name.split('.')[0] not in NO_AXES])} {', '.join(usual)} are usual."
        )


def _check_values(key: str, values: Any, sweep: SweepConfig) -> None:
    if isinstance(values, dict):
        low, high, more = values.get("low"), values.get("high"), set(values) - {"low", "high", "log", "integer"}
        if (
            not isinstance(low, int | float)
            or not isinstance(high, int | float)
            or not low < high
            or more
            or (values.get("log") and low <= 0)
        ):
            raise UserError(f"sweep.axes.{key}={values} is no range; {RANGE} would do (a logarithmic one above 0).")
        if sweep.search == "grid":
            raise UserError(
                f"sweep.axes.{key} is a range, of which a grid cannot try every value: a list of values, or sweep.search=random or optuna."
            )
    elif not isinstance(values, list) or not values:
        raise UserError(f"sweep.axes.{key}={values!r}: a list of values{'' if sweep.search == 'grid' else f', or {RANGE},'} would do.")
    elif any(value in values[:i] for i, value in enumerate(values)):  # 0 and 0.0 are one
        raise UserError(f"sweep.axes.{key}={values} names a value twice.")


def points(sweep: SweepConfig) -> list[dict[str, Any]]:
    """The points of a grid, or of a random search; those of Optuna are not known beforehand."""
    if sweep.search == "grid":
        return [dict(zip(sweep.axes, values, strict=True)) for values in itertools.product(*sweep.axes.values())]
    generator = np.random.Generator(np.random.Philox(sweep.search_seed))
    found: list[dict[str, Any]] = []
    while len(found) < sweep.num_points:
        point = {key: _drawn(values, generator) for key, values in sweep.axes.items()}
        if all(isinstance(values, list) for values in sweep.axes.values()):
            if len(found) == math.prod(len(values) for values in sweep.axes.values()):
                break  # there are no more
            if point in found:
                continue
        found.append(point)
    return found


def count(sweep: SweepConfig) -> int:
    """Trials, before it is looked which come to the same and without random twins; 0 without axes."""
    return (sweep.num_points if sweep.search == "optuna" else len(points(sweep))) * len(sweep.seeds) if sweep.axes else 0


def _drawn(values: Any, generator: np.random.Generator) -> Any:
    if isinstance(values, list):
        return values[int(generator.integers(len(values)))]
    low, high = float(values["low"]), float(values["high"])
    if values.get("integer") and not values.get("log"):
        return int(generator.integers(values["low"], values["high"] + 1))
    value = math.exp(generator.uniform(math.log(low), math.log(high))) if values.get("log") else float(generator.uniform(low, high))
    return round(value) if values.get("integer") else float(f"{value:.4g}")  # as it is written, it is


def twin(point: dict[str, Any], config: Config) -> dict[str, Any] | None:
    """The same point with a random choice; None where it has one, or keeps all images."""
    selector = point.get(SELECTOR, config.select.selector)
    return None if selector in ("random", "all") else {**point, SELECTOR: "random"}


def of_points(config: Config, given: list[dict[str, Any]], plan: "Planner") -> list[Trial]:
    """The trials of points, their random twins among them unless they are switched off; what comes to the same is one trial.

    Raises:
        UserError: a value that its field cannot have; names the point.
    """
    every = [(point, False) for point in given]
    if config.sweep.random_twins and not config.sweep.asha:
        twins = [other for point in given if (other := twin(point, config)) is not None]
        every += [(point, True) for i, point in enumerate(twins) if point not in twins[:i] and point not in given]
    found: dict[str, Trial] = {}
    for (point, is_twin), seed in itertools.product(every, config.sweep.seeds):
        try:
            own = configured(config, point, seed)
            planned = plan(own)
        except UserError as error:
            raise UserError(f"at {label(point)}: {error}") from None
        made = planned.of("evaluate")[0].hash
        if made in found:
            if found[made].point != point:
                found[made].also.append(point)
            continue
        found[made] = Trial(made, point, seed, is_twin, own, planned)
    return list(found.values())


def configured(config: Config, point: dict[str, Any], seed: int) -> Config:
    """The configuration of a trial: the sweep's own, with a point's values and a seed."""
    changes: dict[str, Any] = {}
    for key, value in {**dict.fromkeys(config.sweep.seed_of, seed), **point}.items():
        node = changes
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return from_dict(merged(to_dict(replace(config, sweep=SweepConfig())), changes))


class Planner:
    """Plans trials of one source, which is listed once for each way of reading it.

    Attributes:
        sources: fingerprints of those listed so far; another planner, in another process, may begin with them.
    """

    def __init__(self, sources: dict[str, str] | None = None) -> None:
        self.sources = sources or {}

    def __call__(self, config: Config) -> Plan:
        about = json.dumps([to_dict(config.data), to_dict(config.storage)], sort_keys=True)
        if about not in self.sources:
            self.sources[about] = plans.source_fingerprint(config)
        return plans.make(config, "evaluate", self.sources[about])


def rungs(config: Config) -> list[int]:
    """Images after which a trial is measured: ASHA's, and the last."""
    sweep, last = config.sweep, config.train.num_images
    found = list(itertools.takewhile(lambda images: images < last, _powers(sweep.asha, sweep.reduction))) if sweep.asha else []
    return [*found, last]


def _powers(first: int, factor: int) -> Iterator[int]:
    while True:
        yield first
        first *= factor
