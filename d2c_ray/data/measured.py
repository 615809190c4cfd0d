"""Tables of features to measure in: id, label, a tensor column for every network by its name, and one of class probabilities."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.config import INCEPTION
from d2c_ray.data import tables

FEATURES = "features"  # folder of the reference's parts
BLOCK = 4096  # rows that are held at once while a table is gone through
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


def listed(parts: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of all rows, without their features."""
    found = tables.read(parts, ["id", "label"])
    return found.column("id").to_numpy(), found.column("label").to_numpy()


def blocks(parts: list[Path], network: str) -> Iterator[Measured]:
    """The rows of parts in order, `BLOCK` at a time: no more of them are in memory, however many there are.

    Sums over blocks do not depend on how the rows are cut into parts, not by their last bits either.
    """
    rest: Measured | None = None
    some: list[Path] = []
    waiting = 0
    for number, part in enumerate(parts, 1):
        some.append(part)
        waiting += tables.num_rows(part)
        if waiting < BLOCK and number < len(parts):
            continue
        found = read(some, network) if rest is None else _joined(rest, read(some, network))
        while len(found.ids) >= BLOCK:
            yield _rows(found, 0, BLOCK)
            found = _rows(found, BLOCK, len(found.ids))
        # A copy, or all that it is a part of would be held as well.
        rest, some, waiting = _joined(found), [], len(found.ids)
    if rest is not None and len(rest.ids):
        yield rest


def _rows(of: Measured, start: int, stop: int) -> Measured:
    return Measured(*(None if values is None else values[start:stop] for values in of))  # type: ignore[arg-type]


def _joined(*some: Measured) -> Measured:
    return Measured(*(None if values[0] is None else np.concatenate(values) for values in zip(*some, strict=True)))  # type: ignore[arg-type]


class Picked:
    """The rows of some ids (ascending, all of them there), picked out of `blocks` as they pass."""

    def __init__(self, ids: np.ndarray):
        self._ids, self._found = ids, np.zeros(len(ids), bool)
        self._columns: list[np.ndarray | None] = [None, None, None]  # labels, features, probabilities

    def take(self, block: Measured) -> None:
        """Keeps what is wanted of a block."""
        there = np.flatnonzero(np.isin(block.ids, self._ids))
        places = np.searchsorted(self._ids, block.ids[there])
        for number, values in enumerate((block.labels, block.features, block.probabilities)):
            if values is None:
                continue
            # As large as all of it from the start: parts that are put together at the end are held twice.
            column = self._columns[number]
            if column is None:
                column = self._columns[number] = np.empty((len(self._ids), *values.shape[1:]), values.dtype)
            column[places] = values[there]
        self._found[places] = True

    def rows(self) -> Measured:
        """What was picked, in the order of the ids.

        Raises:
            ValueError: some ids never passed.
        """
        labels, features, probabilities = self._columns
        if labels is None or features is None or not self._found.all():
            raise ValueError(f"{(~self._found).sum()} of {len(self._ids)} rows are not among the features")
        return Measured(self._ids, labels, features, probabilities)
