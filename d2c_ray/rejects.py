"""Images that could not be used: counted against the limit as they come, kept with their reason."""

import json
from pathlib import Path

import pyarrow as pa

from d2c_ray import metrics, schema
from d2c_ray.data import tables
from d2c_ray.errors import UserError


class Rejects:
    """Collects the rejected rows of one stage.

    Args:
        stage: named in the table.
        total: rows in.
        limit: share of `total` above which `add` raises (data.max_rejected).
    """

    def __init__(self, stage: str, total: int, limit: float):
        self.stage, self.total, self.limit = stage, total, limit
        self.rows: list[dict[str, str]] = []

    @staticmethod
    def of(table: pa.Table) -> list[dict[str, str]]:
        """The rejected rows that travel in a decoded table's metadata."""
        return json.loads(table.schema.metadata[b"rejected"])

    def add(self, rows: list[dict[str, str]]) -> None:
        """Counts rejected rows.

        Raises:
            UserError: more than the limit; names the first images and their reasons.
        """
        self.rows += rows
        metrics.tell("d2c_rows_rejected", len(self.rows))
        if len(self.rows) > self.limit * self.total:
            shown = "".join(f"\n  {row['key']}: {row['reason']}" for row in self.rows[:5])
            raise UserError(
                f"{self.stage}: {len(self.rows)} of {self.total} images cannot be used, more than data.max_rejected={self.limit}. The first:{shown}\n"
                f"Mend or remove them, or set data.max_rejected={min(1.0, 2 * len(self.rows) / self.total):.2g}. Finished shards are kept."
            )

    def write(self, out: Path) -> None:
        """Writes `rejected.parquet`, in key order."""
        fields = tables.arrow_schema(schema.REJECTED)
        rows = sorted(({**row, "stage": self.stage} for row in self.rows), key=lambda row: row["key"])
        tables.write(out / "rejected.parquet", pa.Table.from_pylist(rows, schema=fields))
