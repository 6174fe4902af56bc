"""The backend that the run loop drives a worker through: the executor of this process, or one in another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np
import torch

from hybridlab.batch import Entry, OnRoute, StepBatch, StepResult
from hybridlab.engine.faults import require_usable
from hybridlab.engine.worker_thread import WorkerThread, closed
from hybridlab.errors import HybridlabError, WorkerLost
from hybridlab.plans import Move, Program, RequestId, Span

T = TypeVar("T")
WORKER = "main"

StepOutput = tuple[dict[RequestId, int], Sequence[Span]]
"""The drawn tokens, and when each op ran."""


class StepFailed(Exception):
    """A step failed elsewhere; the text says what was raised there."""


class HandOffLost(Exception):
    """A request's KV cache did not arrive; it can be computed again."""


class Worker(Protocol):
    """What computes steps, one at a time.

    `losses` counts how often what it had in its KV cache was lost; `ready` is False while it starts again. Once it is
    `gone`, it stays so.
    """

    losses: int
    gone: WorkerLost | None

    @property
    def ready(self) -> bool: ...

    def run(self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None) -> StepOutput:
        """Compute a step. Raises `WorkerLost` if the worker was lost over it, `HybridlabError` for what was wrong in
        what it was given, and anything else for a step that failed."""
        ...

    def take_routes(self) -> np.ndarray:
        """As `hybridlab.moves.Movable`; counting starts anew where the worker does."""
        ...

    def move(self, moves: Sequence[Move]) -> None:
        """As `hybridlab.moves.Movable`; a worker that starts again carries out what it has missed."""
        ...


class StepExecutor(Protocol):
    """What runs a step in this process: `engine.executor.Executor`, or `engine.ranks_executor.RankExecutor`."""

    def run(
        self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None = None
    ) -> StepOutput: ...

    def logits(self, program: Program, entry: Entry) -> torch.Tensor: ...

    def take_routes(self) -> np.ndarray: ...

    def move(self, moves: Sequence[Move]) -> None: ...


class LocalWorker:
    """The executor of this process. A device that gives up is gone for good: its context lives as long as the process.

    `where` is the torch device that it computes on.
    """

    def __init__(self, executor: StepExecutor, where: str) -> None:
        self._executor: StepExecutor | None = executor
        self._where = where
        self.losses = 0
        self.ready = True
        self.gone: WorkerLost | None = None

    def run(
        self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None = None
    ) -> StepOutput:
        return self._guarded(lambda: self._open.run(program, batch, clock_start_s, on_route))

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every token of `entry`, float32 [T, V]; raises as `run` does."""
        return self._guarded(lambda: self._open.logits(program, entry))

    def take_routes(self) -> np.ndarray:
        return self._guarded(lambda: self._open.take_routes())

    def move(self, moves: Sequence[Move]) -> None:
        self._guarded(lambda: self._open.move(moves))

    def close(self) -> None:
        """Let go of the executor: who still holds this holds nothing else. Idempotent."""
        self._executor = None

    @property
    def _open(self) -> StepExecutor:
        if self._executor is None:
            raise closed()
        return self._executor

    def _guarded(self, compute: Callable[[], T]) -> T:
        if self.gone is not None:
            raise self.gone
        try:
            return compute()
        except HybridlabError:
            raise
        except Exception:
            try:
                require_usable(self._where)
            except WorkerLost as lost:
                self.gone = lost
                raise
            raise


class EngineBackend:
    """`hybridlab.serving.Backend` over one worker. The clock starts at construction: make one per run."""

    def __init__(self, worker: Worker, thread: WorkerThread, on_route: OnRoute | None = None) -> None:
        self._worker, self._thread, self._on_route = worker, thread, on_route
        # The step in flight, kept until its result is taken: an interrupt at any point loses nothing.
        self._step_in_flight: Future[StepResult] | None = None
        self._known_losses = worker.losses
        self._clock_start_s = perf_counter()

    @property
    def now_s(self) -> float:
        return perf_counter() - self._clock_start_s

    @property
    def workers(self) -> tuple[str, ...]:
        return (WORKER,)

    def lost_caches(self) -> tuple[str, ...]:
        losses, known = self._worker.losses, self._known_losses
        self._known_losses = losses
        return (WORKER,) if losses != known else ()

    def idle(self) -> tuple[str, ...]:
        return (WORKER,) if self._step_in_flight is None and self._worker.ready else ()

    def submit(self, worker: str, program: Program, batch: StepBatch) -> None:
        self._check_there()
        known = self._known_losses

        def compute() -> StepOutput:
            if self._worker.losses != known:  # the step builds on what is no longer there
                raise WorkerLost("the worker was lost before the step began")
            return self._worker.run(program, batch, self._clock_start_s, self._on_route)

        self._step_in_flight = self._thread.call(lambda: step_result(batch, self._clock_start_s, compute))

    def take_routes(self) -> np.ndarray:
        return self._thread.call(self._worker.take_routes).result()

    def move(self, moves: Sequence[Move]) -> None:
        self._thread.call(lambda: self._worker.move(moves)).result()

    def wait(self, until_s: float | None) -> Sequence[StepResult]:
        timeout_s = None if until_s is None else max(0.0, until_s - self.now_s)
        if self._step_in_flight is None:
            # A cancelled request, a worker that is back, or the end of the engine wakes an idle loop.
            starting = not self._worker.ready and self._worker.gone is None
            self._thread.woken.wait(timeout_s if starting else timeout_s or 0.0)
            self._thread.woken.clear()
            self._check_there()
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

    def _check_there(self) -> None:
        if self._thread.closed:
            raise closed()
        if self._worker.gone is not None:
            raise self._worker.gone


def step_result(batch: StepBatch, clock_start_s: float, compute: Callable[[], StepOutput]) -> StepResult:
    """What came of a step that `compute` computes; a mistake in what was asked for ends the run: `HybridlabError`."""
    start_s = perf_counter() - clock_start_s
    try:
        tokens, spans = compute()
    except (WorkerLost, HandOffLost, StepFailed) as error:
        lost = not isinstance(error, StepFailed)
        log = logging.getLogger(__name__)
        log.error("a step failed: %s", error, exc_info=not lost)
        text = f"{type(error).__name__}: {error}" if lost else str(error)
        return StepResult(batch, start_s, perf_counter() - clock_start_s, error=text, lost=lost)
    except HybridlabError:
        raise
    except Exception as error:
        logging.getLogger(__name__).exception("a step failed; its requests are marked as failed")
        text = f"{type(error).__name__}: {error}"
        return StepResult(batch, start_s, perf_counter() - clock_start_s, error=text)
    return StepResult(batch, start_s, perf_counter() - clock_start_s, tokens, spans)
