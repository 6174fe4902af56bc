"""The order that each built-in overlap gives a step, by hand and over shapes, tiers and rings."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest

from hybridlab.errors import PlanError, StrategyError
from hybridlab.lowering import Planner, bind_slots, lower
from hybridlab.plans import ExpertPath, LaneKind, PlacementPlan, Shape, StepPlan, Tier
from hybridlab.strategies import registry
from hybridlab.strategies.checks import TOY_GPU, TOY_MODEL
from hybridlab.strategies.overlap.dual_batch import DualBatch
from hybridlab.strategies.overlap.prefetch import Prefetch
from hybridlab.strategies.overlap.sequential import Sequential
from hybridlab.strategies.placement.all_host import AllHost

HOST = PlacementPlan(Tier.HOST)
SHORT = replace(TOY_MODEL, num_layers=3)
MIXED = PlacementPlan(
    Tier.STREAMED,
    {(layer, e): tier for layer in TOY_MODEL.moe_layers for e, tier in ((0, Tier.RESIDENT), (7, Tier.HOST))},
    ring_slots=2,
    parts_per_layer=3,
)


def lowered(placed=HOST, microbatches=1, path=None, model=TOY_MODEL):
    shape = Shape("decode", "main", LaneKind.GPU, path or ExpertPath(), microbatches, (0,), placed)
    return lower(shape, model)


def words(ops, lane=None) -> list[str]:
    """What runs on a lane, as kind, layer and microbatch."""
    return [f"{op.kind}{max(op.layer, 0)}.{op.microbatch}" for op in ops if lane is None or op.lane.kind is lane]


def test_dual_batch_puts_a_combine_behind_the_attention_of_the_other_microbatch():
    ops = DualBatch().arrange(lowered(microbatches=2, model=SHORT))
    assert words(ops, LaneKind.CPU) == ["experts1.0", "experts1.1", "experts2.0", "experts2.1"]
    assert words(ops, LaneKind.GPU) == [
        "embed0.0", "embed0.1",
        "attention0.0", "mlp0.0", "attention0.1", "mlp0.1",
        "attention1.0", "router1.0",
        "attention1.1", "router1.1",  # while the CPU computes experts1.0
        "combine1.0", "attention2.0", "router2.0",  # while the CPU computes experts1.1
        "combine1.1", "attention2.1", "router2.1",
        "combine2.0", "combine2.1", "head3.1",  # one head for both
    ]  # fmt: skip


def test_dual_batch_gives_both_microbatches_their_turn_on_a_part_before_the_next_part():
    ops = DualBatch().arrange(lowered(replace(MIXED, ring_slots=1), 2))
    experts = [(op.layer, op.tier, op.part, op.microbatch) for op in ops if op.kind == "experts"]
    on_gpu = [key for key in experts if key[0] == 1 and key[1] is not Tier.HOST]
    streamed = [(1, Tier.STREAMED, part, microbatch) for part in range(3) for microbatch in (0, 1)]
    assert on_gpu == [(1, Tier.RESIDENT, 0, 0), (1, Tier.RESIDENT, 0, 1), *streamed]


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_one_head_waits_for_the_last_layer_of_all_microbatches(microbatches):
    ops = lowered(microbatches=microbatches)
    (head,) = [op for op in ops if op.kind == "head"]
    last = TOY_MODEL.moe_layers[-1]
    assert last == TOY_MODEL.num_layers - 1
    assert [op.id for op in ops if op.kind == "combine" and op.layer == last] == list(head.needs)
    assert len(head.needs) == microbatches and head.microbatch == microbatches - 1
    for overlap in (Sequential(), Prefetch(), DualBatch()):
        assert list(overlap.arrange(ops))[-1].kind == "head"


@pytest.mark.parametrize("overlap", [Prefetch(), DualBatch()], ids=repr)
@pytest.mark.parametrize("placed", [HOST, MIXED], ids=["host", "mixed"])
def test_one_microbatch_keeps_the_plain_order_of_every_lane(overlap, placed):
    ops = lowered(placed)
    for lane in (LaneKind.GPU, LaneKind.CPU, LaneKind.H2D):
        assert words(overlap.arrange(ops), lane) == words(ops, lane)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("placed", [HOST, MIXED], ids=["host", "mixed"])
def test_orders_hold_the_same_ops(placed, microbatches):
    ops = lowered(placed, microbatches)
    for overlap in (Prefetch(), DualBatch()):
        assert sorted(overlap.arrange(ops), key=lambda op: op.id) == list(ops)
    chained = Sequential().arrange(ops)
    assert [replace(op, needs=own.needs) for op, own in zip(chained, ops, strict=True)] == list(ops)
    assert all(before.id in op.needs for before, op in pairwise(chained))


def test_prefetch_lets_loads_wait_for_a_free_slot_alone():
    placed = replace(MIXED, ring_slots=3)
    ops = bind_slots(Prefetch().arrange(lowered(placed)), 3)
    loads = [op for op in ops if op.kind == "load"]
    kinds = {op.id: op.kind for op in ops}
    assert [op.needs for op in loads[:3]] == [(), (), ()]
    assert all({kinds[need] for need in op.needs} == {"experts"} and len(op.needs) == 1 for op in loads[3:])


def test_the_plain_order_loads_a_part_just_before_it_is_computed():
    assert words(op for op in lowered(MIXED, 2) if op.layer == 1 and op.tier is Tier.STREAMED) == [
        "load1.0", "experts1.0", "load1.0", "experts1.0", "load1.0", "experts1.0",
        "experts1.1", "experts1.1", "experts1.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overlap", "role", "requests", "expected"),
    [
        (DualBatch(), "decode", 1, 1),
        (DualBatch(), "decode", 2, 2),
        (DualBatch(), "decode", 9, 2),
        (DualBatch(), "prefill", 9, 1),
        (DualBatch(), "mixed", 9, 1),
        (DualBatch(4), "decode", 3, 1),
        (DualBatch(4), "decode", 4, 2),
        (DualBatch(1), "decode", 1, 1),
        (Prefetch(), "decode", 9, 1),
        (Sequential(), "decode", 9, 1),
    ],
)
def test_microbatches(overlap, role, requests, expected):
    assert overlap.num_microbatches(StepPlan(role, {str(i): 1 for i in range(requests)})) == expected


@pytest.mark.parametrize(
    ("given", "measured", "used"),
    [(None, None, 2), (None, 1, 2), (None, 2, 2), (None, 6, 6), (4, 6, 4), (6, 2, 6), (4, None, 4), (1, 6, 2)],
)
def test_dual_batch_starts_where_it_was_measured_to_pay_unless_told(given, measured, used):
    hardware = replace(TOY_GPU, dual_batch_from_requests=measured)
    overlap = DualBatch(given).calibrated(hardware)
    steps = [StepPlan("decode", {str(i): 1 for i in range(requests)}) for requests in range(1, 9)]
    assert [overlap.num_microbatches(step) for step in steps] == [1 + (n >= used) for n in range(1, 9)]
    assert overlap.calibrated(replace(hardware, dual_batch_from_requests=3)).min_requests == (
        given or measured or 3  # what is known stays
    )


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_min_requests_is_checked(value):
    with pytest.raises(StrategyError, match="min_requests: expected an integer >= 1 or None"):
        registry.resolve("overlap", {"name": "dual_batch", "min_requests": value})


PATHS = [
    ExpertPath(),
    ExpertPath(prefetch=()),
    ExpertPath(min_tokens=2),
    ExpertPath(tuple(frozenset({1, layer, 6}) for layer in range(TOY_MODEL.num_layers)), 3),
]


@pytest.mark.parametrize("name", registry.names("overlap"))
@pytest.mark.parametrize(("slots", "parts"), list(product((1, 2, 5), (1, 3, 8))))
def test_every_ring_and_path_gives_a_program_that_can_run(name, slots, parts):
    for tiers, path, requests in product(({}, MIXED.tier_of), PATHS, (1, 4)):
        placed = PlacementPlan(Tier.STREAMED, tiers, ring_slots=slots, parts_per_layer=parts)
        planner = Planner(TOY_MODEL, TOY_GPU, AllHost(), registry.resolve("overlap", name), placed)
        step = StepPlan("decode", {str(i): 1 for i in range(requests)})
        program = planner.program(replace(planner.shape("main", step), path=path))
        assert program.shape.num_microbatches == (2 if name == "dual_batch" and requests == 4 else 1)
        assert bool(program.streamed) == (path.prefetch != ())


class Interleaved(DualBatch):
    """A user's overlap that knows nothing of parts: a microbatch holds a part while the other one waits for it."""

    def arrange(self, ops):
        return sorted(ops, key=lambda op: (2 * op.layer + op.microbatch + 1.5 * (op.kind == "combine"), op.id))


def test_an_order_that_needs_a_larger_ring_is_told_so():
    step = StepPlan("decode", {"a": 1, "b": 1})
    for slots in (1, 2, 3):
        placed = PlacementPlan(Tier.STREAMED, ring_slots=slots, parts_per_layer=3)
        planner = Planner(TOY_MODEL, TOY_GPU, AllHost(), Interleaved(), placed)
        if slots == 3:
            assert planner.program(planner.shape("main", step)).streamed
            continue
        with pytest.raises(PlanError, match=rf"overlap Interleaved .* raise ring_slots \({slots}\) or lower parts_per"):
            planner.program(planner.shape("main", step))
    backwards = type("Backwards", (Interleaved,), {"arrange": lambda self, ops: ops[::-1]})()
    planner = Planner(TOY_MODEL, TOY_GPU, AllHost(), backwards, placed)
    with pytest.raises(PlanError, match=r"cycle across lanes.*ops wait\)$"):
        planner.program(planner.shape("main", step))
