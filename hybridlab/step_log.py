"""What each worker did when, and when each request got its tokens: a served run as rows on one clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybridlab.plans import QueueView, Span, StepPlan
from hybridlab.serving import Served
from hybridlab.strategies.registry import resolve

if TYPE_CHECKING:
    import pandas as pd

PROMPT, DECODES, BOTH, LOST = "prompt", "decodes", "prompt and decodes", "lost"
FIRST_TOKEN, TOKEN, KILLED = "until the first token", "token", "killed"
COLUMNS = ("row", "of", "kind", "start_s", "end_s")
FIRST_OP = "embed"


@dataclass(frozen=True)
class _Scheduled:
    worker: str
    at_s: float
    kind: str


@dataclass
class StepLog:
    """A scheduler that decides as `scheduler` does, and keeps what it decided. One for each run.

    `every` is a `keep_span_steps` that keeps all spans, which `timeline_rows` needs.
    """

    scheduler: Any
    steps: list[_Scheduled] = field(default_factory=list)
    every: int = 2**30

    def __post_init__(self) -> None:
        self.scheduler = resolve("scheduler", self.scheduler)

    def schedule(self, queue: QueueView) -> StepPlan | None:
        step = self.scheduler.schedule(queue)
        if step is not None:
            running = {request.id for request in queue.running} & step.tokens.keys()
            kind = DECODES if len(running) == len(step.tokens) else BOTH if running else PROMPT
            self.steps.append(_Scheduled(queue.worker, queue.now_s, kind))
        return step


def timeline_rows(served: Served, log: StepLog) -> pd.DataFrame:
    """A row per step of each worker (`of` "worker") and per token of each request (`of` "request"), in seconds.

    Steps are "prompt", "decodes" or both, from the first op to the last one; "lost" if no op of theirs came back, until
    the worker's next step. Of a request there is a row from its arrival to its first token, and one without length per
    token.
    """
    import pandas as pd

    rows: list[tuple[str, str, str, float, float]] = []
    for worker in dict.fromkeys(step.worker for step in log.steps):
        planned = [step for step in log.steps if step.worker == worker]
        begun = list(_steps([span for span in served.spans if span.op.lane.worker == worker]))
        for number, step in enumerate(planned):
            until_s = planned[number + 1].at_s if number + 1 < len(planned) else served.duration_s
            own = [times for times in begun if step.at_s <= times[0] < until_s]
            start_s, end_s = own[0] if own else (step.at_s, until_s)
            rows.append((worker, "worker", step.kind if own else LOST, start_s, end_s))
    for record in served.records:
        if record.token_times_s:
            arrival_s = record.arrival_s or 0.0
            rows.append((record.request.id, "request", FIRST_TOKEN, arrival_s, record.token_times_s[0]))
            rows += [(record.request.id, "request", TOKEN, at_s, at_s) for at_s in record.token_times_s]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _steps(spans: list[Span]) -> Iterator[tuple[float, float]]:
    """Start and end of each step of one worker."""
    start_s = end_s = None
    for span in sorted(spans, key=lambda one: one.start_s):
        if span.op.kind == FIRST_OP and span.op.microbatch == 0:
            if start_s is not None and end_s is not None:
                yield start_s, end_s
            start_s = end_s = span.start_s
        end_s = span.end_s if end_s is None else max(end_s, span.end_s)
    if start_s is not None and end_s is not None:
        yield start_s, end_s
