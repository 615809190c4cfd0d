"""Whether models may be fetched now, or only looked for on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_only_local: ContextVar[bool] = ContextVar("only_local", default=False)


@contextmanager
def only_local() -> Iterator[None]:
    """Inside, models are looked for in folders and in the hub's cache, and nothing is fetched."""
    token = _only_local.set(True)
    try:
        yield
    finally:
        _only_local.reset(token)


def is_only_local() -> bool:
    return _only_local.get()
