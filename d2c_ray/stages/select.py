"""select: the images of the subset, from scores and a budget."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import DEFAULT_F
from d2c_ray.data import tables
from d2c_ray.job import Job, Result
from d2c_ray.selection import rank
from d2c_ray.selection.baselines import SELECTORS
from d2c_ray.selection.interval import nominal_fraction


def run(job: Job) -> Result:
    options, names = job.config.select, job.facts("manifest")["class_names"]
    table = tables.read(job.inputs["score"].parts(), ["sample_id", "key", "label", "score"])
    ids, labels, scores = (table.column(name).to_numpy() for name in ("sample_id", "label", "score"))
    sizes = np.bincount(np.maximum(labels, 0), minlength=len(names))
    budget = rank.budget_images(options.budget, len(table))
    quotas = rank.quotas(sizes, budget, options.balance)
    select = SELECTORS[options.selector]
    chosen, ranks, positions, class_sizes, by_class = [], [], [], [], []
    for label, rows, members in rank.by_class(labels, ids, scores):
        quota = int(quotas[max(label, 0)])
        taken = np.asarray(select(members, quota, options), np.int64)
        assert len(np.unique(taken)) == quota, "a selector gave duplicates or missed its quota"
        chosen.append(rows[taken])
        ranks.append(taken)
        positions.append(np.arange(quota))
        class_sizes.append(np.full(quota, len(members)))
        sorted_ranks = np.sort(taken)
        by_class.append(
            {
                "label": label, "name": names[max(label, 0)], "size": len(members), "quota": quota,
                "nominal_f": nominal_fraction(sorted_ranks, len(members), 0.0 if options.k else options.f or DEFAULT_F) if options.selector == "interval" else None,
                "deepest_rank": float(sorted_ranks[-1] / len(members)) if quota else None,
                "score_min": float(members.scores[taken].min()) if quota else None, "score_max": float(members.scores[taken].max()) if quota else None,
            }
        )  # fmt: skip
    rows = np.concatenate(chosen)
    order = np.argsort(ids[rows])
    found = table.take(pa.array(rows[order]))
    for name, values in (("rank", ranks), ("class_size", class_sizes), ("position", positions)):
        found = found.append_column(name, pa.array(np.concatenate(values)[order]))
    fields = tables.arrow_schema(schema.SELECTION)
    metadata = {**asdict(options), "images": budget, "scores": job.inputs["score"].path.name}
    with job.progress(budget) as progress:
        tables.write(job.out / "part-00000.parquet", found.select(fields.names).cast(fields), metadata)
        progress.advance(budget)
    return Result(len(table), len(table), 0, {**metadata, "share": budget / len(table), "classes": by_class})
