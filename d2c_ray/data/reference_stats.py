"""Files of reference statistics: an .npz with mu and sigma, as clean-fid's and as ADM's reference batches hold them."""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from d2c_ray.data import npz
from d2c_ray.errors import UserError
from d2c_ray.evaluate.frechet import Statistics
from d2c_ray.rundir import whole

WOULD_DO = "an .npz with mu and sigma, as clean-fid's statistics and ADM's reference batches have them, would do"


def read(key: str, path: Path, width: int, network: str) -> Statistics:
    """The statistics of a file, which is read without unpickling; its images, if it holds some, stay unread.

    Args:
        key: of the configuration, for messages. width: of the features of `network`, which they must have.

    Raises:
        UserError: no such file, none of statistics, another width, or no covariance.
    """
    path = path.expanduser().absolute()
    if not path.is_file():
        raise UserError(f"{key}: there is no file '{path}'; {WOULD_DO}.")
    held = width_of(key, path)
    if held != width:
        raise UserError(
            f"{key}: '{path}' holds statistics of {held} features, and {network} has {width}; statistics of that network's features would do."
        )
    stat = path.stat()
    return _read(key, path, stat.st_size, stat.st_mtime_ns)


def width_of(key: str, path: Path) -> int:
    """Features that a file's statistics are of, by what its arrays say of themselves: none of their values is read.

    Raises:
        UserError: mu and sigma missing, of other kinds, or of shapes that do not fit.
    """
    path = path.expanduser().absolute()
    try:
        held = npz.members(path)
        if not {"mu", "sigma"} <= set(held):
            raise UserError(f"{key}: '{path}' holds {', '.join(held) or 'nothing'} and not both of mu and sigma; {WOULD_DO}.")
        mu, sigma = npz.header(path, "mu"), npz.header(path, "sigma")
        if not all(np.issubdtype(values.dtype, np.floating) for values in (mu, sigma)):
            raise npz.Broken(f"mu is {mu.dtype} and sigma {sigma.dtype}, where both are floats")
        if len(mu.shape) != 1 or sigma.shape != mu.shape * 2:
            raise npz.Broken(f"mu is {mu.words} and sigma {sigma.words}, which do not fit: W and W x W would")
        if "count" in held:
            count = npz.header(path, "count")
            if count.shape != () or not np.issubdtype(count.dtype, np.integer):
                raise npz.Broken(f"count is {count.words}, where it is one whole number")
    except npz.Broken as error:
        raise UserError(f"{key}: '{path}' cannot be used as reference statistics: {error}; {WOULD_DO}.") from None
    return mu.shape[0]


def write(path: Path, statistics: Statistics) -> None:
    """Writes mu, sigma and the count of images, for `read` and for clean-fid."""
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.sigma, count=np.int64(statistics.count or 0))


def content_hash(statistics: Statistics) -> str:
    """16 hex digits of mu and sigma: two files of the same statistics have the same, whatever else they hold."""
    digest = hashlib.sha256(np.ascontiguousarray(statistics.mean).tobytes())
    digest.update(np.ascontiguousarray(statistics.sigma).tobytes())
    return digest.hexdigest()[:16]


def of_adm(path: Path) -> bool:
    """Whether a file is one of ADM's reference batches, which alone have spatial statistics too."""
    return "mu_s" in npz.members(path.expanduser())


@lru_cache(maxsize=2)
def _read(key: str, path: Path, size: int, changed_ns: int) -> Statistics:
    try:
        mu, sigma = npz.load(path, "mu"), npz.load(path, "sigma")
        count = int(npz.load(path, "count")) if "count" in npz.members(path) else 0
        found = Statistics.of(mu, sigma, count or None)
        found.root  # noqa: B018  refuses what is no covariance, and is kept for the distance
    except (npz.Broken, ValueError) as error:
        raise UserError(f"{key}: '{path}' cannot be used as reference statistics: {error}; {WOULD_DO}.") from None
    return found
