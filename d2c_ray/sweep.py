"""`d2c sweep`: every trial of a sweep, what they share made once, and what came of them.

All trials lie in one run folder, where stages are named by what can change them: trials that agree on a stage share its folder,
and what is finished is never made again. The driver makes what all need, attaching to the union of all subsets once; each trial
then trains, samples and evaluates. The same command goes on where it was cut off.

<run>/sweep-<hash>/
  sweep.json             what is tried
  trials/<id>.json       how far a trial came: its state, its folders, and what was measured on the way
  points/<time>.json     points that Optuna chose, in order
  results.parquet        a row a trial
  report.html  best.yaml
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray import bench, estimate, hardware, logs, metrics, pipeline, rates, stopping, tracking, trials
from d2c_ray import forecast as forecasts
from d2c_ray import plan as plans
from d2c_ray.config import Config, SweepConfig, from_dict, to_dict, to_yaml
from d2c_ray.data import tables
from d2c_ray.errors import UserError
from d2c_ray.plan import Node, Plan
from d2c_ray.repeating import once, repeating
from d2c_ray.report import gather, outcomes
from d2c_ray.report import sweep as report
from d2c_ray.report.outcomes import DONE, FAILED, RUNNING, STOPPED, WAITING
from d2c_ray.rundir import PROGRESS, Lock, StageDir, write_json, write_text
from d2c_ray.schedule import least, workers
from d2c_ray.trials import Trial
from d2c_ray.wording import redacted

OWN = ("train", "sample", "unguided", "evaluate")  # stages that a trial runs; all others are made before
POINTS = "points"
COUNT_SEC = 5.0  # between two counts of the trials
CALIBRATION = 0.05  # equal=seconds: share of train.num_images that is trained to learn the pace
Say = Callable[[str], None]
Tell = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Sweep:
    """A sweep and where it lies.

    Attributes:
        trials: those that are known beforehand; none of Optuna's.
        plan: of all their stages, each once.
        sources: of `trials.Planner`.
    """

    config: Config
    folder: Path
    trials: list[Trial]
    plan: Plan
    sources: dict[str, str]


def make(config: Config) -> Sweep:
    """Plans a sweep, reading no image and starting nothing.

    Raises:
        UserError: a sweep that means nothing, or a trial that cannot be run; names the field and the point.
    """
    trials.check(config)
    tracking.check(config.tracking)
    planner = trials.Planner()
    base = planner(replace(config, sweep=SweepConfig()))
    listed = [] if config.sweep.search == "optuna" else trials.of_points(config, trials.points(config.sweep), planner)
    settings = {key: value for key, value in to_dict(config).items() if key not in trials.NO_AXES}
    chosen = {key: value for key, value in to_dict(config.sweep).items() if key not in ("concurrent", "max_failures")}
    name = hashlib.sha256(json.dumps([settings, chosen, base.arms["student"]["evaluate"].hash], sort_keys=True).encode()).hexdigest()[:8]
    return Sweep(config, base.folder / f"sweep-{name}", listed, _merged(config, base, listed), planner.sources)


def _merged(config: Config, base: Plan, listed: list[Trial]) -> Plan:
    """One plan of all trials: an arm each, and each folder once. Of Optuna's, what no axis can change."""
    arms = {trial.id: trial.plan.arms["student"] for trial in listed} or {"shared": _fixed(config, base)}
    nodes: dict[str, Node] = {}
    for arm, own in arms.items():
        for node in own.values():
            nodes.setdefault(node.name, replace(node, arms=[])).arms.append(arm)
    order = list(plans.STAGES)
    return Plan(config, base.folder, sorted(nodes.values(), key=lambda node: order.index(node.stage)), arms)


def _fixed(config: Config, base: Plan) -> dict[str, Node]:
    """The stages that have one folder for all points: those of no axis, and before those of any."""
    sections = {key.split(".")[0] for key in config.sweep.axes} | {key.split(".")[0] for key in config.sweep.seed_of}
    reads = {
        "teacher": {"teacher", "vae", "data"},
        "score": {"score", "teacher", "vae", "data"},
        "embed": {"embed", "data"},
        "manifest": {"data"},
        "reference": {"data", "evaluate"},
    }
    own = base.arms["student"]
    return {stage: node for stage, node in own.items() if stage in reads and not reads[stage] & sections}


