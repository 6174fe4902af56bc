"""The backend that the run loop drives an executor through."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, wait
from time import perf_counter

from hybridlab.batch import OnRoute, StepBatch, StepResult
from hybridlab.engine.executor import Executor
from hybridlab.engine.worker_thread import WorkerThread, closed
from hybridlab.errors import HybridlabError
from hybridlab.plans import Program

WORKER = "main"


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
                raise closed()
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
