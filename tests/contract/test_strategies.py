"""Every built-in strategy passes the checks that its kind ships; broken ones are told what is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest

import hybridlab as hl
from hybridlab.errors import StrategyError
from hybridlab.plans import ExpertPath, Move, PlacementPlan, StepPlan, Tier
from hybridlab.strategies import registry
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill
from hybridlab.strategies.scheduler.fcfs import FCFS

CHECKS = {"scheduler": hl.check_scheduler, "placement": hl.check_placement, "overlap": hl.check_overlap}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in CHECKS for name in registry.names(kind)])
def test_built_in_strategies_pass_their_checks(kind, name):
    CHECKS[kind](name)


@pytest.mark.parametrize("scheduler", [FCFS(1), FCFS(7), ChunkedPrefill(1), ChunkedPrefill(7)], ids=repr)
def test_schedulers_pass_with_small_chunks(scheduler):
    hl.check_scheduler(scheduler, num_trials=10)


class WaitsForever:
    def schedule(self, queue):
        return None


class OverBudget:
    def schedule(self, queue):
        tokens = {r.id: 1 for r in queue.running} | {r.id: r.remaining_prompt for r in queue.waiting}
        return StepPlan("mixed", tokens) if tokens else None


class TwoTokensADecode:
    def schedule(self, queue):
        step = FCFS().schedule(queue)
        return step and replace(step, tokens={i: n + (step.role == "decode") for i, n in step.tokens.items()})


class Dictionary:
    def schedule(self, queue):
        return {r.id: 1 for r in queue.waiting}


class Crashes:
    def schedule(self, queue):
        return queue.waiting[10_000]


class KeepsState:
    turn = 0

    def schedule(self, queue):
        self.turn += 1
        return FCFS(chunk_tokens=1 + self.turn % 3).schedule(queue)


class UnknownRequest:
    def schedule(self, queue):
        return StepPlan("mixed", {"nobody": 1})


class PreemptsForEver:
    def schedule(self, queue):
        holders = tuple(r.id for r in (*queue.waiting, *queue.running) if r.allocated_kv_tokens)
        if holders and queue.waiting and queue.waiting[0].id not in holders:
            return StepPlan("prefill", {queue.waiting[0].id: 1}, holders)
        first = (*queue.waiting, *queue.running)[:1]
        return StepPlan("mixed", {first[0].id: 1}, holders[1:]) if first else None


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (WaitsForever(), "waits for nothing"),
        (OverBudget(), "token_budget is"),
        (TwoTokensADecode(), "a decode computes exactly 1"),
        (Dictionary(), "returned dict, expected StepPlan"),
        (Crashes(), "IndexError"),
        (KeepsState(), "two different steps for the same queue"),
        (UnknownRequest(), "neither waiting nor running"),
        (object(), "has no method schedule"),
        (FCFS, "pass an object"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_broken_scheduler_is_told_what_is_wrong(scheduler, words):
    with pytest.raises(StrategyError, match=words):
        hl.check_scheduler(scheduler)


def said(check, strategy):
    with pytest.raises(StrategyError) as caught:
        check(strategy)
    return str(caught.value)


def test_problems_that_differ_in_numbers_and_ids_alone_are_told_once():
    words = said(hl.check_scheduler, WaitsForever())
    assert words.startswith("scheduler WaitsForever: 1 problem found\n  trial 0 (")
    assert words.count("waits for nothing") == 1 and words.endswith("(and 19 more like this)")
    assert "1 problem found" in said(hl.check_scheduler, TwoTokensADecode())


def test_a_crash_is_told_with_its_line():
    words = said(hl.check_scheduler, Crashes())
    assert re.search(r"in schedule\(\), test_strategies\.py:\d+: return queue\.waiting\[10_000\] \(and 19 more", words)
    assert re.search(r"test_strategies\.py:\d+: return sorted", said(hl.check_overlap, NoSuchAttribute()))


class NoSuchAttribute:
    def num_microbatches(self, step):
        return 1

    def arrange(self, ops):
        return sorted(ops, key=lambda op: op.layers)


class ForgetsQueue:
    def schedule(self):
        return None


class ForgetsHardware(AllHost):
    def place(self, model):  # pyright: ignore
        return PlacementPlan()


class ForgetsOps:
    def num_microbatches(self, step):
        return 1

    def arrange(self):
        return ()


@pytest.mark.parametrize(
    ("check", "strategy", "words"),
    [
        (hl.check_scheduler, ForgetsQueue(), "schedule() is given queue; define it as schedule(self, queue)"),
        (hl.check_placement, ForgetsHardware(), "define it as place(self, model, hardware, routing)"),
        (hl.check_overlap, ForgetsOps(), "define it as arrange(self, ops)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_missing_argument_is_told_by_name(check, strategy, words):
    assert words in said(check, strategy)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
@pytest.mark.parametrize("name", ["fcfs", "chunked_prefill"])
def test_chunk_tokens_are_checked(name, value):
    expected = "an integer >= 1 or None" if name == "fcfs" else "an integer >= 1"
    with pytest.raises(StrategyError) as caught:
        registry.resolve("scheduler", {"name": name, "chunk_tokens": value})
    cls = type(registry.resolve("scheduler", name))
    assert str(caught.value) == f"scheduler {cls.__name__}: chunk_tokens: expected {expected}, got {value!r}"
    with pytest.raises(StrategyError, match="chunk_tokens: expected"):
        cls(value)


def test_chunk_tokens_may_be_none_for_fcfs_alone():
    assert FCFS(None) == FCFS()
    with pytest.raises(StrategyError, match="chunk_tokens"):
        ChunkedPrefill(None)  # pyright: ignore


@dataclass(frozen=True)
class Placed(AllHost):
    plan: object = None
    path: object = ExpertPath()
    moves: object = ()
    update_every_steps: object = 1

    def place(self, model, hardware, routing):
        return self.plan or PlacementPlan()

    def expert_path(self, num_tokens, placed, hardware):
        return self.path

    def update(self, routing):
        return self.moves


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (Placed({"experts": "host"}), "place\\(\\) returned dict"),
        (Placed(PlacementPlan(tier_of={(99, 0): Tier.HOST})), "layer 99, expert 0"),
        (Placed(PlacementPlan(default_tier=Tier.RESIDENT)), "without a GPU"),
        (Placed(PlacementPlan(rank_of={(1, 0): 1})), "expert 0 of layer 1 on rank 1"),
        (Placed(PlacementPlan(ring_slots=-1)), "ring_slots is -1"),
        (Placed(PlacementPlan(parts_per_layer=9)), "parts_per_layer is 9"),
        (Placed(path="all"), "expert_path\\(1\\) returned str"),
        (Placed(path=ExpertPath(prefetch=(frozenset(),))), "prefetches for 1 layers"),
        (Placed(moves=[1]), "expected a tuple of Move"),
        (Placed(moves=(Move(1, 0, Tier.RESIDENT),)), "move of expert 0 of layer 1 to resident: 1 experts would live"),
        (Placed(moves=(Move(0, 3, Tier.HOST),)), "expert 3 of layer 0 to host: the model does not have that expert"),
        (Placed(moves=(Move(1, 0, Tier.STREAMED),)), "the plan has no ring"),
        (Placed(moves=(Move(1, 0, Tier.HOST),), update_every_steps=0), "update_every_steps is missing, or 0"),
        (Placed(update_every_steps=1.5), "update_every_steps is 1.5, expected an int >= 0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_broken_placement_is_told_what_is_wrong(placement, words):
    with pytest.raises(StrategyError, match=words):
        hl.check_placement(placement)


class Overlapping:
    """Arranges with a function; one microbatch."""

    def __init__(self, arrange, microbatches=1):
        self._arrange, self._microbatches = arrange, microbatches

    def num_microbatches(self, step):
        return self._microbatches

    def arrange(self, ops):
        return self._arrange(list(ops))


@pytest.mark.parametrize(
    ("overlap", "words"),
    [
        (Overlapping(lambda ops: ops[1:]), "lost op 0"),
        (Overlapping(lambda ops: [*ops, ops[0]]), "returned op 0 \\(embed\\) twice"),
        (Overlapping(lambda ops: [replace(op, needs=()) for op in ops]), "dropped need"),
        (Overlapping(lambda ops: [replace(op, layer=0) for op in ops]), "beyond its needs"),
        (Overlapping(lambda ops: ops[::-1]), "cycle across lanes"),
        (Overlapping(lambda ops: ops, 0), "num_microbatches\\(\\) returned 0"),
        (Overlapping(lambda ops: None), "arrange\\(\\) returned None, expected ops"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_broken_overlap_is_told_what_is_wrong(overlap, words):
    with pytest.raises(StrategyError, match=words):
        hl.check_overlap(overlap)


@dataclass(frozen=True)
class DualBatch:
    """A user's overlap: two microbatches, interleaved."""

    def num_microbatches(self, step):
        return 2

    def arrange(self, ops):
        return sorted(ops, key=lambda op: (2 * op.layer + op.microbatch + 1.5 * (op.kind == "combine"), op.id))


