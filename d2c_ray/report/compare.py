"""`d2c compare`: the students of several runs side by side, and a refusal where their numbers are of different measures."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2c_ray import plan as plans
from d2c_ray.config import Config, arm_configs, dotted, load, to_dict
from d2c_ray.errors import UserError
from d2c_ray.evaluate import record as records
from d2c_ray.models import offline
from d2c_ray.progress import clock
from d2c_ray.report import numbers
from d2c_ray.rundir import StageDir, place_seconds
from d2c_ray.selection.baselines import NEEDS_SCORES

METRICS = "metrics.json"
SEEDS = ("teacher.train.seed", "score.seed", "select.seed", "train.seed", "sample.seed")
# What a student cannot depend on: where it lies, on what it ran, how often it wrote.
_IRRELEVANT = ("run", "resources", "report", "tracking", "log", "storage", "arms")
_KNOBS = {f"{where}.{knob}" for where in ("train", "teacher.train") for knob in plans.TRAIN_KNOBS}
_CPUS = ("", "cpu", "x86_64", "amd64", "aarch64", "arm64")
# Of an evaluation record, what each network has its own of.
_OF_A_NETWORK = ("generated", "reference", "network_weights", "network_image_size", "reference_statistics")
ALIKE = 1.1  # seconds this near each other count as equal; two runs of one command differ by some percent
WOULD_DO = "a finished run's folder, its configuration, an eval-* folder or a .json that d2c evaluate wrote would do"


@dataclass
class Student:
    """What was measured of one student, or of several that differ in seeds alone.

    Attributes:
        metrics: as metrics.json.
        config: of its run; None where there is none, as of images from elsewhere.
        fingerprint: of the evaluation: equal ones are one measurement and no second seed.
        kept, seen: images in its dataset, and shown in training.
        seconds: of every stage it needed.
        members, seeds: of a group, the names of its students and the seeds they differ in.
    """

    name: str
    metrics: dict[str, Any]
    config: Config | None = None
    fingerprint: str = ""
    kept: int | None = None
    seen: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    gpu_hours: float | None = None
    device: str = ""
    members: list[str] = field(default_factory=list)
    seeds: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def training_seconds(self) -> float | None:
        return self.seconds.get("train")

    @property
    def all_seconds(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds else None


def find(given: str) -> list[Student]:
    """The students of a run folder, a configuration, an eval-* folder or a metrics file.

    Raises:
        UserError: nothing of that kind there, or not finished.
    """
    path = Path(given).expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        config = load(path)
        with offline.only_local():  # what is compared was measured here: nothing is fetched to look at it
            plan = plans.make(config)
        evaluations = {arm: nodes["evaluate"].folder if "evaluate" in nodes else None for arm, nodes in plan.arms.items()}
        return _of_run(given, plan.folder.name, evaluations, {arm: nodes["manifest"].config for arm, nodes in plan.arms.items()})
    if path.is_dir() and (path / METRICS).is_file():
        return [_of_folder(path, f"{path.resolve().parent.name}: {path.name}", _config(path))]
    if path.is_dir() and (path / "plan.json").is_file():
        arms = _arms(path)
        evaluations = {arm: path / nodes["evaluate"] if "evaluate" in nodes else None for arm, nodes in arms.items()}
        return _of_run(given, path.resolve().name, evaluations, _configs(path))
    if path.is_file() and path.suffix.lower() == ".json":
        if path.name == METRICS and StageDir(path.parent).done:
            return find(str(path.parent))
        return [_of_file(path)]
    raise UserError(f"'{given}' is nothing that can be compared; {WOULD_DO}.")


def gather(given: Sequence[str]) -> list[Student]:
    """All students of what is given, each once, under names that tell them apart.

    Raises:
        UserError: as `find`, or fewer than two.
    """
    found: list[Student] = []
    for one in given:
        for student in find(one):
            if student.fingerprint and any(student.fingerprint == other.fingerprint for other in found):
                continue  # the same measurement, given twice
            if any(student.name == other.name for other in found):
                student.name = f"{student.name} ({one})"
            found.append(student)
    if len(found) < 2:
        only = f"'{found[0].name}' alone" if found else "nothing"
        raise UserError(f"{only} is not to be compared: give two runs, or one of several students.")
    return found


def compare(students: Sequence[Student], anyway: bool = False) -> dict[str, Any]:
    """Students side by side, those that differ in seeds alone as one.

    Returns:
        students: name, members, seeds, kept, seen, seconds, gpu_hours and metrics each. differences: (key, values by name) of
        their evaluation records, the key of a further network behind its name, 'inception: network_weights'. equal_images, equal_seconds: whether they were trained alike; None: not known.

    Raises:
        UserError: records that differ in what changes the number, unless `anyway`.
    """
    differ = _differences(students)
    if differ and not anyway:
        raise UserError(
            "these numbers are not of one measure, their records differ: "
            + "; ".join(f"{key} ({_in_words(key)}): {_by_value(values)}" for key, values in differ)
            + ". --anyway shows them nevertheless, under these differences."
        )
    grouped = _grouped(students)
    return {
        "students": grouped,
        "differences": differ,
        "equal_images": _equal([student.seen for student in grouped], 1.0),
        "equal_seconds": _equal([student.training_seconds for student in grouped], ALIKE),
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """A comparison as text."""
    students: list[Student] = found["students"]
    said = []
    if found["differences"]:
        said += ["These numbers are not of one measure. Their records differ in:"]
        for key, values in found["differences"]:
            said += [f"  {key} ({_in_words(key)})", *(f"    {name}: {records.in_words(value)}" for name, value in values.items())]
        said.append("")
    said += _costs(students)
    said += ["", *trained_alike([(student.name, student.seen, student.training_seconds) for student in students])]
    devices = {student.name: student.device for student in students if student.device}
    if len(set(devices.values())) > 1:
        said.append(f"Their seconds are of different machines: {_listed(devices)}.")
    for network in _networks(students):
        said += ["", *_measured(students, network)]
    said += ["", *(f"note: {note}" for note in _notes(students))]
    return said


def to_json(found: dict[str, Any]) -> dict[str, Any]:
    """A comparison as plain values."""
    return {
        "students": [
            {
                "name": student.name, "members": student.members, "seeds": student.seeds, "images_kept": student.kept, "images_seen": student.seen,
                "training_seconds": student.training_seconds, "seconds": student.seconds, "seconds_in_all": student.all_seconds,
                "gpu_hours": student.gpu_hours, "device": student.device, "metrics": student.metrics,
            }
            for student in found["students"]
        ],
        "differences": dict(found["differences"]), "equal_images": found["equal_images"], "equal_seconds": found["equal_seconds"],
    }  # fmt: skip


def trained_alike(students: Sequence[tuple[str, int | None, float | None]]) -> list[str]:
    """Two sentences: whether students saw equal images, and whether they took equal seconds.

    Args:
        students: name, images shown in training, seconds of training; None: not known.
    """
    seen = {name: images for name, images, _ in students}
    took = {name: seconds for name, _, seconds in students}
    said = []
    match _equal(list(seen.values()), 1.0):
        case True:
            said.append(f"Trained on equal images: {next(iter(seen.values())):,} each.")
        case False:
            said.append(f"NOT trained on equal images: {_listed({name: f'{images:,}' for name, images in seen.items()})}.")
        case None:
            said.append(f"On how many images they were trained is not known of {_unknown(seen)}.")
    shown = {name: f"{seconds:,.1f} s" for name, seconds in took.items() if seconds is not None}
    match _equal(list(took.values()), ALIKE):
        case True:
            said.append(f"Trained in equal seconds, within {ALIKE - 1:.0%}: {_listed(shown)}.")
        case False:
            said.append(f"NOT trained in equal seconds: {_listed(shown)}.")
        case None:
            said.append(f"In how many seconds they were trained is not known of {_unknown(took)}.")
    return said


def _of_run(given: str, run: str, evaluations: dict[str, Path | None], configs: dict[str, Config]) -> list[Student]:
    missing = [arm for arm, folder in evaluations.items() if folder is None or not StageDir(folder).done]
    if missing:
        who = "" if len(evaluations) == 1 else f" ({', '.join(missing)})"
        raise UserError(
            f"'{given}' is not finished: its students{who} are not measured yet; d2c run with its configuration goes on from where it is."
        )
    alone = len(evaluations) == 1
    return [_of_folder(folder, run if alone else f"{run}: {arm}", configs.get(arm)) for arm, folder in evaluations.items() if folder]


def _of_folder(folder: Path, name: str, config: Config | None) -> Student:
    """A student by its evaluation's folder, and the folders that one was made from."""
    if not StageDir(folder).done:
        raise UserError(f"'{folder}' is not finished; {WOULD_DO}.")
    metrics = _read(folder / METRICS)
    try:
        return _made_of(folder, name, config, metrics)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:  # of a ledger that something else wrote
        raise UserError(
            f"'{folder}' or a folder it was made from is not as a finished stage leaves it ({type(error).__name__}: {error}); {WOULD_DO}."
        ) from None


