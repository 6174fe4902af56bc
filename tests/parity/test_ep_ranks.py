"""Ranks as processes against the oracles: each streams its own experts over its own link."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab.engine.ranks import Ranks
from hybridlab.lowering import Planner
from hybridlab.plans import EXCHANGES, ExpertPath, PlacementPlan, Tier
from hybridlab.spec import HardwareSpec
from hybridlab.strategies.placement.streamed import Streamed
from hybridlab.strategies.registry import names, resolve

STREAMED = {"name": "streamed", "stream_from_tokens": 4, "ring_slots": 3, "parts_per_layer": 2}
"""Prompts, and decode steps of four requests or five; the last ones are left to the host."""
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "emulated": {"device": "emulated", "placement": STREAMED},
}
SCHEDULERS = ({"name": "fcfs"}, {"name": "chunked_prefill", "chunk_tokens": 9})


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("emulated", 3), ("cpu", 3), ("cpu", 4))]


@pytest.mark.parametrize(("device", "ranks"), [("cpu", 2), ("emulated", 2), ("emulated", 4), *SLOW])
def test_every_plan_gives_the_oracles_tokens_on_ranks(oracle, device, ranks):
    kinds = set()
    with oracle.load(precision="exact", ranks=ranks, **DEVICES[device]) as engine:
        assert isinstance(engine.runtime, Ranks) and len(set(engine.runtime.pids)) == ranks
        given = engine.planner
        # One start for all: exchange and overlap are the program's.
        pairs = product(EXCHANGES, names("overlap")) if ranks == 2 else zip(EXCHANGES, names("overlap"), strict=True)
        for number, (exchange, overlap) in enumerate(pairs):
            scheduler = SCHEDULERS[number % 2]
            placed = replace(given.placed, exchange=exchange)
            chosen = resolve("overlap", overlap)
            engine.planner = Planner(given.model, given.hardware, given.placement, chosen, placed, given.ranks)
            served = engine.serve(oracle.requests(), scheduler, keep_span_steps=1000)
            assert [record.output for record in served.records] == oracle.greedy, (exchange, overlap)
            kinds |= {(span.op.kind, span.op.rank, span.op.tier) for span in served.spans}
        oracle.check_logits(engine)
    # Each rank that has experts loads and computes some of them itself.
    with_experts = {rank for (_, rank) in given.placed.rank_of.items()}
    tiers = {Tier.HOST} if device == "cpu" else {Tier.HOST, Tier.STREAMED}
    assert {(rank, tier) for kind, rank, tier in kinds if kind == "experts"} == {
        (rank, tier) for rank in with_experts for tier in tiers
    }
    assert {rank for kind, rank, _ in kinds if kind == "load"} == (with_experts if device == "emulated" else set())
    for kind in ("attention", "all_gather", "dispatch", "reduce"):
        assert {rank for found, rank, _ in kinds if found == kind} == set(range(ranks))


@dataclass(frozen=True)
class Mixed(Streamed):
    """Some experts cross the link; those that arrive stay on the accelerator if they have three tokens."""

    num_layers: int = 0

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return ExpertPath((frozenset({0, 1, 5, 6}),) * self.num_layers, 3)


@pytest.mark.parametrize("kind", ["mixed", "hot_resident"])
def test_each_rank_has_its_experts_in_several_tiers(oracle, kind):
    spec = oracle.spec
    half_gb = 0.5 * len(spec.moe_layers) * spec.num_experts * spec.expert_bytes / 1e9
    hot = {"name": "hot_resident", "gpu_gb": half_gb, "ring_slots": 2, "stream_from_tokens": 6}
    placement = Mixed(parts_per_layer=2, ring_slots=2, num_layers=spec.num_layers) if kind == "mixed" else hot
    tiers = set()
    with oracle.load(precision="exact", ranks=2, device="emulated", placement=placement, overlap="prefetch") as engine:
        given = engine.planner
        for exchange in EXCHANGES:
            placed = replace(given.placed, exchange=exchange)
            kept = given.placement, given.overlap, placed, given.ranks
            engine.planner = Planner(given.model, given.hardware, *kept)
            served = engine.serve(oracle.requests(), keep_span_steps=1000)
            assert [record.output for record in served.records] == oracle.greedy, exchange
            tiers |= {span.op.tier for span in served.spans if span.op.kind == "experts"}
    assert len(tiers) >= 2


def test_ranks_share_prefixes_and_draw_as_one_process_does(oracle):
    prompt = oracle.prompts[-1]["prompt"]
    again = [hl.Request(str(i), prompt, 12, 0.0, hl.Sampling(0.8, 0.9, seed=i)) for i in range(3)]
    outputs = []
    for ranks in (1, 2):
        with oracle.load(precision="exact", ranks=ranks, device="cpu") as engine:
            first = engine.serve(again, "fcfs")
            outputs.append([record.output for record in first.records])
            texts = [engine.generate(prompt, 8), list(engine.stream(prompt, 8))]
            assert texts == [oracle.greedy[-1][:8]] * 2
    assert outputs[0] == outputs[1]


def test_each_rank_says_what_it_has_sent(oracle):
    with oracle.load(precision="exact", ranks=2, device="cpu") as engine:
        runtime = engine.runtime
        assert isinstance(runtime, Ranks)
        before = runtime.traffic()
        engine.generate(oracle.prompts[-1]["prompt"], 1)
        after = runtime.traffic()
        runtime.wait_mapped()
        mapped = sum(weight_pss_bytes(pid) for pid in runtime.pids)
    size = sum(file.stat().st_size for file in oracle.folder.glob("model*.safetensors"))
    assert 0 < mapped <= 1.05 * size + 4096 * 8  # one copy, in whole pages
    spec, tokens = oracle.spec, len(oracle.prompts[-1]["prompt"])
    moved = [{name: after[rank][name] - before[rank][name] for name in after[rank]} for rank in range(2)]
    assert moved[0]["experts"].sent_bytes == moved[1]["experts"].received_bytes
    assert sum(m["experts"].sent_bytes for m in moved) == len(spec.moe_layers) * tokens * spec.hidden * 8
    assert sum(m["attention"].sent_bytes for m in moved) == tokens * spec.kv_elements_per_token * 4


def weight_pss_bytes(pid: int) -> int:
    """A process's share of the pages of weights that it has mapped."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text())
    weights = [text for text in mappings if ".safetensors" in text.partition("\n")[0]]
    return sum(1024 * int(re.findall(r"^Pss: +(\d+)", text, re.MULTILINE)[0]) for text in weights)
