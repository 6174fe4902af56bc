"""What a plan must fulfil before an interpreter may run it; each violation is a `PlanError` or `StrategyError`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

from hybridlab.errors import PlanError
from hybridlab.plans import COLLECTIVE_KINDS, OP_KINDS, ROLES, Lane, LaneKind, Op, QueueView, StepPlan


def execution_order(ops: Sequence[Op]) -> tuple[Op, ...]:
    """A sequence of `ops` that respects lane order and needs (Kahn; ties by position).

    Raises `PlanError` naming the ops of a cycle, which may run across lanes.
    """
    position = {op.id: i for i, op in enumerate(ops)}
    before = _predecessors(ops)
    after: dict[int, list[int]] = defaultdict(list)
    missing = {op_id: len(preds) for op_id, preds in before.items()}
    for op_id, preds in before.items():
        for pred in preds:
            after[pred].append(op_id)
    ready = [position[op.id] for op in ops if missing[op.id] == 0]
    order: list[Op] = []
    while ready:  # positions: already a heap, since they ascend
        op = ops[heappop(ready)]
        order.append(op)
        for nxt in after[op.id]:
            missing[nxt] -= 1
            if missing[nxt] == 0:
                heappush(ready, position[nxt])
    if len(order) < len(ops):
        stuck = [_describe(op) for op in ops if missing[op.id] > 0]
        raise PlanError(f"cycle across lanes: none of {', '.join(stuck[:6])} can start ({len(stuck)} ops wait)")
    return tuple(order)


def validate(ops: Sequence[Op], *, ring_slots: int, ranks: Sequence[int]) -> tuple[Op, ...]:
    """Check a lowered and arranged list of ops; return an execution order.

    Raises `PlanError` on duplicate ids, unknown kinds or needs, needs of other ranks, cycles across lanes, collectives
    that a rank misses or meets in another order, and ring slots read unloaded or refilled while still in use.
    """
    ids = [op.id for op in ops]
    if len(set(ids)) != len(ids):
        raise PlanError(f"op id {next(i for i in ids if ids.count(i) > 1)} occurs more than once")
    known = {op.id: op.rank for op in ops}
    for op in ops:
        if op.kind not in OP_KINDS:
            raise PlanError(f"{_describe(op)} has unknown kind {op.kind!r}; expected one of {', '.join(OP_KINDS)}")
        if op.kind == "load" and op.lane.kind is not LaneKind.H2D:
            raise PlanError(f"{_describe(op)} loads weights and belongs on an h2d lane, not {op.lane}")
        if unknown := [need for need in op.needs if need not in known]:
            raise PlanError(f"{_describe(op)} needs op {unknown[0]}, which is not in the program")
        if other := [need for need in op.needs if known[need] != op.rank]:
            raise PlanError(
                f"{_describe(op)} of rank {op.rank} needs op {other[0]} of rank {known[other[0]]}: ranks wait for each "
                "other in collectives alone"
            )
    order = execution_order(ops)
    _check_collectives(ops, ranks)
    _check_slots(ops, order, ring_slots)
    return order


def check_step(view: QueueView, step: StepPlan) -> list[str]:
    """What is wrong with a scheduler's step, as sentences; empty when it may run."""
    if not isinstance(step, StepPlan):
        return [f"schedule() returned {type(step).__name__}, expected StepPlan or None"]
    problems = []
    running = {r.id: r for r in view.running}
    if step.role not in ROLES:
        problems.append(f"role {step.role!r} is unknown; expected one of {', '.join(ROLES)}")
    if not isinstance(step.tokens, Mapping) or not step.tokens:
        return [
            *problems,
            "tokens must be a non-empty mapping of request id to token count; return None to wait",
        ]
    # Most steps only decode: those who wait need not be looked at, and may be many.
    others = bool(step.preempt) or any(rid not in running for rid in step.tokens)
    waiting = {r.id: r for r in view.waiting} if others else {}
    if step.ranks is not None and step.ranks not in view.rank_sets:
        problems.append(f"ranks is {step.ranks!r}, expected {' or '.join(map(str, view.rank_sets))}, or None for all")
    if not isinstance(step.preempt, tuple):
        return [*problems, f"preempt is {step.preempt!r:.60}, expected a tuple of request ids"]
    if len(set(step.preempt)) != len(step.preempt):
        problems.append("preempt names a request more than once")
    for rid in step.preempt:
        if rid in step.tokens:
            problems.append(f"request {rid!r} is both preempted and computed")
        elif (rid not in running and rid not in waiting) or (running.get(rid) or waiting[rid]).allocated_kv_tokens == 0:
            problems.append(f"preempt names {rid!r}, which holds no KV cache here")
    for rid, count in step.tokens.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            problems.append(f"request {rid!r} gets {count!r} tokens, expected a positive int")
        elif rid in running:
            if count != 1:
                problems.append(f"running request {rid!r} gets {count} tokens, a decode computes exactly 1")
            if step.role == "prefill":
                problems.append(f"role is prefill, but {rid!r} is running")
        elif rid in waiting:
            if count > waiting[rid].remaining_prompt:
                problems.append(f"request {rid!r} gets {count} tokens, {waiting[rid].remaining_prompt} remain")
            if step.role == "decode":
                problems.append(f"role is decode, but {rid!r} is waiting")
        else:
            problems.append(f"request {rid!r} is neither waiting nor running on worker {view.worker!r}")
    if not problems and step.num_tokens > view.token_budget:
        problems.append(f"the step has {step.num_tokens} tokens, token_budget is {view.token_budget}")
    return problems