def run(config: Config, say: Say = print) -> Sweep:
    """Runs every trial that is not finished yet, and writes results and report.

    Raises:
        UserError: bad input, before anything starts wherever that can be seen; or trials that failed for good, when all others
            are finished and reported.
    """
    sweep = make(config)
    with Lock(sweep.plan.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            sweep.folder / "sweep.json",
            {"axes": config.sweep.axes, "seeds": config.sweep.seeds, "trials": {trial.id: trial.label for trial in sweep.trials}},
        )
        write_text(sweep.plan.folder / "config.yaml", to_yaml(config))
        _run(sweep, say)
        found = outcomes.gather(sweep.folder, config)
        outcomes.write(sweep.folder / "results.parquet", found)
        outcomes.track(config, sweep.folder, found)
        report.write(sweep.folder, config, found)
        failed = [row for row in found if row["state"] == FAILED]
        missing = {trial.id for trial in sweep.trials} - {row["id"] for row in found if row["state"] in (DONE, STOPPED, FAILED)}
    if missing and not failed:
        raise UserError(f"{len(missing)} of {len(sweep.trials)} trials did not come to an end; the same command goes on with them.")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(found)} trials failed, the first at {failed[0]['label']}: {failed[0]['error']} The others are in {sweep.folder / 'report.html'}; "
            "the same command tries the failed ones again."
        )
    return sweep


def _run(sweep: Sweep, say: Say) -> None:
    status = pipeline.Status(sweep.plan)
    with stopping.stoppable(), status.kept("sweep", sweep=sweep.folder.name), stopping.as_raised():
        _run_with(sweep, status, say)


def _run_with(sweep: Sweep, status: pipeline.Status, say: Say) -> None:
    config = sweep.config
    attaching = [node.config for node in sweep.plan.of("attach") if not node.dir.done]
    listed = all(manifest.dir.done for manifest in sweep.plan.of("manifest"))
    connected, slots = pipeline.connected(config, attaching, status, say, dashboard=True), None
    with ExitStack() as ray:
        if config.resources.address and not listed:  # from the start, as for a run
            slots = ray.enter_context(connected)
        _list(sweep, status, say)
        if sweep.trials and all(_finished(sweep, trial) for trial in sweep.trials):
            say(f"all {len(sweep.trials)} trials are finished")
            return
        if slots is None:
            slots = ray.enter_context(connected)
        share(sweep, slots, status, say)
        _try(sweep, slots, say)


def _list(sweep: Sweep, status: pipeline.Status, say: Say) -> None:
    """Lists the images, and refuses trials that do not fit them."""
    for manifest in sweep.plan.of("manifest"):
        pipeline.run_all([manifest], 1, status, say)
    for trial in sweep.trials:
        try:
            plans.check_against_data(trial.plan, trial.plan.of("manifest")[0].dir.success()["facts"])
        except UserError as error:
            raise UserError(f"at {trial.label}: {error}") from None


def share(sweep: Sweep, slots: int, status: pipeline.Status, say: Say) -> None:
    """Makes what trials share: scores, features, selections, and what is attached, once for all images that any of them chose."""
    before = [node for node in sweep.plan.nodes if node.stage not in (*OWN, "attach", "manifest")]
    pipeline.run_all(before, slots, status, say)
    attaching = sweep.plan.of("attach")
    larger = [one for one in (_union(sweep.plan, group) for group in _alike(attaching)) if one is not None]
    for first in larger:
        pipeline.run_all([*first.inputs.values(), first] if first.inputs["select"].stage == "union" else [first], slots, status, say)
    pipeline.run_all(attaching, slots, status, say)


def _alike(attaching: list[Node]) -> list[list[Node]]:
    """Datasets by what is attached to their images, those that are not finished."""
    groups: dict[str, list[Node]] = {}
    for node in attaching:
        if not node.dir.done:
            groups.setdefault(node.lineage, []).append(node)
    return list(groups.values())


def _union(plan: Plan, group: list[Node]) -> Node | None:
    """What to attach first so that each of a group is a part of it: one of them, or a dataset of all their images; None for one alone."""
    chosen = [_ids(node.inputs["select"]) for node in group]
    every = pc.unique(pa.chunked_array(chosen, pa.int64()))
    if len(group) < 2:
        return None
    for node, ids in zip(group, chosen, strict=True):
        if len(ids) == len(every):
            return node
    selections = {node.inputs["select"].name: node.inputs["select"] for node in group}
    digest = hashlib.sha256("\n".join(sorted(selections)).encode()).hexdigest()[:8]
    config = replace(group[0].config, select=replace(group[0].config.select, selector="random"))
    union = Node("union", config, selections, digest, plan.folder / f"selection-{digest}", ["shared"])
    given = {"manifest": group[0].inputs["manifest"], "select": union}
    scores = {node.inputs["score"].name: node.inputs["score"] for node in group if "score" in node.inputs}
    if len(scores) == 1:  # which may have kept latents
        given["score"] = next(iter(scores.values()))
    digest = hashlib.sha256(f"{group[0].lineage}|{union.hash}".encode()).hexdigest()[:8]
    return Node("attach", config, given, digest, plan.folder / f"{plans.FOLDERS['attach']}-{digest}", ["shared"], group[0].lineage)