def needed_by(folder: Path) -> dict[str, dict[str, Any]]:
    """What a finished stage and all that it needed recorded, by stage; the teacher and scores only where its selection looked at them."""
    stages: dict[str, dict[str, Any]] = {}
    waiting = [(StageDir(folder).success()["stage"], folder)]
    while waiting:
        stage, path = waiting.pop()
        if stage not in stages and StageDir(path).done:
            stages[stage] = StageDir(path).success()
            waiting += [(given, folder.parent / where) for given, where in stages[stage]["inputs"].items()]
    selector = stages.get("select", {}).get("facts", {}).get("selector")
    free = () if selector in NEEDS_SCORES or selector is None else ("teacher", "score")
    return {stage: stages[stage] for stage in plans.STAGES if stage in stages and stage not in free}


def _made_of(folder: Path, name: str, config: Config | None, metrics: dict[str, Any]) -> Student:
    needed = needed_by(folder)
    on_gpus = [success for success in needed.values() if _is_gpu(success.get("device", ""))]
    train = needed.get("train", {})
    return Student(
        name, metrics, config, needed["evaluate"]["fingerprint"], needed.get("attach", {}).get("rows_done"),
        train.get("facts", {}).get("images"), {stage: success["seconds"] for stage, success in needed.items()},
        sum(map(place_seconds, on_gpus)) / 3600 if on_gpus else None, train.get("device", ""),
    )  # fmt: skip


