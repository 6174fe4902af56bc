"""Step maps: the vectorised clocks give what the event clock gives, and refuse what cannot be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import MODEL, SHAPE, SLOW, machines, micros, planned, programs

from hybridlab.errors import ConfigError, MemoryBudgetError, PlanError
from hybridlab.plans import ExpertPath, LaneKind, PlacementPlan, StepPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.simulator.clock import Dram, EventClock
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.step_maps import CHUNK, StepMap
from hybridlab.simulator.vector_clock import queued

pytest.importorskip("jax", reason="step maps need jax")
ONE = StepPlan("decode", {"a": 1})
HOST = planned(PlacementPlan(), ExpertPath(), "prefetch", ONE)
MIXED_PATH = ExpertPath((frozenset({0, 1, 2, 3}),) * MODEL.num_layers, 2)
MIXED = planned(PlacementPlan(default_tier=Tier.STREAMED, ring_slots=2), MIXED_PATH, "prefetch", ONE)


def on_the_event_clock(table, machine: Machine, shape, sizes) -> float:
    cost = cost_model(machine, shape, sizes)
    costs = [cost(one) for one in table.classes]
    clock = EventClock(handoffs_s(machine), Dram(*dram_bytes_s(machine)))
    run = clock.submit(table, [c.alone_s for c in costs], [c.dram_bytes for c in costs])
    clock.advance()
    return float(run.end_s)


def stacked(kind, each):
    return kind(**{f.name: np.array([getattr(one, f.name) for one in each], float) for f in fields(kind)})


@settings(deadline=None, max_examples=25)
@given(programs(ranks=1), st.lists(st.tuples(machines(), micros, micros), min_size=4, max_size=4), st.floats(2.0, 16.0))
def test_equal_to_the_event_clock(program, configurations, bits):
    shape = SHAPE.with_bits(bits)
    sizes = [stacked(Micro, [c[1 + i] for c in configurations]) for i in range(program.shape.num_microbatches)]
    steps = StepMap(program, MODEL)
    found = steps(stacked(Machine, [c[0] for c in configurations]), shape, sizes)
    wanted = [
        on_the_event_clock(steps.table, machine, shape, both[: program.shape.num_microbatches])
        for machine, *both in configurations
    ]
    assert found == pytest.approx(wanted, rel=1e-6)


@settings(deadline=None, max_examples=12)
@given(programs(ranks=2), machines(), micros)
def test_ranks_that_do_not_share_dram_are_equal_too(program, machine, size):
    sizes = [size] * program.shape.num_microbatches
    steps = StepMap(program, MODEL)
    kinds = [lane.kind for lane in steps.table.lanes]
    if steps.table.shares and max(kinds.count(LaneKind.CPU), kinds.count(LaneKind.H2D)) > 1:
        with pytest.raises(PlanError, match="one CPU lane and one link"):
            queued(steps.table)
        return
    found = steps(machine, SHAPE, sizes)
    assert found == pytest.approx([on_the_event_clock(steps.table, machine, SHAPE, sizes)], rel=1e-6)


def test_more_configurations_than_a_chunk_and_one_are_the_same_numbers():
    count = CHUNK + 3
    link, context = np.linspace(0.1, 9.0, count), np.linspace(1.0, 999.0, count)
    steps = StepMap(MIXED, MODEL)
    found = steps(replace(SLOW, link_gb_s=link), SHAPE, [Micro.decode(64.0, context)])
    assert found.shape == (count,) and found.dtype == np.float64
    for at in (0, 17, CHUNK - 1, CHUNK, count - 1):
        alone = steps(replace(SLOW, link_gb_s=link[at]), SHAPE, [Micro.decode(64.0, context[at])])
        assert alone.shape == (1,) and alone[0] == pytest.approx(found[at], rel=1e-12)


def test_recorded_routing_is_used():
    row = (1000, 1000, 1, 1, 1, 1, 1, 1)
    skewed = RoutingStats((row,) * len(MODEL.moe_layers), "skewed", MODEL.moe_layers)
    slow, size = replace(SLOW, host_peak_gb_s=0.01), [Micro.decode(4.0, 10.0)]
    uniform, recorded = (StepMap(HOST, MODEL, routing)(slow, SHAPE, size)[0] for routing in (None, skewed))
    assert recorded < 0.8 * uniform


def test_arrays_of_models_and_bits():
    shape = replace(SHAPE, expert_bits=np.array([16.0, 8.0, 4.5]))
    found = StepMap(HOST, MODEL)(replace(SLOW, host_peak_gb_s=0.01), shape, [Micro.decode(4.0, 10.0)])
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize(
    ("machine", "sizes", "message"),
    [
        ({"link_gb_s": np.array([1.0, 0.0])}, [Micro.decode(1.0, 1.0)], r"machine.link_gb_s is 0.0, .* above 0"),
        ({"host_peak_gb_s": 0.0}, [Micro.decode(1.0, 1.0)], r"machine.host_peak_gb_s is 0.0"),
        ({"gpu_op_us": np.array([1.0, np.nan])}, [Micro.decode(1.0, 1.0)], r"machine.gpu_op_us is nan"),
        ({"cpu_overlap": 3.0}, [Micro.decode(1.0, 1.0)], r"machine.cpu_overlap is 3.0, .* at most 1"),
        ({"cpu_tflops": "many"}, [Micro.decode(1.0, 1.0)], r"machine.cpu_tflops is 'many', expected numbers"),
        ({"cpu_tflops": np.ones((2, 2))}, [Micro.decode(1.0, 1.0)], r"machine.cpu_tflops has shape \[2, 2\]"),
        ({"cpu_tflops": np.ones(2), "link_gb_s": np.ones(3)}, [Micro.decode(1.0, 1.0)], r"machine.link_gb_s has shape"),
        ({}, [Micro.decode(-1.0, 1.0)], r"micros\[0\].tokens is -1.0"),
        ({}, [], r"0 microbatches given, the program has 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(machine, sizes, message):
    with pytest.raises(ConfigError, match=f"step map: {message}"):
        StepMap(HOST, MODEL)(replace(SLOW, **machine), SHAPE, sizes)


def test_a_model_larger_than_the_memory_is_refused_and_told():
    steps, size = StepMap(HOST, MODEL), [Micro.decode(1.0, 1.0)]
    machine = replace(SLOW, host_memory_gb=np.array([64.0, 1e-6, 32.0]))
    assert steps.fits(machine, SHAPE).tolist() == [True, False, True]
    with pytest.raises(MemoryBudgetError, match="memory of 1 of 3 configurations, the first is 1"):
        steps(machine, SHAPE, size)


def test_jax_outside_stays_as_it_was():
    import jax

    before = jax.numpy.ones(1).dtype
    StepMap(HOST, MODEL)(SLOW, SHAPE, [Micro.decode(1.0, 1.0)])
    assert jax.numpy.ones(1).dtype == before == np.float32


WITHOUT_JAX = """
import sys
sys.path[:], sys.modules["jax"] = PATH, None
import hybridlab.bench.simulated_serving
from random_programs import MODEL, SHAPE, SLOW, planned
from hybridlab.plans import ExpertPath, PlacementPlan, StepPlan
from hybridlab.simulator.cost_model import Micro
from hybridlab.simulator.step_maps import StepMap

