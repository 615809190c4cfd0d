"""Tables of features to measure in: id, label, a tensor column for every network by its name, and one of class probabilities."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import INCEPTION
from d2c_ray.data import tables

PROBABILITIES = "probabilities"  # of Inception, which alone gives them


class Measured(NamedTuple):
    """Images in one network: ids and labels (int, N), features (float32, N x D), probabilities (N x 1008, of Inception)."""

    ids: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    probabilities: np.ndarray | None


def table(ids: np.ndarray, labels: np.ndarray, tensors: dict[str, np.ndarray]) -> pa.Table:
    """The rows of a table.

    Args:
        tensors: features by the network's name, and PROBABILITIES where there are some: N x D each.
    """
    columns = schema.FEATURES | dict.fromkeys(tensors, "tensor")
    fields = tables.arrow_schema(columns, {name: ("float32", values.shape[1:]) for name, values in tensors.items()})
    values = [tables.tensor_column(values.astype(np.float32, copy=False)) for values in tensors.values()]
    return pa.table([pa.array(ids.astype(np.int64)), pa.array(labels.astype(np.int32)), *values], schema=fields)


def read(paths: Path | list[Path], network: str) -> Measured:
    """The rows of a file, or of parts of generated images (whose ids are called index), as one network sees them."""
    parts = [paths] if isinstance(paths, Path) else paths
    names = tables.columns(parts[0])
    id_column = "id" if "id" in names else "index"
    probable = network == INCEPTION and PROBABILITIES in names
    found = tables.read(parts, [id_column, "label", network, *([PROBABILITIES] if probable else [])])
    return Measured(
        found.column(id_column).to_numpy(), found.column("label").to_numpy(), tables.tensor_values(found, network),
        tables.tensor_values(found, PROBABILITIES) if probable else None,
    )  # fmt: skip
