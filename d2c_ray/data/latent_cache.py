"""Latents of all images, kept while they are scored: uncompressed Arrow files, from which single rows are read by memory map.

    scores-<hash>/latents/000012/0000049152-0000049407.arrow     sample_ids of a shard's run of rows

They are what `attached.latents` would encode: posterior mean and standard deviation, float16, both flips where
flips are on. A table made with them equals one made without.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from d2c_ray.data import tables
from d2c_ray.rundir import whole

Latents = dict[str, np.ndarray]  # 'latent_mean' and 'latent_std', each N x F x c x h x w float16


def row_bytes(channels: int, side: int, flip: bool) -> int:
    """Bytes an image takes."""
    return 2 * 2 * (2 if flip else 1) * channels * side * side


def write(folder: Path, rows: pa.Table, latents: Latents) -> None:
    """Keeps the latents of a unit's rows (sample_id, shard)."""
    if not len(rows):
        return
    ids = rows.column("sample_id").to_numpy()
    kinds = {name: (str(values.dtype), values.shape[1:]) for name, values in latents.items()}
    fields = tables.arrow_schema({"sample_id": "int64", **dict.fromkeys(latents, "tensor")}, kinds)
    table = pa.table([pa.array(ids), *(tables.tensor_column(values) for values in latents.values())], schema=fields)
    path = folder / f"{rows.column('shard')[0].as_py():06d}" / f"{ids.min():010d}-{ids.max():010d}.arrow"
    with whole(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, fields) as writer:
        writer.write_table(table)


def read(folder: Path, rows: pa.Table, flip: bool) -> Latents | None:
    """The latents of rows (sample_id, shard), in their order; None where one of them was not kept as `flip` wants it.

    Scores do not depend on flips, so what one setting of them kept, another may find.
    """
    wanted = rows.column("sample_id").to_numpy()
    if not len(wanted):
        return None
    position = {int(sample): row for row, sample in enumerate(wanted)}
    sides = 2 if flip else 1
    found: Latents = {}
    missing = set(position)
    for shard in np.unique(rows.column("shard").to_numpy()):
        for path in sorted((folder / f"{shard:06d}").glob("*.arrow")):
            first, last = (int(digits) for digits in path.stem.split("-"))
            if not any(first <= sample <= last for sample in missing):
                continue
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
                ids = table.column("sample_id").to_numpy()
                here = [row for row, sample in enumerate(ids) if int(sample) in missing]
                kept = {name: tables.tensor_values(table, name) for name in table.column_names[1:]}
                if any(values.shape[1] != sides for values in kept.values()):
                    continue
                for name, values in kept.items():
                    target = found.setdefault(name, np.empty((len(wanted), *values.shape[1:]), values.dtype))
                    target[[position[int(ids[row])] for row in here]] = values[here]
                missing -= {int(ids[row]) for row in here}
    return found if not missing else None
