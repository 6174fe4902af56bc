"""Programs, placements and moves as bytes: sent to a worker once per shape, checked there before they are used.

A program is a head of counts, a JSON text of its shape, an `OP` per op, and all their needs and experts one after
another. Numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from hybridlab.engine.channel import ProtocolError, pack_json, unpack_json
from hybridlab.plans import (
    OP_KINDS,
    ROLES,
    ExpertPath,
    Lane,
    LaneKind,
    Move,
    Op,
    PlacementPlan,
    Program,
    Shape,
    SlotUse,
    Tier,
)
from hybridlab.spec import ModelSpec

TIERS = tuple(Tier)
_HEAD = struct.Struct("<IIIII")  # program, bytes of the shape, ops, needs, experts
_OP = np.dtype(
    [
        ("id", "<i4"), ("kind", "u1"), ("lane", "<u2"), ("rank", "<i4"), ("layer", "<i4"), ("part", "<i4"),
        ("microbatch", "<i4"), ("tier", "i1"), ("slot", "<i4"), ("generation", "<i4"), ("needs", "<u4"),
        ("experts", "<u4"), ("turn", "<u4"),
    ]
)  # fmt: skip
"""`tier` and `slot` are -1 for None; `lane` counts the lanes of the shape; `needs` and `experts` are their numbers;
`turn` is the op's place in the order of execution."""
_MOVE = np.dtype([("layer", "<i4"), ("expert", "<i4"), ("tier", "u1")])


def pack_program(number: int, program: Program) -> bytes:
    """`program`, which steps call `number` from now on."""
    lanes = list(dict.fromkeys(op.lane for op in program.ops))
    turns = {op.id: turn for turn, op in enumerate(program.order)}
    rows = np.array([(*_row(op, lanes), turns[op.id]) for op in program.ops], _OP)
    needs = np.array(list(chain.from_iterable(op.needs for op in program.ops)), "<i4")
    experts = np.array(list(chain.from_iterable(op.experts for op in program.ops)), "<i4")
    shape = pack_json({**_plain_shape(program.shape), "lanes": [(lane.worker, lane.kind) for lane in lanes]})
    head = _HEAD.pack(number, len(shape), len(rows), len(needs), len(experts))
    return b"".join((head, shape, rows.tobytes(), needs.tobytes(), experts.tobytes()))


def unpack_program(body: memoryview, model: ModelSpec) -> tuple[int, Program]:
    """Raises `ProtocolError` for a program that is not whole, that `model` does not have, or that cannot run."""
    if len(body) < _HEAD.size:
        raise ProtocolError(f"a program of {len(body)} bytes")
    number, shape_bytes, num_ops, num_needs, num_experts = _HEAD.unpack_from(body)
    if len(body) != _HEAD.size + shape_bytes + num_ops * _OP.itemsize + 4 * (num_needs + num_experts):
        raise ProtocolError(f"a program of {len(body)} bytes for {num_ops} ops")
    start = _HEAD.size + shape_bytes
    rows = np.frombuffer(body, _OP, num_ops, start)
    needs, experts = np.split(np.frombuffer(body, "<i4", offset=start + rows.nbytes), [num_needs])
    plain = unpack_json(body[_HEAD.size : start])
    try:
        shape = _shape(plain)
        lanes = [Lane(str(worker), LaneKind(kind)) for worker, kind in plain["lanes"]]
        ops = tuple(_ops(rows, lanes, needs, experts, model))
        order = tuple(ops[place] for place in np.argsort(rows["turn"]).tolist())
        _check(ops, order, shape)
    except Exception as error:  # whatever a text that is no program leads to
        raise ProtocolError(f"a program that cannot be: {type(error).__name__}: {error}") from None
    return number, Program(shape, ops, order)


def plain_placement(placed: PlacementPlan) -> dict[str, Any]:
    """A plan as JSON has it; tiers are their numbers."""
    return {
        "default_tier": placed.default_tier,
        "tier_of": [(*key, TIERS.index(tier)) for key, tier in placed.tier_of.items()],
        "rank_of": [(*key, rank) for key, rank in placed.rank_of.items()],
        "ring_slots": placed.ring_slots,
        "parts_per_layer": placed.parts_per_layer,
        "exchange": placed.exchange,
        "movable": placed.movable,
    }


def placement(plain: dict[str, Any]) -> PlacementPlan:
    """The plan of which `plain_placement` was made."""
    return PlacementPlan(
        Tier(plain["default_tier"]),
        {(layer, expert): TIERS[tier] for layer, expert, tier in plain["tier_of"]},
        {(layer, expert): rank for layer, expert, rank in plain["rank_of"]},
        ring_slots=plain["ring_slots"],
        parts_per_layer=plain["parts_per_layer"],
        exchange=plain["exchange"],
        movable=bool(plain["movable"]),
    )


