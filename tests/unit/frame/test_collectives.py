"""What ranks exchange: rows arrive where they belong, are counted, and as many as the formulas say."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from ranks_in_threads import on_ranks

from hybridlab.engine import ep_traffic
from hybridlab.engine.collectives import Traffic
from hybridlab.engine.ep_exchange import Wire, make_exchanges
from hybridlab.errors import StrategyError
from hybridlab.lowering import Planner, lower
from hybridlab.model.base import Routed
from hybridlab.plans import EXCHANGES, ExpertPath, LaneKind, PlacementPlan, Shape, StepPlan, Tier
from hybridlab.strategies.checks import TOY_GPU, TOY_MODEL
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.strategies.registry import names, resolve
from hybridlab.validation import validate

HIDDEN, EXPERTS, TOP_K = 16, 11, 3
WIRES = (Wire(), Wire(torch.bfloat16, torch.float32), Wire(torch.bfloat16, torch.bfloat16))
FORMULAS = {"dispatch_per_route": ep_traffic.dispatch_per_route, "dispatch_per_rank": ep_traffic.dispatch_per_rank}


def tokens_on(size: int) -> list[int]:
    """Uneven, and none on the last rank but one."""
    counts = [3 + 5 * (rank % 3) for rank in range(size)]
    counts[size - 2] = 0
    return counts


def rank_of(size: int) -> np.ndarray:
    """11 experts on 2, 4 or 8 ranks: never the same number for all."""
    return np.array([e * size // EXPERTS for e in range(EXPERTS)])


class Layer:
    """A router and experts that are a few lines of torch in float64, and all ranks' tokens."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.gate = torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
        self.experts = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
        self.sizes = tokens_on(size)
        self.x = torch.randn(sum(self.sizes), HIDDEN, generator=generator).split(self.sizes)

    def router(self, x_TH: torch.Tensor) -> Routed:
        weights, ids = (x_TH.double() @ self.gate.T).softmax(-1).topk(TOP_K)
        return Routed(x_TH, ids.int(), weights.float())

    def compute(self, routed: Routed, mine: set[int]) -> torch.Tensor:
        total = torch.zeros(len(routed.x_TH), HIDDEN, dtype=torch.float64)
        for row, (ids, weights) in enumerate(zip(routed.expert_ids.tolist(), routed.weights.double(), strict=True)):
            for slot, e in enumerate(ids):
                if e in mine:
                    total[row] += weights[slot] * (self.experts[e] @ routed.x_TH[row].double())
        return total.float()


def through(name: str, size: int, wire: Wire, layer: Layer) -> list[tuple[torch.Tensor, Traffic]]:
    owner = rank_of(size)

    def work(peers):
        exchange = make_exchanges(peers, wire, {0: torch.from_numpy(owner)})[name]
        routed = layer.router(exchange.gather(layer.x[peers.rank], layer.sizes))
        moved, trip = exchange.dispatch(0, routed, layer.sizes)
        mine = set(np.flatnonzero(owner == peers.rank).tolist())
        return exchange.reduce(layer.compute(moved, mine), trip), peers.traffic

    return on_ranks(size, work)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", EXCHANGES)
def test_every_exchange_gives_each_rank_the_sum_over_all_experts_of_its_tokens(name, size):
    layer = Layer(size)
    for rank, (found, _) in enumerate(through(name, size, Wire(), layer)):
        expected = layer.compute(layer.router(layer.x[rank]), set(range(EXPERTS)))
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_sums_are_made_in_the_order_of_ranks(size):
    layer = Layer(size)
    small, per_rank = (through(name, size, Wire(), layer) for name in ("small_ep", "dispatch_per_rank"))
    again = through("small_ep", size, Wire(), layer)
    for (a, _), (b, _), (c, _) in zip(small, per_rank, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("name", EXCHANGES)
def test_counted_bytes_are_those_of_the_formulas(name, wire, size):
    layer = Layer(size)
    counted = [traffic for _, traffic in through(name, size, wire, layer)]
    routes = [layer.router(x).expert_ids.numpy() for x in layer.x]
    for rank, traffic in enumerate(counted):
        if name == "small_ep":
            expected = ep_traffic.small_ep(layer.sizes, rank, HIDDEN, wire)
        else:
            expected = FORMULAS[name](routes, rank_of(size), rank, HIDDEN, wire)
        assert traffic == expected and traffic.sent_bytes > 0
    # What is sent is received, and as much as the formula over all ranks says.
    assert sum(t.sent_bytes for t in counted) == sum(t.received_bytes for t in counted)
    if name == "small_ep":
        per_value = wire.hidden.itemsize + wire.partial.itemsize
        assert sum(t.sent_bytes for t in counted) == (size - 1) * sum(layer.sizes) * HIDDEN * per_value


def test_expected_rows_are_those_of_random_routes():
    experts_of_rank, tokens = [3, 3, 2, 3], 20_000
    owner = np.repeat(np.arange(4), experts_of_rank)
    routes = np.argsort(np.random.default_rng(0).random((tokens, EXPERTS)), axis=1)[:, :TOP_K]
    small, per_route, per_rank = ep_traffic.expected_rows_per_token(experts_of_rank, 1, TOP_K)
    assert small == 3
    assert per_route == pytest.approx((owner[routes] != 1).sum() / tokens, rel=0.02)
    seen = sum((owner[routes] == peer).any(1).sum() for peer in (0, 2, 3)) / tokens
    assert per_rank == pytest.approx(seen, rel=0.02)


def test_each_exchange_has_its_ops_and_a_plan_names_one_that_there_is():
    ranked = {(layer, e): e % 2 for layer in TOY_MODEL.moe_layers for e in range(TOY_MODEL.num_experts)}
    for name in EXCHANGES:
        placed = PlacementPlan(rank_of=ranked, exchange=name)
        ops = lower(Shape("prefill", "main", LaneKind.CPU, ExpertPath(), 2, (0, 1), placed), TOY_MODEL)
        validate(ops, ring_slots=0, ranks=(0, 1))
        gather, dispatch = (sum(op.kind == kind for op in ops) for kind in ("all_gather", "dispatch"))
        each = 2 * 2 * len(TOY_MODEL.moe_layers)
        assert (gather, dispatch) == ((each, 0) if name == "small_ep" else (0, each))
        # Whatever the overlap and the tier, ranks meet their collectives in one order.
        for overlap, tier in product(names("overlap"), Tier):
            plan = replace(placed, default_tier=tier, ring_slots=2, parts_per_layer=2)
            planner = Planner(TOY_MODEL, TOY_GPU, AllHost(), resolve("overlap", overlap), plan, ranks=(0, 1))
            step = StepPlan("decode", dict.fromkeys("abcd", 1))
            assert planner.program(planner.shape("main", step)).shape.ranks == (0, 1)
    assert PlacementPlan() != PlacementPlan(exchange="dispatch_per_rank")
    with pytest.raises(StrategyError, match="exchange is 'ring', expected one of small_ep"):
        PlacementPlan(exchange="ring")
