"""A program as tables: ops in an order that can run, by number, so that a clock looks nothing up.

Costs depend on the class of an op, not on the op: layers that are alike share their classes, and once the time from one
layer to the next stands still, the layers that follow are skipped (`finish_times` against `end_s`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from hybridlab.errors import PlanError
from hybridlab.plans import COLLECTIVE_KINDS, Lane, LaneKind, Op, Program
from hybridlab.simulator.cost_model import OpClass
from hybridlab.simulator.routes import Routes
from hybridlab.validation import execution_order

HANDOFFS = ("none", "gpu to cpu", "cpu to gpu", "stream to stream")
_GPU_SIDE = (LaneKind.GPU, LaneKind.H2D, LaneKind.D2H, LaneKind.NET)


@dataclass(frozen=True, eq=False)
class Table:
    """`ops[i]` is of class `classes[cls[i]]`, on lane `lanes[lane[i]]`, and waits for `needs[i]`: pairs of an index
    below i and a number of `HANDOFFS`. `shares`: a CPU lane and
    another one, CPU or link, may move bytes of DRAM side by side.

    Ops from `begin` on repeat every `period` until `end`; a period of 0 means that nothing does.
    """

    ops: tuple[Op, ...]
    cls: tuple[int, ...]
    classes: tuple[OpClass, ...]
    lane: tuple[int, ...]
    lanes: tuple[Lane, ...]
    needs: tuple[tuple[tuple[int, int], ...], ...]
    shares: bool
    period: int = 0
    begin: int = 0
    end: int = 0
    window: int = 0
    """How far back an op may look for what it needs."""

    @cached_property
    def first(self) -> tuple[int, ...]:
        """The first op of each lane."""
        return tuple(self.lane.index(lane) for lane in range(len(self.lanes)))

    @cached_property
    def after(self) -> tuple[int, ...]:
        """By op, the one behind it on its lane; the number of ops if there is none."""
        found, last = [len(self.ops)] * len(self.ops), [len(self.ops)] * len(self.lanes)
        for i in range(len(self.ops) - 1, -1, -1):
            found[i], last[self.lane[i]] = last[self.lane[i]], i
        return tuple(found)

    @cached_property
    def in_period(self) -> tuple[bool, ...]:
        """By lane, whether it has an op of what repeats."""
        inside = set(self.lane[self.begin : self.begin + self.period])
        return tuple(lane in inside for lane in range(len(self.lanes)))


def tabulate(program: Program, routes: Routes) -> Table:
    """The table of a program. Raises `PlanError` for a cycle or an unknown need."""
    ops = _in_order(program)
    index = {op.id: i for i, op in enumerate(ops)}
    lanes = {lane: i for i, lane in enumerate(dict.fromkeys(op.lane for op in ops))}
    classes: dict[tuple, int] = {}
    found: list[OpClass] = []
    cls, needs = [], []
    arrived = _arrived(ops)
    least, exchange = program.shape.path.min_tokens, program.shape.placement.exchange
    ranks, small = len(program.shape.ranks), exchange == "small_ep"
    rows = routes.rows_sent(exchange, ranks)
    for i, op in enumerate(ops):
        chosen = None
        if op.kind == "experts":
            chosen = routes.chosen(op.layer, op.experts, arrived.get((op.rank, op.layer), frozenset()), least, op.tier)
        on_cpu = op.lane.kind is LaneKind.CPU
        everyone = op.kind in ("experts", "load") or (op.kind == "router" and small)
        key = (op.kind, on_cpu, op.microbatch, len(op.experts) * (op.kind == "load"), id(chosen))
        if key not in classes:
            classes[key] = len(found)
            found.append(OpClass(op.kind, on_cpu, op.microbatch, key[3], chosen, ranks, rows, everyone or ranks == 1))
        cls.append(classes[key])
        needs.append(tuple((index[need], _handoff(ops[index[need]].lane, op.lane)) for need in op.needs))
        if any(need >= i for need, _ in needs[-1]):
            raise PlanError(f"cycle: op {op.id} ({op.kind}) waits for an op that can only run behind it")
    kinds = [lane.kind for lane in lanes]
    shares = LaneKind.CPU in kinds and kinds.count(LaneKind.CPU) + kinds.count(LaneKind.H2D) > 1
    lane = tuple(lanes[op.lane] for op in ops)
    table = Table(ops, tuple(cls), tuple(found), lane, tuple(lanes), tuple(needs), shares)
    return _with_period(table)


def _in_order(program: Program) -> tuple[Op, ...]:
    """An op of a collective starts once the ops of all its ranks can: each waits for what any of them waits for."""
    known = {op.id for op in program.ops}
    for op in program.ops:
        if unknown := [need for need in op.needs if need not in known]:
            raise PlanError(f"op {op.id} ({op.kind}) needs op {unknown[0]}, which is not in the program")
    if len(program.shape.ranks) == 1:
        return program.order if len(program.order) == len(program.ops) else execution_order(program.ops)
    groups: dict[tuple, set[int]] = {}
    before: dict[Lane, int] = {}
    for op in program.ops:
        if op.kind in COLLECTIVE_KINDS:
            group = groups.setdefault((op.kind, op.layer, op.part, op.microbatch), set())
            group.update(op.needs)
            if op.lane in before:
                group.add(before[op.lane])
        before[op.lane] = op.id
    met = [
        replace(op, needs=tuple(sorted({*op.needs, *groups[op.kind, op.layer, op.part, op.microbatch]})))
        if op.kind in COLLECTIVE_KINDS
        else op
        for op in program.ops
    ]
    return execution_order(met)


def _arrived(ops: Sequence[Op]) -> Mapping[tuple[int, int], frozenset[int]]:
    found: dict[tuple[int, int], frozenset[int]] = {}
    for op in ops:
        if op.kind == "load":
            found[op.rank, op.layer] = found.get((op.rank, op.layer), frozenset()) | frozenset(op.experts)
    return found


def _handoff(source: Lane, to: Lane) -> int:
    """Which of `HANDOFFS` lies between two ops."""
    if source == to:
        return 0
    if to.kind is LaneKind.CPU:
        return 1 if source.kind in _GPU_SIDE else 0
    return 2 if source.kind is LaneKind.CPU else 3


def _with_period(table: Table) -> Table:
    """Find the longest stretch in which every op is like the one a period before it."""
    n = len(table.ops)
    marks = [i for i, op in enumerate(table.ops) if op.kind == "router" and not op.microbatch and not op.rank]
    if len(marks) < 4:
        return table
    period = Counter(b - a for a, b in pairwise(marks)).most_common(1)[0][0]
    signs = [
        (table.cls[i], table.lane[i], tuple((i - need, handoff) for need, handoff in table.needs[i])) for i in range(n)
    ]
    best, start = (0, 0), None
    for i in range(period, n + 1):
        if i < n and signs[i] == signs[i - period]:
            start = i if start is None else start
        elif start is not None:
            best, start = max(best, (i - start, start)), None
    length, first = best
    begin, end = first - period, first + length
    inside = [i - need for i in range(begin, end) for need, _ in table.needs[i]]
    window = max([period, *inside])
    behind = [end - need for i in range(end, n) for need, _ in table.needs[i] if need < end]
    if length < 2 * period or max(behind, default=0) > window:
        return table
    return replace(table, period=period, begin=begin, end=end, window=window)


def finish_times(table: Table, alone_s: Sequence[float], handoffs_s: Sequence[float]) -> list[tuple[float, float]]:
    """(start, end) of every op, in seconds since the start of the step, where nothing shares DRAM."""
    free = [0.0] * len(table.lanes)
    done: list[float] = []
    spans = []
    for cls, lane, needs in zip(table.cls, table.lane, table.needs, strict=True):
        start = free[lane]
        for need, handoff in needs:
            ready = done[need] + handoffs_s[handoff]
            if ready > start:
                start = ready
        end = start + alone_s[cls]
        free[lane] = end
        done.append(end)
        spans.append((start, end))
    return spans


def end_s(table: Table, alone_s: Sequence[float], handoffs_s: Sequence[float]) -> float:
    """When the last op of `finish_times` ends, with layers skipped once each takes as long as the one before.

    An op's start is a maximum of sums. So once all that later ops may look at (ends within `window`, lanes) has moved
    by the same time over a period, the next period moves it by that again.
    """
    cls, lanes, all_needs, n = table.cls, table.lane, table.needs, len(table.ops)
    free = [0.0] * len(table.lanes)
    done = [0.0] * n
    period, window = table.period, table.window
    check = table.begin + max(2 * period, window + period) if period else n + 1
    i = 0
    while i < n:
        if i == check and i + period <= table.end:
            step = done[i - 1] - done[i - 1 - period]
            tolerance = 1e-10 * step
            steady = all(abs(done[j] - done[j - period] - step) <= tolerance for j in range(i - window, i))
            if steady:
                skipped = (table.end - i) // period * period
                by = step * (skipped // period)
                for j in range(i - 1, i - window - 1, -1):  # from the end: the two stretches may overlap
                    done[j + skipped] = done[j] + by
                for lane in {lanes[j] for j in range(i - period, i)}:
                    free[lane] += by
                i += skipped
                check = n + 1
                continue
            check = i + period
        lane = lanes[i]
        start = free[lane]
        for need, handoff in all_needs[i]:
            ready = done[need] + handoffs_s[handoff]
            if ready > start:
                start = ready
        free[lane] = done[i] = start + alone_s[cls[i]]
        i += 1
    return max(free, default=0.0)