def pack_moves(moves: Sequence[Move]) -> bytes:
    return np.array([(move.layer, move.expert, TIERS.index(move.tier)) for move in moves], _MOVE).tobytes()


def unpack_moves(body: memoryview, model: ModelSpec) -> tuple[Move, ...]:
    """Raises `ProtocolError` for moves that are not whole, or of experts or tiers that there are not."""
    if len(body) % _MOVE.itemsize:
        raise ProtocolError(f"moves of {len(body)} bytes")
    moves = []
    for layer, expert, tier in np.frombuffer(body, _MOVE).tolist():
        if layer not in model.moe_layers or not 0 <= expert < model.num_experts or tier >= len(TIERS):
            raise ProtocolError(f"a move of expert {expert} of layer {layer} to tier {tier}")
        moves.append(Move(layer, expert, TIERS[tier]))
    return tuple(moves)


def _row(op: Op, lanes: list[Lane]) -> tuple[int, ...]:
    slot, generation = (op.slot.slot, op.slot.generation) if op.slot else (-1, -1)
    tier = -1 if op.tier is None else TIERS.index(op.tier)
    return (
        op.id, OP_KINDS.index(op.kind), lanes.index(op.lane), op.rank, op.layer, op.part, op.microbatch, tier, slot,
        generation, len(op.needs), len(op.experts),
    )  # fmt: skip


def _ops(rows: np.ndarray, lanes: list[Lane], needs: np.ndarray, experts: np.ndarray, model: ModelSpec):
    if rows["needs"].sum() != len(needs) or rows["experts"].sum() != len(experts):
        raise ProtocolError(f"{len(needs)} needs and {len(experts)} experts, which is not what the ops count")
    if len(experts) and not 0 <= experts.min() <= experts.max() < model.num_experts:
        raise ProtocolError(f"experts {experts.min()} to {experts.max()} of {model.num_experts}")
    needs_left, experts_left = iter(needs.tolist()), iter(experts.tolist())
    for row in rows.tolist():
        number, kind, lane, rank, layer, part, microbatch, tier, slot, generation, num_needs, num_experts, _ = row
        if not -1 <= layer <= model.num_layers or tier < -1 or microbatch < 0:
            raise ProtocolError(f"op {number} of layer {layer}, microbatch {microbatch}, tier {tier}")
        yield Op(
            number, OP_KINDS[kind], lanes[lane], rank, layer, part, microbatch,
            tuple(next(needs_left) for _ in range(num_needs)),
            None if tier < 0 else TIERS[tier],
            tuple(next(experts_left) for _ in range(num_experts)),
            None if slot < 0 else SlotUse(slot, generation),
        )  # fmt: skip


def _check(ops: Sequence[Op], order: Sequence[Op], shape: Shape) -> None:
    """That the ops can be run in `order` and lane by lane, without waiting for one another for ever.

    Whether a plan is a good one is for the parent to say (`hybridlab.validation`).
    """
    done: set[int] = set()
    for op in order:
        if op.id in done or not done.issuperset(op.needs):
            raise ProtocolError(f"op {op.id} is there twice, or before what it needs")
        if op.slot is not None and op.slot.slot >= shape.placement.ring_slots:
            raise ProtocolError(f"op {op.id} of slot {op.slot.slot}")
        if op.microbatch >= shape.num_microbatches:
            raise ProtocolError(f"op {op.id} of microbatch {op.microbatch}")
        done.add(op.id)
    for lane in {op.lane for op in ops}:
        if [op for op in ops if op.lane == lane] != [op for op in order if op.lane == lane]:
            raise ProtocolError(f"ops of {lane} that are executed in another order")


def _plain_shape(shape: Shape) -> dict[str, Any]:
    prefetch = shape.path.prefetch
    return {
        "role": shape.role,
        "worker": shape.worker,
        "compute_lane": shape.compute_lane,
        "prefetch": None if prefetch is None else [sorted(experts) for experts in prefetch],
        "min_tokens": shape.path.min_tokens,
        "num_microbatches": shape.num_microbatches,
        "ranks": shape.ranks,
        "placement": plain_placement(shape.placement),
    }


def _shape(plain: dict[str, Any]) -> Shape:
    prefetch, count = plain["prefetch"], plain["num_microbatches"]
    if plain["role"] not in ROLES or not isinstance(count, int) or count < 1:
        raise ProtocolError(f"a shape of role {plain['role']!r} with {count!r} microbatches")
    return Shape(
        plain["role"],
        plain["worker"],
        LaneKind(plain["compute_lane"]),
        ExpertPath(None if prefetch is None else tuple(map(frozenset, prefetch)), plain["min_tokens"]),
        count,
        tuple(plain["ranks"]),
        placement(plain["placement"]),
    )
