"""Work that a thread does again and again beside other work: signs of life, looks at files, words of who waits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from d2c_ray import logs
from d2c_ray.wording import first_line


def once(work: Callable[[], object], name: str, before: str = "") -> str:
    """Calls `work`, which only looks or tells, and whose failure must not end what goes on beside it.

    Args:
        name: of the work, in what is said of a failure.
        before: the failure of the last call, which is not said again.

    Returns:
        The failure; empty where there is none.
    """
    try:
        work()
    except Exception as error:  # a storage that hesitates, a head that is gone: next time may be another
        found = f"{type(error).__name__}: {first_line(error)}"
        if found != before:
            logs.say(f"{name}: {found}", "warning")
        return found
    return ""


@contextmanager
def repeating(work: Callable[[], object], every_sec: float, name: str, patience_sec: float | None = None) -> Iterator[None]:
    """Calls `work` every `every_sec` seconds in a daemon thread while the block lasts, and waits for a call that goes on at its end.

    Args:
        work: an error of it is said, and it is called again all the same.
        name: of the thread.
        patience_sec: longest wait at the end, for work that a storage may hold up; None: as long as it takes.
    """
    over = threading.Event()

    def again() -> None:
        failed = ""
        while not over.wait(every_sec):
            failed = once(work, name, failed)

    thread = threading.Thread(target=again, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience_sec)
