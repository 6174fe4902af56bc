"""The end of one step whose CPU lanes and links share DRAM, event by event, with layers skipped once they are alike.

The rules are `clock.EventClock`'s, its slow twin. Lanes are numbers, nothing outlives the step, and when an op of the
period ends with everything as it was a period before (ops on lanes, what is left of them, past ends), the periods that
follow are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

from hybridlab.errors import PlanError
from hybridlab.plans import LaneKind
from hybridlab.simulator.clock import TIE, Dram
from hybridlab.simulator.programs import Table

ALIKE = 1e-10
"""Of a period: times that differ by less are the same ones."""


def shared_end_s(
    table: Table, alone_s: Sequence[float], dram_bytes: Sequence[float], handoffs_s: Sequence[float], dram: Dram
) -> float:
    """Seconds until the last op ends; costs are by the table's classes. Raises `PlanError` for a step that cannot."""
    return SharedStep(table, alone_s, dram_bytes, handoffs_s, dram).end_s()


@dataclass(frozen=True)
class _Before:
    """A step when an op of the period ended: what the next such time is compared with."""

    now_s: float
    head: tuple[int, ...]
    busy: tuple[bool, ...]
    left_s: tuple[float, ...]


@dataclass(eq=False)
class SharedStep:
    """By lane: `head`, the op that runs there or is next (N: none is), what is `left_s` of it, its bytes per second."""

    table: Table
    alone_s: Sequence[float]
    dram_bytes: Sequence[float]
    handoffs_s: Sequence[float]
    dram: Dram
    now_s: float = 0.0
    before: _Before | None = None
    skipped: bool = False
    head: list[int] = field(init=False)

    def __post_init__(self) -> None:
        lanes, n = len(self.table.lanes), len(self.table.ops)
        self.head = list(self.table.first)
        self.on_cpu = [lane.kind is LaneKind.CPU for lane in self.table.lanes]
        self.on_link = [lane.kind is LaneKind.H2D for lane in self.table.lanes]
        self.busy, self.left_s = [False] * lanes, [0.0] * lanes
        self.bytes_s, self.scale = [0.0] * lanes, [1.0] * lanes
        self.ready_s = [inf] * lanes
        self.done_s = [inf] * n
        self.skipped = not self.table.period

    def end_s(self) -> float:
        n, period, begin = len(self.table.ops), self.table.period, self.table.begin
        while True:
            next_s = min(self._start(n), self._share())
            if next_s == inf:
                break
            ended = self._pass(next_s)
            if not self.skipped and any(i >= begin and not (i - begin) % period for i in ended):
                self._skip_alike()
        if waits := [i for i in self.head if i < n]:
            op = self.table.ops[waits[0]]
            raise PlanError(f"op {op.id} ({op.kind} on {op.lane}) can never start: a cycle across lanes")
        return self.now_s

    def _start(self, n: int) -> float:
        """Start what can start now; returns when the next idle lane can start its op."""
        next_s, now_s, cls, all_needs = inf, self.now_s, self.table.cls, self.table.needs
        for lane, i in enumerate(self.head):
            if self.busy[lane] or i == n:
                continue
            ready_s = self.ready_s[lane]
            if ready_s == inf:
                ready_s = 0.0
                for need, handoff in all_needs[i]:
                    there_s = self.done_s[need] + self.handoffs_s[handoff]
                    if there_s > ready_s:
                        ready_s = there_s
                self.ready_s[lane] = ready_s
            if ready_s <= now_s:
                alone_s = self.alone_s[cls[i]]
                self.busy[lane], self.left_s[lane], self.scale[lane] = True, alone_s, 1.0
                self.bytes_s[lane] = self.dram_bytes[cls[i]] / alone_s if alone_s > 0 else 0.0
            elif ready_s < next_s:
                next_s = ready_s
        return next_s

    def _share(self) -> float:
        """Say how fast each op runs; returns when one ends, or has as little left as one that it had to wait for."""
        now_s, left_s, scale = self.now_s, self.left_s, self.scale
        running = [lane for lane, busy in enumerate(self.busy) if busy]
        users = [lane for lane in running if self.bytes_s[lane] > 0]
        next_s = inf
        if len(users) > 1 and not all(self.on_link[lane] for lane in users):
            users.sort(key=lambda lane: -left_s[lane])
            scales = self.dram.scales([(left_s[lane], self.bytes_s[lane], self.on_cpu[lane]) for lane in users])
            for lane, found in zip(users, scales, strict=True):
                scale[lane] = found
            for more, less in pairwise(users):
                if scale[more] > scale[less] and left_s[more] > left_s[less]:
                    meet_s = now_s + (left_s[more] - left_s[less]) / (scale[more] - scale[less])
                    next_s = min(next_s, meet_s)
        else:
            for lane in users:
                scale[lane] = 1.0
        for lane in running:
            if scale[lane] > 0:
                next_s = min(next_s, now_s + left_s[lane] / scale[lane])
        return next_s

    def _pass(self, to_s: float) -> list[int]:
        """Let time pass; returns the ops that end."""
        passed_s, self.now_s, ended = to_s - self.now_s, to_s, []
        for lane, busy in enumerate(self.busy):
            if not busy:
                continue
            i = self.head[lane]
            left_s = self.left_s[lane] - self.scale[lane] * passed_s
            if left_s > TIE * self.alone_s[self.table.cls[i]]:
                self.left_s[lane] = left_s
                continue
            self.done_s[i], self.ready_s[lane], self.busy[lane] = to_s, inf, False
            self.head[lane] = self.table.after[i]
            ended.append(i)
        return ended

    def _skip_alike(self) -> None:
        """If all is as it was a period before, be as many periods later as there are like it."""
        table, before = self.table, self.before
        left = [left_s if busy else 0.0 for left_s, busy in zip(self.left_s, self.busy, strict=True)]
        now = self.before = _Before(self.now_s, tuple(self.head), tuple(self.busy), tuple(left))
        lanes = [lane for lane, inside in enumerate(table.in_period) if inside]
        heads = [self.head[lane] for lane in lanes]
        low, high = min(heads) - table.window, max(heads)
        count = (table.end - 1 - high) // table.period
        if before is None or count < 1 or low < table.begin + table.period or now.busy != before.busy:
            return
        step_s = now.now_s - before.now_s
        if any(now.head[lane] - before.head[lane] != table.period for lane in lanes):
            return
        near = ALIKE * step_s
        if any(abs(a - b) > near for a, b in zip(now.left_s, before.left_s, strict=True)):
            return
        for i in range(low, high):
            earlier_s, later_s = self.done_s[i - table.period], self.done_s[i]
            if later_s == inf:
                continue
            if abs(later_s - earlier_s - step_s) > near:
                return
        by_s, by = count * step_s, count * table.period
        for i in range(high - 1, low - 1, -1):  # from the end: the two stretches may overlap
            self.done_s[i + by] = self.done_s[i] + by_s
        for lane in lanes:
            self.head[lane] += by
            if not self.busy[lane] and self.ready_s[lane] < inf:
                self.ready_s[lane] += by_s
        self.now_s += by_s
        self.skipped = True
