"""Why an image is in the subset or not, read back from a run's folders."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray.config import FEATURE_SELECTORS, SelectConfig
from d2c_ray.data import tables
from d2c_ray.errors import UserError
from d2c_ray.plan import Node, Plan
from d2c_ray.wording import nearest

SHOWN = 5


@dataclass(frozen=True)
class Scored:
    """An image in the score table: its place in its class, and its error at every timestep beside the class's.

    T timesteps; `quartiles` are the class's at each of them, 3 x T.
    """

    score: float
    rank: int
    class_size: int
    timesteps: list[float]
    errors: np.ndarray
    quartiles: np.ndarray
    ranked_scores: np.ndarray  # of the class, from easy to hard


def image_of(plan: Plan, key: str) -> dict[str, Any]:
    """The manifest row of a key, or of the only key that ends with what was given.

    Raises:
        UserError: no such image, or several; names some.
    """
    paths = plan.of("manifest")[0].dir.parts()
    for path in paths:
        file = tables.opened(path, path)
        column = file.schema_arrow.get_field_index("key")
        for group in range(file.metadata.num_row_groups):
            bounds = file.metadata.row_group(group).column(column).statistics
            if bounds is not None and bounds.has_min_max and not bounds.min <= key <= bounds.max:
                continue
            keys = file.read_row_group(group, ["key"]).column("key")
            index = pc.index(keys, key).as_py()
            if index >= 0:
                return file.read_row_group(group).slice(index, 1).to_pylist()[0]
    ending: list[dict[str, Any]] = []
    some: list[str] = []
    for path in paths:
        table = tables.read(path)
        ending += table.filter(pc.ends_with(table.column("key"), key)).slice(0, SHOWN + 1).to_pylist()
        some += table.column("key").slice(0, 1000).to_pylist()
    if len(ending) == 1:
        return ending[0]
    if ending:
        shown = ", ".join(row["key"] for row in ending[:SHOWN])
        raise UserError(
            f"'{key}' ends the keys of several images: {shown}{', ...' if len(ending) > SHOWN else ''}. Give one of them whole."
        )
    raise UserError(f"no image has the key '{key}'{nearest(key, some)} Keys are those of the manifest, for example '{some[0]}'.")


def rejected(plan: Plan, key: str) -> list[dict[str, str]]:
    """The stages that could not use an image, with the reason."""
    found = []
    for node in plan.nodes:
        path = node.folder / "rejected.parquet"
        if path.is_file():
            table = tables.read(path)
            found += table.filter(pc.equal(table.column("key"), key)).to_pylist()
    return found


def scored(node: Node, row: dict[str, Any]) -> Scored | None:
    """What the score table says of a manifest row; None where it is not there."""
    label = max(row["label"], 0)
    ids, scores, errors, mine = [], [], [], None
    facts = node.dir.success()["facts"]
    for path in node.dir.parts():
        table = tables.read(path, ["sample_id", "label", "score", "errors"])
        table = table.filter(pa.array(np.maximum(table.column("label").to_numpy(), 0) == label))
        values = table.column("errors").combine_chunks()
        found = values.flatten().to_numpy().reshape(len(table), -1) if len(table) else np.zeros((0, facts["num_timesteps"]), np.float32)
        ids.append(table.column("sample_id").to_numpy())
        scores.append(table.column("score").to_numpy())
        errors.append(found)
        here = np.flatnonzero(ids[-1] == row["sample_id"])
        if len(here):
            mine = found[here[0]]
    if mine is None:
        return None
    all_ids, all_scores = np.concatenate(ids), np.concatenate(scores)
    order = np.lexsort((all_ids, all_scores))
    rank = int(np.flatnonzero(all_ids[order] == row["sample_id"])[0])
    quartiles = np.quantile(np.concatenate(errors), (0.25, 0.5, 0.75), axis=0)
    return Scored(
        float(all_scores[order[rank]]), rank, len(order), facts["timesteps"], mine, quartiles, all_scores[order]
    )  # fmt: skip


def reason(options: SelectConfig, row: dict[str, Any], chosen: pa.Table, place: Scored | None) -> list[str]:
    """Lines that say whether a selector kept an image, and why.

    Args:
        chosen: the selection's rows of the image's class.
    """
    ids = chosen.column("sample_id").to_numpy()
    kept = bool((ids == row["sample_id"]).any())
    lines = []
    if kept:
        position = int(chosen.column("position").to_numpy()[ids == row["sample_id"]][0])
        lines.append(f"kept, as number {position + 1} of {len(ids)} of its class")
    else:
        lines.append(f"not kept; {len(ids)} of its class are")
    if not len(ids):
        return [*lines, "the class gave no image: its quota was 0"]
    if options.selector in FEATURE_SELECTORS:
        lines.append(f"{options.selector} looks at the whole set in feature space, so that no image is kept or left for its own sake")
    elif options.selector == "all":
        lines.append("every image is kept that can be decoded")
    elif options.selector == "random":
        lines.append("the choice was random: the lowest of keys that a seed gives to every image")
    elif place is not None:
        lines += _by_rank(options, chosen, place, kept)
    return lines


def _by_rank(options: SelectConfig, chosen: pa.Table, place: Scored, kept: bool) -> list[str]:
    keys = dict(zip(chosen.column("rank").to_pylist(), chosen.column("key").to_pylist(), strict=True))
    ranks = np.sort(np.asarray(list(keys), np.int64))
    below, above = ranks[ranks < place.rank], ranks[ranks > place.rank]
    lines = []
    if options.selector == "interval":
        steps = np.unique(np.diff(ranks)).tolist()
        stride = f" in steps of {' and '.join(map(str, steps))}" if steps else ""
        lines.append(
            f"interval takes even ranks from the easiest: here 0 to {ranks[-1]} of {place.class_size}{stride}, the hardest {1 - (ranks[-1] + 1) / place.class_size:.0%} are never used"
        )
    if options.selector == "stratified":
        cut = f", without the hardest {options.cutoff:.0%}" if options.cutoff else ""
        lines.append(f"stratified draws at random from {options.strata} ranges of equal score width{cut}, as many from each as it can give")
    if not kept and len(above) == 0 and len(ranks):
        lines.append(f"its rank {place.rank} is harder than the hardest that is kept ({ranks[-1]})")
    elif not kept and len(below) == 0:
        lines.append(f"its rank {place.rank} is easier than the easiest that is kept ({ranks[0]})")
    elif not kept:
        lines.append(f"its rank {place.rank} lies between two that are kept, {below[-1]} and {above[0]}")
    for name, side in (("easier", below[-1:]), ("harder", above[:1])):
        for rank in side.tolist():
            lines.append(f"the next {name} one that is kept: {keys[rank]} (rank {rank}, score {place.ranked_scores[rank]:.4f})")
    return lines


def lines(plan: Plan, key: str) -> list[str]:
    """Everything there is to say of an image, line by line."""
    row = image_of(plan, key)
    names = plan.of("manifest")[0].dir.success()["facts"]["class_names"]
    name = names[max(row["label"], 0)] or "no name"
    label = f"class {row['label']} ({name})" if row["label"] >= 0 else "unlabelled"
    found = [f"{row['key']}: {label}, sample_id {row['sample_id']}"]
    reasons = rejected(plan, row["key"])
    found += [f"rejected by {each['stage']}: {each['reason']}" for each in reasons]
    place = None
    for node in plan.of("score"):
        place = scored(node, row)
        if place is None:
            continue
        share = place.rank / max(1, place.class_size - 1)
        found.append(
            f"score {place.score:.4f}: rank {place.rank} of {place.class_size} in its class ({share:.0%} of the way from the easiest to the hardest)"
        )
        found.append("  timestep      error   its class: quarter below, median, quarter above")
        for t, error, (low, middle, high) in zip(place.timesteps, place.errors, place.quartiles.T, strict=True):
            mark = "harder" if error > high else "easier" if error < low else ""
            found.append(f"  {t:8.4g} {error:10.4f}   {low:10.4f} {middle:10.4f} {high:10.4f}  {mark}".rstrip())
    if reasons and place is None:
        return found
    for node in plan.of("select"):
        options = node.config.select
        chosen = tables.read(node.dir.parts())
        chosen = chosen.filter(pa.array(np.maximum(chosen.column("label").to_numpy(), 0) == max(row["label"], 0)))
        title = f"{options.selector}, {node.dir.success()['facts']['images']} images in all ({', '.join(node.arms)})"
        found += [title, *(f"  {line}" for line in reason(options, row, chosen, place))]
    return found
