"""The engine against `transformers` on the oracle checkpoints, over schedulers, chunks, threads and batching."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hybridlab import kernels

SCHEDULERS = [
    {"name": name, **({} if chunk is None else {"chunk_tokens": chunk})}
    for name in ("fcfs", "chunked_prefill")
    for chunk in (1, 7, None)
]


@pytest.fixture(scope="module", params=[1, 2], ids="threads{}".format)
def exact(request, oracle):
    with oracle.load(precision="exact", threads=request.param) as engine:
        yield engine


def test_exact_logits_are_within_the_float32_tolerance(oracle, exact):
    oracle.check_logits(exact)


def test_exact_logits_do_not_depend_on_chunks(oracle, exact):
    prompt = oracle.prompts[-1]["prompt"]
    with oracle.load(precision="exact", token_budget=7) as chunked:
        assert np.abs(chunked.logits(prompt) - exact.logits(prompt)).max() <= oracle.expected["tol_f32"]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_exact_greedy_tokens_alone_and_batched(oracle, exact, scheduler):
    requests = oracle.requests()
    assert [r.output for r in exact.serve(requests, scheduler).records] == oracle.greedy
    assert exact.serve(requests[-1:], scheduler).records[0].output == oracle.greedy[-1]


def test_exact_greedy_tokens_survive_preemption(oracle):
    """A cache too small for all: requests are preempted and recomputed, and nothing changes."""
    requests = oracle.requests()
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
    prompt = oracle.prompts[check["request"]]["prompt"]
    with oracle.load(precision="exact") as engine:
        tokens = engine.generate(prompt, 24, stop_token_ids=[check["eos_token_id"]])
    assert tokens == check["greedy"]


@pytest.mark.parametrize("tier", kernels.supported_tiers())
@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_is_within_its_tolerances(oracle, tier, threads, monkeypatch):
    monkeypatch.setenv("HYBRIDLAB_ISA", tier)
    errors, agree = [], []
    with oracle.load(precision="bf16", threads=threads) as engine:
        for request, expected in zip(oracle.prompts, oracle.logits, strict=True):
            got = engine.logits(request["prompt"])
            errors.append(np.abs(got - expected).ravel())
            agree.append(got.argmax(-1) == expected.argmax(-1))
    assert np.median(np.concatenate(errors)) <= oracle.expected["tol_bf16_median"]
    assert np.concatenate(agree).mean() >= oracle.expected["bf16_top1_agree"] - 0.1
