"""What the report shows, read back from a finished run's folders."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray.config import get, to_dict
from d2c_ray.data import provenance, score_parts, tables, units
from d2c_ray.data.decode import decode
from d2c_ray.plan import Node, Plan
from d2c_ray.rundir import PLAN
from d2c_ray.selection.baselines import NEEDS_SCORES

# In the order of the bill; 'reference' and 'evaluate' are measuring, not making.
BILL = ("manifest", "teacher", "score", "embed", "select", "attach", "train", "sample", "unguided", "reference", "evaluate")


@dataclass
class Arm:
    """One student and everything measured of it."""

    name: str
    nodes: dict[str, Node]
    metrics: dict[str, Any]
    curve: list[dict[str, Any]]
    chosen: pa.Table
    selector: str
    seconds: dict[str, float | None]  # None: this arm would not have needed the stage
    planned: dict[str, float | None]  # None: not planned before the stage began

    @property
    def total_seconds(self) -> float:
        return sum(value for value in self.seconds.values() if value is not None)

    @property
    def planned_beside_actual(self) -> tuple[float, float] | None:
        """Seconds that were planned of the stages that were planned, and that these took; None where none was."""
        both = [
            (planned, took) for stage, took in self.seconds.items() if took is not None and (planned := self.planned.get(stage)) is not None
        ]
        return (sum(planned for planned, _ in both), sum(took for _, took in both)) if both else None


def arms(plan: Plan) -> list[Arm]:
    """Every arm of a finished plan, in the order of the configuration."""
    found, planned = [], kept(plan.folder)
    for name, nodes in plan.arms.items():
        selector = nodes["select"].config.select.selector
        free = () if selector in NEEDS_SCORES else ("teacher", "score")
        found.append(
            Arm(
                name=name,
                nodes=nodes,
                metrics=json.loads((nodes["evaluate"].folder / "metrics.json").read_text()),
                curve=read_curve(nodes["train"].folder / "metrics.jsonl"),
                chosen=tables.read(nodes["attach"].folder / provenance.SELECTION),
                selector=selector,
                seconds={stage: None if stage in free or stage not in nodes else nodes[stage].dir.success()["seconds"] for stage in BILL},
                planned={stage: planned.get(node.name, {}).get("seconds") for stage, node in nodes.items()},
            )
        )
    return found


def kept(folder: Path) -> dict[str, Any]:
    """What was planned of each stage's folder before it was begun, as plan.json keeps it; nothing of older runs and of sweeps."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        return dict(json.loads((folder / PLAN).read_text()).get("planned", {}))
    return {}


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The metrics of a training, a dictionary a line."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def selection_classes(node: Node, most: int) -> tuple[int, list[dict[str, Any]]]:
    """How many classes a selection has, and the first of its table of classes."""
    table = tables.read(node.folder / score_parts.CLASSES)
    return len(table), table.slice(0, most).to_pylist()


def scores(plan: Plan) -> pa.Table | None:
    """sample_id, label and score of every scored image; None where no student needed scores."""
    for node in plan.of("score"):
        return tables.read(node.dir.parts(), ["sample_id", "label", "score"])
    return None


def with_ranks(chosen: pa.Table, scored: pa.Table) -> pa.Table:
    """A selection with the scores and ranks that its selector had no use for.

    Args:
        scored: of `scores`.
    """
    if not chosen.column("rank").null_count:
        return chosen
    ids, labels, values = (scored.column(name).to_numpy() for name in ("sample_id", "label", "score"))
    labels = np.maximum(labels, 0)
    order = np.lexsort((ids, values, labels))
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(ids), np.int64)
    ranks[order] = np.arange(len(ids)) - np.repeat(starts, sizes)
    by_id = np.argsort(ids)
    wanted = chosen.column("sample_id").to_numpy()
    rows = by_id[np.minimum(np.searchsorted(ids[by_id], wanted), len(ids) - 1)]
    if not np.array_equal(ids[rows], wanted):
        raise RuntimeError("images that were embedded and chosen are not in the score table: has the source changed between the two?")
    for name, column in (("score", values[rows]), ("rank", ranks[rows])):
        chosen = chosen.set_column(chosen.column_names.index(name), name, pa.array(column))
    return chosen


