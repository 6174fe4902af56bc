"""Lanes as threads: order, needs, and errors on any lane; nothing waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from time import perf_counter, sleep

import pytest

from hybridlab.engine.lane_threads import LaneThreads
from hybridlab.errors import HybridlabError
from hybridlab.lowering import Planner
from hybridlab.plans import ExpertPath, Lane, LaneKind, Op, PlacementPlan, Program, Shape, StepPlan, Tier
from hybridlab.strategies.checks import TOY_GPU, TOY_MODEL
from hybridlab.strategies.overlap.dual_batch import DualBatch
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.validation import execution_order

GPU, CPU, H2D = (Lane("main", kind) for kind in (LaneKind.GPU, LaneKind.CPU, LaneKind.H2D))
TIMEOUT_S = 30.0
"""Of what must come at once: a failure is told instead of a test that hangs."""


@pytest.fixture
def lanes():
    lanes = LaneThreads()
    yield lanes
    closing = threading.Thread(target=lanes.close, daemon=True)
    closing.start()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive(), "a lane's thread hangs"


def program(*ops: Op) -> Program:
    shape = Shape("decode", "main", LaneKind.GPU, ExpertPath(), 1, (0,), PlacementPlan())
    return Program(shape, ops, execution_order(ops))


def toy_program() -> Program:
    """Two microbatches, two layers of parts through a ring of two slots, the other experts on the CPU."""
    tiers = {(layer, e): Tier.HOST for layer in TOY_MODEL.moe_layers for e in (0, 5)}
    placed = PlacementPlan(Tier.STREAMED, tiers, ring_slots=2, parts_per_layer=3)
    planner = Planner(TOY_MODEL, TOY_GPU, AllHost(), DualBatch(), placed)
    found = planner.program(planner.shape("main", StepPlan("decode", {"a": 1, "b": 1})))
    assert {op.lane for op in found.ops} == {GPU, CPU, H2D} and found.shape.num_microbatches == 2
    return found


def run(lanes, program, execute):
    """`lanes.run` from a thread of its own, as in the engine; what it returns or raises, or a failure if it hangs."""
    result: Future = Future()

    def target():
        try:
            result.set_result(lanes.run(program, execute, perf_counter()))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return result.result(TIMEOUT_S)


def violations(spans, program) -> list[str]:
    """Ops that did not run once, before the one ahead of them in their lane had ended, or before a need had."""
    span_of = {span.op.id: span for span in spans}
    found = [f"op {op.id} ran {n} times" for op in program.ops if (n := [s.op for s in spans].count(op)) != 1]
    last: dict[Lane, Op] = {}
    for op in program.ops:
        ahead = [*op.needs, *([last[op.lane].id] if op.lane in last else [])]
        last[op.lane] = op
        for need in ahead:
            if need in span_of and op.id in span_of and span_of[need].end_s > span_of[op.id].start_s:
                found.append(f"op {op.id} started before op {need} ended")
    return found


@pytest.mark.parametrize("slow", [GPU, CPU, H2D], ids=str)
def test_lanes_keep_their_order_and_needs_whichever_is_slow(lanes, slow):
    toy = toy_program()
    for _ in range(3):
        spans = run(lanes, toy, lambda op: sleep(0.001 * (op.lane == slow)))
        assert violations(spans, toy) == []
        assert [s.start_s for s in spans] == sorted(s.start_s for s in spans) and spans[0].start_s >= 0


def test_lanes_work_at_the_same_time(lanes):
    """Three ops without needs meet: none of them can end before the others have started."""
    meeting = threading.Barrier(3, timeout=TIMEOUT_S)
    spans = run(
        lanes, program(*(Op(i, "mlp", lane) for i, lane in enumerate((GPU, CPU, H2D)))), lambda op: meeting.wait()
    )
    assert max(span.start_s for span in spans) <= min(span.end_s for span in spans)


def test_a_need_that_was_removed_is_seen_in_the_spans(lanes):
    """The reader is fast and the load slow: without the need, the reader runs first."""
    load, reader = Op(0, "load", H2D), Op(1, "experts", GPU, needs=(0,))
    right, planted = program(load, reader), program(load, replace(reader, needs=()))
    has_run = threading.Event()

    def execute(op):
        if op.kind == "experts":
            has_run.set()
        elif not waits_for_need:
            assert has_run.wait(TIMEOUT_S)

    waits_for_need = True
    assert violations(run(lanes, right, execute), right) == []
    has_run.clear()
    waits_for_need = False
    spans = run(lanes, planted, execute)
    spans = tuple(replace(span, op=right.ops[span.op.id]) for span in spans)
    assert violations(spans, right) == ["op 1 started before op 0 ended"]


class Planted(RuntimeError):
    pass


@pytest.mark.parametrize("first", [GPU, CPU, H2D], ids=str)
def test_the_first_ops_lane_runs_on_the_callers_thread_and_the_others_beside_it(lanes, first):
    ops = [Op(i, "mlp", lane) for i, lane in enumerate(sorted((GPU, CPU, H2D), key=lambda lane: lane != first))]
    ran_on = {}
    caller = []

    def execute(op):
        ran_on[op.lane] = threading.get_ident()

    def call():
        caller.append(threading.get_ident())
        return lanes.run(program(*ops), execute, perf_counter())

    result: Future = Future()
    threading.Thread(target=lambda: result.set_result(call()), daemon=True).start()
    assert len(result.result(TIMEOUT_S)) == 3
    assert ran_on[first] == caller[0] and len(set(ran_on.values())) == 3


def test_a_program_without_ops_ends_at_once(lanes):
    assert run(lanes, program(), lambda op: None) == ()


def test_an_error_in_any_op_ends_the_step_and_no_thread(lanes):
    toy = toy_program()
    for bad in toy.ops:
        ran = []

        def execute(op, bad=bad, ran=ran):
            if op.id == bad.id:
                raise Planted(f"op {op.id}")
            ran.append(op.id)

        with pytest.raises(Planted, match=f"op {bad.id}$"):
            run(lanes, toy, execute)
        after = {op.id for op in toy.ops if bad.id in op.needs}
        assert not after & set(ran) and len(set(ran)) == len(ran)
        assert violations(run(lanes, toy, lambda op: None), toy) == []


@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt, SystemExit])
def test_errors_on_several_lanes_are_raised_once(lanes, error):
    meeting = threading.Barrier(3, timeout=TIMEOUT_S)

    def execute(op):
        meeting.wait()
        raise error(f"on {op.lane}")

    several = program(*(Op(i, "mlp", lane) for i, lane in enumerate((GPU, CPU, H2D))))
    with pytest.raises(error, match="on main/"):
        run(lanes, several, execute)
    assert len(run(lanes, several, lambda op: None)) == 3


@pytest.mark.parametrize("gone", [LaneKind.CPU, LaneKind.H2D])
def test_a_lane_that_is_closed_ends_the_step_instead_of_holding_the_others(lanes, gone):
    """At the end of the interpreter, threads are closed in any order while a step may still begin."""
    toy = toy_program()
    run(lanes, toy, lambda op: None)
    lanes._threads[gone].close()
    with pytest.raises(HybridlabError, match="closed"):
        run(lanes, toy, lambda op: None)
    others = [op for op in toy.ops if op.lane.kind is not gone]
    alone = program(*(replace(op, needs=()) for op in others))
    assert len(run(lanes, alone, lambda op: None)) == len(others)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    lanes = LaneThreads()
    run(lanes, toy_program(), lambda op: None)
    started = {thread.name for thread in set(threading.enumerate()) - before}
    assert {name for name in started if name.startswith("hybridlab-")} == {"hybridlab-cpu", "hybridlab-h2d"}
    lanes.close()
    lanes.close()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("hybridlab-")]
