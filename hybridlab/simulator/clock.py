"""The event clock: programs on lanes, in simulated time.

A lane is first-in first-out; an op starts when its lane is free, its needs are done and have been handed over. Lanes
live as long as the clock: programs of several workers may be on it at once, and of one worker one after another.

DRAM is shared by the law T = max(Xc/Bc, Xp/Bp, (Xc + Xp)/Bcp) for a CPU op of Xc bytes and a copy of Xp bytes that
start together. An event clock needs rates at each moment. These are progressive, the most urgent first: among ops that
move bytes of DRAM at the same time, the one with the most of its own time left runs at its full rate, the next gets
what of Bcp that leaves, and ops with as much left as each other slow down alike. Nothing that can be given is held
back, and two ops that start together end by exactly the law. A fair split of Bcp would not: the longer op then still
pays for what the shorter one took. Links alone take nothing from each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

from hybridlab.errors import PlanError
from hybridlab.plans import Lane, LaneKind, Program, Span
from hybridlab.simulator.cost_model import Costs
from hybridlab.simulator.programs import Table, tabulate
from hybridlab.simulator.routes import Routes

TIE = 1e-9
"""Times whose ratio differs from 1 by less count as equal; far above rounding, far below what is modelled."""


@dataclass(frozen=True)
class Dram:
    """Bytes per second that all CPU lanes get together, and CPU lanes and links together, where several ops ask."""

    cpu_bytes_s: float = inf
    total_bytes_s: float = inf

    def scales(self, users: Sequence[tuple[float, float, bool]]) -> list[float]:
        """How fast each of several ops runs, as a share of its own rate, by the law above.

        Of an op: seconds left at its own rate, bytes per second at that rate (above 0), whether a CPU lane has it. The
        one with the most left comes first.
        """
        free, free_cpu = self.total_bytes_s, self.cpu_bytes_s
        found: list[float] = []
        while len(found) < len(users):
            first = last = len(found)
            while last < len(users) and users[last][0] >= users[first][0] * (1 - TIE):
                last += 1
            alike = users[first:last]
            wanted = sum(bytes_s for _, bytes_s, _ in alike)
            wanted_cpu = sum(bytes_s for _, bytes_s, on_cpu in alike if on_cpu)
            scale = min(1.0, free / wanted)
            if wanted_cpu > 0:
                scale = min(scale, free_cpu / wanted_cpu)
            found += [scale] * len(alike)
            free, free_cpu = max(0.0, free - scale * wanted), max(0.0, free_cpu - scale * wanted_cpu)
        return found


NO_LIMIT = Dram()


@dataclass(eq=False)
class Run:
    """A program on the clock; spans are in seconds of the clock, by the table's order."""

    table: Table
    alone_s: Sequence[float]
    dram_bytes: Sequence[float]
    start_s: float
    done_s: list[float]
    spans: list[tuple[float, float]]
    left: int
    end_s: float = 0.0


@dataclass(eq=False)
class _Busy:
    """An op that runs: `left_s` of its own time are left, at `scale` of its own rate."""

    run: Run
    index: int
    lane: Lane
    start_s: float
    left_s: float
    bytes_s: float
    scale: float = 1.0


