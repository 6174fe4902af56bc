"""Lanes: who runs the ops of a program, and when."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from hybridlab.plans import Op, Program, Span


class Lanes(Protocol):
    """Runs every op of a program: a lane is first-in first-out, an op starts when its needs are done."""

    def run(self, program: Program, execute: Callable[[Op], None], clock_start_s: float) -> tuple[Span, ...]:
        """Run to the end; spans are relative to `clock_start_s` on `time.perf_counter`."""
        ...


class TurnTakingLanes:
    """device="cpu": one pool of all cores, so lanes take turns in the program's execution order.

    Nothing overlaps and nothing is emulated; every op gets all cores.
    """

    def run(self, program: Program, execute: Callable[[Op], None], clock_start_s: float) -> tuple[Span, ...]:
        spans = []
        start_s = perf_counter() - clock_start_s
        for op in program.order:
            execute(op)
            end_s = perf_counter() - clock_start_s
            spans.append(Span(op, start_s, end_s))
            start_s = end_s
        return tuple(spans)
