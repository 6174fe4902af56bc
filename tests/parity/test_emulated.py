"""device="emulated" against the oracles: every placement under every overlap gives the tokens of device="cpu"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

import hybridlab as hl
from hybridlab.plans import ExpertPath, Span, Tier
from hybridlab.spec import ModelSpec
from hybridlab.strategies import registry
from hybridlab.strategies.placement.streamed import Streamed

RESIDENT, STREAMED, HOST = Tier.RESIDENT, Tier.STREAMED, Tier.HOST


@dataclass(frozen=True)
class Mixed(Streamed):
    """Experts that arrive stay on the accelerator if they have `min_tokens` tokens; `prefetch` None: all arrive."""

    prefetch: tuple[frozenset[int], ...] | None = None
    min_tokens: int = 0

    def expert_path(self, num_tokens, placed, hardware):
        return ExpertPath(self.prefetch, self.min_tokens)


def some_of(spec: ModelSpec) -> tuple[frozenset[int], ...]:
    """A third of each layer's experts, other ones in each layer."""
    return tuple(frozenset(range(layer % 3, spec.num_experts, 3)) for layer in range(spec.num_layers))


def subset(spec: ModelSpec) -> Mixed:
    return Mixed(parts_per_layer=2, prefetch=some_of(spec))


def most_of(spec: ModelSpec) -> float:
    """1e9 bytes that hold two experts of three."""
    return 0.7 * len(spec.moe_layers) * spec.num_experts * spec.expert_bytes / 1e9


# name -> (placement, tiers that must have computed)
PLACEMENTS: dict[str, tuple[Any, set[Tier]]] = {
    "all_host": ("all_host", {HOST}),
    "all_resident": ("all_resident", {RESIDENT}),
    "streamed": ({"name": "streamed", "stream_from_tokens": 1}, {STREAMED}),
    "streamed, prompts only": (
        {"name": "streamed", "stream_from_tokens": 6, "ring_slots": 3, "parts_per_layer": 3},
        {STREAMED, HOST},
    ),
    "hot_resident": (lambda spec: {"name": "hot_resident", "gpu_gb": most_of(spec)}, {RESIDENT, HOST}),
    "hot_resident, streaming": (
        lambda spec: {
            "name": "hot_resident",
            "gpu_gb": most_of(spec),
            "ring_slots": 2,
            "parts_per_layer": 2,
            "stream_from_tokens": 6,
        },
        {RESIDENT, STREAMED, HOST},
    ),
    "lru_cache": (
        lambda spec: {"name": "lru_cache", "gpu_gb": most_of(spec) / 2, "update_every_steps": 3},
        {RESIDENT, HOST},
    ),
    "layer_split": (lambda spec: {"name": "layer_split", "gpu_gb": most_of(spec)}, {RESIDENT, HOST}),
    "mixed": (Mixed(parts_per_layer=2, min_tokens=3), {STREAMED, HOST}),
    "subset": (subset, {STREAMED, HOST}),
}
OVERLAPS = registry.names("overlap")

SCHEDULERS = [
    {"name": name, "chunk_tokens": chunk} for name, chunk in product(("fcfs", "chunked_prefill"), (6, 9, 100))
]


def load(oracle, placement, overlap, **options) -> hl.Engine:
    placement = placement(oracle.spec) if callable(placement) else placement
    own = {"precision": "exact", "threads": 2}
    return oracle.load(device="emulated", placement=placement, overlap=overlap, **{**own, **options})


def serve(oracle, engine, scheduler: Any = "fcfs") -> Sequence[Span]:
    """All requests together; their tokens are the oracle's."""
    served = engine.serve(oracle.requests(), scheduler, keep_span_steps=10**6)
    assert [record.output for record in served.records] == oracle.greedy
    return served.spans


def check_lanes(oracle, spans: Sequence[Span], name: str, overlap: str) -> None:
    """What was to be tested did run."""
    tiers = PLACEMENTS[name][1]
    if name == "layer_split" and len(oracle.spec.moe_layers) == 1:
        tiers = {HOST}  # no whole layer fits
    experts = [span.op for span in spans if span.op.kind == "experts"]
    assert {op.tier for op in experts} == tiers
    assert {op.lane.kind.value for op in experts} == {"cpu" if tier is HOST else "gpu" for tier in tiers}
    assert (STREAMED in tiers) == any(span.op.kind == "load" for span in spans)
    assert {op.microbatch for op in experts} == ({0, 1} if overlap == "dual_batch" else {0})


def test_no_placement_is_forgotten():
    assert set(registry.names("placement")) <= {name.partition(",")[0] for name in PLACEMENTS}


PAIRS = [
    pytest.param(placement, overlap, SCHEDULERS[(i + 2 * j) % len(SCHEDULERS)], id=f"{placement}-{overlap}")
    for (i, placement), (j, overlap) in product(enumerate(PLACEMENTS), enumerate(OVERLAPS))
]


@pytest.mark.parametrize(("name", "overlap", "scheduler"), PAIRS)
def test_every_placement_under_every_overlap(oracle, name, overlap, scheduler):
    with load(oracle, PLACEMENTS[name][0], overlap) as engine:
        oracle.check_logits(engine)
        check_lanes(oracle, serve(oracle, engine, scheduler), name, overlap)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_full_product(oracle, name, overlap):
    for token_budget, threads in ((2048, 2), (19, 3)):
        with load(oracle, PLACEMENTS[name][0], overlap, token_budget=token_budget, threads=threads) as engine:
            oracle.check_logits(engine)
            for scheduler in SCHEDULERS:
                check_lanes(oracle, serve(oracle, engine, scheduler), name, overlap)