def _of_file(path: Path) -> Student:
    metrics = _read(path)
    return Student(str(path), metrics)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read: {type(error).__name__}: {error}; {WOULD_DO}.") from None


def _arms(run: Path) -> dict[str, dict[str, str]]:
    """The folders of a run's arms by stage, of its plan.json."""
    plan = _json(run / "plan.json")
    arms = plan.get("arms") if isinstance(plan, dict) else None
    if not isinstance(arms, dict) or not arms or not all(isinstance(nodes, dict) for nodes in arms.values()):
        raise UserError(f"'{run / 'plan.json'}' names no arms with their folders, and so is no plan of a run; {WOULD_DO}.")
    for arm, nodes in arms.items():
        if not all(isinstance(folder, str) for folder in nodes.values()):
            raise UserError(f"'{run / 'plan.json'}': the folders of arm '{arm}' are no names; {WOULD_DO}.")
    return arms


def _read(path: Path) -> dict[str, Any]:
    metrics = _json(path)
    if not isinstance(metrics, dict) or not {"record", "generated", "counts"} <= set(metrics):
        raise UserError(f"'{path}' holds no measures with their evaluation record; {WOULD_DO}.")
    wrong = _fault(metrics)
    if wrong:
        raise UserError(f"'{path}' holds no measures that can be shown: {wrong}; {WOULD_DO}.")
    return metrics