def candidates(plan: Plan) -> pa.Table:
    """sample_id, label and score of every image that could be chosen; where no student needed scores, nulls in their place."""
    table = scores(plan)
    if table is not None:
        return table
    embedded = plan.of("embed")
    # Where nobody needed features either, all images were kept that could be decoded.
    parts = embedded[0].dir.parts() if embedded else [plan.of("attach")[0].folder / provenance.SELECTION]
    table = tables.read(parts, ["sample_id", "label"])
    return table.append_column("score", pa.nulls(len(table), pa.float32()))


def images(plan: Plan, sample_ids: np.ndarray) -> dict[int, np.ndarray]:
    """Decoded pixels (H x W x C) of some images of the source, by sample_id."""
    manifest = plan.of("manifest")[0]
    wanted = pa.array(np.unique(sample_ids))
    found: dict[int, np.ndarray] = {}
    for path in manifest.dir.parts():
        rows = tables.read(path)
        decoded, _ = units.decode_rows(rows.filter(pc.is_in(rows.column("sample_id"), wanted)), plan.config.data, plan.config.storage)
        found |= dict(zip(decoded.column("sample_id").to_pylist(), units.pixels_of(decoded), strict=True))
    return found


def samples(plan: Plan, node: Node, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels and pixels of a sampling's first images; none where only their features were kept."""
    labels, pixels = [], []
    for path in _with_images(node):
        table = tables.read(path, ["label", "image"])
        for label, image in zip(table.column("label").to_pylist(), table.column("image").to_pylist(), strict=True):
            labels.append(label)
            pixels.append(_decoded(plan, image))
            if len(labels) == count:
                return np.asarray(labels), pixels
    return np.asarray(labels), pixels


def samples_at(plan: Plan, node: Node, indices: set[int]) -> dict[int, np.ndarray]:
    """Pixels of a sampling's images by their index; none where only their features were kept."""
    found: dict[int, np.ndarray] = {}
    for path in _with_images(node):
        wanted = [i for i, index in enumerate(tables.read(path, ["index"]).column("index").to_pylist()) if index in indices]
        if wanted:  # the images of a part are read only where some of them are shown
            table = tables.read(path, ["index", "image"]).take(pa.array(wanted))
            images = table.column("image").to_pylist()
            found |= {index: _decoded(plan, image) for index, image in zip(table.column("index").to_pylist(), images, strict=True)}
    return found


def _with_images(node: Node) -> list[Path]:
    return [path for path in node.dir.parts() if "image" in tables.columns(path)]


def _decoded(plan: Plan, image: bytes) -> np.ndarray:
    data = plan.config.data
    return decode(image, data.image_size, data.channels, data.max_pixels)


def shown_classes(plan: Plan) -> list[tuple[int, str]]:
    """The classes whose pictures are shown: spread evenly over the labels that have images."""
    facts = plan.of("manifest")[0].dir.success()["facts"]
    labels = [label for label, size in enumerate(facts["class_counts"]) if size]
    count = min(plan.config.report.classes, len(labels))
    picked = [labels[round(i * (len(labels) - 1) / max(1, count - 1))] for i in range(count)]
    return [(label, facts["class_names"][label] or f"label {label}") for label in picked]


def differences(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """Configuration keys in which the arms differ, with each arm's value."""
    from d2c_ray.config import describe

    configs = {name: nodes["train"].config for name, nodes in plan.arms.items()}
    keys = [key for key in describe() if key != "arms"]
    rows = [(key, {name: get(config, key) for name, config in configs.items()}) for key in keys]
    return [(key, values) for key, values in rows if len({json.dumps(value, default=to_dict) for value in values.values()}) > 1]
