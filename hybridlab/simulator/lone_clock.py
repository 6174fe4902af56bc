"""The clock of one worker alone, whose steps never overlap: a step ends when its last op does, whatever came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from hybridlab.simulator.clock import NO_LIMIT, Dram, EventClock
from hybridlab.simulator.programs import Table, end_s, finish_times
from hybridlab.simulator.shared_clock import shared_end_s


@dataclass(eq=False)
class LoneRun:
    """A step on a clock of its own; `spans` are worked out if somebody looks at them."""

    table: Table
    alone_s: Sequence[float]
    dram_bytes: Sequence[float]
    handoffs_s: Sequence[float]
    dram: Dram
    start_s: float
    end_s: float = inf

    @cached_property
    def spans(self) -> list[tuple[float, float]]:
        shared = self.table.shares
        times = _on_event_clock(self) if shared else finish_times(self.table, self.alone_s, self.handoffs_s)
        return [(self.start_s + a, self.start_s + b) for a, b in times]


@dataclass(eq=False)
class LoneClock:
    """As `EventClock`, for one program at a time: no event is simulated unless CPU and link share DRAM in it."""

    handoffs_s: Sequence[float]
    dram: Dram = NO_LIMIT
    now_s: float = 0.0
    _run: LoneRun | None = field(default=None, init=False)

    def submit(self, table: Table, alone_s: Sequence[float], dram_bytes: Sequence[float]) -> LoneRun:
        """Start a step, now; the last one has ended."""
        assert self._run is None
        run = LoneRun(table, alone_s, dram_bytes, self.handoffs_s, self.dram, self.now_s)
        if table.shares:
            run.end_s = self.now_s + shared_end_s(table, alone_s, dram_bytes, self.handoffs_s, self.dram)
        else:
            run.end_s = self.now_s + end_s(table, alone_s, self.handoffs_s)
        self._run = run
        return run

    def advance(self, until_s: float = inf) -> list[LoneRun]:
        """Let time pass until the step ends or it is `until_s`; returns what ended."""
        run = self._run
        if run is not None and run.end_s <= until_s:
            self.now_s, self._run = run.end_s, None
            return [run]
        if until_s < inf:
            self.now_s = max(self.now_s, until_s)
        return []


def _on_event_clock(run: LoneRun) -> list[tuple[float, float]]:
    clock = EventClock(run.handoffs_s, run.dram)
    there = clock.submit(run.table, run.alone_s, run.dram_bytes)
    clock.advance()
    return there.spans
