"""A thread that runs calls one after another."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakSet

import torch

from hybridlab.errors import HybridlabError

T = TypeVar("T")


class WorkerThread:
    """Runs calls one after another on a thread of its own.

    torch runs single-threaded on it: OpenMP threads that spin after each small op would take the cores from the
    kernels' pool (docs/decisions/0005).
    """

    def __init__(self, name: str = "hybridlab-worker") -> None:
        self._calls: SimpleQueue[tuple[Callable, Future] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self.closed = False
        self.woken = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()
        _WORKERS.add(self)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the thread; once closed, the future holds a `HybridlabError` instead."""
        future: Future[T] = Future()
        with self._lock:  # nothing may be queued behind the end
            if self.closed:
                future.set_exception(closed())
            else:
                self._calls.put((function, future))
        return future

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._calls.put(None)
        self.woken.set()
        self._thread.join()

    def _loop(self) -> None:
        torch.set_num_threads(1)
        while (item := self._calls.get()) is not None:
            function, future = item
            try:
                future.set_result(function())
            except BaseException as error:  # handed to the waiting thread, which decides
                future.set_exception(error)


def closed() -> HybridlabError:
    """What a call that comes too late is answered with."""
    return HybridlabError("the engine was closed")


_WORKERS: WeakSet[WorkerThread] = WeakSet()


@atexit.register
def _close_workers() -> None:
    # A thread that is still inside torch when the interpreter ends would abort the process.
    for worker in tuple(_WORKERS):
        worker.close()
