"""The features of an embedded dataset, class by class."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from d2c_ray import schema
from d2c_ray.data import tables
from d2c_ray.errors import UserError


@dataclass(frozen=True)
class Embedded:
    """All rows sorted by (class, sample_id). N rows of width D.

    Attributes:
        sample_ids: int64 N. labels: int32 N, -1 of unlabelled data as class 0.
        features: float16 N x D, memory-mapped. path: of their file, in NumPy's own format.
        classes: labels that have rows, ascending. starts: of each of them, its first row, and N at the end.
    """

    sample_ids: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    classes: np.ndarray
    starts: np.ndarray
    path: str

    def of(self, label: int) -> slice:
        """The rows of a class, none where it has none."""
        index = int(np.searchsorted(self.classes, label))
        if index == len(self.classes) or self.classes[index] != label:
            return slice(0, 0)
        return slice(int(self.starts[index]), int(self.starts[index + 1]))


@contextmanager
def embedded(parts: list[Path], scratch: Path) -> Iterator[Embedded]:
    """Sorts the features of an embed stage by class into a file below `scratch`, which is gone afterwards.

    A part at a time is in memory. The file takes as many bytes as the features: 2 N D.

    Raises:
        UserError: features that are not finite; names the first images.
    """
    for stale in scratch.glob(".features-*"):  # of a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    light = [tables.opened(path, path).read(["sample_id", "label"]) for path in parts]
    ids, labels = (pa.concat_tables(light).column(name).to_numpy() for name in ("sample_id", "label"))
    labels = np.maximum(labels, 0)
    order = np.lexsort((ids, labels))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    width = tables.tensor_shape(parts[0], "features")[0]
    with TemporaryDirectory(dir=scratch, prefix=".features-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "features.npy"
        sorted_features = np.lib.format.open_memmap(file, "w+", np.float16, (len(order), width))
        start = 0
        for path in parts:
            values = tables.tensor_values(tables.opened(path, path).read(["features"]), "features")
            broken = np.flatnonzero(~np.isfinite(values).all(1))
            if len(broken):
                keys = tables.opened(path, path).read(["key"]).column(0).take(broken[:5]).to_pylist()
                raise UserError(
                    f"the encoder gives features that are no numbers, or too large to be kept in 16 bits, for {', '.join(keys)}: another one (embed.encoder) would do."
                )
            sorted_features[place[start : start + len(values)]] = values
            start += len(values)
        sorted_features.flush()  # other nodes read the file
        classes, starts = np.unique(labels[order], return_index=True)
        yield Embedded(ids[order], labels[order], sorted_features, classes, np.append(starts, len(order)), str(file))


def write_selection(
    path: Path, parts: list[Path], data: Embedded, rows: dict[int, np.ndarray], sizes: np.ndarray, metadata: dict[str, Any]
) -> dict[int, int]:
    """Writes the chosen rows by sample_id, as `schema.SELECTION`; their scores and ranks are null.

    Returns:
        By class, the label that its images have: -1 where they have none.

    Args:
        parts: the embed stage's. rows: by class, in order of choice, counted from the class's first row.
        sizes: images by label.
    """
    labels = np.fromiter(rows, np.int64, len(rows))
    counts = np.asarray([len(rows[label]) for label in labels])
    ids = np.concatenate([data.sample_ids[data.of(label)][rows[label]] for label in labels])
    columns = {"class_size": np.repeat(sizes[labels], counts), "position": np.concatenate([np.arange(count) for count in counts])}
    order = np.argsort(ids)
    found = []
    for part in parts:
        table = tables.opened(part, part).read(["sample_id", "key", "label"])
        found.append(table.replace_schema_metadata(None).filter(pa.array(np.isin(table.column("sample_id").to_numpy(), ids))))
    table = pa.concat_tables(found).sort_by("sample_id")
    for name in ("score", "rank"):
        table = table.append_column(name, pa.nulls(len(table)))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values[order]))
    fields = tables.arrow_schema(schema.SELECTION)
    tables.write(path, table.select(fields.names).cast(fields), metadata)
    there = table.column("label").to_numpy()
    return {max(label, 0): label for label in np.unique(there).tolist()}