@dataclass(frozen=True)
class DecodeFirst:
    """A user's scheduler of eleven lines, which does not count KV blocks."""

    chunk: int = 512

    def schedule(self, queue):
        tokens = {r.id: 1 for r in queue.running}
        left = min(queue.token_budget, queue.free_kv_tokens) - len(tokens)
        for r in queue.waiting:
            n = min(r.remaining_prompt, self.chunk, left)
            if n <= 0:
                break
            tokens[r.id] = n
            left -= n
        return StepPlan("mixed", tokens)


def test_short_strategies_of_users_keep_every_contract():
    hl.check_overlap(DualBatch())
    hl.check_scheduler(DecodeFirst())


def test_a_strategy_is_found_by_class_path_and_described_with_its_source():
    found = registry.resolve("scheduler", "hybridlab.strategies.scheduler.fcfs:FCFS")
    assert found == FCFS()
    described = registry.describe(registry.resolve("scheduler", {"name": "chunked_prefill", "chunk_tokens": 3}))
    assert described["fields"] == {"chunk_tokens": 3}
    assert "def schedule" in described["source"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fcsf", "did you mean 'fcfs'"),
        ("nowhere.at_all:X", "cannot import module"),
        (":X", "expected 'module:Class'"),
        ("hybridlab.plans:Nothing", "has no class 'Nothing'"),
        ({"name": "fcfs", "chunk": 3}, "has no field 'chunk'; did you mean 'chunk_tokens'"),
        ({"chunk_tokens": 3}, "either 'name' or 'class'"),
    ],
)
def test_a_strategy_that_cannot_be_found_is_named(value, words):
    with pytest.raises(StrategyError, match=words):
        registry.resolve("scheduler", value)


@pytest.mark.parametrize("text", ["def (", "raise ValueError('two\\nlines')", "1 / 0"])
def test_modules_that_fail_at_import_are_one_line(tmp_path, monkeypatch, text):
    (tmp_path / "broken_strategy.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StrategyError, match=r"cannot import module 'broken_strategy' \(\w+Error: ") as caught:
        registry.resolve("scheduler", "broken_strategy:X")
    assert "\n" not in str(caught.value)