def _fault(metrics: dict[str, Any]) -> str:
    """What is not as d2c evaluate writes it; empty where all that is shown is."""
    record = metrics["record"]
    if not isinstance(record, dict):
        return "record is no mapping"
    if not isinstance(record.get("network"), str):
        return "its record names no network"
    if not _is_number(record.get("guidance")):
        return "record.guidance is no number"
    more = metrics.get("more") or {}
    if not isinstance(more, dict):
        return "more is no mapping"
    for where, own in {"": metrics, **{f"more.{name}": own for name, own in more.items()}}.items():
        for name, part in {where: own, f"{where}.unguided".lstrip("."): own.get("unguided") if isinstance(own, dict) else None}.items():
            wrong = _fault_in(part) if part is not None or name == where else ""
            if wrong:
                return f"{name}: {wrong}" if name else wrong
    return ""


def _fault_in(own: Any) -> str:
    """What is not as `measure` gives it, in one network."""
    if not isinstance(own, dict) or not isinstance(own.get("counts"), dict):
        return "no mapping of measures with their counts"
    for part, needed in (("generated", True), ("real", False), ("subset", False)):
        count = own["counts"].get(part, 0)
        if not isinstance(count, int) or (needed and part not in own["counts"]):
            return f"counts.{part} is no whole number"
        own["counts"].setdefault(part, 0)
        values = own.get(part)
        if not isinstance(values, dict):
            if needed or count or values is not None:
                return f"{part} is no mapping of measures"
            continue
        for key, value in values.items():
            pair = key == "frechet_interval" and isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
            if not pair and (not _is_number(value) or (key == "frechet_interval" and value is not None)):
                return f"{part}.{key} is no number"
    for key in ("label_agreement", "probe_accuracy"):
        if not _is_number(own.get(key)):
            return f"{key} is no number"
    copying = own.get("copying")
    if copying is not None and (
        not isinstance(copying, dict)
        or type(copying.get("median_generated")) not in (int, float)
        or not all(_is_number(copying.get(key)) for key in ("median_real", "share_closer", "share_closer_expected", "real_duplicates"))
    ):
        return "copying holds no distances"
    if not isinstance(own.get("too_few"), str | None):
        return "too_few is no sentence"
    for key in ("notices", "notes"):
        said = own.get(key) or []
        if not isinstance(said, list) or not all(isinstance(note, str) for note in said):
            return f"{key} are no sentences"
    return "" if isinstance(own.get("network") or {}, dict) else "network is no mapping"


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _configs(run: Path) -> dict[str, Config]:
    """The configurations of a run's arms, as far as they can be read."""
    with suppress(UserError):
        return arm_configs(load(run / "config.yaml"))
    return {}


def _config(folder: Path) -> Config | None:
    """The configuration of the arm whose evaluation a folder is."""
    run = folder.resolve().parent
    if not (run / "plan.json").is_file():
        return None
    arms = _arms(run)
    mine = next((arm for arm, nodes in arms.items() if nodes.get("evaluate") == folder.resolve().name), None)
    return _configs(run).get(mine) if mine is not None else None


def _grouped(students: Sequence[Student]) -> list[Student]:
    groups: dict[str, list[Student]] = {}
    for index, student in enumerate(students):
        groups.setdefault(_apart_from_seeds(student) or f"alone {index}", []).append(student)
    return [mine[0] if len(mine) == 1 else _merged(mine) for mine in groups.values()]


def _apart_from_seeds(student: Student) -> str:
    """What must agree for two students to differ in seeds alone; empty where that cannot be known."""
    if student.config is None:
        return ""
    kept = {
        key: value
        for key, value in dotted(student.config).items()
        if key not in SEEDS and key not in _KNOBS and key.partition(".")[0] not in _IRRELEVANT
    }
    measured = [records.of(student.metrics["record"], key) for key in records.DIFFERENT]
    return json.dumps([kept, measured], default=to_dict, sort_keys=True)


