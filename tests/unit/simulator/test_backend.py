"""The run loop on the simulated clock: every strategy, asynchronous workers, the same result each time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from random_programs import MODEL, SHAPE, SLOW

from hybridlab.kv_blocks import BlockPool
from hybridlab.lowering import Planner
from hybridlab.plans import LaneKind, Move, StepPlan, Tier
from hybridlab.request import Request, Status
from hybridlab.request_queue import RequestQueue
from hybridlab.routing import RoutingStats
from hybridlab.serving import Served, serve
from hybridlab.simulator.backend import PLACEHOLDER, SimulatorBackend
from hybridlab.simulator.routes import Routes
from hybridlab.strategies.registry import names, resolve

HARDWARE = SLOW.hardware("slow", gpu=True)
SKEWED = RoutingStats(((40, 9, 8, 7, 6, 5, 1, 1),) * len(MODEL.moe_layers), "skewed", MODEL.moe_layers)


def requests(count=6, prompt=40, output=8, gap_s=0.002):
    return [Request(f"r{i}", tuple(range(prompt + i)), output, i * gap_s) for i in range(count)]


def simulate(
    scheduler: Any = "fcfs",
    placement: Any = "all_host",
    overlap="prefetch",
    *,
    workers=("main",),
    machine=SLOW,
    given=None,
    keep=64,
) -> tuple[Served, SimulatorBackend]:
    placement = resolve("placement", placement)
    placed = placement.place(MODEL, HARDWARE, SKEWED)
    planner = Planner(MODEL, HARDWARE, placement, resolve("overlap", overlap), placed)
    backend = SimulatorBackend(machine, MODEL, SHAPE, Routes(MODEL, SKEWED), workers)
    queue = RequestQueue(given or requests(), BlockPool(200, 16), MODEL, 256)
    return serve(backend, queue, resolve("scheduler", scheduler), planner, keep_span_steps=keep), backend


@pytest.mark.parametrize("overlap", names("overlap"))
@pytest.mark.parametrize("placement", names("placement"))
@pytest.mark.parametrize("scheduler", names("scheduler"))
def test_every_strategy_serves_all_requests_to_their_length(scheduler, placement, overlap):
    served, _ = simulate(scheduler, placement, overlap)
    for record in served.records:
        assert (record.status, record.finish_reason) == (Status.FINISHED, "length")
        assert record.output == [PLACEHOLDER] * 8
        times = [record.arrival_s, record.first_scheduled_s, *record.token_times_s]
        assert times == sorted(times) and times[1] < times[2]
    assert served.duration_s == served.records[-1].finished_s or served.duration_s > 0


def test_the_same_run_is_the_same_to_the_last_bit():
    (one, _), (two, _) = (simulate("chunked_prefill", "lru_cache", "dual_batch") for _ in range(2))
    assert [r.token_times_s for r in one.records] == [r.token_times_s for r in two.records]
    assert one.spans == two.spans


def test_spans_fill_the_steps_that_the_requests_saw():
    served, _ = simulate(keep=10**6)
    ends = {time for record in served.records for time in record.token_times_s}
    heads = [span.end_s for span in served.spans if span.op.kind == "head"]
    assert len(heads) == served.num_steps
    assert max(heads) == pytest.approx(served.duration_s, rel=1e-9)
    for end in ends:
        assert min(abs(end - head) for head in heads) <= 1e-9 * served.duration_s
    none, _ = simulate(keep=0)
    assert not none.spans and none.records[0].token_times_s == served.records[0].token_times_s


def test_time_passes_without_work_and_requests_wait_for_it():
    late = [Request("late", (1, 2, 3), 2, arrival_s=5.0)]
    served, backend = simulate(given=late)
    assert served.records[0].first_scheduled_s == 5.0
    assert backend.now_s == served.duration_s > 5.0


@dataclass(frozen=True)
class Apart:
    """One worker prefills, the other decodes."""

    def schedule(self, queue):
        if queue.worker == "prefill" and queue.waiting:
            return StepPlan("prefill", {queue.waiting[0].id: queue.waiting[0].remaining_prompt})
        if queue.worker == "decode" and queue.running:
            return StepPlan("decode", {r.id: 1 for r in queue.running})
        return None


def test_a_long_prefill_does_not_block_the_decoding_worker():
    given = [Request("short", (1,) * 8, 60, 0.0), Request("long", (1,) * 240, 2, 0.0)]
    served, _ = simulate(Apart(), workers=("prefill", "decode"), given=given, keep=10**6)
    assert all(record.status is Status.FINISHED for record in served.records)
    short, long = served.records
    began_s, first_s = long.first_scheduled_s or 0.0, long.token_times_s[0]
    between = [time for time in short.token_times_s if began_s < time < first_s]
    assert len(between) >= 2
    workers = {span.op.lane.worker for span in served.spans}
    assert workers == {"prefill", "decode"}


def test_two_workers_slow_each_other_by_the_dram_they_share():
    given = [Request("short", (1,) * 8, 200, 0.0), Request("long", (1,) * 240, 2, 0.0)]
    machine = replace(SLOW, host_peak_gb_s=0.2, cpu_tflops=0.01)
    both, alone = (
        simulate(Apart(), workers=("prefill", "decode"), machine=machine, given=g)[0] for g in (given, given[:1])
    )
    short, long = both.records
    ends = np.array(short.token_times_s)
    slower = np.diff(ends) / np.diff(alone.records[0].token_times_s)  # by step: each computes the same in both
    assert long.first_scheduled_s is not None and long.finished_s is not None
    beside = (ends[:-1] >= long.first_scheduled_s) & (ends[1:] <= long.token_times_s[0])
    after = ends[:-1] >= long.finished_s
    assert beside.sum() >= 2 and after.sum() >= 2
    assert (slower[beside] > 1.1).all()
    assert slower[after] == pytest.approx(1.0, rel=1e-6)


def test_workers_that_begin_late_end_in_as_many_events_as_early_ones():
    counts = []
    for arrival_s in (0.0, 1e5):
        given = [Request(f"r{i}", (1,) * 60 * (i + 1), 20, arrival_s + 0.01 * i) for i in range(4)]
        served, backend = simulate(Apart(), workers=("prefill", "decode"), given=given)
        assert all(record.status is Status.FINISHED for record in served.records)
        counts.append(backend.num_events)
    assert counts[1] == pytest.approx(counts[0], rel=0.05)
    assert counts[0] < 30 * MODEL.num_layers * served.num_steps


def test_a_load_is_on_the_link_and_experts_where_their_tier_is():
    served, _ = simulate(placement={"name": "streamed", "ring_slots": 2, "stream_from_tokens": 16}, overlap="prefetch")
    lanes = {(span.op.kind, span.op.tier): span.op.lane.kind for span in served.spans}
    assert lanes["experts", Tier.HOST] is LaneKind.CPU  # short steps
    streamed, _ = simulate(placement={"name": "streamed", "ring_slots": 2, "stream_from_tokens": 1}, overlap="prefetch")
    lanes = {(span.op.kind, span.op.tier): span.op.lane.kind for span in streamed.spans}
    assert lanes["load", Tier.STREAMED] is LaneKind.H2D and lanes["experts", Tier.STREAMED] is LaneKind.GPU


def test_routes_are_counted_as_expected_from_when_they_are_first_asked_for():
    placement, backend = resolve("placement", "all_host"), SimulatorBackend(SLOW, MODEL, SHAPE, Routes(MODEL, SKEWED))
    assert backend.take_routes().tolist() == [[0] * 8] * len(MODEL.moe_layers)
    placed = placement.place(MODEL, HARDWARE, SKEWED)
    planner = Planner(MODEL, HARDWARE, placement, resolve("overlap", "prefetch"), placed)
    serve(
        backend, RequestQueue(requests(1, 99, 2), BlockPool(50, 16), MODEL, 256), resolve("scheduler", "fcfs"), planner
    )
    routes = backend.take_routes()
    assert routes.dtype == np.int64 and abs(int(routes.sum()) - 100 * MODEL.top_k * len(MODEL.moe_layers)) <= 60
    assert (routes[:, 0] > 2 * routes[:, 1]).all()
    assert backend.take_routes().max() <= 1


def test_moves_take_the_time_of_their_copies():
    cache = {
        "name": "lru_cache",
        "update_every_steps": 2,
        "moves_per_update": 6,
        "gpu_gb": 40 * MODEL.expert_bytes / 1e9,
    }
    served, backend = simulate(placement=cache)
    assert all(record.status is Status.FINISHED for record in served.records)
    before_s = backend.now_s
    backend.move([Move(1, 0, Tier.RESIDENT), Move(1, 1, Tier.HOST), Move(2, 3, Tier.RESIDENT)])
    one_s = SLOW.link_latency_us * 1e-6 + MODEL.expert_bytes / (SLOW.link_gb_s * 1e9)
    assert backend.now_s - before_s == pytest.approx(2 * one_s)


def test_a_step_left_behind_is_drained():
    backend = SimulatorBackend(SLOW, MODEL, SHAPE, Routes(MODEL))
    placement = resolve("placement", "all_host")
    planner = Planner(
        MODEL, HARDWARE, placement, resolve("overlap", "prefetch"), placement.place(MODEL, HARDWARE, SKEWED)
    )
    queue = RequestQueue(requests(1), BlockPool(50, 16), MODEL, 256)
    view = queue.view("main", 0.0)
    batch = queue.start(view, StepPlan("prefill", {"r0": 40}), "test")
    assert batch is not None
    backend.submit("main", planner.program(planner.shape("main", batch.step)), batch)
    assert backend.idle() == () and backend.wait(0.0) == []
    assert backend.wait(-1.0) == [] and backend.now_s == 0.0  # time never goes back
    backend.drain()
    assert backend.idle() == ("main",) and backend.now_s > 0
