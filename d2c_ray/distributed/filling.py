"""Filling a table over the manifest's shards: what its ledger misses goes through decoding and actors, and is kept as it comes."""

from typing import Any

from d2c_ray.config import Config
from d2c_ray.data.ledger import Ledger
from d2c_ray.distributed.actors import Busy
from d2c_ray.distributed.cluster import Share
from d2c_ray.distributed.ingest import Extend, stream
from d2c_ray.errors import UserError
from d2c_ray.progress import Progress
from d2c_ray.rejects import Rejects

MOST_UNITS = 65_536  # at a time: the driver and Ray hold some kB for each, and billions of images have millions


def fill(
    ledger: Ledger,
    config: Config,
    share: Share,
    actor: type,
    actor_args: dict[str, Any],
    rejects: Rejects,
    progress: Progress,
    extend: Extend | None = None,
) -> None:
    """Has `actor` make every row that is not there yet; leaves one Parquet part a shard.

    Args:
        actor: of `distributed.actors`, one whose results carry their rejected rows and an actor's `Clock`.
        extend: see `ingest.stream`.

    Raises:
        UserError: too many images cannot be decoded, the storage does not answer, other hardware than before, or actors
            that cannot load.
    """
    try:
        rejects.add(ledger.rejected())
    except UserError:  # the last attempt ended for them, and they may have been mended
        ledger.forget_rejected()
        rejects.rows.clear()
    progress.advance(ledger.rows_done)
    busy = Busy()

    def say(text: str) -> None:
        progress.at(progress.done, text)

    while work := ledger.todo(share.rows_per_task, MOST_UNITS):
        for unit, result in stream(
            work, config.data, config.storage, share, actor, actor_args, extend, say=say, notes=ledger.out / "loading"
        ):
            rejected = rejects.of(result)
            facts = busy.add(result)
            ledger.add(unit, result.replace_schema_metadata(None), rejected, facts["device"])
            rejects.add(rejected)
            progress.advance(unit["stop"] - unit["start"], busy.note())
        if ledger.todo(share.rows_per_task, 1)[:1] == work[:1]:
            raise RuntimeError(f"{ledger.out}: of {len(work)} units the first never came back")
    ledger.close()