@dataclass(eq=False)
class EventClock:
    """`now_s` only ever grows. `handoffs_s` by `programs.HANDOFFS`."""

    handoffs_s: Sequence[float]
    dram: Dram = NO_LIMIT
    now_s: float = 0.0
    _queues: dict[Lane, deque[tuple[Run, int]]] = field(default_factory=dict)
    _busy: dict[Lane, _Busy] = field(default_factory=dict)

    def submit(self, table: Table, alone_s: Sequence[float], dram_bytes: Sequence[float]) -> Run:
        """Put a program on its lanes, now; costs are by the table's classes."""
        n = len(table.ops)
        run = Run(table, alone_s, dram_bytes, self.now_s, [inf] * n, [(inf, inf)] * n, n)
        for i, lane in enumerate(table.lane):
            self._queues.setdefault(table.lanes[lane], deque()).append((run, i))
        return run

    def advance(self, until_s: float = inf) -> list[Run]:
        """Let time pass until programs end or it is `until_s`; returns those that ended.

        Raises `PlanError` if no op that waits can ever start.
        """
        while True:
            next_s = self._start_ops()
            self._share_dram()
            next_s = min(next_s, self._next_change_s())  # from now on: what is short is lost in a sum with a late now
            if next_s == inf and any(self._queues.values()):
                run, i = next(queue[0] for queue in self._queues.values() if queue)
                op = run.table.ops[i]
                raise PlanError(f"op {op.id} ({op.kind} on {op.lane}) can never start: a cycle across lanes")
            if self.now_s + next_s > until_s or next_s == inf:
                if until_s < inf:
                    self._pass(until_s - self.now_s)
                    self.now_s = until_s
                return []
            if ended := self._pass(next_s):
                return ended

    def _start_ops(self) -> float:
        """Start what can start now; returns seconds until the next idle lane can start its op (inf: after a need)."""
        next_s = inf
        for lane, queue in self._queues.items():
            if not queue or lane in self._busy:
                continue
            run, i = queue[0]
            ready_s = run.start_s
            for need, handoff in run.table.needs[i]:
                ready_s = max(ready_s, run.done_s[need] + self.handoffs_s[handoff])
            if ready_s <= self.now_s:
                queue.popleft()
                cls = run.table.cls[i]
                alone_s, size = run.alone_s[cls], run.dram_bytes[cls]
                self._busy[lane] = _Busy(run, i, lane, self.now_s, alone_s, size / alone_s if alone_s > 0 else 0.0)
            else:
                next_s = min(next_s, ready_s - self.now_s)
        return next_s

    def _share_dram(self) -> None:
        users = [busy for busy in self._busy.values() if busy.bytes_s > 0]
        if len(users) < 2 or all(busy.lane.kind is LaneKind.H2D for busy in users):
            for busy in users:
                busy.scale = 1.0
            return
        users.sort(key=lambda busy: -busy.left_s)
        scales = self.dram.scales([(b.left_s, b.bytes_s, b.lane.kind is LaneKind.CPU) for b in users])
        for busy, scale in zip(users, scales, strict=True):
            busy.scale = scale

    def _next_change_s(self) -> float:
        """Seconds until the next op ends, or has as little left as one that it had to wait for."""
        next_s = inf
        for busy in self._busy.values():
            if busy.scale > 0:
                next_s = min(next_s, busy.left_s / busy.scale)
        users = sorted((b for b in self._busy.values() if b.bytes_s > 0), key=lambda busy: -busy.left_s)
        for more, less in pairwise(users):
            if more.scale > less.scale and more.left_s > less.left_s:
                next_s = min(next_s, (more.left_s - less.left_s) / (more.scale - less.scale))
        return next_s

    def _pass(self, seconds: float) -> list[Run]:
        self.now_s += seconds
        ended = []
        for lane, busy in list(self._busy.items()):
            left_s = busy.left_s - busy.scale * seconds
            if left_s > TIE * busy.run.alone_s[busy.run.table.cls[busy.index]]:
                busy.left_s = left_s
                continue
            run = busy.run
            del self._busy[lane]
            run.done_s[busy.index] = self.now_s
            run.spans[busy.index] = (busy.start_s, self.now_s)
            run.left -= 1
            if not run.left:
                run.end_s = self.now_s
                ended.append(run)
        return ended


def spans_of(table: Table, times: Sequence[tuple[float, float]], start_s: float = 0.0) -> tuple[Span, ...]:
    """Spans of a step that began at `start_s`, from times since then."""
    return tuple(Span(op, start_s + a, start_s + b) for op, (a, b) in zip(table.ops, times, strict=True))


def run_program(
    program: Program, routes: Routes, cost: Costs, handoffs_s: Sequence[float], dram: Dram = NO_LIMIT
) -> tuple[Span, ...]:
    """One program on a fresh clock, as the engine's lanes return it. Raises `PlanError` if it cannot run."""
    table = tabulate(program, routes)
    costs = [cost(one) for one in table.classes]
    clock = EventClock(handoffs_s, dram)
    run = clock.submit(table, [each.alone_s for each in costs], [each.dram_bytes for each in costs])
    clock.advance()
    return spans_of(table, run.spans)
