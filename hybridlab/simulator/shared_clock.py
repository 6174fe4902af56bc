"""Steps of one or several workers, event by event, with layers skipped once they are alike.

The rules are `clock.EventClock`'s, its slow twin. Lanes are numbers, each in one step at a time, and time is counted
from where each step began: sums stay small, however long the run. When an op of the period ends with everything as it
was a period before (ops on lanes, what is left of them, past ends), the periods that follow are known, until an op of
another step ends or begins, or has so little left that it takes DRAM otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf

from hybridlab.errors import PlanError
from hybridlab.plans import LaneKind
from hybridlab.simulator.clock import NO_LIMIT, TIE, Dram
from hybridlab.simulator.programs import Table

ALIKE = 1e-10
"""Of a period: times that differ by less are the same ones."""


def shared_end_s(
    table: Table, alone_s: Sequence[float], dram_bytes: Sequence[float], handoffs_s: Sequence[float], dram: Dram
) -> float:
    """Seconds until the last op ends; costs are by the table's classes. Raises `PlanError` for a step that cannot."""
    clock = SharedClock(handoffs_s, dram)
    clock.submit(table, alone_s, dram_bytes)
    clock.advance()
    return clock.now_s


@dataclass(frozen=True)
class _Lanes:
    """What is on the lanes of a step at a time."""

    step: SharedStep
    head: tuple[int, ...]
    busy: tuple[bool, ...]
    left_s: tuple[float, ...]

    def is_as(self, other: _Lanes) -> bool:
        return self.step is other.step and self.head == other.head and self.busy == other.busy


@dataclass(frozen=True)
class _Before:
    """All steps when an op of one's period ended: what the next such time is compared with."""

    at_s: float
    own: _Lanes
    others: tuple[_Lanes, ...]


