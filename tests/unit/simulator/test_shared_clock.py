"""Steps of several workers side by side: as on the event clock, with layers skipped, however late it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import MODEL, SHAPE, SLOW, machines, micros, planned, programs

from hybridlab.plans import ExpertPath, PlacementPlan, StepPlan, Tier
from hybridlab.simulator.clock import Dram, EventClock
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.programs import Table, tabulate
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shared_clock import SharedClock

DEEP = replace(MODEL, num_layers=30)
STEP = StepPlan("decode", {"a": 1}, ranks=(0,))


def of(worker: str, program, machine, sizes, model=DEEP) -> tuple[Table, list[float], list[float]]:
    table = tabulate(program, Routes(model))
    costs = [cost_model(machine, SHAPE, sizes)(one) for one in table.classes]
    lanes = tuple(replace(lane, worker=worker + lane.worker) for lane in table.lanes)
    return replace(table, lanes=lanes), [c.alone_s for c in costs], [c.dram_bytes for c in costs]


def serve(clock: EventClock | SharedClock, long, short, again: int, wait_s: float):
    """A long step beside short ones, the first of which begins at `wait_s`; returns them as they ended."""
    steps, ended = [clock.submit(*long)], []
    ended += clock.advance(wait_s)
    for _ in range(again):
        steps.append(clock.submit(*short))
        while steps[-1] not in ended:
            ended += clock.advance()
    while len(ended) < len(steps):
        ended += clock.advance()
    return steps


@settings(deadline=None, max_examples=40)
@given(
    programs(model=DEEP), programs(model=DEEP), machines(), st.tuples(micros, micros), st.tuples(micros, micros),
    st.sampled_from([1.0, 10.0, 300.0]), st.floats(0.0, 1e-2),
)  # fmt: skip
def test_steps_side_by_side_are_as_if_no_layer_was_skipped(first, second, machine, large, small, times, wait_s):
    long, short = of("prefill", first, machine, large), of("decode", second, machine, small)
    long = long[0], [times * each for each in long[1]], [times * each for each in long[2]]
    kinds = EventClock, SharedClock
    slow, fast = (
        serve(kind(handoffs_s(machine), Dram(*dram_bytes_s(machine))), long, short, 3, wait_s) for kind in kinds
    )
    for one, other in zip(slow, fast, strict=True):
        took_s = one.end_s - one.start_s
        assert other.end_s == pytest.approx(one.end_s, rel=1e-6)
        for (a, b), (c, d) in zip(one.spans, other.spans, strict=True):
            assert (a, b) == pytest.approx((c, d), rel=1e-6, abs=1e-6 * took_s)


def two_workers(num_layers: int) -> tuple[SharedClock, int]:
    """Short steps on the CPU beside a long step that streams; returns the clock and how many steps there were."""
    model = replace(MODEL, num_layers=num_layers)
    streamed = PlacementPlan(default_tier=Tier.STREAMED, ring_slots=MODEL.num_experts)
    on_cpu, sizes = PlacementPlan(), [Micro.decode(1.0, 100.0)]
    long = of("prefill", planned(streamed, ExpertPath(), "prefetch", STEP), SLOW, [Micro.prefill(256.0)])
    short = of("decode", planned(on_cpu, ExpertPath(), "prefetch", STEP, model), SLOW, sizes, model)
    long = long[0], [3000 * each for each in long[1]], [3000 * each for each in long[2]]
    clock = SharedClock(handoffs_s(SLOW), Dram(*dram_bytes_s(SLOW)))
    return clock, len(serve(clock, long, short, 20, 0.0))


def test_layers_beside_a_long_op_are_skipped():
    (few, _), (many, num_steps) = two_workers(30), two_workers(120)
    assert many.num_events < 1.2 * few.num_events < 60 * num_steps


@pytest.mark.parametrize("kind", [EventClock, SharedClock])
@pytest.mark.parametrize("now_s", [0.0, 1e6])
def test_short_ops_end_however_late_it_is(kind, now_s, monkeypatch):
    """A million seconds and one nanosecond more are as far apart as rounding says: it must not be waited for."""
    program, passed, pass_ = planned(PlacementPlan(), ExpertPath(), "prefetch", STEP), [], kind._pass
    one, other = (of(worker, program, SLOW, [Micro.decode(1.0, 9.0)]) for worker in "ab")
    most = 3 * len(program.ops)

    def counted(clock, time_s):
        passed.append(time_s)
        assert len(passed) <= most, "nothing ends"
        return pass_(clock, time_s)

    monkeypatch.setattr(kind, "_pass", counted)
    clock = kind((0.0,) * 4, Dram(1e9, 1e9), now_s)
    steps = {
        clock.submit(table, [1e-9 * (1.3 + 0.1 * i) for i in range(len(alone_s))], size)
        for table, alone_s, size in (one, other)
    }
    ended = set()
    while steps - ended:
        ended |= set(clock.advance())
    assert len(passed) > len(program.ops) / 2