RINGS = list(product((1, 2, 5), (1, 3, 8)))


def check_ring(oracle, slots: int, parts: int, overlap: str) -> None:
    placement = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": slots, "parts_per_layer": parts}
    with load(oracle, placement, overlap) as engine:
        oracle.check_logits(engine)
        spans = serve(oracle, engine)
    check_lanes(oracle, spans, "streamed", overlap)
    loads = [span.op for span in spans if span.op.kind == "load"]
    assert {op.slot.slot for op in loads if op.slot} == set(
        range(min(slots, len({(op.layer, op.part) for op in loads})))
    )
    assert {op.part for op in loads} == set(range(min(parts, oracle.spec.num_experts)))


@pytest.mark.parametrize(("slots", "parts"), RINGS)
def test_rings_of_any_size(oracle, slots, parts):
    check_ring(oracle, slots, parts, OVERLAPS[(RINGS.index((slots, parts)) // 3 + parts) % len(OVERLAPS)])


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_the_smallest_ring_under_every_overlap(oracle, overlap):
    """Two microbatches share the one slot, part by part; a sequence of ops loads a part when its turn has come."""
    check_ring(oracle, 1, 8, overlap)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(("slots", "parts"), RINGS)
def test_every_ring_under_every_overlap(oracle, slots, parts, overlap):
    check_ring(oracle, slots, parts, overlap)


@pytest.mark.parametrize("min_tokens", [2, 5, 10**6])
@pytest.mark.parametrize("arrive", ["all", "some"])
def test_ring_and_cpu_share_the_experts_that_arrive(oracle, min_tokens, arrive):
    """Each (layer, expert) of a step is computed once: by the ring if it has enough tokens, else by the CPU."""
    everything = set(range(oracle.spec.num_experts))
    prefetch = None if arrive == "all" else some_of(oracle.spec)
    placement = Mixed(3, 3, prefetch=prefetch, min_tokens=min_tokens)
    with load(oracle, placement, "prefetch") as engine:
        calls = spy(engine)
        oracle.check_logits(engine)
        serve(oracle, engine)
    num_streamed = 0
    for layer, chosen, computed in calls.values():
        arrived = everything if prefetch is None else prefetch[layer]
        enough = {e for e in arrived if chosen[e] >= min_tokens}
        assert sum(computed.values(), Counter()) == chosen
        assert set(computed[STREAMED]) == enough
        assert set(computed[HOST]) == set(chosen) - enough
        num_streamed += len(enough)
    assert (num_streamed > 0) == (min_tokens < 10**6)


def spy(engine: hl.Engine) -> dict[int, tuple[int, Counter[int], dict[Tier, Counter[int]]]]:
    """Fills while `engine` runs: per choice of a router its layer, the routes of each expert, and who computed them."""
    found: dict[int, tuple[int, Counter[int], dict[Tier, Counter[int]]]] = {}
    runtime: Any = engine.runtime
    device = runtime._device
    route, kept = device.model.router, []

    def router(layer, x_TH):
        routed = route(layer, x_TH)
        kept.append(routed.weights)  # so that its id stays its own
        chosen = Counter(routed.expert_ids.flatten().tolist())
        found[id(routed.weights)] = layer, chosen, {HOST: Counter(), STREAMED: Counter()}
        return routed

    def watched(tier, compute):
        def call(op, routed):
            mine = set(op.experts)
            computed = (e for e in routed.expert_ids.flatten().tolist() if e in mine)
            found[id(routed.weights)][2][tier].update(computed)
            return compute(op, routed)

        return call

    device.model.router = router
    for tier, compute in list(device.experts.items()):
        device.experts[tier] = watched(tier, compute)
    return found


@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_bf16_is_within_its_tolerances_and_the_same_every_time(oracle, layout):
    """Lanes finish in any order, sums are made in one; packed weights pass through the ring as they are stored."""
    errors, agree = [], []
    placement = Mixed(ring_slots=2, parts_per_layer=4, min_tokens=2)
    with load(oracle, placement, "prefetch", precision="bf16", weight_layout=layout) as engine:
        for request, expected in zip(oracle.prompts, oracle.logits, strict=True):
            got = engine.logits(request["prompt"])
            for _ in range(3):
                np.testing.assert_array_equal(engine.logits(request["prompt"]), got)
            errors.append(np.abs(got - expected).ravel())
            agree.append(got.argmax(-1) == expected.argmax(-1))
    assert np.median(np.concatenate(errors)) <= oracle.expected["tol_bf16_median"]
    assert np.concatenate(agree).mean() >= oracle.expected["bf16_top1_agree"] - 0.1


def test_sampled_tokens_do_not_depend_on_the_device(oracle):
    prompt = oracle.prompts[-1]["prompt"]
    requests = [hl.Request(str(s), tuple(prompt[: 9 + s]), 8, 0.0, hl.Sampling(1.2, 0.9, s)) for s in range(4)]
    with oracle.load(precision="exact") as cpu, load(oracle, PLACEMENTS["hot_resident"][0], "dual_batch") as emulated:
        expected = [record.output for record in cpu.serve(requests).records]
        assert [record.output for record in emulated.serve(requests).records] == expected