@dataclass(eq=False)
class SharedStep:
    """By lane: `head`, the op that runs there or is next (N: none is), what is `left_s` of it, its bytes per second.

    Times are in seconds since `start_s`, now is `at_s`.
    """

    table: Table
    alone_s: Sequence[float]
    dram_bytes: Sequence[float]
    start_s: float = 0.0
    end_s: float = inf
    at_s: float = 0.0
    before: _Before | None = None
    known_from: int = 0
    """The first op that ran since layers were skipped."""

    def __post_init__(self) -> None:
        table = self.table
        lanes, self.num_left = len(table.lanes), len(table.ops)
        self.head = list(table.first)
        self.on_cpu = [lane.kind is LaneKind.CPU for lane in table.lanes]
        self.on_link = [lane.kind is LaneKind.H2D for lane in table.lanes]
        self.busy, self.left_s = [False] * lanes, [0.0] * lanes
        self.bytes_s, self.scale = [0.0] * lanes, [1.0] * lanes
        self.ready_s = [inf] * lanes
        self.begun_s, self.done_s = [inf] * self.num_left, [inf] * self.num_left
        self.repeats = [lane for lane, inside in enumerate(table.in_period) if inside]
        self.known_from = table.begin
        used = [alone_s for alone_s, size in zip(self.alone_s, self.dram_bytes, strict=True) if size > 0]
        self.longest_use_s = max(used, default=0.0)
        self.skips: list[tuple[range, float]] = []

    @cached_property
    def spans(self) -> list[tuple[float, float]]:
        """(start, end) of each op, on the clock; the step has ended."""
        begun_s, done_s, period = self.begun_s, self.done_s, self.table.period
        for skipped, step_s in self.skips:
            for i in skipped:
                if done_s[i] == inf:
                    begun_s[i], done_s[i] = begun_s[i - period] + step_s, done_s[i - period] + step_s
        return [(self.start_s + a, self.start_s + b) for a, b in zip(begun_s, done_s, strict=True)]

    def lanes(self) -> _Lanes:
        left = [left_s if busy else 0.0 for left_s, busy in zip(self.left_s, self.busy, strict=True)]
        return _Lanes(self, tuple(self.head), tuple(self.busy), tuple(left))

    def start(self, handoffs_s: Sequence[float]) -> float:
        """Start what can start now; returns seconds until the next idle lane can start its op."""
        next_s, at_s, cls, all_needs, n = inf, self.at_s, self.table.cls, self.table.needs, len(self.table.ops)
        for lane, i in enumerate(self.head):
            if self.busy[lane] or i == n:
                continue
            ready_s = self.ready_s[lane]
            if ready_s == inf:
                ready_s = 0.0
                for need, handoff in all_needs[i]:
                    there_s = self.done_s[need] + handoffs_s[handoff]
                    if there_s > ready_s:
                        ready_s = there_s
                self.ready_s[lane] = ready_s
            if ready_s <= at_s:
                alone_s = self.alone_s[cls[i]]
                self.busy[lane], self.left_s[lane], self.scale[lane] = True, alone_s, 1.0
                self.begun_s[i] = at_s
                self.bytes_s[lane] = self.dram_bytes[cls[i]] / alone_s if alone_s > 0 else 0.0
            elif ready_s < next_s:
                next_s = ready_s
        return next_s - at_s

    def pass_(self, seconds: float) -> bool:
        """Let time pass; returns whether the first op of a layer that has one like it before it has ended."""
        table, marked = self.table, False
        self.at_s += seconds
        for lane, busy in enumerate(self.busy):
            if not busy:
                continue
            i = self.head[lane]
            left_s = self.left_s[lane] - self.scale[lane] * seconds
            if left_s > TIE * self.alone_s[table.cls[i]]:
                self.left_s[lane] = left_s
                continue
            self.done_s[i], self.ready_s[lane], self.busy[lane] = self.at_s, inf, False
            self.head[lane] = table.after[i]
            self.num_left -= 1
            if table.period and table.begin <= i < table.end and not (i - table.begin) % table.period:
                marked = True
        return marked

    def most_alike(self, before: _Before) -> int:
        """How many of the periods that follow are like the last one, by this step alone."""
        table, period, lanes = self.table, self.table.period, self.repeats
        now, was, step_s = self.lanes(), before.own, self.at_s - before.at_s
        low, high = min(self.head[lane] for lane in lanes) - table.window, max(self.head[lane] for lane in lanes)
        count = (table.end - 1 - high) // period
        if count < 1 or low < self.known_from + period or now.busy != was.busy:
            return 0
        if any(now.head[lane] - was.head[lane] != period for lane in lanes):
            return 0
        near = ALIKE * step_s
        if any(abs(a - b) > near for a, b in zip(now.left_s, was.left_s, strict=True)):
            return 0
        for i in range(low, high):
            later_s = self.done_s[i]
            if later_s < inf and abs(later_s - self.done_s[i - period] - step_s) > near:
                return 0
        return count

    def skip(self, count: int, step_s: float) -> None:
        """Be `count` periods of `step_s` later."""
        by_s, by = count * step_s, count * self.table.period
        heads = [self.head[lane] for lane in self.repeats]
        low, high = min(heads) - self.table.window, max(heads)
        for i in range(high, low - 1, -1):  # from the end: the two stretches may overlap
            self.done_s[i + by], self.begun_s[i + by] = self.done_s[i] + by_s, self.begun_s[i] + by_s
        for lane, i in zip(self.repeats, heads, strict=True):
            self.ready_s[lane] += by_s
            self.head[lane] = i + by
        self.num_left -= by
        self.at_s += by_s
        self.skips.append((range(min(heads), high + by), step_s))
        self.known_from, self.before = high + by, None


