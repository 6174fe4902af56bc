"""A worker thread that owns an executor, and the backend that the run loop drives it through."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import TypeVar

import torch

from hybridlab.batch import StepBatch, StepResult
from hybridlab.engine.executor import Executor
from hybridlab.plan import Program

T = TypeVar("T")
WORKER = "main"


class WorkerThread:
    """Runs calls one after another on a thread whose torch pool has `threads` threads (that is per thread)."""

    def __init__(self, threads: int) -> None:
        self._calls: SimpleQueue[tuple[Callable, Future] | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=self._loop, args=(threads,), name="hybridlab-worker", daemon=True
        )
        self._thread.start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join()

    def _loop(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while (item := self._calls.get()) is not None:
            function, future = item
            try:
                future.set_result(function())
            except BaseException as error:  # handed to the waiting thread, which decides
                future.set_exception(error)


class EngineBackend:
    """`hybridlab.run.Backend` over one worker. The clock starts at construction: make one per run."""

    def __init__(self, executor: Executor, worker: WorkerThread) -> None:
        self._executor, self._worker = executor, worker
        self._done: SimpleQueue[StepResult] = SimpleQueue()
        self._in_flight = 0
        self._clock_start_s = perf_counter()

    @property
    def now_s(self) -> float:
        return perf_counter() - self._clock_start_s

    def idle(self) -> tuple[str, ...]:
        return () if self._in_flight else (WORKER,)

    def submit(self, worker: str, program: Program, batch: StepBatch) -> None:
        self._in_flight += 1
        self._worker.call(lambda: self._done.put(self._step(program, batch)))

    def wait(self, until_s: float | None) -> Sequence[StepResult]:
        if not self._in_flight and until_s is None:
            return ()
        timeout = None if until_s is None else max(0.0, until_s - self.now_s)
        try:
            result = self._done.get(timeout=timeout)
        except Empty:
            return ()
        self._in_flight -= 1
        return (result,)

    def drain(self) -> None:
        while self._in_flight:
            self._done.get()
            self._in_flight -= 1

    def _step(self, program: Program, batch: StepBatch) -> StepResult:
        start_s = self.now_s
        try:
            tokens, spans = self._executor.run(program, batch, self._clock_start_s)
        except Exception as error:
            logging.getLogger(__name__).exception("a step failed; its requests are marked as failed")
            return StepResult(batch, start_s, self.now_s, error=f"{type(error).__name__}: {error}")
        return StepResult(batch, start_s, self.now_s, tokens, spans)
