"""A worker process computes what a worker thread does, token for token, and tells of it alike."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import hybridlab as hl
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.errors import StrategyError
from hybridlab.request import Status
from hybridlab.strategies.placement.lru_cache import LruCache

STREAMED = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 3, "parts_per_layer": 2}
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "emulated": {"device": "emulated", "threads": 2, "placement": STREAMED, "overlap": "dual_batch"},
}


@pytest.fixture(scope="module", params=DEVICES)
def engines(request, oracle) -> Iterator[dict[str, hl.Engine]]:
    """The same engine with its worker in a thread and in a process."""
    options = {"precision": "exact", **DEVICES[request.param]}
    with oracle.load(**options, worker="thread") as thread, oracle.load(**options, worker="process") as process:
        yield {"thread": thread, "process": process}


def serve(oracle, engine, **options):
    return engine.serve(oracle.requests(), {"name": "chunked_prefill", "chunk_tokens": 9}, **options)


def test_tokens_and_spans_are_those_of_a_thread(oracle, engines):
    served = {name: serve(oracle, engine, keep_span_steps=10**6) for name, engine in engines.items()}
    for one in served.values():
        assert [record.output for record in one.records] == oracle.greedy
        assert all(0 <= span.start_s <= span.end_s <= one.duration_s for span in one.spans)
    ops = {name: [span.op for span in one.spans] for name, one in served.items()}
    if engines["thread"].planner.hardware.device == "cpu":
        assert ops["process"] == ops["thread"]
    else:  # lanes finish in any order
        assert sorted(ops["process"], key=repr) == sorted(ops["thread"], key=repr)
    assert served["process"].num_steps == served["thread"].num_steps


def test_logits_and_memory_are_those_of_a_thread(oracle, engines):
    thread, process = engines["thread"], engines["process"]
    assert process.memory == thread.memory
    prompt = oracle.prompts[0]["prompt"]
    assert np.array_equal(process.logits(prompt), thread.logits(prompt))
    oracle.check_logits(process)


def test_sampled_tokens_are_those_of_a_thread(oracle, engines):
    prompt = oracle.prompts[1]["prompt"]
    how = {"temperature": 1.5, "top_p": 0.9, "seed": 2**31}
    drawn = {name: engine.generate(prompt, 16, **how) for name, engine in engines.items()}
    assert drawn["process"] == drawn["thread"] != engines["thread"].generate(prompt, 16)


def test_routing_hooks_see_and_replace_what_they_do_in_a_thread(oracle, engines):
    prompts = [request["prompt"] for request in oracle.prompts]
    found = {name: hl.record_routing(engine, prompts, 4, progress=False) for name, engine in engines.items()}
    assert found["process"].counts == found["thread"].counts
    for mine, theirs in zip(found["process"].chosen, found["thread"].chosen, strict=True):
        assert np.array_equal(mine, theirs)
    spec = engines["thread"].spec

    def others(layer, entries, ids):
        return ((ids + 1) % spec.num_experts).astype(np.int32)

    outputs = {name: [r.output for r in serve(oracle, e, on_route=others).records] for name, e in engines.items()}
    assert outputs["process"] == outputs["thread"] != oracle.greedy


@pytest.mark.parametrize("hook", ["raises", "returns what cannot be"])
def test_a_routing_hook_that_fails_does_so_as_in_a_thread(oracle, engines, hook):
    told = {}
    for name, engine in engines.items():
        calls = []

        def on_route(layer, entries, ids, calls=calls):
            calls.append(layer)
            if len(calls) < 3:
                return None
            if hook == "raises":
                raise ZeroDivisionError("mine")
            return np.zeros((1, 1), np.int64)

        if hook == "raises":
            records = serve(oracle, engine, on_route=on_route).records
            told[name] = [record.error for record in records]
            assert {record.status for record in records} == {Status.FAILED}
            assert all("ZeroDivisionError: mine" in error for error in told[name])
        else:
            with pytest.raises(StrategyError, match=r"on_route, layer \d+: returned int64") as caught:
                serve(oracle, engine, on_route=on_route)
            told[name] = [str(caught.value)]
        assert [record.output for record in serve(oracle, engine).records] == oracle.greedy
    assert told["process"] == told["thread"]


def test_experts_move_in_a_process_and_are_there_again_after_its_end(oracle):
    spec = oracle.spec
    gpu_gb = 0.4 * len(spec.moe_layers) * spec.num_experts * spec.expert_bytes / 1e9
    placement = LruCache(gpu_gb, update_every_steps=2, moves_per_update=6)
    with oracle.load(device="emulated", threads=2, precision="exact", placement=placement, worker="process") as engine:
        planned, runtime, pids = engine.planner.placed, engine.runtime, set()
        assert isinstance(runtime, WorkerProcess)

        def kill(record, token):
            if len(pids) < 2 and len(record.output) == 8 * (len(pids) + 1) and runtime.pid:
                pids.add(runtime.pid)
                os.kill(runtime.pid, signal.SIGKILL)

        first, *others = oracle.requests()
        late = replace(first, id="late", after="0")
        served = engine.serve([first, late], on_event=kill)
        assert len(pids) == 2 and engine.planner.placed != planned
        assert {record.status for record in served.records} <= {Status.FINISHED, Status.FAILED}
        assert [record.output for record in engine.serve([first, *others]).records] == oracle.greedy