@dataclass(eq=False)
class SharedClock:
    """As `EventClock`, for steps that have their lanes to themselves: what they share is DRAM."""

    handoffs_s: Sequence[float]
    dram: Dram = NO_LIMIT
    now_s: float = 0.0
    num_events: int = 0
    _steps: list[SharedStep] = field(default_factory=list, init=False)

    def submit(self, table: Table, alone_s: Sequence[float], dram_bytes: Sequence[float]) -> SharedStep:
        """Start a step, now; costs are by the table's classes."""
        step = SharedStep(table, alone_s, dram_bytes, self.now_s)
        self._steps.append(step)
        return step

    def advance(self, until_s: float = inf) -> list[SharedStep]:
        """Let time pass until steps end or it is `until_s`; returns those that ended.

        Raises `PlanError` if no op that waits can ever start.
        """
        while True:
            next_s = min((step.start(self.handoffs_s) for step in self._steps), default=inf)
            next_s = min(next_s, self._share())
            if next_s == inf and self._steps:
                step = self._steps[0]
                op = step.table.ops[min(step.head)]
                raise PlanError(f"op {op.id} ({op.kind} on {op.lane}) can never start: a cycle across lanes")
            if self.now_s + next_s > until_s or next_s == inf:
                if until_s < inf:
                    self._pass(until_s - self.now_s)
                    self.now_s = until_s
                return []
            marked = self._pass(next_s)
            if ended := [step for step in self._steps if not step.num_left]:
                self._steps = [step for step in self._steps if step.num_left]
                for step in ended:
                    step.end_s = self.now_s
                return ended
            for step in marked:
                self._skip_alike(step, until_s)

    def _share(self) -> float:
        """Say how fast ops run; returns seconds until one ends, or has as little left as one that it held up."""
        running = [(step, lane) for step in self._steps for lane, busy in enumerate(step.busy) if busy]
        users = [(step, lane) for step, lane in running if step.bytes_s[lane] > 0]
        next_s = inf
        if len(users) > 1 and not all(step.on_link[lane] for step, lane in users):
            users.sort(key=lambda user: -user[0].left_s[user[1]])
            asked = [(step.left_s[lane], step.bytes_s[lane], step.on_cpu[lane]) for step, lane in users]
            scales = self.dram.scales(asked)
            for (step, lane), scale in zip(users, scales, strict=True):
                step.scale[lane] = scale
            for ((more_s, _, _), more), ((less_s, _, _), less) in pairwise(zip(asked, scales, strict=True)):
                if more > less and more_s > less_s:
                    next_s = min(next_s, (more_s - less_s) / (more - less))
        else:
            for step, lane in users:
                step.scale[lane] = 1.0
        for step, lane in running:
            if step.scale[lane] > 0:
                next_s = min(next_s, step.left_s[lane] / step.scale[lane])
        return next_s

    def _pass(self, seconds: float) -> list[SharedStep]:
        self.num_events += 1
        self.now_s += seconds
        return [step for step in self._steps if step.pass_(seconds)]

    def _skip_alike(self, step: SharedStep, until_s: float) -> None:
        """If all is as it was a period before, be as many periods later as there are like it."""
        others = tuple(other.lanes() for other in self._steps if other is not step)
        before, step.before = step.before, _Before(step.at_s, step.lanes(), others)
        if before is None or len(others) != len(before.others):
            return
        if not all(now.is_as(was) for now, was in zip(others, before.others, strict=True)):
            return
        step_s = step.at_s - before.at_s
        count = step.most_alike(before)
        if count < 1 or (count := min(count, self._most_beside(step, before, until_s))) < 1:
            return
        step.skip(count, step_s)
        self.now_s += count * step_s
        for now, was in zip(others, before.others, strict=True):
            other = now.step
            other.at_s += count * step_s
            for lane, busy in enumerate(other.busy):
                if busy:
                    other.left_s[lane] -= count * (was.left_s[lane] - now.left_s[lane])

    def _most_beside(self, step: SharedStep, before: _Before, until_s: float) -> int:
        """How many periods of `step` it takes until anything changes for it.

        An op of another step that uses DRAM with more left than any of `step` has its own rate first, whatever `step`
        does. Two such could change places, and are not followed.
        """
        step_s, users = step.at_s - before.at_s, 0
        count = (until_s - self.now_s) / step_s
        for was in before.others:
            other = was.step
            for lane, busy in enumerate(other.busy):
                if not busy:
                    count = min(count, (other.ready_s[lane] - other.at_s) / step_s)
                    continue
                left_s = other.left_s[lane]
                passed_s = was.left_s[lane] - left_s
                if other.bytes_s[lane] > 0 and step.longest_use_s:
                    users, left_s = users + 1, left_s - step.longest_use_s
                count = min(count, left_s / passed_s if passed_s > 0 else inf)
        if users > 1 or count == inf:
            return 0 if users > 1 else len(step.table.ops)
        return int(count - 1e-6)
