"""What a run takes, stage by stage, before it runs: on this machine, a cluster at hand or one that is described; what does not fit, and what would.

Seconds are those of `rates`, laid side by side as `pipeline.run_all` would start the stages. The forecast of a stage is kept in plan.json
when its run begins and never changed once its folder is there: planned is then set beside actual as it was planned.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import estimate, hardware, rates, trials
from d2c_ray import plan as plans
from d2c_ray.config import Config, arm_configs, from_dict, merged, pools, to_dict
from d2c_ray.data import tables
from d2c_ray.errors import UserError
from d2c_ray.estimate import Assumed, Data
from d2c_ray.hardware import Cluster
from d2c_ray.models import offline
from d2c_ray.plan import Node, Plan
from d2c_ray.rates import MOST_COMPARED, Rates, Time
from d2c_ray.report import estimate as printed
from d2c_ray.report import gather
from d2c_ray.schedule import WORKERS_OF, starting
from d2c_ray.selection import rank
from d2c_ray.training.batches import BLOCK

# Sections that a stage reads besides those of its inputs: what tells stages of arms apart where hashes are not known yet.
SECTIONS = {
    "manifest": ("data",), "teacher": ("teacher", "vae"), "score": ("score",), "embed": ("embed",), "select": ("select",), "attach": ("attach", "vae"),
    "train": ("model", "train"), "sample": ("sample",), "unguided": ("sample",), "reference": ("evaluate",), "evaluate": ("evaluate", "sample"),
}  # fmt: skip
# Of the driver: the order of all images, a number of 8 bytes with what drawing it takes, and a row of the manifest of those that are measured
# against: a key and an address of some 25 characters, and 40 bytes of numbers.
DRAWN_BYTES, LISTED_BYTES = 24, 100
SPARE = 0.9  # of a device's memory that is planned with; the rest is the allocator's


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for.

    Attributes:
        cluster: None: this machine. mfu: as `Rates`. images: of the source, where it is not at hand; 0: as known or assumed.
        price: of a GPU-hour. disk, cache: bytes free for the run folder, and for a node's copies; None: as this machine says.
    """

    cluster: Cluster | None = None
    mfu: float | None = None
    images: int = 0
    price: float | None = None
    disk: float | None = None
    cache: float | None = None


@dataclass(frozen=True)
class Resolved:
    """A configuration with those of its arms, which take a while to make."""

    config: Config
    arms: dict[str, Config]

    @classmethod
    def of(cls, config: Config) -> "Resolved":
        return cls(config, arm_configs(config))

    def with_(self, changes: list[str]) -> "Resolved | None":
        """With some `key=value`; None where they do not go together."""
        import yaml

        nested: dict[str, Any] = {}
        for change in changes:
            key, _, value = change.partition("=")
            *sections, name = key.split(".")
            node = nested
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = yaml.safe_load(value)
        try:
            return Resolved.of(from_dict(merged(to_dict(self.config), nested)))
        except UserError:
            return None


def collect(config: Config, asked: Asked = Asked()) -> dict[str, Any]:
    """All that `d2c plan` says, as numbers. Nothing is run, fetched or written; without the data, its size is assumed and said.

    Raises:
        UserError: a device that is not known, or a budget that does not fit.
    """
    cluster, known = asked.cluster or hardware.here(), rates.of(config, asked.mfu)
    rates.check(cluster, config, known)
    plan, why = _plan(config)
    facts, image_bytes = _manifest(plan) if plan else (None, None)
    students, datas, whole = {}, {}, Resolved.of(config)
    for arm, own in whole.arms.items():
        datas[arm], assumed = estimate.known(asked.images, own, facts, image_bytes)
        found = estimate.student(own, datas[arm])
        _check(own, datas[arm], facts)
        students[arm] = {**found, "assumed": [*assumed, *found["assumed"]]}
    nodes = every_node(whole, plan)
    look = Look(cluster, known, {node.name: datas[node.arms[0]] for node in nodes})
    stages, total = look.stages(nodes, config, gather.kept(plan.folder) if plan else {})
    for student in students.values():
        student["assumed"] = list(dict.fromkeys([*student["assumed"], *cluster.assumed, *known.assumed]))
    first = next(iter(datas.values()))
    return {
        "name": config.run.name, "cluster": {"title": cluster.title, "gpus": cluster.gpus, "gpu": cluster.gpu, "cpus": cluster.cpus, "how": cluster.how},
        "students": students, "stages": stages, "no_stages": why, "total": {**total, **_price(total, asked.price)},
        "source_bytes": _source_bytes(first), "leaves": look.leaves(nodes), "leaves_without": look.without(nodes), "memory": memories(whole, datas),
        "trials": trials.count(config.sweep), "not_checked": _not_checked(asked, cluster),
        "problems": problems(whole, asked, cluster, nodes, datas), "idle": _idle(config, cluster, nodes),
    }  # fmt: skip