program = planned(PlacementPlan(), ExpertPath(), "prefetch", StepPlan("decode", {"a": 1}))
try:
    StepMap(program, MODEL)(SLOW, SHAPE, [Micro.decode(1.0, 1.0)])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_without_jax_the_error_says_how_to_get_it():
    code = WITHOUT_JAX.replace("PATH", repr(sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("ConfigError step maps need jax") and "hybridlab[jax]" in done.stdout, done.stderr


@pytest.mark.parametrize("program", [HOST, MIXED], ids=["scanned", "event by event"])
def test_a_sensitivity_is_what_a_small_change_does(program):
    steps, sizes = StepMap(program, MODEL), [Micro.decode(64.0, 500.0)]
    machine = replace(SLOW, link_gb_s=0.005)
    found = steps.sensitivity(machine, SHAPE, sizes)
    assert set(found) == {each.name for each in fields(Machine)}
    for name in ("host_peak_gb_s", "cpu_tflops", "gpu_read_gb_s", "link_gb_s", "gpu_op_us", "handoff_gpu_to_cpu_us"):
        value = getattr(machine, name)
        less, more = steps(replace(machine, **{name: value * np.array([1 - 1e-4, 1 + 1e-4])}), SHAPE, sizes)
        assert found[name] == pytest.approx(
            (more - less) / (2e-4 * steps(machine, SHAPE, sizes)[0]), rel=1e-3, abs=1e-6
        )
    assert found["host_memory_gb"] == 0 and found["gpu_op_us"] > 0
    assert found["link_gb_s"] < 0 if program is MIXED else found["link_gb_s"] == 0
    with pytest.raises(ConfigError, match="a sensitivity is of one"):
        steps.sensitivity(replace(machine, link_gb_s=np.ones(2)), SHAPE, sizes)
