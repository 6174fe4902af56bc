"""Lowering, slot binding and validation: programs that run, and programs that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridlab.errors import PlanError, StrategyError
from hybridlab.lowering import Planner, bind_slots, lower, parts_of
from hybridlab.plans import ExpertPath, Lane, LaneKind, Op, PlacementPlan, Shape, SlotUse, StepPlan, Tier
from hybridlab.strategies.checks import TOY_CPU, TOY_GPU, TOY_MODEL
from hybridlab.strategies.overlap.sequential import Sequential
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.validation import execution_order, validate

GPU, CPU, H2D, NET = (Lane("main", kind) for kind in (LaneKind.GPU, LaneKind.CPU, LaneKind.H2D, LaneKind.NET))
HOST, ANY_PATH = PlacementPlan(), ExpertPath()
STREAMED = PlacementPlan(default_tier=Tier.STREAMED, ring_slots=3, parts_per_layer=2)


def shape(placed=HOST, microbatches=1, path=ANY_PATH, ranks=(0,)):
    return Shape("decode", "main", LaneKind.GPU, path, microbatches, ranks, placed)


def test_a_host_program_has_each_op_of_each_layer_once():
    ops = lower(shape(microbatches=2), TOY_MODEL)
    kinds = [(op.kind, op.layer, op.microbatch) for op in ops]
    assert len(set(kinds)) == len(kinds)
    assert sum(kind == "mlp" for kind, _, _ in kinds) == 2  # one dense layer, two microbatches
    assert sum(kind == "experts" for kind, _, _ in kinds) == 2 * len(TOY_MODEL.moe_layers)
    assert {op.lane for op in ops if op.kind == "experts"} == {CPU}
    assert {op.lane for op in ops if op.kind == "attention"} == {GPU}


def test_streamed_parts_are_loaded_once_for_all_microbatches():
    ops = lower(shape(STREAMED, microbatches=2), TOY_MODEL)
    loads = [op for op in ops if op.kind == "load"]
    assert len(loads) == 2 * len(TOY_MODEL.moe_layers)
    assert all(op.lane == H2D for op in loads)
    for load in loads:
        users = [op for op in ops if load.id in op.needs]
        assert [op.microbatch for op in users] == [0, 1]
        assert all(op.experts == load.experts for op in users)
    parts = parts_of(STREAMED, TOY_MODEL, 1, 0, Tier.STREAMED)
    assert [e for part in parts for e in part] == list(range(TOY_MODEL.num_experts))


def test_experts_that_are_not_prefetched_stay_on_the_cpu():
    path = ExpertPath(prefetch=tuple(frozenset({0, 1}) for _ in range(TOY_MODEL.num_layers)))
    ops = lower(shape(STREAMED, path=path), TOY_MODEL)
    on_cpu = [op for op in ops if op.kind == "experts" and op.lane == CPU]
    assert {op.experts for op in on_cpu} == {(2, 3, 4, 5, 6, 7)}
    assert {op.experts for op in ops if op.kind == "load"} == {(0, 1)}


def test_a_small_expert_may_stay_behind_after_the_router():
    ops = lower(shape(STREAMED, path=ExpertPath(min_tokens=4)), TOY_MODEL)
    assert {op.experts for op in ops if op.kind == "experts" and op.lane == CPU} == {tuple(range(8))}


def test_the_ring_is_bound_with_release_edges():
    ops = bind_slots(lower(shape(STREAMED, microbatches=2), TOY_MODEL), STREAMED.ring_slots)
    loads = [op for op in ops if op.kind == "load"]
    assert [op.slot for op in loads[:4]] == [SlotUse(0, 0), SlotUse(1, 0), SlotUse(2, 0), SlotUse(0, 1)]
    readers = {op.id for op in ops if op.kind == "experts" and op.slot == SlotUse(0, 0)}
    assert len(readers) == 2 and readers <= set(loads[3].needs)
    validate(ops, ring_slots=3, ranks=(0,))


def test_programs_are_memoised_by_shape():
    planner = Planner(TOY_MODEL, TOY_CPU, AllHost(), Sequential(), PlacementPlan())
    one, two = StepPlan("decode", {"a": 1}), StepPlan("decode", {"b": 1, "c": 1})
    assert planner.program(planner.shape("main", one)) is planner.program(planner.shape("main", two))
    prefill = StepPlan("prefill", {"a": 9})
    assert planner.program(planner.shape("main", prefill)) is not planner.program(planner.shape("main", one))
    assert {op.lane.kind for op in planner.program(planner.shape("main", one)).ops} == {LaneKind.CPU}


def test_equal_placements_share_programs_and_unequal_ones_do_not():
    a, b = PlacementPlan(tier_of={(1, 0): Tier.HOST}), PlacementPlan(tier_of={(1, 0): Tier.HOST})
    assert a == b and hash(a) == hash(b) and a != PlacementPlan()
    with pytest.raises(TypeError):
        a.tier_of[1, 0] = Tier.RESIDENT  # type: ignore[index]


def test_microbatches_are_capped_by_requests():
    class Many(Sequential):
        def num_microbatches(self, step):
            return 8

    planner = Planner(TOY_MODEL, TOY_GPU, AllHost(), Many(), PlacementPlan())
    assert planner.shape("main", StepPlan("decode", {"a": 1, "b": 1})).num_microbatches == 2


def test_expert_parallel_programs_pair_their_collectives():
    placed = PlacementPlan(rank_of={(layer, e): e % 2 for layer in TOY_MODEL.moe_layers for e in range(8)})
    ops = lower(shape(placed, ranks=(0, 1)), TOY_MODEL)
    validate(ops, ring_slots=0, ranks=(0, 1))
    assert {op.lane.worker for op in ops} == {"main", "main.1"}
    one_less = [op for op in ops if not (op.kind == "reduce" and op.rank == 1 and op.layer == 3)]
    lost = next(op for op in ops if op.kind == "reduce" and op.rank == 1 and op.layer == 3)
    one_less = [replace(op, needs=tuple(n for n in op.needs if n != lost.id)) for op in one_less]
    with pytest.raises(PlanError, match="unpaired collective"):
        validate(one_less, ring_slots=0, ranks=(0, 1))


def _ops(*rows):
    return [Op(i, kind, lane, needs=needs, slot=slot) for i, (kind, lane, needs, slot) in enumerate(rows)]


@pytest.mark.parametrize(
    ("ops", "words"),
    [
        (_ops(("embed", GPU, (1,), None), ("head", GPU, (0,), None)), "cycle across lanes"),
        (_ops(("embed", GPU, (3,), None), ("mlp", GPU, (), None), ("head", CPU, (1,), None),
              ("mlp", CPU, (), None)), "cycle across lanes"),  # each lane alone is fine
        (_ops(("embed", GPU, (7,), None)), "needs op 7, which is not in the program"),
        (_ops(("teleport", GPU, (), None)), "unknown kind 'teleport'"),
        (_ops(("load", GPU, (), None)), "belongs on an h2d lane"),
        ([Op(0, "embed", GPU), Op(0, "head", GPU)], "op id 0 occurs more than once"),
        ([Op(0, "embed", GPU, rank=3)], "is on rank 3"),
        (_ops(("load", H2D, (), SlotUse(5, 0))), "uses slot 5, the ring of a rank has 2"),
        (_ops(("experts", GPU, (), SlotUse(0, 0))), "which nothing loads"),
        (_ops(("load", H2D, (), SlotUse(0, 0)), ("load", H2D, (), SlotUse(0, 0))), "loaded twice in generation 0"),
        (_ops(("load", H2D, (), SlotUse(0, 0)), ("experts", GPU, (), SlotUse(0, 0))), "may read slot 0 before"),
        (_ops(("load", H2D, (), SlotUse(0, 0)), ("experts", GPU, (0,), SlotUse(0, 0)),
              ("load", H2D, (), SlotUse(0, 1))), "may overwrite slot 0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_programs_that_cannot_run_are_refused(ops, words):
    with pytest.raises(PlanError, match=words):
        validate(ops, ring_slots=2, ranks=(0,))


def test_ranks_that_meet_collectives_in_different_orders_are_refused():
    lanes = [Lane("main", LaneKind.NET), Lane("main.1", LaneKind.NET)]
    ops = [
        Op(0, "all_gather", lanes[0], 0, layer=0),
        Op(1, "all_gather", lanes[0], 0, layer=1),
        Op(2, "all_gather", lanes[1], 1, layer=1),
        Op(3, "all_gather", lanes[1], 1, layer=0),
    ]
    with pytest.raises(PlanError, match="different orders"):
        validate(ops, ring_slots=0, ranks=(0, 1))


def test_the_execution_order_respects_lanes_and_needs():
    ops = bind_slots(lower(shape(STREAMED, microbatches=2), TOY_MODEL), STREAMED.ring_slots)
    order = execution_order(ops)
    at = {op.id: i for i, op in enumerate(order)}
    assert len(order) == len(ops)
    assert all(at[need] < at[op.id] for op in ops for need in op.needs)
    for lane in {op.lane for op in ops}:
        assert [op.id for op in order if op.lane == lane] == [op.id for op in ops if op.lane == lane]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tier_of": {(99, 0): Tier.HOST}}, "layer 99, expert 0"),
        ({"rank_of": {(1, 2): 1}}, "expert 2 of layer 1 on rank 1, the step runs on \\(0,\\)"),
        ({"parts_per_layer": 0}, "parts_per_layer is 0"),
    ],
)
def test_a_placement_that_would_lose_experts_is_refused(fields, words):
    with pytest.raises(StrategyError, match=words):
        lower(shape(PlacementPlan(**fields)), TOY_MODEL)


def test_a_tier_given_as_text_is_that_tier_and_an_unknown_one_is_named():
    assert PlacementPlan(default_tier="host") == PlacementPlan()  # type: ignore[arg-type]
    with pytest.raises(StrategyError, match="'moon' is not a valid Tier; expected one of resident"):
        PlacementPlan(default_tier="moon")  # type: ignore[arg-type]


def test_ranks_that_the_machine_lacks_are_refused():
    planner = Planner(TOY_MODEL, TOY_CPU, AllHost(), Sequential(), PlacementPlan())
    with pytest.raises(StrategyError, match=r"asks for ranks \(0, 1\), this machine runs steps on \(0,\)"):
        planner.shape("main", StepPlan("decode", {"a": 1}, ranks=(0, 1)))


def test_an_overlap_may_return_a_generator():
    class Lazily(Sequential):
        def arrange(self, ops):
            return (op for op in super().arrange(ops))

    planner = Planner(TOY_MODEL, TOY_CPU, AllHost(), Lazily(), PlacementPlan())
    assert planner.program(planner.shape("main", StepPlan("decode", {"a": 1}))).ops
