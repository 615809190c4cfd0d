"""union: all images that any of several selections chose, to attach to each of them once."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c_ray import schema
from d2c_ray.data import tables
from d2c_ray.job import Job, Result

SELECTOR = "union"


def run(job: Job) -> Result:
    every = pa.concat_tables([tables.read(given.parts(), ["sample_id", "key", "label"]) for given in job.inputs.values()])
    first = every.append_column("row", pa.array(np.arange(len(every)))).group_by("sample_id").aggregate([("row", "min")])
    chosen = every.take(first.column("row_min")).sort_by("sample_id")
    fields = tables.arrow_schema(schema.SELECTION)
    table = pa.table({name: chosen.column(name) if name in chosen.column_names else pa.nulls(len(chosen)) for name in fields.names})
    total = job.facts(next(iter(job.inputs)))["images"]
    facts = {"selector": SELECTOR, "images": len(chosen), "of": sorted(given.path.name for given in job.inputs.values())}
    tables.write(job.out / "part-00000.parquet", table.cast(fields), facts)
    share = len(chosen) / total * job.facts(next(iter(job.inputs)))["share"]
    return Result(
        len(chosen),
        len(chosen),
        0,
        {**facts, "share": share, "num_classes": pc.count_distinct(chosen.column("label")).as_py(), "shortfall": 0},
    )
