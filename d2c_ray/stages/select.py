"""select: the images of the subset, from scores and a budget."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import DEFAULT_F, FEATURE_SELECTORS, SelectConfig
from d2c_ray.data import features, score_parts, tables, whole
from d2c_ray.errors import UserError
from d2c_ray.job import Job, Result
from d2c_ray.selection import rank
from d2c_ray.selection.baselines import SELECTORS, nominal


def run(job: Job) -> Result:
    if job.config.select.selector == "all":
        return _all(job)
    return _by_features(job) if job.config.select.selector in FEATURE_SELECTORS else _by_scores(job)


def _all(job: Job) -> Result:
    """Every image of the manifest; attach leaves out those that cannot be decoded."""
    chosen = whole.selection(tables.read(job.inputs["manifest"].parts(), ["sample_id", "key", "label"]))
    facts = {"selector": "all", "images": len(chosen)}
    tables.write(job.out / "part-00000.parquet", chosen, facts)
    classes = whole.classes(chosen, job.facts("manifest")["class_names"])
    tables.write(job.out / score_parts.CLASSES, classes, facts)
    return Result(len(chosen), len(chosen), 0, {**facts, "share": 1.0, "num_classes": len(classes), "shortfall": 0})


def _by_scores(job: Job) -> Result:
    options, data, resources = job.config.select, job.facts("manifest"), job.config.resources
    scores = job.inputs["score"]
    for stale in job.out.glob("*.parquet"):  # of an attempt that was cut off
        stale.unlink()
    with job.progress(scores.success()["rows_done"]) as progress:

        def say(text: str) -> None:
            progress.at(progress.done, text)

        many = resources.rows_per_partition if data["rows"] > resources.rows_per_partition else 0
        rows, facts = select(
            scores.parts(), data["class_names"], options, job.out, scores.path.name, many, job.config.data.rows_per_shard, say
        )
        progress.at(rows)
    return Result(rows, rows, 0, facts)


def _by_features(job: Job) -> Result:
    from d2c_ray.distributed import choose, cluster

    options, names, parts = job.config.select, job.facts("manifest")["class_names"], job.inputs["embed"].parts()
    with features.embedded(parts, job.out) as data:
        sizes, total = np.bincount(data.labels, minlength=len(names)), len(data.labels)
        budget = rank.budget_images(options.budget, total)
        wanted, quotas = rank.shares(sizes, budget, options.balance), rank.quotas(sizes, budget, options.balance)
        share = cluster.share(job.config.resources, job.places)
        with job.progress(budget) as progress:
            found, said = choose.choose(data, quotas, options, share, progress.advance)
        rows = {label: chosen for label, (chosen, _) in found.items()}
        for label, chosen in rows.items():
            if len(np.unique(chosen)) != quotas[label] or len(chosen) != quotas[label]:
                raise RuntimeError(f"the selector gave an image of label {label} twice or missed its quota")
        near = f"{options.selector} chooses in the features of {job.config.embed.encoder}, a space close to those that Fréchet distances are measured in"
        said["notices"] = [*said.get("notices", []), near]
        metadata = {**asdict(options), "images": budget, "features": job.inputs["embed"].path.name, **said}
        labels = features.write_selection(job.out / "part-00000.parquet", parts, data, rows, sizes, metadata)
    giving = np.asarray(sorted(rows))
    shortfall = np.maximum(wanted - sizes, 0)
    columns = {
        "label": np.asarray([labels[label] for label in giving.tolist()]),
        "name": np.asarray(names, object)[giving],
        "size": sizes[giving],
        "quota": quotas[giving],
        "shortfall": shortfall[giving],
    }
    fields = tables.arrow_schema(schema.SELECTION_CLASSES)
    table = pa.table({name: pa.array(columns[name]) if name in columns else pa.nulls(len(giving)) for name in fields.names})
    tables.write(
        job.out / score_parts.CLASSES, table.cast(fields), {**metadata, "classes": {label: facts for label, (_, facts) in found.items()}}
    )
    facts = {**metadata, "share": budget / total, "num_classes": len(giving), "shortfall": int(shortfall.sum())}
    return Result(total, total, 0, facts)


def select(
    parts: list[Path],
    names: list[str],
    options: SelectConfig,
    out: Path,
    scores: str = "",
    rows_per_partition: int = 0,
    rows_per_part: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[int, dict[str, Any]]:
    """Chooses rows of score parts and writes them with the table of classes; gives the number of rows and the facts.

    Args:
        names: of the classes, by label.
        scores: name of the score table, for the record.
        rows_per_partition: rows ranked at once, in tasks on Ray, which must be connected; 0: all of them, here.
        rows_per_part: the most a score part holds.

    Raises:
        UserError: scores that are not finite, or a budget that does not fit.
    """
    source: Any
    if rows_per_partition:
        from d2c_ray.distributed.rank import OnRay

        source = OnRay.of(parts, len(names), rows_per_partition, rows_per_part, say)
    else:
        source = score_parts.InMemory.of(parts, len(names))
    total = int(source.sizes.sum())
    _check_finite(source, total)
    budget = rank.budget_images(options.budget, total)
    wanted = rank.shares(source.sizes, budget, options.balance)
    classes = rank.Classes(source.sizes, rank.quotas(source.sizes, budget, options.balance))
    choice = _choose(source, classes, options)
    metadata = {**asdict(options), "images": budget, "scores": scores}
    if options.selector == "interval" and not options.k:
        metadata["f"] = options.f or DEFAULT_F
    found = source.lookup(np.sort(choice.sample_id))
    label, deepest, low, high = score_parts.write_selection(out, choice, classes, found, metadata)
    shortfall, fraction = np.maximum(wanted - classes.sizes, 0), nominal(classes, options)
    giving = np.flatnonzero(classes.quotas)
    columns = {
        "label": label, "name": np.asarray(names, object), "size": classes.sizes, "quota": classes.quotas, "shortfall": shortfall,
        "deepest_rank": deepest / np.maximum(classes.sizes, 1), "score_min": low, "score_max": high,
    }  # fmt: skip
    arrays = {name: pa.array(values[giving]) for name, values in columns.items()}
    arrays["nominal_f"] = pa.array(fraction[giving]) if fraction is not None else pa.nulls(len(giving))
    fields = tables.arrow_schema(schema.SELECTION_CLASSES)
    tables.write(out / score_parts.CLASSES, pa.table(arrays).select(fields.names).cast(fields), metadata)
    return total, {**metadata, "share": budget / total, "num_classes": len(giving), "shortfall": int(shortfall.sum())}


def _check_finite(source: Any, total: int) -> None:
    count, first = source.not_finite()
    if count:
        keys = [key for table in source.lookup(first) for key in table.column("key").to_pylist()]
        raise UserError(
            f"{count} of {total} scores are not finite, the first of {', '.join(keys)}: the teacher gives no number for them. Score again with another teacher or in fp32."
        )


def _choose(source: Any, classes: rank.Classes, options: SelectConfig) -> rank.Choice:
    """The partitions are let go of when this returns."""
    spans, each = source.partitions()
    choice = SELECTORS[options.selector](classes, spans, each, options)
    met = np.array_equal(np.bincount(choice.label, minlength=len(classes.quotas)), classes.quotas)
    if not met or (np.diff(np.sort(choice.sample_id)) == 0).any():
        raise RuntimeError("the selector gave an image twice or missed a quota")
    return choice