def _predecessors(ops: Sequence[Op]) -> dict[int, set[int]]:
    before = {op.id: set(op.needs) for op in ops}
    last_on: dict[Lane, int] = {}
    for op in ops:
        if op.lane in last_on:
            before[op.id].add(last_on[op.lane])
        last_on[op.lane] = op.id
    return before


def _check_collectives(ops: Sequence[Op], ranks: Sequence[int]) -> None:
    met: dict[int, list[tuple]] = {rank: [] for rank in ranks}
    for op in ops:
        if op.rank not in met:
            raise PlanError(f"{_describe(op)} is on rank {op.rank}, the step runs on ranks {tuple(ranks)}")
        if op.kind in COLLECTIVE_KINDS:
            met[op.rank].append((op.kind, op.layer, op.part, op.microbatch))
    first = met[ranks[0]]
    for rank in ranks[1:]:
        if sorted(met[rank]) != sorted(first):
            odd = sorted(set(met[rank]) ^ set(first))[:1]
            raise PlanError(f"unpaired collective: rank {rank} and rank {ranks[0]} do not share {odd}")
        if met[rank] != first:
            raise PlanError(f"ranks {ranks[0]} and {rank} meet their collectives in different orders: deadlock")


def _check_slots(ops: Sequence[Op], order: Sequence[Op], ring_slots: int) -> None:
    using = [op for op in ops if op.slot is not None]
    if not using:
        return
    ancestors = _ancestors(ops, order)
    bit = {op.id: 1 << i for i, op in enumerate(ops)}
    loads: dict[tuple, Op] = {}
    users: dict[tuple, list[Op]] = defaultdict(list)
    for op in using:
        assert op.slot is not None
        if not 0 <= op.slot.slot < ring_slots:
            raise PlanError(f"{_describe(op)} uses slot {op.slot.slot}, the ring of a rank has {ring_slots}")
        key = (op.rank, op.slot.slot, op.slot.generation)
        if op.kind != "load":
            users[key].append(op)
        elif key in loads:
            raise PlanError(f"slot {key[1]} is loaded twice in generation {key[2]}: {_describe(op)}")
        else:
            loads[key] = op
    for key, readers in users.items():
        if key not in loads:
            raise PlanError(f"{_describe(readers[0])} reads slot {key[1]} generation {key[2]}, which nothing loads")
        for op in readers:
            if not ancestors[op.id] & bit[loads[key].id]:
                raise PlanError(f"{_describe(op)} may read slot {key[1]} before {_describe(loads[key])} is done")
    for (rank, slot, generation), load in loads.items():
        for op in users.get((rank, slot, generation - 1), ()):
            if not ancestors[load.id] & bit[op.id]:
                raise PlanError(f"{_describe(load)} may overwrite slot {slot} while {_describe(op)} still reads it")


def _ancestors(ops: Sequence[Op], order: Sequence[Op]) -> dict[int, int]:
    """Bit set, per op id, of all ops that are done before it starts."""
    bit = {op.id: 1 << i for i, op in enumerate(ops)}
    before = _predecessors(ops)
    found: dict[int, int] = {}
    for op in order:
        mask = 0
        for pred in before[op.id]:
            mask |= found[pred] | bit[pred]
        found[op.id] = mask
    return found


def _describe(op: Op) -> str:
    where = f" layer {op.layer}" if op.layer >= 0 else ""
    return f"op {op.id} ({op.kind}{where} part {op.part} microbatch {op.microbatch} on {op.lane})"
