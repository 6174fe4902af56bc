"""Steps that run on all ranks, or on the first one alone: tokens are the oracles' whichever way each step goes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import hybridlab as hl
from hybridlab.engine.ranks import Ranks
from hybridlab.errors import StrategyError
from hybridlab.plans import QueueView, StepPlan
from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill
from hybridlab.strategies.scheduler.paper import Paper

STREAMED = {"name": "streamed", "stream_from_tokens": 4, "ring_slots": 3, "parts_per_layer": 2}
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "emulated": {"device": "emulated", "placement": STREAMED, "overlap": "prefetch"},
}


class InTurn:
    """Chunked prefill whose steps run where `turns` says, one after another."""

    def __init__(self, turns: str, chunk_tokens: int = 5) -> None:
        self._inner, self._turns, self.steps = ChunkedPrefill(chunk_tokens), turns, list[StepPlan]()

    def schedule(self, queue: QueueView) -> StepPlan | None:
        step = self._inner.schedule(queue)
        if step is None:
            return None
        alone = self._turns[len(self.steps) % len(self._turns)] == "1"
        self.steps.append(step := replace(step, ranks=queue.rank_sets[alone]))
        return step


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_each_step_may_run_on_all_ranks_or_on_the_first_alone(oracle, device):
    with oracle.load(precision="exact", ranks=3 if device == "cpu" else 2, **DEVICES[device]) as engine:
        for turns in ("1", "1a", "aa1", "1111a"):
            scheduler = InTurn(turns)
            served = engine.serve(oracle.requests(), scheduler, keep_span_steps=1000)
            assert [record.output for record in served.records] == oracle.greedy, turns
            alone = [step for step in scheduler.steps if step.ranks == (0,)]
            assert alone and (turns == "1") == (len(alone) == len(scheduler.steps))
            ranks = {span.op.rank for span in served.spans}
            assert ranks == ({0} if turns == "1" else set(engine.planner.ranks))
            kinds = {span.op.kind for span in served.spans}
            assert ("reduce" in kinds) == (turns != "1")
        oracle.check_logits(engine)


def test_experts_of_other_ranks_are_computed_by_the_host_of_the_one_that_is_alone(oracle):
    with oracle.load(precision="exact", ranks=2, device="emulated", placement="all_resident") as engine:
        served = engine.serve(oracle.requests(), InTurn("1"), keep_span_steps=1000)
        assert [record.output for record in served.records] == oracle.greedy
        found = {(span.op.layer, e): span.op.tier for span in served.spans for e in span.op.experts}
        assert {key: tier == "host" for key, tier in found.items()} == {
            key: rank == 1 for key, rank in engine.planner.placed.rank_of.items()
        }


def test_a_prefix_that_one_rank_computed_is_used_by_all(oracle):
    """The second request finds the first one's blocks, which the other ranks get to know then, and not before."""
    prompt = oracle.prompts[-1]["prompt"]
    spec, block = oracle.spec, 8
    blocks = (len(prompt) - 1) // block
    assert blocks
    with oracle.load(precision="exact", ranks=2, device="cpu", kv_block_tokens=block) as engine:
        assert isinstance(engine.runtime, Ranks)
        first, later = (hl.Request(name, prompt, 1, arrival_s=at_s) for name, at_s in (("first", 0.0), ("later", 0.01)))
        before = engine.runtime.traffic()[0]["attention"].sent_bytes
        scheduler = InTurn("1a", chunk_tokens=512)
        served = engine.serve([first, later], scheduler)
        assert [record.output for record in served.records] == [oracle.greedy[-1][:1]] * 2
        assert served.records[1].cached_tokens == blocks * block
        sent = engine.runtime.traffic()[0]["attention"].sent_bytes - before
    own = [len(prompt) - blocks * block]  # of the later one's last tokens, the first rank computed some
    per_token = spec.kv_elements_per_token * 4
    assert blocks * block * per_token <= sent <= (blocks * block + own[0]) * per_token


@dataclass(frozen=True)
class On:
    ranks: Any

    def schedule(self, queue: QueueView) -> StepPlan | None:
        step = ChunkedPrefill().schedule(queue)
        return step and replace(step, ranks=self.ranks)


def test_other_sets_of_ranks_are_refused_by_name(oracle):
    with oracle.load(precision="exact", ranks=3, device="cpu", threads=1) as engine:
        for ranks in ((1,), (0, 2), (1, 0), (0, 1), (0, 1, 2, 3), (), [0], 0):
            with pytest.raises(StrategyError, match=re.escape(f"ranks is {ranks!r}, expected ")):
                hl.check_scheduler(On(ranks))
            words = f"scheduler On: ranks is {ranks!r}, expected (0, 1, 2) or (0,), or None for all"
            with pytest.raises(StrategyError, match=re.escape(words)):
                engine.serve(oracle.requests(), On(ranks))
        assert engine.serve(oracle.requests(), On(None)).records[0].output == oracle.greedy[0]


def test_the_paper_computes_a_long_prompt_on_all_ranks_and_all_else_on_one(oracle):
    """The prompt begins while nothing has decoded yet; decodes, and what is short, run on the first rank."""
    longest = max(oracle.requests(), key=lambda request: len(request.prompt))
    others = [request for request in oracle.requests() if request.id != longest.id]
    paper = Recorded(Paper(short_tokens=len(longest.prompt), idle_s=1000.0, chunk_tokens=4))
    with oracle.load(precision="exact", ranks=2, device="cpu") as engine:
        served = engine.serve([longest, *others], paper)
    outputs = {record.request.id: record.output for record in served.records}
    assert [outputs[request.id] for request in oracle.requests()] == oracle.greedy
    first, *later = paper.steps
    assert first == StepPlan("prefill", {longest.id: len(longest.prompt)})
    assert {step.ranks for step in later} == {(0,)} and len(later) >= 24


def test_a_scheduler_gets_what_was_measured_on_the_machine(oracle):
    """The paper's, on an engine whose machine streams from a prompt's length on."""
    longest = max(oracle.requests(), key=lambda request: len(request.prompt))
    with oracle.load(precision="exact", ranks=2, device="emulated", placement=STREAMED) as engine:
        engine.planner.hardware = replace(engine.planner.hardware, stream_from_tokens=len(longest.prompt))
        served = engine.serve([longest], "paper", keep_span_steps=1000)
        short = engine.serve([replace(longest, prompt=longest.prompt[1:])], "paper", keep_span_steps=1000)
    assert {span.op.rank for span in served.spans} == {0, 1} and {span.op.rank for span in short.spans} == {0}


@dataclass(frozen=True)
class Recorded:
    """Any scheduler, and its steps."""

    inner: Any
    steps: list[StepPlan] = field(default_factory=list)

    def schedule(self, queue: QueueView) -> StepPlan | None:
        step = self.inner.schedule(queue)
        self.steps.extend([] if step is None else [step])
        return step