def _ids(node: Node) -> pa.Array:
    return tables.read(node.dir.parts(), ["sample_id"]).column("sample_id").combine_chunks()


# The trials


@dataclass(frozen=True)
class Context:
    """What a trial's process has to know of its sweep."""

    folder: str
    sources: dict[str, str]
    base: dict[str, Any]  # the sweep's configuration
    places: int


def _try(sweep: Sweep, slots: int, say: Say) -> None:
    from d2c_ray.distributed import sweep as tuning

    config, options = sweep.config, sweep.config.sweep
    concurrent = concurrency(config, pipeline.trainings(config))
    own = replace(config, run=replace(config.run, dir=str(sweep.plan.folder.parent)))  # wherever a trial's process works
    context = Context(str(sweep.folder), sweep.sources, to_dict(own), max(1, slots // concurrent))
    better = [trials.METRICS[name] for name in options.metrics]
    total = len(sweep.trials) or options.num_points
    with _watched(sweep, total, config.resources.progress_interval_sec, say) as ended:
        if options.search == "optuna":
            before = [json.loads(path.read_text()) for path in sorted((sweep.folder / POINTS).glob("*.json"))]
            tuning.optimise(partial(_point, context), options, before, concurrent, better, ended)
            return
        # ASHA has to hear of finished trials too, which tell it in no time.
        todo = [trial for trial in sweep.trials if options.asha or not _finished(sweep, trial)]
        given = [about(trial) for trial in todo]
        tuning.try_each(partial(_trial, context), given, options, concurrent, better[0], config.train.num_images, ended)


def concurrency(config: Config, slots: int) -> int:
    """Trials at once: a training holds its workers' places, and a trial is mostly training."""
    return config.sweep.concurrent or max(1, slots // config.resources.train_workers)


def _finished(sweep: Sweep, trial: Trial) -> bool:
    """Whether a trial came to its end, or to the one that ASHA made for it, and what it left is there."""
    record = outcomes.read_record(sweep.folder, trial.id)
    return record["state"] in (DONE, STOPPED) and all(StageDir(sweep.plan.folder / name).done for name in record["folders"].values())


def _trial(context: Context, given: dict[str, Any], tell: Tell) -> None:
    """One trial, in a process of its own."""
    base = from_dict(context.base)
    outcome = _complete(trials.configured(base, given["point"], given["seed"]), base.sweep, context, given, tell)
    if outcome is not None:
        tell({**dict.fromkeys(base.sweep.metrics, math.nan), **outcome, "finished": 1.0})


def _point(context: Context, point: dict[str, Any], tell: Tell) -> None:
    """One point that was chosen on the way, in a process of its own: all its seeds and its random twins. Tells the means over its seeds."""
    base, chosen = from_dict(context.base), Path(context.folder) / POINTS
    if not any(json.loads(path.read_text()) == point for path in chosen.glob("*.json")):
        write_json(chosen / f"{time.time_ns()}.json", point)
    found: list[dict[str, float]] = []
    for trial in trials.of_points(base, [point], trials.Planner(context.sources)):
        plans.check_against_data(trial.plan, trial.plan.of("manifest")[0].dir.success()["facts"])
        outcome = _complete(trial.config, base.sweep, context, about(trial), lambda _: None)
        if outcome is not None and not trial.twin:
            found.append(outcome)
    if found:
        names = [name for name in found[0] if all(name in own for own in found)]
        means = {name: sum(own[name] for own in found) / len(found) for name in names}
        tell({**dict.fromkeys(base.sweep.metrics, math.nan), **means, "finished": 1.0})


def about(trial: Trial) -> dict[str, Any]:
    """What is kept of a trial besides what becomes of it."""
    return {"id": trial.id, "label": trial.label, "point": trial.point, "seed": trial.seed, "twin": trial.twin, "also": trial.also}


def _complete(config: Config, options: SweepConfig, context: Context, given: dict[str, Any], tell: Tell) -> dict[str, float] | None:
    """Brings a trial to its end, from wherever it stands; gives what was measured then, None of one that has failed or was ended early."""
    folder = Path(context.folder)
    before = outcomes.read_record(folder, given["id"])
    if before["state"] in (DONE, STOPPED) and all(StageDir(folder.parent / name).done for name in before["folders"].values()):
        *early, last = before["reports"]
        for outcome in early:
            tell(outcome)
        if before["state"] == DONE:
            return last
        tell(last)
        return None
    record: dict[str, Any] = {**given, "state": RUNNING, "error": "", "folders": {}, "reports": []}
    outcomes.write_record(folder, record)
    try:
        if options.equal == "seconds":
            config = _for_seconds(config, options, context, given["id"])
        stops = trials.rungs(replace(config, sweep=options))
        for images in stops:
            nodes = _run_nodes(replace(config, train=replace(config.train, num_images=images)), "evaluate", context)
            record["folders"] = {stage: node.name for stage, node in nodes.items()}
            record["reports"].append(outcomes.measures(nodes["evaluate"].folder))
            record["state"] = DONE if images == stops[-1] else RUNNING
            outcomes.write_record(folder, record)
            if images < stops[-1]:
                tell({**dict.fromkeys(options.metrics, math.nan), **record["reports"][-1]})
    except UserError as error:  # which would only come again
        outcomes.write_record(folder, {**record, "state": FAILED, "error": redacted(str(error))})
        return None
    except Exception as error:
        found = pipeline.unwrap(error)
        if found is None:  # it may not come again; what it was is kept for when it always does
            last = redacted((str(error).strip().splitlines() or [""])[-1])
            outcomes.write_record(folder, {**record, "error": f"{type(error).__name__}: {last}"})
            raise
        outcomes.write_record(folder, {**record, "state": FAILED, "error": redacted(str(found))})
        return None
    return record["reports"][-1]


def _run_nodes(config: Config, upto: str, context: Context) -> dict[str, Node]:
    """Makes what is missing of a trial up to a stage, one stage after the other; other trials may be making some of it just now."""
    plan = trials.Planner(context.sources)(config)
    logs.configure(config.log.format, plan.folder.name)
    pipeline.follow()
    status = pipeline.Status(plan, record=False)
    for node in plan.needed(upto):
        if not node.dir.done:
            pipeline.run_node(node, workers(node) or max(least(node), context.places), status)
    return plan.arms["student"]


def _for_seconds(config: Config, options: SweepConfig, context: Context, name: str) -> Config:
    """The configuration with as many images as can be trained in what its data leaves of the seconds, by the pace of its first ones.

    The first images are the training's own, which goes on after them. What was decided is kept: a resumed trial is the same.

    Raises:
        UserError: making the data and the first images take all the seconds.
    """
    kept, train = Path(context.folder) / outcomes.SECONDS / f"{name}.json", config.train
    if kept.is_file():
        return replace(config, train=replace(train, num_images=json.loads(kept.read_text())["images"]))
    nodes = _run_nodes(config, "attach", context)
    spent = outcomes.seconds(nodes["attach"].folder)
    batches = max(1, math.ceil(CALIBRATION * train.num_images / train.batch_size))
    first = min(train.num_images, batches * train.batch_size)
    trained = _run_nodes(replace(config, train=replace(train, num_images=first)), "train", context)["train"]
    each = 1.0 / outcomes.pace(gather.read_curve(trained.folder / "metrics.jsonl"))
    images = int((options.seconds - spent) / each / train.batch_size) * train.batch_size
    if images < first:
        raise UserError(
            f"sweep.seconds={options.seconds:g}: this student's data took {spent:,.0f} s and {first:,} images take {first * each:,.0f} s to train; "
            f"{math.ceil(spent + first * each):,} or more would do."
        )
    write_json(kept, {"images": min(images, train.num_images), "data_seconds": spent, "images_per_sec": 1.0 / each})
    return replace(config, train=replace(train, num_images=min(images, train.num_images)))


@contextmanager
def _watched(sweep: Sweep, total: int, interval_sec: float, say: Say) -> Iterator[Callable[[dict[str, Any], str], None]]:
    """Says how the trials come along; gives what is to be told how each of them ended."""
    # ASHA is told of the finished ones again.
    ended_so_far = 0 if sweep.config.sweep.asha else sum(_finished(sweep, trial) for trial in sweep.trials)
    said = time.monotonic()

    def ended(chosen: dict[str, Any], how: str) -> None:
        nonlocal ended_so_far
        points = (chosen, trials.twin(chosen, sweep.config)) if "id" not in chosen else ()
        mine = [record for record in outcomes.records(sweep.folder) if record["id"] == chosen.get("id") or record["point"] in points]
        if not mine and how == FAILED and "id" in chosen:  # before it could say anything
            mine = [{**chosen, "state": RUNNING, "error": "", "folders": {}, "reports": []}]
        for record in mine:
            if record["state"] == RUNNING:
                record |= {"state": STOPPED} if how == STOPPED else {"state": FAILED, "error": record["error"] or "its process died"}
                outcomes.write_record(sweep.folder, record)
        ended_so_far += 1
        worst = next((record for record in mine if record["state"] == FAILED), None)
        what = f"failed: {worst['error']}" if worst else "ended early" if any(record["state"] == STOPPED for record in mine) else how
        say(f"{ended_so_far} of {total}: {chosen.get('label') or trials.label(chosen)}: {what}")

    def look() -> None:
        nonlocal said
        records = outcomes.records(sweep.folder)
        _count(sweep, total, records)
        if time.monotonic() - said < interval_sec:
            return
        said = time.monotonic()
        running = [f"{record['label']} ({how})" for record in records if record["state"] == RUNNING and (how := _stands(sweep, record))]
        if running:
            say(f"{ended_so_far} of {total} trials; running {'; '.join(running)}")

    try:
        with repeating(look, min(interval_sec, COUNT_SEC), "d2c-trials"):
            yield ended
    finally:
        once(lambda: _count(sweep, total, outcomes.records(sweep.folder)), "d2c-trials")


def _count(sweep: Sweep, total: int, records: list[dict[str, Any]]) -> None:
    """Trials by state, for who monitors the sweep; those of an earlier attempt that are not taken up yet count as running."""
    found = {state: sum(record["state"] == state for record in records) for state in (DONE, RUNNING, STOPPED, FAILED)}
    about = logs.About(sweep.plan.folder.name, "sweep", sweep.folder.name)
    for state, count in {WAITING: max(0, total - sum(found.values())), **found}.items():
        metrics.tell("d2c_sweep_trials", count, about, state=state)


def _stands(sweep: Sweep, record: dict[str, Any]) -> str:
    """Where a running trial stands, in words; empty where its process has not said so yet."""
    nodes = sweep.plan.arms.get(record["id"], {})
    for stage in OWN:
        if stage in nodes and not nodes[stage].dir.done:
            with suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
                said = json.loads((nodes[stage].folder / PROGRESS).read_text())
                waits = f", waits: {said['waits_for'][0]}" if said.get("waits_for") else ""
                return f"{stage} {said['done'] / max(1, said['total']):.0%}{waits}"
            return stage
    return ""


# Beforehand


def forecast(config: Config, cluster: hardware.Cluster | None = None) -> dict[str, Any]:
    """What a sweep will run and take, before it does: trials, shared work, seconds and bytes.

    Lists the images, which every run needs, and measures this machine where it is to run there. Starts no Ray.

    Args:
        cluster: that it is to run on; None: this machine.

    Raises:
        UserError: as `run`, of all that can be seen beforehand; or a GPU that nothing is known of.
    """
    sweep = make(config)
    with Lock(sweep.plan.folder):
        _list(sweep, pipeline.Status(sweep.plan, record=False), lambda _: None)
    manifest, assumed = sweep.plan.of("manifest")[0], list[str]()
    data, _ = estimate.known(0, config, manifest.dir.success()["facts"], None)
    options, here = config.sweep, cluster or hardware.here()
    places = here.places(config.resources)
    concurrent = concurrency(config, here.trainings(config.resources))
    listed = sweep.trials or _unknown(sweep)
    nodes: dict[str, Node] = {}
    for trial in listed:
        for node in trial.plan.arms["student"].values():
            nodes.setdefault(node.name if sweep.trials else f"{node.name}{trial.id if node.stage in OWN else ''}", node)
    todo = {name: node for name, node in nodes.items() if not node.dir.done}
    pace = rates.of(config)
    if cluster is None:
        fresh, missing = bench.measured([(node.stage, node.config) for node in todo.values()], data, concurrent, known=pace)
        pace.entries += fresh
        assumed += [f"{what}, as it could not be measured: {why}" for what, why in missing.items()]
    else:
        rates.check(cluster, config, pace)
        assumed += cluster.assumed

    def seconds_of(node: Node, of: estimate.Data) -> float:
        share = workers(node) or (places if node.stage not in OWN else max(1, places // concurrent))
        found = pace.stage(node.stage, node.config, of, here, share)
        if found.seconds is None:
            assumed.append(f"that {node.stage} takes no time, which is not known: {found.by.said}")
        return found.seconds or 0.0

    seconds: dict[str, float] = {}
    attaching: dict[str, list[Node]] = {}
    for name, node in todo.items():
        if node.stage == "attach":  # all of a kind are taken from one of all their images
            attaching.setdefault(node.lineage, []).append(node)
            seconds[name] = pace.start(here).seconds * rates.STARTS["attach"]
            continue
        seconds[name] = seconds_of(node, data)
        if node.stage == "train" and options.equal == "seconds":
            seconds[name] = min(seconds[name], pace.start(here).seconds * rates.STARTS["train"] + options.seconds)
        if node.stage in OWN[1:]:  # once more at every rung
            seconds[name] *= len(trials.rungs(replace(node.config, sweep=options)))
    for lineage, group in attaching.items():
        # Subsets overlap by an amount that only selecting shows: as many images as there can be.
        chosen = min(data.images, sum(estimate.images("attach", node.config, data) for node in group))
        of_all = replace(group[0], config=replace(group[0].config, select=replace(group[0].config.select, budget=float(max(2, chosen)))))
        seconds[f"attach once {lineage}"] = seconds_of(of_all, data)
    if options.asha:
        assumed.append("that ASHA ends no trial early: it will take less")
    if options.equal == "seconds":
        assumed.append(f"that training takes all of the {options.seconds:g} s at most")
    if not sweep.trials:
        assumed.append("that every point costs what the configuration itself does")
    own = sum(value for name, value in seconds.items() if name in todo and todo[name].stage in OWN)
    shared = sum(seconds.values()) - own
    return {
        "trials": len(listed), "points": len({json.dumps(trial.point) for trial in listed}), "twins": sum(trial.twin for trial in listed), "concurrent": concurrent,
        "cluster": here.title, "finished": sum(_finished(sweep, trial) for trial in sweep.trials), "stages": _counted(nodes, todo), "shared_seconds": shared, "trial_seconds": own,
        "seconds": shared + own / concurrent, "bytes": _bytes(todo, data), "assumed": list(dict.fromkeys([*assumed, *pace.assumed])), "measured": cluster is None,
        "images_per_second": _paces(pace, todo, data, here), "labels": [trial.label for trial in sweep.trials],
    }  # fmt: skip


def _unknown(sweep: Sweep) -> list[Trial]:
    """As many trials as points that are chosen on the way come to, each like the configuration itself."""
    config, options = sweep.config, sweep.config.sweep
    own = replace(config, sweep=SweepConfig())
    planned = trials.Planner(sweep.sources)(own)
    twins = (False, True) if options.random_twins and trials.twin({}, config) is not None else (False,)
    every = itertools.product(range(options.num_points), options.seeds, twins)
    return [Trial(f"{index}-{seed}-{twin}", {"point": index, "twin": twin}, seed, twin, own, planned) for index, seed, twin in every]


def _paces(pace: rates.Rates, todo: dict[str, Node], data: estimate.Data, here: hardware.Cluster) -> dict[str, list[float]]:
    """Images a second of one process, by stage, slowest first: students of several kinds have several."""
    found: dict[str, set[float]] = {}
    for node in todo.values():
        each = sum(rate.seconds for _, rate in pace.image(node.stage, node.config, data, here.device(node.stage, node.config.resources)))
        if each and node.stage != "reference":  # which evaluate's networks look at
            found.setdefault(node.stage, set()).add(1.0 / each)
    return {stage: sorted(values) for stage, values in found.items()}


def _counted(nodes: dict[str, Node], todo: dict[str, Node]) -> dict[str, dict[str, int]]:
    """Folders a stage: those that trials share among them, and those that are still to be made."""
    return {
        stage: {"folders": len([node for node in nodes.values() if node.stage == stage]), "to_make": len([node for node in todo.values() if node.stage == stage])}
        for stage in plans.STAGES if any(node.stage == stage for node in nodes.values())
    }  # fmt: skip


def _bytes(todo: dict[str, Node], data: estimate.Data) -> dict[str, float]:
    found = forecasts.leaves((node, data) for node in todo.values())
    return {**found, "datasets": 2 * found["datasets"]}  # once more in the one that all of a kind are taken from