def _merged(students: list[Student]) -> Student:
    """Mean and standard deviation (n - 1) of students that differ in seeds."""
    first = students[0]
    seeds = {key: [dotted(student.config)[key] for student in students if student.config] for key in SEEDS}
    metrics = _mean_metrics([student.metrics for student in students])
    metrics["more"] = {
        name: _mean_metrics([student.metrics["more"][name] for student in students])
        for name in first.metrics.get("more") or {}
        if all(name in (student.metrics.get("more") or {}) for student in students)
    }
    metrics["record"] = {**first.metrics["record"], "seeds": len(students)}
    return Student(
        f"{first.name}, {len(students)} seeds", metrics, first.config, "", _mean([student.kept for student in students], whole=True),
        _mean([student.seen for student in students], whole=True),
        {stage: float(np.mean([student.seconds.get(stage, 0.0) for student in students])) for stage in first.seconds},
        _mean([student.gpu_hours for student in students]), first.device,
        [student.name for student in students], {key: values for key, values in seeds.items() if len(set(values)) > 1},
    )  # fmt: skip


def _mean_metrics(every: list[dict[str, Any]]) -> dict[str, Any]:
    merged = {key: value for key, value in every[0].items() if key not in ("more", "unguided", "copying", "per_class", "at_equal_counts")}
    for part in ("generated", "real", "subset"):
        if all(own.get(part) for own in every):
            merged[part] = _mean_values([own[part] for own in every])
    for key in ("label_agreement", "probe_accuracy"):
        merged |= _mean_values([{key: own.get(key)} for own in every])
    merged["copying"] = _mean_copying([own.get("copying") for own in every])
    unguided = [own["unguided"] for own in every if own.get("unguided")]
    merged["unguided"] = _mean_metrics(unguided) if len(unguided) == len(every) else None
    return merged


