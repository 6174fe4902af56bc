"""A worker that is killed while it computes: what its requests and those of the others see."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from hybridlab.engine.workers import Workers
from hybridlab.errors import ConfigError
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.serving import Served
from hybridlab.session import Engine
from hybridlab.step_log import KILLED, StepLog, timeline_rows

if TYPE_CHECKING:
    import pandas as pd

POLL_S, READY_WITHIN_S = 0.001, 60.0


@dataclass(frozen=True)
class LostWorker:
    """`summary`: one row of what happened, seconds after the kill. `requests`: one row each, beside an undisturbed run.

    `timeline` has the rows of `step_log.timeline_rows` and one of kind "killed".
    """

    summary: pd.DataFrame
    requests: pd.DataFrame
    timeline: pd.DataFrame


def lose_worker(
    engine: Engine, requests: Sequence[Request], scheduler: Any = "paper", *, worker: str = "prefill", after: int = 4
) -> LostWorker:
    """Serve `requests` undisturbed, then again with a SIGKILL for `worker`.

    It is sent `after` tokens of any requests after the worker has begun a step. Raises `ConfigError` if `engine` has no
    such worker, or if it was never killed: nothing drew tokens while it computed.
    """
    import pandas as pd

    runtime = engine.runtime
    if not isinstance(runtime, Workers) or worker not in runtime.pids:
        there = ", ".join(runtime.pids) if isinstance(runtime, Workers) else "an engine without workers"
        raise ConfigError(f"worker is {worker!r}, expected one of this engine: {there}")
    undisturbed = engine.serve(requests, scheduler)
    log = StepLog(scheduler)
    kill = _Kill(runtime, worker, log, after)
    served = engine.serve(requests, log, keep_span_steps=log.every, on_event=kill)
    if kill.watcher is None:
        raise ConfigError(f"worker {worker} was not killed: fewer than {after} tokens were drawn while it computed")
    kill.watcher.join()
    rows = [
        {
            "request": record.request.id,
            "status": str(record.status),
            "tokens": len(record.output),
            "equal": record.output == before.output,
            "ttft_s": record.token_times_s[0] - (record.arrival_s or 0.0) if record.token_times_s else None,
            "undisturbed_ttft_s": before.token_times_s[0] - (before.arrival_s or 0.0),
        }
        for record, before in zip(served.records, undisturbed.records, strict=True)
    ]
    summary = {
        "worker": worker,
        "noticed_after_s": kill.noticed_s,
        "another_ready_after_s": kill.ready_s,
        "finished": sum(record.status is Status.FINISHED for record in served.records),
        "requests": len(rows),
        "tokens_lost_or_twice": sum(not row["equal"] for row in rows),
        "tokens_meanwhile": kill.drawn_until(served),
    }
    timeline = timeline_rows(served, log)
    timeline.loc[len(timeline)] = [worker, "worker", KILLED, kill.killed_s, kill.killed_s]
    return LostWorker(pd.DataFrame([summary]), pd.DataFrame(rows), timeline.assign(evidence="measured"))


@dataclass
class _Kill:
    """Called with every token; kills once, and watches from then on until another process is ready."""

    runtime: Workers
    worker: str
    log: StepLog
    after: int
    drawn: int = 0
    killed_s: float = 0.0
    noticed_s: float | None = None
    ready_s: float | None = None
    watcher: threading.Thread | None = field(default=None, repr=False)

    def __call__(self, record: RequestRecord, token: int) -> None:
        if self.watcher is not None or self.worker not in {step.worker for step in self.log.steps}:
            return
        self.drawn += 1
        pid = self.runtime.pids[self.worker]
        if self.drawn < self.after or pid is None:
            return
        os.kill(pid, signal.SIGKILL)
        self.killed_s = record.token_times_s[-1]
        self.watcher = threading.Thread(target=self._watch, args=(pid, perf_counter()), name="hybridlab-lost-worker")
        self.watcher.start()

    def _watch(self, pid: int, start_s: float) -> None:
        while self.ready_s is None and perf_counter() < start_s + READY_WITHIN_S:
            now = self.runtime.pids[self.worker]
            if self.noticed_s is None and now != pid:
                self.noticed_s = perf_counter() - start_s
            if now not in (None, pid):
                self.ready_s = perf_counter() - start_s
            sleep(POLL_S)

    def drawn_until(self, served: Served) -> int:
        """Tokens from the kill until another worker was ready."""
        until_s = self.killed_s + (self.ready_s or 0.0)
        return sum(self.killed_s < at_s <= until_s for record in served.records for at_s in record.token_times_s)
