"""The engine against `transformers` on the oracle checkpoints, over schedulers, chunks, threads and batching."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import hybridlab as hl
from hybridlab import kernels

ORACLES = Path(__file__).parents[1] / "data" / "oracles"
CASES = ("qwen3_bf16", "qwen3_fp8_128")
SCHEDULERS = [
    {"name": name, **({} if chunk is None else {"chunk_tokens": chunk})}
    for name in ("fcfs", "chunked_prefill")
    for chunk in (1, 7, None)
]


class Oracle:
    def __init__(self, case: str) -> None:
        self.folder = ORACLES / case
        self.expected = json.loads((self.folder / "expected.json").read_text())
        self.requests = self.expected["requests"]
        with safe_open(self.folder / "expected.safetensors", "np") as file:
            self.logits = [file.get_tensor(f"logits.{i}") for i in range(len(self.requests))]

    def load(self, **options) -> hl.Engine:
        return hl.load(self.folder, quiet=True, kv_tokens=1024, **options)


@pytest.fixture(scope="module", params=CASES)
def oracle(request) -> Oracle:
    return Oracle(request.param)


@pytest.fixture(scope="module", params=[1, 2], ids="threads{}".format)
def exact(request, oracle):
    with oracle.load(precision="exact", threads=request.param) as engine:
        yield engine


def test_exact_logits_are_within_the_float32_tolerance(oracle, exact):
    for request, expected in zip(oracle.requests, oracle.logits, strict=True):
        got = exact.logits(request["prompt"])
        assert got.dtype == np.float32 and got.shape == expected.shape
        assert np.abs(got - expected).max() <= oracle.expected["tol_f32"]


def test_exact_logits_do_not_depend_on_chunks(oracle, exact):
    prompt = oracle.requests[-1]["prompt"]
    with oracle.load(precision="exact", token_budget=7) as chunked:
        assert np.abs(chunked.logits(prompt) - exact.logits(prompt)).max() <= oracle.expected["tol_f32"]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_exact_greedy_tokens_alone_and_batched(oracle, exact, scheduler):
    requests = [hl.Request(str(i), tuple(r["prompt"]), 24) for i, r in enumerate(oracle.requests)]
    greedy = {str(i): r["greedy"] for i, r in enumerate(oracle.requests)}
    batched = exact.serve(requests, scheduler)
    assert {r.request.id: r.output for r in batched.records} == greedy
    alone = exact.serve(requests[-1:], scheduler)
    assert alone.records[0].output == greedy[requests[-1].id]


def test_exact_greedy_tokens_survive_preemption(oracle):
    """A cache too small for all: requests are preempted and recomputed, and nothing changes."""
    requests = [hl.Request(str(i), tuple(r["prompt"]), 24) for i, r in enumerate(oracle.requests)]
    with oracle.load(precision="exact", threads=1) as engine:
        engine._runtime.num_kv_blocks = 8  # 128 tokens; the five requests need 233
        preempted = _count_preemptions(engine, requests)
    assert preempted > 0


def _count_preemptions(engine, requests) -> int:
    from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill

    class Counting(ChunkedPrefill):
        seen = 0

        def schedule(self, queue):
            step = super().schedule(queue)
            type(self).seen += len(step.preempt) if step else 0
            return step

    oracle = {r.id: None for r in requests}
    served = engine.serve(requests, Counting())
    expected = json.loads((engine.checkpoint.folder / "expected.json").read_text())["requests"]
    for record in served.records:
        assert record.output == expected[int(record.request.id)]["greedy"]
        oracle.pop(record.request.id)
    assert not oracle
    return Counting.seen


def test_generation_ends_with_the_eos_token(oracle):
    check = oracle.expected["eos_check"]
    prompt = oracle.requests[check["request"]]["prompt"]
    with oracle.load(precision="exact") as engine:
        tokens = engine.generate(prompt, 24, stop_token_ids=[check["eos_token_id"]])
    assert tokens == check["greedy"]


@pytest.mark.parametrize("tier", kernels.supported_tiers())
@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_is_within_its_tolerances(oracle, tier, threads, monkeypatch):
    monkeypatch.setenv("HYBRIDLAB_ISA", tier)
    errors, agree = [], []
    with oracle.load(precision="bf16", threads=threads) as engine:
        for request, expected in zip(oracle.requests, oracle.logits, strict=True):
            got = engine.logits(request["prompt"])
            errors.append(np.abs(got - expected).ravel())
            agree.append(got.argmax(-1) == expected.argmax(-1))
    assert np.median(np.concatenate(errors)) <= oracle.expected["tol_bf16_median"]
    assert np.concatenate(agree).mean() >= oracle.expected["bf16_top1_agree"] - 0.1
