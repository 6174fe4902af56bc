"""Prompts computed on one worker and decoded on another: the tokens of one process, whoever schedules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab.engine.remote_worker import RemoteWorker
from hybridlab.engine.worker_options import GPU_RESERVE_BYTES, check_workers, share_cores, share_gpus
from hybridlab.engine.workers import PIECE_BYTES, Workers
from hybridlab.errors import ConfigError, MemoryBudgetError, StrategyError
from hybridlab.hardware.gpu import Gpu
from hybridlab.plans import QueueView, RunningRequest, StepPlan, WaitingRequest
from hybridlab.request import Status
from hybridlab.spec import NEVER
from hybridlab.strategies.checks import TOY_GPU
from hybridlab.strategies.scheduler.paper import Paper

BOTH: dict[str, dict[str, Any]] = {"prefill": {}, "decode": {}}
STREAMED = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 3, "parts_per_layer": 2}
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", "workers": BOTH},
    "two decode workers": {"device": "cpu", "workers": {**BOTH, "decode.1": {}}},
    "emulated": {"device": "emulated", "placement": STREAMED, "overlap": "dual_batch", "workers": BOTH},
}


@pytest.fixture(scope="module", params=DEVICES)
def engine(request, oracle) -> Iterator[hl.Engine]:
    with oracle.load(precision="exact", **DEVICES[request.param]) as engine:
        yield engine


def workers_of(served) -> set[str]:
    return {span.op.lane.worker for span in served.spans}


SCHEDULERS: list[Any] = [
    "fcfs",
    {"name": "chunked_prefill", "chunk_tokens": 9},
    {"name": "paper", "short_tokens": 10, "chunk_tokens": 3},
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["fcfs", "chunked_prefill", "paper"])
def test_tokens_are_those_of_one_process(oracle, engine, scheduler):
    served = engine.serve(oracle.requests(), scheduler, keep_span_steps=10**6)
    assert [record.output for record in served.records] == oracle.greedy
    assert {record.status for record in served.records} == {Status.FINISHED}
    assert {"prefill", "decode"} <= workers_of(served)
    for span in served.spans:
        assert 0 <= span.start_s <= span.end_s <= served.duration_s


def test_sampled_tokens_and_logits_are_those_of_one_process(oracle, engine):
    prompt = oracle.prompts[1]["prompt"]
    with oracle.load(precision="exact") as alone:
        options = {"temperature": 1.5, "top_p": 0.9, "seed": 2**31}
        assert engine.generate(prompt, 16, **options) == alone.generate(prompt, 16, **options)
    oracle.check_logits(engine)


def test_a_cache_too_small_for_all_at_once_delays_and_changes_nothing(oracle):
    longest = max(len(request["prompt"]) for request in oracle.prompts) + 24
    small = {"prefill": {"kv_tokens": longest + 16}, "decode": {"kv_tokens": 2 * longest}}
    with oracle.load(precision="exact", workers=small) as engine:
        served = engine.serve(oracle.requests(), {"name": "paper", "short_tokens": 2})
        assert [record.output for record in served.records] == oracle.greedy
        assert engine.memory.kv_tokens < 2 * longest
        too_long = hl.Request("x", (1,) * (longest + 32), 4)
        (record,) = engine.serve([too_long]).records
        assert record.status is Status.REJECTED and "KV tokens, the cache holds" in record.error


def test_beside_others_a_cache_arrives_in_pieces(oracle, monkeypatch):
    taken: list[tuple[int, int]] = []
    take = RemoteWorker.take

    def counted(self, hand_off, blocks):
        taken.append((hand_off.ticket, len(hand_off.blocks)))
        take(self, hand_off, blocks)

    monkeypatch.setattr(RemoteWorker, "take", counted)
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1)
    with oracle.load(precision="exact", workers=BOTH, kv_block_tokens=4) as engine:
        served = engine.serve(oracle.requests(), {"name": "paper", "short_tokens": 1})
        assert [record.output for record in served.records] == oracle.greedy
        tickets = {ticket for ticket, _ in taken}
        assert len(tickets) == len(oracle.prompts) < len(taken)
        assert sum(count for _, count in taken) == sum(-(-len(r["prompt"]) // 4) for r in oracle.prompts)


def test_a_prompt_of_one_token_to_draw_never_leaves_its_worker(oracle, engine):
    prompt = tuple(oracle.prompts[0]["prompt"])
    scheduler = {"name": "paper", "short_tokens": 1}
    served = engine.serve([hl.Request("one", prompt, 1)], scheduler, keep_span_steps=10**6)
    assert served.records[0].output == oracle.greedy[0][:1] and workers_of(served) == {"prefill"}


def test_a_long_prompt_does_not_keep_the_decode_worker(oracle, engine):
    """While a request decodes, the prefill worker computes a prompt in one step: decodes end within that step."""
    first, *others = oracle.prompts
    long = tuple(index % oracle.spec.vocab for index in range(min(800, oracle.spec.max_positions - 2)))
    requests = [
        hl.Request("decoding", tuple(first["prompt"]), 24),
        hl.Request("long", long, 2, after="go", arrival_s=0.0),
        hl.Request("go", tuple(others[0]["prompt"])[:8], 1),
    ]
    scheduler = {"name": "paper", "short_tokens": len(long)}
    served = engine.serve(requests, scheduler, keep_span_steps=10**6)
    assert {record.status for record in served.records} == {Status.FINISHED}
    assert served.records[0].output == oracle.greedy[0]
    prompt_spans = [span for span in served.spans if span.op.lane.worker == "prefill"]
    start_s, end_s = min(s.start_s for s in prompt_spans), max(s.end_s for s in prompt_spans)
    decodes = [s for s in served.spans if s.op.lane.worker == "decode" and start_s < s.start_s and s.end_s < end_s]
    assert any(span.op.kind == "head" for span in decodes)


def test_hooks_see_every_token_of_both_workers(oracle, engine):
    seen: list[tuple[int, int]] = []

    def on_route(layer, entries, ids):
        seen.append((layer, len(ids)))

    served = engine.serve(oracle.requests(), SCHEDULERS[2], on_route=on_route)
    assert [record.output for record in served.records] == oracle.greedy
    computed = sum(len(request["prompt"]) + 23 for request in oracle.prompts)
    for layer in oracle.spec.moe_layers:
        assert sum(count for found, count in seen if found == layer) == computed


def test_memory_counts_the_weights_once_and_what_is_between_the_workers(engine):
    parts = engine.memory.parts
    assert sum("weights" in name for name in parts) == 1 and parts["between workers"] > 0
    assert engine.memory.kv_tokens == 1024 and engine.memory.total_bytes <= engine.memory.budget_bytes


def test_each_worker_has_cores_of_its_own_if_there_are_enough(oracle):
    cores = sorted(os.sched_getaffinity(0))
    assert share_cores({"prefill": 2, "decode": 1}, [4, 5, 6, 7]) == {"prefill": [4, 5], "decode": [6]}
    assert share_cores({"prefill": 2, "decode": 1}, [4, 5]) == {"prefill": [], "decode": []}
    if len(cores) < 2:
        pytest.skip("one core")
    with oracle.load(workers={"prefill": {"threads": 1}, "decode": {"threads": 1}}) as engine:
        assert isinstance(engine.runtime, Workers)
        pids = engine.runtime.pids.values()
        assert [os.sched_getaffinity(pid or 0) for pid in pids] == [{cores[0]}, {cores[1]}]
        for pid in pids:
            assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 2}, "workers is 2, expected for example {'prefill': {'threads': 1}"),
        ({"workers": {"prefill": {}}}, r"workers has \['prefill'\], expected 2 to 8 names"),
        ({"workers": {**BOTH, "other": {}}}, "names that begin with 'prefill' or 'decode'"),
        ({"workers": {**BOTH, "decode": {"cores": 1}}}, "workers.decode has 'cores', expected threads and kv_tokens$"),
        ({"workers": {**BOTH, "decode": {"gpu": 1}}}, "has 'gpu', expected threads and kv_tokens on device 'cpu'"),
        ({"workers": {**BOTH, "decode": {"threads": 0}}}, "workers.decode.threads is 0"),
        ({"workers": BOTH, "worker": "thread"}, "worker is 'thread', which does not go with workers"),
        ({"workers": BOTH, "ranks": 2}, "ranks is 2, which does not go with workers"),
        ({"workers": BOTH, "weight_layout": "tiles"}, "weight_layout is 'tiles', which does not go with workers"),
    ],
)
def test_what_workers_cannot_be_is_one_error(oracle, options, words):
    with pytest.raises(ConfigError, match=words):
        oracle.load(**options)


def test_the_worker_that_does_not_fit_is_named(oracle):
    workers = {"prefill": {"threads": 1}, "decode": {"threads": 1, "kv_tokens": 10**12}}
    with pytest.raises(MemoryBudgetError, match=r"worker decode: .* of memory needed"):
        oracle.load(workers=workers)


GPUS = tuple(Gpu(index, "made up", 80 * 10**9, (9, 0)) for index in range(2))


def shares(vram_gb: float | None = None, **workers: dict[str, Any]) -> dict[str, int]:
    checked = check_workers(workers, 8, "cuda", unused={}, in_files=True)
    assert checked is not None
    return share_gpus(checked, GPUS, vram_gb)


def test_workers_share_the_memory_of_a_gpu():
    room = 80 * 10**9 - GPU_RESERVE_BYTES
    assert shares(prefill={}, decode={}) == {"prefill": room // 2, "decode": room // 2}
    assert shares(prefill={"vram_gb": 50}, decode={}) == {"prefill": 50 * 10**9, "decode": room - 50 * 10**9}
    assert shares(40.0, prefill={}, decode={}) == {"prefill": 20 * 10**9, "decode": 20 * 10**9}
    assert shares(40.0, prefill={"gpu": 1}, decode={}) == {"prefill": 40 * 10**9, "decode": 40 * 10**9}
    three = shares(60, prefill={"gpu": 1}, decode={"gpu": 0}, **{"decode.1": {"gpu": 1, "vram_gb": 10.5}})
    assert three == {"prefill": 49_500_000_000, "decode": 60 * 10**9, "decode.1": 10_500_000_000}


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({"prefill": {"gpu": 2}, "decode": {}}, "workers.prefill.gpu is 2, expected an index from 0 to 1"),
        ({"prefill": {"gpu": True}, "decode": {}}, "workers.prefill.gpu is True, expected an index"),
        ({"prefill": {"vram_gb": -1}, "decode": {}}, "workers.prefill.vram_gb is -1, expected a finite number > 0"),
        ({"prefill": {"cores": 1}, "decode": {}}, "has 'cores', expected threads, kv_tokens, gpu and vram_gb"),
        (
            {"prefill": {"vram_gb": 30}, "decode": {"vram_gb": 10.5}},
            "prefill, decode share GPU 0 with 40.0 GB for them, and their vram_gb add up to 40.5 GB; expected no more$",
        ),
        ({"prefill": {"vram_gb": 39.5}, "decode": {}}, "add up to 39.5 GB; expected no more, and some GB for those"),
    ],
)
def test_what_workers_cannot_have_of_a_gpu_is_one_error(workers, words):
    with pytest.raises(ConfigError, match=words):
        shares(40.0, **workers)


def view(worker: str, **options: Any) -> QueueView:
    waiting = (WaitingRequest("long", 0.0, 1000, computed_tokens=1048), WaitingRequest("short", 1.0, 2047))
    given = {"now_s": 400.0, "waiting": waiting, "running": (), "token_budget": 4096, "free_kv_tokens": 9000, **options}
    return QueueView(worker=worker, kv_block_tokens=16, **given)


def test_the_paper_sends_prompts_where_it_says():
    scheduler, running = Paper(), (RunningRequest("r", 5, 16),)
    assert scheduler.schedule(view("prefill")) == StepPlan("prefill", {"long": 1000})
    assert scheduler.schedule(view("decode", running=running)) == StepPlan("mixed", {"r": 1, "short": 512})
    assert scheduler.schedule(view("main", running=running)) == StepPlan("mixed", {"r": 1, "long": 512})
    ranks = {"rank_sets": ((0, 1), (0,))}
    alone = StepPlan("prefill", {"long": 1000})
    assert scheduler.schedule(view("main", **ranks)) == alone
    assert scheduler.schedule(view("main", last_decode_s=99.0, **ranks)) == alone
    assert scheduler.schedule(view("main", last_decode_s=101.0, **ranks)) == StepPlan(
        "prefill", {"long": 512}, (), (0,)
    )
    measured = replace(TOY_GPU, stream_from_tokens=1000)
    assert scheduler.calibrated(measured).schedule(view("decode")) is None  # both are long there
    assert Paper(2048).calibrated(measured) == Paper(2048) and Paper().calibrated(TOY_GPU) == Paper()
    assert Paper().calibrated(replace(TOY_GPU, stream_from_tokens=NEVER)) == Paper()
    with pytest.raises(StrategyError, match="idle_s: expected a number >= 0, got 'long'"):
        Paper(idle_s="long")  # type: ignore[arg-type]
