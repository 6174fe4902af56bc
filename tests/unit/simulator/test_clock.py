"""The event clock: lane semantics, hand-offs, and the law by which CPU and link share DRAM."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlab.errors import PlanError
from hybridlab.plans import ExpertPath, Lane, LaneKind, Op, PlacementPlan, Program, Shape
from hybridlab.simulator.clock import Dram, EventClock, run_program
from hybridlab.simulator.cost_model import Cost, OpClass
from hybridlab.simulator.programs import Table, tabulate
from hybridlab.simulator.routes import Routes
from hybridlab.strategies.checks import TOY_MODEL

GPU, CPU, H2D = (Lane("main", kind) for kind in (LaneKind.GPU, LaneKind.CPU, LaneKind.H2D))
ROUTES = Routes(TOY_MODEL)
NONE = (0.0, 0.0, 0.0, 0.0)
SECONDS = {"attention": 3.0, "embed": 2.0, "head": 1.0, "mlp": 4.0, "load": 5.0}


def program(*ops: Op) -> Program:
    shape = Shape("decode", "main", LaneKind.GPU, ExpertPath(), 1, (0,), PlacementPlan())
    return Program(shape, ops, ops)


def cost(one: OpClass) -> Cost:
    return Cost(SECONDS[one.kind], 0.0)


def times(*ops: Op, handoffs=NONE):
    return [(span.start_s, span.end_s) for span in run_program(program(*ops), ROUTES, cost, handoffs)]


def test_a_lane_is_first_in_first_out_and_ops_wait_for_their_needs():
    a = Op(0, "attention", GPU)
    b = Op(1, "embed", CPU, needs=(0,))
    c = Op(2, "mlp", GPU)
    d = Op(3, "head", GPU, needs=(1,))
    assert times(a, b, c, d) == [(0, 3), (3, 5), (3, 7), (7, 8)]


def test_an_op_behind_a_waiting_one_waits_too():
    a = Op(0, "attention", CPU)
    b = Op(1, "embed", GPU, needs=(0,))
    c = Op(2, "mlp", GPU)
    assert times(a, b, c) == [(0, 3), (3, 5), (5, 9)]


def test_handing_over_takes_time_between_lanes_and_none_within_one():
    a, b = Op(0, "attention", GPU), Op(1, "embed", CPU, needs=(0,))
    c, d = Op(2, "mlp", GPU, needs=(1,)), Op(3, "head", GPU, needs=(2,))
    e = Op(4, "load", H2D, needs=(3,))
    found = times(a, b, c, d, e, handoffs=(0.0, 0.25, 0.5, 0.125))
    assert found == [(0, 3), (3.25, 5.25), (5.75, 9.75), (9.75, 10.75), (10.875, 15.875)]


def test_what_can_never_run_is_refused_by_name():
    with pytest.raises(PlanError, match="cycle"):
        times(Op(0, "attention", GPU, needs=(1,)), Op(1, "embed", CPU, needs=(0,)))
    with pytest.raises(PlanError, match="needs op 7"):
        times(Op(0, "attention", GPU, needs=(7,)))
    ops = (Op(0, "attention", GPU), Op(1, "embed", CPU))
    table = Table(ops, (0, 0), (OpClass("embed", True, 0),), (0, 1), (GPU, CPU), (((1, 0),), ((0, 0),)), False)
    clock = EventClock(NONE)
    clock.submit(table, [1.0], [0.0])
    with pytest.raises(PlanError, match=r"op 0 .* can never start"):
        clock.advance()


def pair(cpu_bytes, link_bytes, dram, cpu_rate, link_rate):
    """Ends of a CPU op and a copy that start together."""
    ops = (Op(0, "embed", CPU), Op(1, "load", H2D))
    table = tabulate(program(*ops), ROUTES)
    clock = EventClock(NONE, dram)
    run = clock.submit(table, [cpu_bytes / cpu_rate, link_bytes / link_rate], [cpu_bytes, link_bytes])
    clock.advance()
    return run


sizes = st.floats(1.0, 1e4)


@given(sizes, sizes, st.floats(10.0, 1000.0), st.floats(10.0, 1000.0), st.floats(1.0, 2000.0))
def test_two_ops_that_start_together_end_by_the_law(cpu_bytes, link_bytes, cpu_rate, link_rate, both_rate):
    both_rate = max(both_rate, cpu_rate, link_rate)
    run = pair(cpu_bytes, link_bytes, Dram(cpu_rate, both_rate), cpu_rate, link_rate)
    law = max(cpu_bytes / cpu_rate, link_bytes / link_rate, (cpu_bytes + link_bytes) / both_rate)
    assert run.end_s == pytest.approx(law, rel=1e-7)
    for (_, end), alone in zip(run.spans, (cpu_bytes / cpu_rate, link_bytes / link_rate), strict=True):
        assert end >= alone * (1 - 1e-7)


def test_dram_that_is_enough_slows_nobody():
    run = pair(100.0, 50.0, Dram(100.0, 150.0), 100.0, 50.0)
    assert run.spans == [(0.0, 1.0), (0.0, 1.0)]


def test_cpu_lanes_of_two_workers_share_what_the_cpu_reads():
    clock = EventClock(NONE, Dram(100.0, 150.0))
    for worker in ("a", "b"):
        ops = (Op(0, "embed", Lane(worker, LaneKind.CPU)),)
        clock.submit(tabulate(program(*ops), ROUTES), [1.0], [100.0])
    assert len(clock.advance()) == 2
    assert clock.now_s == pytest.approx(2.0)


def test_links_alone_take_nothing_from_each_other():
    clock = EventClock(NONE, Dram(100.0, 100.0))
    for worker in ("a", "b"):
        ops = (Op(0, "load", Lane(worker, LaneKind.H2D)),)
        clock.submit(tabulate(program(*ops), ROUTES), [1.0], [80.0])
    clock.advance()
    assert clock.now_s == 1.0


def test_lanes_persist_from_program_to_program():
    """A second program queues up behind the first on the same lane, and starts when submitted on a free one."""
    clock = EventClock(NONE)
    first = tabulate(program(Op(0, "attention", GPU), Op(1, "embed", CPU)), ROUTES)
    one = clock.submit(first, [4.0, 1.0], [0.0, 0.0])
    assert clock.advance(until_s=2.0) == [] and clock.now_s == 2.0
    two = clock.submit(first, [4.0, 1.0], [0.0, 0.0])
    assert clock.advance() == [one] and clock.advance() == [two]
    assert two.spans == [(4.0, 8.0), (2.0, 3.0)]
