"""A step's end is the same whether every op is timed, layers are skipped, or events are simulated one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import MODEL, SHAPE, SLOW, machines, micros, planned, programs

from hybridlab.errors import PlanError
from hybridlab.plans import ExpertPath, PlacementPlan, StepPlan, Tier
from hybridlab.simulator.clock import Dram, EventClock
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.lone_clock import LoneClock
from hybridlab.simulator.programs import end_s, finish_times, tabulate
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shared_clock import SharedClock, shared_end_s
from hybridlab.strategies.overlap.sequential import Sequential

ROUTES = Routes(MODEL)
DEEP = replace(MODEL, num_layers=30)
ONE = StepPlan("decode", {"a": 1}, ranks=(0,))


def seconds(table, machine, sizes):
    cost = cost_model(machine, SHAPE, sizes)
    return [cost(one).alone_s for one in table.classes]


@settings(deadline=None, max_examples=60)
@given(programs(), machines(), st.tuples(micros, micros))
def test_three_ways_to_the_end_of_a_step(program, machine, sizes):
    table = tabulate(program, ROUTES)
    alone_s, hand = seconds(table, machine, sizes), handoffs_s(machine)
    spans = finish_times(table, alone_s, hand)
    clock = EventClock(hand)  # DRAM without a limit: nothing is shared
    run = clock.submit(table, alone_s, [0.0] * len(alone_s))
    clock.advance()
    for (a, b), (c, d) in zip(spans, run.spans, strict=True):
        assert (a, b) == pytest.approx((c, d), rel=1e-9, abs=1e-15)
    assert end_s(table, alone_s, hand) == pytest.approx(run.end_s, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(programs(), machines(), st.tuples(micros, micros))
def test_lanes_are_first_in_first_out_and_needs_are_done(program, machine, sizes):
    table = tabulate(program, ROUTES)
    alone_s, hand = seconds(table, machine, sizes), handoffs_s(machine)
    spans = {op.id: times for op, times in zip(table.ops, finish_times(table, alone_s, hand), strict=True)}
    assert set(spans) == {op.id for op in program.ops}
    free = {}
    for op in program.ops:
        start, end = spans[op.id]
        assert start >= free.get(op.lane, 0.0)
        assert all(start >= spans[need][1] for need in op.needs)
        free[op.lane] = end


def test_equal_layers_are_skipped():
    table = tabulate(planned(PlacementPlan(), ExpertPath(), "prefetch", ONE), ROUTES)
    assert (table.period, table.end - table.begin) == (4, 4 * 11)  # attention, router, experts, combine
    streamed = PlacementPlan(default_tier=Tier.STREAMED, ring_slots=2, parts_per_layer=2)
    assert tabulate(planned(streamed, ExpertPath(), "prefetch", ONE), ROUTES).period == 7


def test_ranks_meet_in_their_collectives():
    """The slower rank's attention holds the other one's all_gather up."""
    rank_of = {(layer, e): e % 2 for layer in MODEL.moe_layers for e in range(MODEL.num_experts)}
    plan = PlacementPlan(Tier.RESIDENT, {}, rank_of)
    step = StepPlan("decode", {"a": 1}, ranks=(0, 1))
    table = tabulate(planned(plan, ExpertPath(), "prefetch", step), ROUTES)
    alone_s = [1.0] * len(table.classes)
    spans = finish_times(table, alone_s, (0.0,) * 4)
    first = [i for i, op in enumerate(table.ops) if op.kind == "all_gather" and op.layer == 1]
    assert len(first) == 2 and len({spans[i] for i in first}) == 1


@settings(deadline=None, max_examples=60)
@given(programs(ranks=1), machines(), st.tuples(micros, micros))
def test_a_lone_clock_is_an_event_clock_of_one_worker(program, machine, sizes):
    table = tabulate(program, ROUTES)
    cost = cost_model(machine, SHAPE, sizes)
    costs = [cost(one) for one in table.classes]
    ends = []
    for kind in (EventClock, LoneClock):
        clock = kind(handoffs_s(machine), Dram(*dram_bytes_s(machine)))
        assert clock.advance(0.5) == [] and clock.now_s == 0.5
        run = clock.submit(table, [c.alone_s for c in costs], [c.dram_bytes for c in costs])
        assert clock.advance() == [run]
        assert clock.now_s == run.end_s == pytest.approx(max(end for _, end in run.spans), rel=1e-9)
        ends.append(run.end_s)
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(programs(model=DEEP), machines(), st.tuples(micros, micros), st.sampled_from([0.0, 1.0]))
def test_dram_shared_in_deep_models_is_as_if_no_layer_was_skipped(program, machine, sizes, gpu_dram_bytes):
    machine = replace(machine, gpu_dram_bytes=gpu_dram_bytes)  # 1: what computes in the GPU's place reads DRAM as well
    table = tabulate(program, Routes(DEEP))
    cost = cost_model(machine, SHAPE, sizes)
    costs = [cost(one) for one in table.classes]
    alone_s, dram_bytes = [c.alone_s for c in costs], [c.dram_bytes for c in costs]
    hand, dram = handoffs_s(machine), Dram(*dram_bytes_s(machine))
    clock = EventClock(hand, dram)
    run = clock.submit(table, alone_s, dram_bytes)
    clock.advance()
    assert shared_end_s(table, alone_s, dram_bytes, hand, dram) == pytest.approx(run.end_s, rel=1e-8)


@pytest.mark.parametrize("parts", [1, 2])
def test_layers_of_a_mixed_step_are_skipped(parts):
    model = replace(MODEL, num_layers=40)
    path = ExpertPath((frozenset({0, 1, 2, 3}),) * model.num_layers)
    plan = PlacementPlan(default_tier=Tier.STREAMED, ring_slots=2, parts_per_layer=parts)
    one = StepPlan("decode", {"a": 1}, ranks=(0,))
    table = tabulate(planned(plan, path, "prefetch", one, model), Routes(model))
    cost = cost_model(SLOW, SHAPE, [Micro.decode(64.0, 100.0)])
    costs = [cost(each) for each in table.classes]
    hand, dram = handoffs_s(SLOW), Dram(*dram_bytes_s(SLOW))
    clock = SharedClock(hand, dram)
    step = clock.submit(table, [c.alone_s for c in costs], [c.dram_bytes for c in costs])
    assert clock.advance() == [step]
    assert table.shares and step.skips
    assert step.done_s.count(float("inf")) > len(table.ops) / 2  # ops that nobody looked at


def test_a_shared_step_that_can_never_end_is_refused_by_name():
    table = tabulate(
        planned(PlacementPlan(), ExpertPath(), "prefetch", StepPlan("decode", {"a": 1}, ranks=(0,))), ROUTES
    )
    stuck = replace(table, needs=(((1, 0),), *table.needs[1:]))
    with pytest.raises(PlanError, match=r"op \d+ \(\w+ on .*\) can never start: a cycle"):
        shared_end_s(stuck, [1.0] * len(table.classes), [0.0] * len(table.classes), (0.0,) * 4, Dram())


def test_ranks_whose_experts_are_on_the_host_share_its_dram():
    rank_of = {(layer, e): e % 2 for layer in MODEL.moe_layers for e in range(MODEL.num_experts)}
    step = StepPlan("decode", {"a": 1}, ranks=(0, 1))
    host, link = (
        tabulate(planned(PlacementPlan(tier, {}, rank_of, 4), ExpertPath(), "prefetch", step), ROUTES).shares
        for tier in (Tier.HOST, Tier.STREAMED)
    )
    assert host and not link


def test_sharing_dram_makes_a_mixed_step_slower():
    path = ExpertPath((frozenset({0, 1, 2, 3}),) * MODEL.num_layers)
    plan = PlacementPlan(default_tier=Tier.STREAMED, ring_slots=2)
    table = tabulate(planned(plan, path, "prefetch", ONE), ROUTES)
    assert table.shares
    cost = cost_model(SLOW, SHAPE, [Micro.decode(64.0, 100.0)])
    costs = [cost(one) for one in table.classes]
    ends = []
    for total in (1e12, 1e9):
        clock = LoneClock(handoffs_s(SLOW), Dram(1e12, total))
        ends.append(clock.submit(table, [c.alone_s for c in costs], [c.dram_bytes for c in costs]).end_s)
    assert ends[1] > 1.01 * ends[0]


def test_ranks_may_each_be_a_chain_but_not_one_through_both():
    """One rank's all_gather would wait for what the other one computes behind its own: neither would ever start."""
    step = StepPlan("decode", {"a": 1}, ranks=(0, 1))
    table = tabulate(planned(PlacementPlan(Tier.RESIDENT), ExpertPath(), "sequential", step), ROUTES)
    assert {op.rank for op in table.ops} == {0, 1}
    with pytest.raises(PlanError, match="needs op 0 of rank 0: ranks wait for each other in collectives alone"):
        planned(PlacementPlan(Tier.RESIDENT), ExpertPath(), Chained(), step)  # type: ignore[arg-type]


class Chained(Sequential):
    def arrange(self, ops):
        return [*ops[:1], *(replace(op, needs=(*op.needs, before.id)) for before, op in pairwise(ops))]
