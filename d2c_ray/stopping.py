"""SIGTERM as an exception of the main thread, one that cannot get lost on its way."""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from d2c_ray.errors import Stopped

AGAIN_SEC = 0.05  # after it got lost: what lost it is over by then, or another follows

_raised: "weakref.ref[Stopped] | None" = None  # the one that is on its way
_open = False


@contextmanager
def stoppable() -> Iterator[None]:
    """While the block runs, SIGTERM raises `Stopped` in the main thread, so that locks are let go of and status.json says what happened.

    Further ones are passed over until the block has ended: they would cut off the cleaning up after the first.
    """
    global _open, _raised
    main, outer = threading.current_thread() is threading.main_thread(), _open
    before, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    listen()
    if main:
        _open, sys.unraisablehook = True, partial(_dropped, hook)
    try:
        yield
    finally:
        if main:
            _open, _raised, sys.unraisablehook = outer, _raised if outer else None, hook
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextmanager
def as_raised() -> Iterator[None]:
    """Gives a `Stopped` back that was raised inside C code which goes on to return a result, as Ray's does while it waits.

    Python makes a `SystemError` of it.
    """
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Stopped):
            raise error.__cause__ from None
        raise


def listen() -> None:
    """Takes the signal back from who has taken it meanwhile."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)


def stop() -> NoReturn:
    """Raises `Stopped`, as the signal does."""
    global _raised
    error = Stopped()
    _raised = weakref.ref(error, _lost)
    try:
        raise error
    finally:
        del error  # which its traceback would keep alive, wherever it is dropped


def _on_signal(number: int, frame: Any) -> None:
    if _raised is None or _raised() is None:
        stop()


# It can be raised where Python has nobody to give it to, and drops it: in a finaliser, a callback of C code, a hook of an import. Code of
# others may catch everything too. Nobody may see it then, and the process would go on, deaf to every further request.


def _dropped(otherwise: Callable[[Any], object], what: Any) -> None:
    """In the place of `sys.unraisablehook`."""
    global _raised
    if isinstance(what.exc_value, Stopped):
        _raised = None
        _again()
    else:
        otherwise(what)


def _lost(reference: "weakref.ref[Stopped]") -> None:
    """The exception is gone; where the block is still open, nobody cleans up for it."""
    _again()


def _again() -> None:
    if not _open:
        return
    timer = threading.Timer(AGAIN_SEC, _signal)  # not here, which may be inside what dropped it
    timer.daemon = True
    timer.start()


def _signal() -> None:
    if _open:
        os.kill(os.getpid(), signal.SIGTERM)