def _mean_copying(every: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    found = [own for own in every if own]
    return {**_mean_values(found), "pairs": []} if len(found) == len(every) else None


def _mean_values(every: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every measure under its name, and its standard deviation under `name_spread`."""
    found: dict[str, Any] = {}
    for key in every[0]:
        values = [own.get(key) for own in every]
        if not all(isinstance(value, int | float) for value in values):
            continue
        if key.endswith(("_error", "_count")):
            continue  # of one measurement, and no spread of several
        found[key] = float(np.mean(values))  # type: ignore[arg-type]
        if len(set(values)) > 1:  # real images are the same for every seed
            found[f"{key}_spread"] = float(np.std(values, ddof=1))  # type: ignore[arg-type]
    return found


def _mean(values: list[Any], whole: bool = False) -> Any:
    if any(value is None for value in values):
        return None
    mean = float(np.mean(values))
    return round(mean) if whole else mean


def _equal(values: Sequence[float | None], within: float) -> bool | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return max(known) <= within * min(known)


def _costs(students: list[Student]) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return numbers.NONE if value is None else format(value, form)

    body = [
        [
            student.name, shown(student.kept, ","), shown(student.seen, ","), shown(student.training_seconds, ",.1f"),
            numbers.NONE if student.all_seconds is None else f"{student.all_seconds:,.1f} ({clock(student.all_seconds)})", shown(student.gpu_hours, ".2f"),
        ]
        for student in students
    ]  # fmt: skip
    table = numbers.grid(["", "images kept", "images seen", "training seconds", "seconds in all", "GPU-hours"], body)
    for student in students:
        if student.members:
            seeds = "; ".join(f"{key} {', '.join(map(str, values))}" for key, values in student.seeds.items())
            table.append(f"{student.name}: mean ± standard deviation of {', '.join(student.members)} ({seeds})")
    return table


def _networks(students: Sequence[Student]) -> list[str]:
    """Every network that somebody was measured in, the main ones first."""
    main = [student.metrics["record"]["network"] for student in students]
    return list(dict.fromkeys([*main, *(name for student in students for name in student.metrics.get("more") or {})]))


def _measured(students: list[Student], network: str) -> list[str]:
    rows: list[numbers.Row] = []
    for student in students:
        own = in_network(student.metrics, network)
        if own is None:
            continue
        mine = [
            *numbers.real_row(own, "held_out" in student.metrics.get("sets", ["held_out"])),
            *numbers.rows(student.name, own, unguided=own.get("unguided")),
        ]
        # Real images are one row as long as they are the same ones.
        rows += [row for row in mine if row.kind != "real" or not any(row.kind == old.kind and row.values == old.values for old in rows)]
    return [f"measured in {network}", *numbers.as_text(rows)]


def in_network(metrics: dict[str, Any], network: str) -> dict[str, Any] | None:
    """The measures in one network of a metrics.json, `unguided` among them; None where it was not measured in."""
    return metrics if network == metrics["record"]["network"] else (metrics.get("more") or {}).get(network)


def _notes(students: list[Student]) -> list[str]:
    said: list[str] = []
    caveats: dict[str, list[str]] = {}
    for network in _networks(students):
        said.append(numbers.what_it_is(network))
        for student in students:
            own = in_network(student.metrics, network)
            for note in numbers.network_notes(network, own)[1:] if own is not None else []:
                caveats.setdefault(note, []).append(student.name)
    for student in students:
        for note in numbers.caveats(student.metrics):
            caveats.setdefault(note, []).append(student.name)
    said += [note if len(who) == len(students) else f"{', '.join(who)}: {note}" for note, who in caveats.items()]
    unknown = [set(records.unknown(student.metrics["record"])) for student in students]
    if alike := [records.DIFFERENT[key] for key in records.DIFFERENT if all(key in keys for keys in unknown)]:
        said.append(f"not known, and so perhaps not alike: {', '.join(alike)}.")
    if len(students) > 1 and not any(student.members for student in students):
        said.append("one seed each: a difference can be chance.")
    return said


def _differences(students: Sequence[Student]) -> list[tuple[str, dict[str, Any]]]:
    """Every key in which records are not all alike, with the values by name: of the main network, and of each that is shown beside it."""

    def named(every: Sequence[Student], values: list[Any]) -> dict[str, Any]:
        return {student.name: value for student, value in zip(every, values, strict=True)}

    found = [(key, named(students, values)) for key, values in records.differences([student.metrics["record"] for student in students])]
    main = {key for key, _ in found}
    for network in _networks(students):
        measured = [student for student in students if in_network(student.metrics, network) is not None]
        if all(student.metrics["record"]["network"] == network for student in measured):
            continue  # its records are compared above
        differ = records.differences([_record_in(student.metrics, network) for student in measured])
        # What differs in the main record differs in every network, and is said once.
        found += [(f"{network}: {key}", named(measured, values)) for key, values in differ if key not in main or key in _OF_A_NETWORK]
    return found


def _record_in(metrics: dict[str, Any], network: str) -> dict[str, Any]:
    """The evaluation record of the numbers in one network. Given statistics are the main network's alone."""
    record, own = metrics["record"], in_network(metrics, network)
    if own is None or own is metrics:
        return record
    facts = own.get("network") or {}
    return {
        **record, "network": network, "network_weights": facts.get("weights"), "network_image_size": facts.get("image_size"),
        "reference_images": record.get("reference_images") or facts.get("reference_features"), "reference_statistics": None,
        "generated": own["counts"]["generated"], "reference": own["counts"].get("reference", record.get("reference")),
    }  # fmt: skip


def _in_words(key: str) -> str:
    return records.DIFFERENT[key.rpartition(": ")[2]]


def _by_value(values: dict[str, Any]) -> str:
    """Who has which value, each value once."""
    said: dict[str, list[str]] = {}
    for name, value in values.items():
        said.setdefault(records.in_words(value), []).append(name)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in said.items())


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _unknown(values: dict[str, Any]) -> str:
    return ", ".join(name for name, value in values.items() if value is None)


def _is_gpu(device: str) -> bool:
    return device.lower() not in _CPUS
