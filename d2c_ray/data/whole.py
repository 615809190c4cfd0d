"""The selection that keeps every image: a table like any selector's, without scores or ranks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.data import tables


def selection(rows: pa.Table) -> pa.Table:
    """Rows of `schema.SELECTION` by sample_id, for images that are all kept; positions in a class follow sample_id.

    Args:
        rows: with sample_id, key and label (-1, of unlabelled data, as class 0).
    """
    fields = tables.arrow_schema(schema.SELECTION)
    table = rows.select(["sample_id", "key", "label"]).replace_schema_metadata(None).sort_by("sample_id")
    labels = np.maximum(table.column("label").to_numpy(), 0)
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    position, size = np.empty((2, len(labels)), np.int64)
    position[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    size[order] = np.repeat(sizes, sizes)
    for name, values in (("score", pa.nulls(len(table))), ("rank", pa.nulls(len(table))), ("class_size", size), ("position", position)):
        table = table.append_column(name, pa.array(values) if isinstance(values, np.ndarray) else values)
    return table.select(fields.names).cast(fields)


def classes(chosen: pa.Table, names: Sequence[str]) -> pa.Table:
    """The table of classes of such a selection: every class gives all that it has."""
    fields = tables.arrow_schema(schema.SELECTION_CLASSES)
    labels, sizes = np.unique(chosen.column("label").to_numpy(), return_counts=True)
    columns: dict[str, Any] = {
        "label": labels,
        "name": np.asarray([names[max(label, 0)] for label in labels.tolist()], object),
        "size": sizes,
        "quota": sizes,
        "shortfall": np.zeros_like(sizes),
    }
    table = pa.table({name: pa.array(columns[name]) if name in columns else pa.nulls(len(labels)) for name in fields.names})
    return table.cast(fields)
