"""Statistics of one domain, used on another: what `hot_resident` recorded on some prompts is worth on others."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab.errors import ConfigError
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.strategies.checks import TOY_GPU
from hybridlab.strategies.placement.hot_resident import HotResident


def test_by_hand():
    stats = RoutingStats(((6, 2, 0), (0, 1, 1)), "by hand", (1, 4))
    assert hl.hit_rate(PlacementPlan(), stats) == 0
    assert hl.hit_rate(PlacementPlan(Tier.RESIDENT), stats) == 1
    assert hl.hit_rate(PlacementPlan(tier_of={(1, 0): Tier.RESIDENT, (4, 2): Tier.RESIDENT}), stats) == 0.7
    assert hl.hit_rate(PlacementPlan(Tier.STREAMED, {(1, 1): Tier.RESIDENT}), stats) == 0.2


@pytest.mark.parametrize("stats", [RoutingStats(), RoutingStats(((0, 0),), "a source", (3,))])
def test_without_routes_there_is_no_rate(stats):
    with pytest.raises(ConfigError, match=f"routing statistics \\({stats.source}\\) hold no routes"):
        hl.hit_rate(PlacementPlan(), stats)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """A checkpoint whose experts are as unequally popular as OLMoE's on code."""
    return hl.make_checkpoint(tmp_path_factory.mktemp("skewed") / "tiny", "tiny", routing="olmoe", progress=False)


def prompts(first: int, last: int, count: int) -> list[list[int]]:
    """Token ids of a domain of their own: no token is in both."""
    rng = random.Random(first)
    return [[rng.randrange(first, last) for _ in range(40)] for _ in range(count)]


def test_what_is_hot_in_one_domain_serves_another(skewed):
    with hl.load(skewed, quiet=True, kv_tokens=1024) as engine:
        spec = engine.spec
        half = spec.vocab // 2
        one = hl.record_routing(engine, prompts(0, half, 12), progress=False)
        other = hl.record_routing(engine, prompts(half, spec.vocab, 12), progress=False)
    assert one.counts != other.counts
    everything = len(spec.moe_layers) * spec.num_experts
    quarter = everything // 4 * spec.expert_bytes / 1e9
    hardware = replace(TOY_GPU, gpu_memory_bytes=2**36)

    def placed(stats: RoutingStats) -> PlacementPlan:
        return HotResident(quarter).place(spec, hardware, stats)

    carried, at_best, blind = (hl.hit_rate(placed(stats), other) for stats in (one, other, RoutingStats()))
    assert blind < 0.4  # about its share of the experts
    assert carried > 1.5 * 0.25 and carried > blind + 0.1
    assert carried <= at_best and carried > 0.85 * at_best


def test_the_rate_is_what_the_accelerator_computed(skewed):
    """Routes that its op was given, over all routes of a run."""
    with hl.load(skewed, quiet=True, kv_tokens=1024) as engine:
        stats = hl.record_routing(engine, prompts(0, 50, 3), progress=False)
        spec = engine.spec
    placement = HotResident(len(spec.moe_layers) * spec.num_experts // 3 * spec.expert_bytes / 1e9)
    routes = {Tier.RESIDENT: 0, Tier.HOST: 0}
    with hl.load(
        skewed, device="emulated", threads=2, placement=placement, routing=stats, quiet=True, kv_tokens=1024
    ) as engine:
        runtime: Any = engine.runtime
        experts = runtime._device.experts

        def watched(tier, compute):
            def call(op, routed):
                routes[tier] += int(torch.isin(routed.expert_ids, torch.tensor(op.experts)).sum())
                return compute(op, routed)

            return call

        for tier, compute in list(experts.items()):
            experts[tier] = watched(tier, compute)
        engine.serve([hl.Request(str(i), tuple(prompt), 1) for i, prompt in enumerate(prompts(0, 50, 3))])
        expected = hl.hit_rate(engine.planner.placed, stats)
    assert sum(routes.values()) == sum(map(sum, stats.counts))
    # A different order of sums may turn a few choices.
    assert routes[Tier.RESIDENT] / sum(routes.values()) == pytest.approx(expected, abs=0.02)
