"""A worker thread that owns an executor, and the backend that the run loop drives it through."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from time import perf_counter
from typing import TypeVar
from weakref import WeakSet

import torch

from hybridlab.batch import OnRoute, StepBatch, StepResult
from hybridlab.engine.executor import Executor
from hybridlab.errors import HybridlabError
from hybridlab.plans import Program

T = TypeVar("T")
WORKER = "main"


class WorkerThread:
    """Runs calls one after another on a thread of its own.

    torch runs single-threaded on it: OpenMP threads that spin after each small op would take the cores from the
    kernels' pool (docs/decisions/0005).
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable, Future] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self.closed = False
        self.woken = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hybridlab-worker", daemon=True)
        self._thread.start()
        _WORKERS.add(self)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the thread; once closed, the future holds a `HybridlabError` instead."""
        future: Future[T] = Future()
        with self._lock:  # nothing may be queued behind the end
            if self.closed:
                future.set_exception(_closed())
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


def _closed() -> HybridlabError:
    return HybridlabError("the engine was closed")


_WORKERS: WeakSet[WorkerThread] = WeakSet()


@atexit.register
def _close_workers() -> None:
    # A thread that is still inside torch when the interpreter ends would abort the process.
    for worker in tuple(_WORKERS):
        worker.close()


class EngineBackend:
    """`hybridlab.serving.Backend` over one worker. The clock starts at construction: make one per run."""

    def __init__(self, executor: Executor, worker: WorkerThread, on_route: OnRoute | None = None) -> None:
        self._executor, self._worker, self._on_route = executor, worker, on_route
        # The step in flight, kept until its result is taken: an interrupt at any point loses nothing.
        self._step_in_flight: Future[StepResult] | None = None
        self._clock_start_s = perf_counter()

    @property
    def now_s(self) -> float:
        return perf_counter() - self._clock_start_s

    def idle(self) -> tuple[str, ...]:
        return () if self._step_in_flight else (WORKER,)

    def submit(self, worker: str, program: Program, batch: StepBatch) -> None:
        self._step_in_flight = self._worker.call(lambda: self._step(program, batch))

    def wait(self, until_s: float | None) -> Sequence[StepResult]:
        timeout_s = None if until_s is None else max(0.0, until_s - self.now_s)
        if self._step_in_flight is None:
            # A cancelled request, or the end of the engine, wakes an idle loop.
            self._worker.woken.wait(timeout_s or 0.0)
            self._worker.woken.clear()
            if self._worker.closed:
                raise _closed()
            return ()
        try:
            result = self._step_in_flight.result(timeout_s)
        except TimeoutError:
            return ()
        self._step_in_flight = None
        return (result,)

    def drain(self) -> None:
        if self._step_in_flight is not None:
            wait([self._step_in_flight])
            self._step_in_flight = None

    def _step(self, program: Program, batch: StepBatch) -> StepResult:
        start_s = self.now_s
        try:
            tokens, spans = self._executor.run(program, batch, self._clock_start_s, self._on_route)
        except HybridlabError:
            raise  # a mistake in what was asked for ends the run in one line
        except Exception as error:
            logging.getLogger(__name__).exception("a step failed; its requests are marked as failed")
            return StepResult(batch, start_s, self.now_s, error=f"{type(error).__name__}: {error}")
        return StepResult(batch, start_s, self.now_s, tokens, spans)
