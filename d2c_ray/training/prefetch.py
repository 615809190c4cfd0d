"""Batches made ahead of the step that wants them, in a thread of their own."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

AHEAD = 2  # batches at most that lie ready or are being made

Batch = Mapping[str, Tensor]


class Prefetch:
    """Makes batches in order, ahead of the loop that takes them. Leaving the `with` block ends the thread.

    On CUDA a batch is made on a stream of its own. The step's stream waits for it there; the host does not wait.

    Args:
        make: gives the batch of a step; called in the thread, one step after the other.
        steps: the steps whose batches are wanted.

    Attributes:
        waited_sec: how long `take` waited for batches, in all.
    """

    def __init__(self, make: Callable[[int], Batch], steps: range, device: torch.device):
        self._make, self._steps, self._device = make, steps, device
        self._ready: deque[tuple[Batch, torch.cuda.Event | None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self.waited_sec = 0.0

    def __enter__(self) -> "Prefetch":
        threads = torch.get_num_threads()
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(threads)  # the thread's own setting has become the default of threads to come
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def take(self) -> Batch:
        """The next step's batch; raises what making it raised."""
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error)
            if not self._ready:
                assert self._error is not None
                raise self._error
            batch, event = self._ready.popleft()
            self._changed.notify_all()
        self.waited_sec += time.perf_counter() - start
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for tensor in batch.values():
                tensor.record_stream(current)  # or its memory could become another batch's while the step still reads it
        return batch

    def _run(self) -> None:
        torch.set_num_threads(1)  # a team of threads of this one's own would fight the step's for the cores
        self._started.set()
        try:
            if self._device.type == "cuda":
                with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
                    self._make_all()
            else:
                self._make_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _make_all(self) -> None:
        for step in self._steps:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < AHEAD)
                if self._closed:
                    return
            event, batch = None, self._make(step)
            if self._device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
            with self._changed:
                self._ready.append((batch, event))
                self._changed.notify_all()
            del batch  # it is the loop's now
