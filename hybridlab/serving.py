"""The only loop: schedulers decide, a backend (engine or simulator) computes, the queue keeps the books."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hybridlab.batch import StepBatch, StepResult
from hybridlab.errors import StrategyError
from hybridlab.lowering import Planner
from hybridlab.moves import Movable
from hybridlab.plans import Program, Span
from hybridlab.request import RequestRecord, Status
from hybridlab.request_queue import RequestQueue
from hybridlab.strategies.base import Scheduler


class Backend(Movable, Protocol):
    """Runs programs. Submit and wait are asynchronous, so that one worker's long prefill never blocks another."""

    @property
    def now_s(self) -> float:
        """Seconds since the start of the run, on this backend's clock."""
        ...

    @property
    def workers(self) -> Sequence[str]:
        """All of them, by name."""
        ...

    def idle(self) -> Iterable[str]:
        """Workers without a step, of those that are there."""
        ...

    def lost_caches(self) -> Sequence[str]:
        """The workers that, since this was last asked, lost their KV cache: what it held must be computed again."""
        ...

    def submit(self, worker: str, program: Program, batch: StepBatch) -> None:
        """Start a step on an idle worker."""
        ...

    def wait(self, until_s: float | None) -> Sequence[StepResult]:
        """Steps that have finished; blocks until there is one or the clock reads `until_s` (None: no limit)."""
        ...

    def drain(self) -> None:
        """Wait for steps in flight and forget them; the backend can be used again."""
        ...


@dataclass
class Served:
    """What a run left behind. `duration_s` is the end of the last request; spans are those of the last steps."""

    records: list[RequestRecord]
    spans: list[Span]
    duration_s: float
    num_steps: int

    def _repr_html_(self) -> str:
        done = sum(r.status is Status.FINISHED for r in self.records)
        tokens = sum(len(r.output) for r in self.records)
        return (
            f"<b>Served</b>: {done} of {len(self.records)} requests finished, {tokens} tokens in "
            f"{self.duration_s:.2f} s, {self.num_steps} steps"
        )


def steps(
    backend: Backend, queue: RequestQueue, scheduler: Scheduler, planner: Planner
) -> Iterator[tuple[Sequence[StepResult], list[tuple[RequestRecord, int]]]]:
    """Run until the queue is empty; yield finished steps and the tokens they drew.

    Closing the generator, or an exception inside it, waits for the steps in flight, so that the backend stays
    usable. Raises `StrategyError` when the scheduler breaks its contract or waits for nothing.
    """
    name = type(scheduler).__name__
    if (resolved := getattr(scheduler, "calibrated", None)) is not None:
        scheduler = resolved(planner.hardware)
    try:
        planner.update(backend, 0)
        while queue.live:
            for worker in backend.lost_caches():
                queue.lose_cache(worker)
            queue.sweep(backend.now_s)
            idle = tuple(backend.idle())
            for worker in idle:
                view = queue.view(worker, backend.now_s)
                step = scheduler.schedule(view) if view.waiting or view.running else None
                if step is not None and (batch := queue.start(view, step, name)) is not None:
                    backend.submit(worker, planner.program(planner.shape(worker, batch.step)), batch)
            if len(idle) == len(backend.workers) and not queue.in_flight and queue.next_arrival_s is None:
                if queue.live and not queue.has_cancelled:
                    raise StrategyError(f"scheduler {name} waits, but nothing runs and nothing will arrive")
                continue
            results = backend.wait(queue.next_event_s)
            events = queue.apply(results)
            if results and not queue.in_flight:
                planner.update(backend, len(results))
            yield results, events
    finally:
        backend.drain()


def serve(
    backend: Backend,
    queue: RequestQueue,
    scheduler: Scheduler,
    planner: Planner,
    *,
    keep_span_steps: int = 64,
    on_event: Callable[[RequestRecord, int], None] | None = None,
) -> Served:
    """Serve all requests of `queue`; `on_event` is called with every (record, token).

    Spans of the last `keep_span_steps` steps are kept.
    """
    spans: deque[Sequence[Span]] = deque(maxlen=keep_span_steps)
    num_steps = 0
    for results, events in steps(backend, queue, scheduler, planner):
        num_steps += len(results)
        spans.extend(result.spans for result in results)
        if on_event is not None:
            for record, token in events:
                on_event(record, token)
    records = list(queue.records.values())
    duration_s = max((r.finished_s or 0.0 for r in records), default=0.0)
    return Served(records, [span for step_spans in spans for span in step_spans], duration_s, num_steps)
