"""Two interpreters, one program: the engine's emulated device and the simulator run the same ops in the same order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import pytest

import hybridlab as hl
from hybridlab.checkpoint import make_checkpoint
from hybridlab.kv_blocks import BlockPool
from hybridlab.plans import Lane, Span
from hybridlab.request import Request
from hybridlab.request_queue import RequestQueue
from hybridlab.serving import serve
from hybridlab.simulator.backend import SimulatorBackend
from hybridlab.simulator.machine import load_profile
from hybridlab.simulator.programs import finish_times, tabulate
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape
from hybridlab.strategies.registry import resolve

STREAMED = {"name": "streamed", "stream_from_tokens": 20, "ring_slots": 3, "parts_per_layer": 2}
MIXED = {**STREAMED, "stream_from_tokens": 10**6, "mixed_from_tokens": 20, "min_expert_tokens": 2}
CASES = [("all_host", "dual_batch"), ("all_host", "sequential"), (STREAMED, "prefetch"), (MIXED, "prefetch")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("simulator") / "tiny"
    make_checkpoint(folder, "tiny", dtype="fp8", seed=0)
    return folder


def requests() -> list[Request]:
    return [Request(f"r{i}", tuple(range(1, 30 + i)), 4) for i in range(3)]


def orders(spans: Iterable[Span]) -> dict[Lane, list[tuple]]:
    """Per lane, the ops as they started."""
    found = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start_s):
        op = span.op
        found[op.lane].append((op.kind, op.layer, op.part, op.microbatch, op.tier, op.experts, op.slot))
    return dict(found)


@pytest.mark.parametrize(("placement", "overlap"), CASES, ids=str)
def test_the_same_ops_on_the_same_lanes_in_the_same_order(checkpoint, placement, overlap):
    with hl.load(
        checkpoint, device="emulated", threads=2, placement=placement, overlap=overlap, token_budget=256,
        kv_tokens=1024, prefix_cache=False, quiet=True,
    ) as engine:  # fmt: skip
        real = engine.serve(requests(), "fcfs", keep_span_steps=10**6)
        planner, spec = engine.planner, engine.spec
    backend = SimulatorBackend(load_profile("rtx5090_2x_epyc9355").machine, spec, ModelShape.of(spec), Routes(spec))
    # An answer of the engine's may end early, at a token that ends it; then the steps differ.
    assert all(record.finish_reason == "length" for record in real.records)
    queue = RequestQueue(requests(), BlockPool(64, 16), spec, 256)
    simulated = serve(backend, queue, resolve("scheduler", "fcfs"), planner, keep_span_steps=10**6)
    assert simulated.num_steps == real.num_steps
    assert orders(simulated.spans) == orders(real.spans)
    assert [len(record.output) for record in simulated.records] == [len(record.output) for record in real.records]


@pytest.mark.parametrize(("placement", "overlap"), CASES, ids=str)
def test_with_the_times_that_ops_took_the_clock_is_never_later_than_the_engine(checkpoint, placement, overlap):
    """It has the engine's lanes and needs, and no time between ops: a bound from below on the same step."""
    with hl.load(
        checkpoint, device="emulated", threads=2, placement=placement, overlap=overlap, token_budget=256,
        kv_tokens=1024, prefix_cache=False, quiet=True,
    ) as engine:  # fmt: skip
        served = engine.serve(requests()[:1], "fcfs", keep_span_steps=1)
        planner, routes = engine.planner, Routes(engine.spec)
        program = next(reversed(planner._programs.values()))
    took = {span.op.id: span for span in served.spans}
    assert set(took) == {op.id for op in program.ops}
    table = tabulate(program, routes)
    alone_s = [took[op.id].end_s - took[op.id].start_s for op in table.ops]
    one_class_each = replace(table, cls=tuple(range(len(table.ops))))
    begin_s = min(span.start_s for span in served.spans)
    for op, (start_s, end_s) in zip(table.ops, finish_times(one_class_each, alone_s, (0.0,) * 4), strict=True):
        assert start_s <= took[op.id].start_s - begin_s + 1e-9, op
        assert end_s <= took[op.id].end_s - begin_s + 1e-9, op