def _not_checked(asked: Asked, cluster: Cluster) -> list[str]:
    """Options without which nothing is known of a disk elsewhere."""
    given = {
        "--disk": asked.disk is not None or cluster.how != hardware.DESCRIBED,
        "--cache": asked.cache is not None or cluster.how == hardware.HERE,
    }
    return [option for option, known in given.items() if not known]


def _check(config: Config, data: Data, facts: dict[str, Any] | None) -> None:
    """Refuses what a run refuses (`plans.check_against_data`), as far as it can be seen without the images.

    Raises:
        UserError: a budget that does not fit, or a batch of fewer blocks than workers.
    """
    if config.select.selector != "all":
        budget = rank.budget_images(config.select.budget, data.images)
        if facts is not None and facts["rows"] == data.images:
            rank.quotas(np.asarray(facts["class_counts"]), budget, config.select.balance)
        elif budget > data.images:
            raise UserError(f"select.budget asks for {budget} images; there are {data.images}.")
    plans.check_batch("train.batch_size", config.train.batch_size, config.resources.train_workers)
    plans.check_batch("teacher.train.batch_size", config.teacher.train.batch_size, config.resources.teacher_workers)


def _idle(config: Config, cluster: Cluster, nodes: list[Node]) -> str:
    """What would use GPUs that trainings leave idle; empty where they leave none."""
    trainings, workers = [node for node in nodes if node.stage == "train" and not node.dir.done], config.resources.train_workers
    taken = min(len(trainings), max(1, cluster.gpus // workers)) * workers
    if not trainings or not cluster.trains_on_gpus(config.resources) or taken >= cluster.gpus:
        return ""
    would = min(cluster.gpus // len(trainings) or 1, *(-(-node.config.train.batch_size // BLOCK) for node in trainings))
    said = f"training takes {taken} of {cluster.gpus} GPUs"
    return f"{said}: resources.train_workers={would} would use more" if would > workers else said


def _price(total: dict[str, Any], price: float | None) -> dict[str, Any]:
    """Of the cluster's GPUs from the first stage to the last, idle or not, as they are rented.

    Raises:
        UserError: a price of GPUs where there are none.
    """
    if price is None:
        return {}
    if not total["gpus"]:
        raise UserError(
            f"--price {price:g} is of a GPU-hour, and the plan is for CPUs; --gpus 8xH100, for example, describes a cluster with some."
        )
    return {"price_an_hour": price, "price": price * total["rented_gpu_hours"] if total["rented_gpu_hours"] is not None else None}


def _source_bytes(data: Data) -> dict[str, Any]:
    if data.image_bytes:
        return {"bytes": data.image_bytes * data.images, "source": rates.MEASURED, "said": "the manifest"}
    if data.imagenet:
        return {"bytes": estimate.IMAGENET_BYTES * data.images, "source": rates.ASSUMED, "said": "ImageNet's training set, as published"}
    return {"bytes": None, "source": rates.UNKNOWN, "said": "d2c manifest counts a source that is at hand"}


def _plan(config: Config) -> tuple[Plan | None, str]:
    """The run's plan, as far as data and weights are at hand; or why there is none."""
    if not config.data.path and config.data.source != "digits":
        return None, "data.path is not given"
    try:
        with offline.only_local():
            return plans.make(config, "manifest"), ""
    except UserError as error:
        return None, str(error)


def _manifest(plan: Plan) -> tuple[dict[str, Any] | None, float | None]:
    """What the manifest says where it is finished, and the mean bytes of an image where it knows them; one part in memory at a time."""
    (node,) = plan.of("manifest")
    facts = _facts(plan)
    if facts is None:
        return None, None
    rows = total = 0
    for path in node.dir.parts():
        lengths = tables.read(path, ["length"]).column("length").to_numpy()
        if (lengths < 0).any():
            return facts, None
        rows, total = rows + len(lengths), total + int(lengths.sum())
    return facts, total / rows if rows else None


def _facts(plan: Plan) -> dict[str, Any] | None:
    """What the manifest says of the source; None where it is not finished."""
    (node,) = plan.of("manifest")
    return node.dir.success()["facts"] if node.dir.done else None


def some_rows(config: Config) -> pa.Table | None:
    """Manifest rows of a run whose images are listed, and at hand."""
    plan, _ = _plan(config)
    node = plan.of("manifest")[0] if plan else None
    return tables.read(node.dir.parts()[0]) if node is not None and node.dir.done else None


def every_node(whole: Resolved, plan: Plan | None) -> list[Node]:
    """All stages of a run, each once; those whose folder cannot be named yet, for want of data or weights, too."""
    nodes: dict[str, Node] = {}
    for arm, own in whole.arms.items():
        mine: dict[str, Node] = {}
        wanted = plans.needs("evaluate", own)
        for stage, (reads, _) in plans.STAGES.items():
            if stage not in wanted:
                continue
            found = plan.arms[arm].get(stage) if plan else None
            if found is None:
                config_of = plans.unguided(own) if stage == "unguided" else own
                inputs = {name: mine[name] for name in reads(own)}
                said = [
                    stage,
                    *(node.name for node in inputs.values()),
                    *(to_dict(getattr(config_of, section)) for section in SECTIONS[stage]),
                ]
                digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:8]
                folder = plans.run_folder(whole.config) / f".unknown-{stage}-{digest}"
                found = nodes.get(folder.name) or Node(stage, config_of, inputs, "", folder)
                found.arms.append(arm)
            mine[stage] = nodes.setdefault(found.name, found)
    order = list(plans.STAGES)
    return sorted(nodes.values(), key=lambda node: order.index(node.stage))


@dataclass
class Look:
    """Seconds and bytes of stages on a cluster.

    Attributes:
        data: of each node, by its name.
    """

    cluster: Cluster
    rates: Rates
    data: dict[str, Data]
    assumed: Assumed = field(default_factory=list)

    def time(self, node: Node, share: int) -> Time:
        return self.rates.stage(node.stage, node.config, self.data[node.name], self.cluster, share)

    def stages(self, nodes: list[Node], config: Config, planned: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """A row a stage, and all together.

        Args:
            planned: of `gather.kept`.
        """
        todo = [node for node in nodes if not node.dir.done]
        shares, hours = schedule(todo, lambda node, share: self.time(node, share).seconds or 0.0, self.cluster.places(config.resources))
        rows = [self.row(node, shares.get(node.name, 0), planned.get(node.name)) for node in nodes]
        unknown = [row["stage"] for row in rows if not row["done"] and row["seconds"] is None]
        gpu_hours = [row["gpu_hours"] for row in rows if not row["done"]]
        known = not unknown
        both = [row for row in rows if row["done"] and row["planned"] is not None and row["actual"] is not None]
        return rows, {
            "seconds": hours if known else None, "gpus": self.cluster.gpus, "gpu_hours": sum(gpu_hours) if known else None,
            "rented_gpu_hours": self.cluster.gpus * hours / 3600 if known else None, "not_known": unknown,
            "planned_seconds": _sum(row["planned"] for row in both), "actual_seconds": _sum(row["actual"] for row in both), "planned_stages": len(both),
        }  # fmt: skip

    def row(self, node: Node, share: int, planned: dict[str, Any] | None) -> dict[str, Any]:
        done, config = node.dir.done, node.config
        found: dict[str, Any] = {
            "stage": node.stage, "folder": "" if node.name.startswith(".") else node.name, "arms": node.arms, "done": done,
            "images": estimate.images(node.stage, config, self.data[node.name]), "planned": planned["seconds"] if planned else None, "actual": None, "seconds": None,
        }  # fmt: skip
        if done:
            success = node.dir.success()
            return {
                **found,
                "actual": success["seconds"],
                "places": success.get("places"),
                "planned_places": planned["places"] if planned else None,
            }
        spent, device = self.time(node, share), self.cluster.device(node.stage, config.resources)
        each = 1.0 if node.stage in hardware.TRAININGS else self.cluster.gpus_per_actor(config.resources)
        gpus = share * each if device.gpu else 0.0
        return {
            **found, "seconds": spent.seconds, "places": share, "device": device.name or ("GPU" if device.gpu else "CPU"), "gpu_hours": gpus * (spent.seconds or 0.0) / 3600,
            "source": spent.by.source, "said": spent.by.said,
            "parts": [{"what": what, "seconds": seconds, "source": rate.source, "said": rate.said} for what, seconds, rate in spent.parts],
        }  # fmt: skip

    def leaves(self, nodes: Iterable[Node]) -> dict[str, float]:
        """Bytes that stages leave which are still to run."""
        return leaves((node, self.data[node.name]) for node in nodes if not node.dir.done)

    def without(self, nodes: Iterable[Node]) -> str:
        """What of them is not counted, for want of its size; empty: all is."""
        unknown = any(node.stage == "attach" and not node.dir.done and self.data[node.name].about_bytes is None for node in nodes)
        return "the datasets' images, whose size is not known" if unknown else ""


def _sum(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def leaves(nodes: Iterable[tuple[Node, Data]]) -> dict[str, float]:
    """Bytes that stages leave: tables, features, datasets (with the images as far as their size is known), checkpoints, models, images and latents.

    Not counted are logs, figures and, of a few bytes an image that was chosen, selections.
    """
    found = dict.fromkeys(("manifest", "scores", "features", "datasets", "checkpoints", "models", "images", "latents"), 0.0)
    for node, data in nodes:
        for what, size in _left(node, data).items():
            found[what] += size
    return found


def _left(node: Node, data: Data) -> dict[str, float]:
    config, stage = node.config, node.stage
    count = estimate.images(stage, config, data)
    if stage == "manifest":
        return {"manifest": estimate.MANIFEST_BYTES * count}
    if stage == "embed":
        return {"features": 2.0 * estimate.network_width(config.embed.encoder, []) * count}  # float16
    if stage in ("reference", "evaluate"):
        return {"features": float(estimate.feature_bytes(config, []) * count)}
    if stage not in ("score", "attach", "teacher", "train", "sample", "unguided") or (stage == "teacher" and config.teacher.checkpoint):
        return {}
    own = estimate.teacher_training(config) if stage == "teacher" else config
    spec = estimate.transformer_spec(own, data.classes, [])
    sizes = estimate.sizes(own, spec, estimate.images("attach", own, data), data, [])
    if stage == "score":
        return {"scores": (estimate.SCORE_BYTES + 4.0 * config.score.num_timesteps) * count, "latents": sizes["kept_latents"]}
    if stage == "attach":
        return {"datasets": sizes["dataset"]["total"]}
    if stage in hardware.TRAININGS:
        return {"checkpoints": 0.0 if config.resources.checkpoint_storage else sizes["checkpoints"], "models": sizes["model"]}
    if config.sample.keep == "none":
        return {"features": float(estimate.feature_bytes(config, []) * count)}
    return {"images": sizes["samples"]}


def schedule(nodes: list[Node], seconds: Callable[[Node, int], float], slots: int) -> tuple[dict[str, int], float]:
    """Places of every stage and the seconds of all, started as `pipeline.run_all` starts them."""
    waiting, ended, shares, now = list(nodes), set[str](), dict[str, int](), 0.0
    running: list[tuple[float, Node]] = []
    todo, free = {node.name for node in nodes}, slots
    while waiting or running:
        for node, share in starting(waiting, [one for _, one in running], free, lambda node: node.name in ended or node.name not in todo):
            free -= share
            waiting.remove(node)
            shares[node.name] = share
            running.append((now + seconds(node, share), node))
        now = min(end for end, _ in running)
        for _, node in [one for one in running if one[0] == now]:
            ended.add(node.name)
            free += shares[node.name]
        running = [one for one in running if one[0] > now]
    return shares, now


# Planned beside actual


def planned(plan: Plan, nodes: list[Node], cluster: Cluster, slots: int) -> dict[str, Any]:
    """What is to be kept of the stages of a run that begins: of those whose folder is there, what was planned before it was.

    Nothing of what is not known, as where GPUs come on demand.

    Args:
        nodes: that this run makes. slots: as `pipeline.run_all`.
    """
    facts = _facts(plan)
    found = gather.kept(plan.folder)  # of other settings' stages too, which lie in the same folder
    fresh = [node for node in nodes if not node.folder.exists()]
    look = Look(cluster, rates.of(plan.config), {node.name: estimate.known(0, node.config, facts, None)[0] for node in nodes})
    todo = [node for node in nodes if not node.dir.done]
    shares, _ = schedule(todo, lambda node, share: look.time(node, share).seconds or 0.0, slots)
    for node in fresh:
        row = look.row(node, shares[node.name], None)
        found.pop(node.name, None)
        if row["seconds"] is None:
            continue
        found[node.name] = {name: row[name] for name in ("stage", "images", "seconds", "places", "device", "source", "said")} | {
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")
        }
    return found


# What does not fit, and what would


def memories(whole: Resolved, datas: dict[str, Data]) -> dict[str, dict[str, Any]]:
    """The largest step of each kind on one device: bytes, which arm's, and the source of the number."""
    found: dict[str, dict[str, Any]] = {}

    def take(what: str, arm: str, size: float, source: str, knob: str, value: int) -> None:
        if what not in found or size > found[what]["bytes"]:
            found[what] = {"bytes": size, "arm": arm, "source": source, "knob": knob, "value": value}

    for arm, own in whole.arms.items():
        classes = datas[arm].classes
        if own.train.num_images:
            spec = estimate.transformer_spec(own, classes, [])
            size = estimate.memory(own, spec)
            take("train", arm, size["total"], "counted", "resources.micro_batch", size["micro_batch"])
        if "teacher" in plans.needs("evaluate", own) and not own.teacher.checkpoint:
            teacher = estimate.teacher_training(own)
            size = estimate.memory(teacher, estimate.transformer_spec(teacher, classes, []))
            take("teacher", arm, size["total"], "counted", "resources.micro_batch", size["micro_batch"])
        for what, each in estimate.forwards(own, classes, []).items():
            take(what, arm, each["bytes"], "estimated", each["knob"], each["value"])
    return found


def problems(whole: Resolved, asked: Asked, cluster: Cluster, nodes: list[Node], datas: dict[str, Data]) -> list[dict[str, Any]]:
    """What does not fit: in words, what it wants, what there is, and changes that make it fit; none where nothing known here does."""
    return [
        *_places(whole.config, cluster, nodes),
        *_memory(whole, cluster, datas),
        *_reference(whole, cluster, datas),
        *_disk(whole, asked, cluster, nodes, datas),
    ]


def _places(config: Config, cluster: Cluster, nodes: list[Node]) -> list[dict[str, Any]]:
    """Actors and workers that the cluster has no room for; a run refuses them (`cluster.preflight`)."""
    pools_of = max((pools(node.config) for node in nodes if node.stage == "attach" and not node.dir.done), default=1)
    lacks = hardware.lacking(cluster, config.resources, pools_of)
    return [_problem(lack.what, lack.wants, lack.has, list(lack.would), else_would="a larger cluster") for lack in lacks]


def _memory(whole: Resolved, cluster: Cluster, datas: dict[str, Data]) -> list[dict[str, Any]]:
    config = whole.config
    limits: dict[str, float | None] = {}
    for what in printed.MEMORY_OF:
        stage = {"decode": "sample", "text": "attach"}.get(what, what)
        device = cluster.device(stage, config.resources)
        if device.gpu:
            each = 1.0 if stage in hardware.TRAININGS else max(cluster.gpus_per_actor(config.resources), 1e-9)
            memory = cluster.gpu_bytes or hardware.memory_bytes(device.name)
            limits[what] = memory * min(1.0, each) if memory else None
        else:  # shared by as many as work there
            knob = WORKERS_OF.get(stage)
            side = getattr(config.resources, knob) if knob else cluster.places(config.resources)
            memory = hardware.host_memory() if cluster.how == hardware.HERE else None
            limits[what] = memory / side if memory else None

    def over(own: Resolved) -> dict[str, dict[str, Any]]:
        sizes = memories(own, datas)
        return {what: size for what, size in sizes.items() if (limit := limits[what]) is not None and size["bytes"] > SPARE * limit}

    found = []
    for what, size in over(whole).items():
        limit = limits[what] or 0.0
        halves = _halves(size["value"])
        tries = [[f"{size['knob']}={value}"] for value in halves]
        if what in hardware.TRAININGS:
            tries += [["resources.recompute=true", *own] for own in ([], *tries)]
        if what == "text":
            tries = [["attach.text.precision=bf16"]]
        if what == "attach":
            tries += [["resources.encoders_apart=true", *own] for own in ([], *tries)]
        would = next((changes for changes in tries if (own := whole.with_(changes)) is not None and what not in over(own)), [])
        on = f"one {cluster.device('train' if what in hardware.TRAININGS else 'score', config.resources).name}"
        least = memories(whole.with_(tries[-1]) or whole, datas)[what]["bytes"] / SPARE if tries else size["bytes"]
        found.append(_problem(
            f"the memory of {printed.MEMORY_OF[what]}" + (f" of {size['arm']}" if len(datas) > 1 else ""), size["bytes"], SPARE * limit, would,
            f"{SPARE:.0%} of {on}", "" if would else f"a device of {least / 1e9:,.0f} GB", planned_with=True,
        ))  # fmt: skip
    return found


def _reference(whole: Resolved, cluster: Cluster, datas: dict[str, Data]) -> list[dict[str, Any]]:
    """Memory of the driver, where it draws which real images are measured against and holds their rows of the manifest."""
    memory, (config, data) = hardware.host_memory() if cluster.how == hardware.HERE else None, (whole.config, next(iter(datas.values())))

    def held(config: Config) -> float:
        return float(DRAWN_BYTES * data.images + LISTED_BYTES * estimate.images("reference", config, data))

    wants = held(config)
    if memory is None or wants <= SPARE * memory:
        return []
    fewer = [f"evaluate.max_reference={MOST_COMPARED}"]
    own = whole.with_(fewer)
    would = fewer if own is not None and held(own.config) <= SPARE * memory else []
    what, on = "the memory of listing the real images that are measured against", f"{SPARE:.0%} of this machine"
    return [
        _problem(what, wants, SPARE * memory, would, on, "" if would else f"a machine of {wants / SPARE / 1e9:,.0f} GB", planned_with=True)
    ]


def _halves(value: int) -> list[int]:
    found = []
    while value > 1:
        value //= 2
        found.append(value)
    return found


def _disk(whole: Resolved, asked: Asked, cluster: Cluster, nodes: list[Node], datas: dict[str, Data]) -> list[dict[str, Any]]:
    """The run folder's disk, and that of a node's copies, where what is free there is known."""
    config, at_hand = whole.config, cluster.how != hardware.DESCRIBED
    disk = asked.disk if asked.disk is not None else _free(Path(config.run.dir)) if at_hand else None
    cache_dir = Path(config.resources.cache_dir or tempfile.gettempdir())
    cache = asked.cache if asked.cache is not None else _free(cache_dir) if cluster.how == hardware.HERE else None
    found = []
    ways = [
        ["attach.vision.storage=int8"], ["train.keep_every=0"], ["train.keep_checkpoints=1", "teacher.train.keep_checkpoints=1"], ["sample.keep=none"],
        [f"evaluate.max_reference={MOST_COMPARED}"], ["score.cache_latents=false"], ["attach.vision.encode=training"], ["vae.encode=training"],
    ]  # fmt: skip

    mine = {node.name for node in every_node(whole, None)}
    done = {(node.stage, *node.arms) for node in nodes if node.dir.done}

    def needed(own: Resolved) -> float:
        todo = [node for node in every_node(own, None) if (node.stage, *node.arms) not in done or node.name not in mine]
        return sum(leaves((node, datas[node.arms[0]]) for node in todo).values())

    def copied(own: Resolved) -> float:
        sizes = []
        for arm, each in own.arms.items():
            if each.train.num_images:
                spec = estimate.transformer_spec(each, datas[arm].classes, [])
                sizes.append(estimate.sizes(each, spec, estimate.images("attach", each, datas[arm]), datas[arm], [])["cache"])
        at_once = sum(sizes) if config.resources.keep_cache else max(sizes, default=0)
        return float(at_once)

    for what, free, size, where in (
        ("the run folder", disk, needed, config.run.dir),
        ("a node's copy to train from", cache, copied, str(cache_dir)),
    ):
        wants = size(whole)
        if free is None or wants <= free:
            continue
        would: list[str] = []
        own, least = whole, wants
        for way in ways:
            other = whole.with_([*would, *way])
            if other is not None and (less := size(other)) < least:
                own, least, would = other, less, [*would, *way]
                if least <= free:
                    break
        fits = least <= free and own is not whole
        found.append(
            _problem(
                what, wants, free, would if fits else [], f"free at {where}", "" if fits else f"a disk with {least / 1e9:,.0f} GB free"
            )
        )
    return found


def _problem(
    what: str, wants: Any, has: Any, would: list[str], where: str = "", else_would: str = "", planned_with: bool = False
) -> dict[str, Any]:
    return {
        "what": what,
        "wants": wants,
        "has": has,
        "where": where,
        "would": would,
        "else_would": else_would,
        "planned_with": planned_with,
    }


def _free(folder: Path) -> float | None:
    path = folder.expanduser().absolute()
    there = next((parent for parent in (path, *path.parents) if parent.exists()), None)
    return float(shutil.disk_usage(there).free) if there else None
