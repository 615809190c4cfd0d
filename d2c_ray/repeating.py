"""Work that a thread does again and again beside other work: signs of life, looks at files, words of who waits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(work: Callable[[], object], every_sec: float, name: str, patience_sec: float | None = None) -> Iterator[None]:
    """Calls `work` every `every_sec` seconds in a daemon thread while the block lasts, and waits for a call that goes on at its end.

    Args:
        work: raises nothing; an error would end the thread.
        name: of the thread.
        patience_sec: longest wait at the end, for work that a storage may hold up; None: as long as it takes.
    """
    over = threading.Event()

    def again() -> None:
        while not over.wait(every_sec):
            work()

    thread = threading.Thread(target=again, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience_sec)
