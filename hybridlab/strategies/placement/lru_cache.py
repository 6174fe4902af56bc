"""A cache of experts on the GPU: between steps, those in use of late take the places of those that are not."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.fields import check_budget, check_positive
from hybridlab.strategies.placement.hot_resident import HotResident

KEPT_HEAT = 0.8
"""What an update leaves of the routes counted before it: use of late weighs most, one quiet step evicts nobody."""


@dataclass(frozen=True)
class LruCache:
    """Starts as `hot_resident`; each layer keeps as many experts on the GPU as it began with, the CPU has the others.

    Every `update_every_steps` steps, at most `moves_per_update` moves: an expert comes in and the coldest of its layer
    goes, so a pair is two moves; where most is gained first. What it counted belongs to the model placed last: an
    object for each engine.
    """

    gpu_gb: float | None = None
    update_every_steps: int = 16
    moves_per_update: int = 32

    def __post_init__(self) -> None:
        check_budget("gpu_gb", self.gpu_gb)
        check_positive("update_every_steps", self.update_every_steps)
        check_positive("moves_per_update", self.moves_per_update, least=2)

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        placed = HotResident(self.gpu_gb).place(model, hardware, routing)
        # Not among the fields, which are what a run is known by.
        vars(self)["_layers"] = {
            layer: _Layer({e for e in experts if placed.tier(layer, e) is Tier.RESIDENT}, [0.0] * len(experts))
            for layer, experts in ((layer, range(model.num_experts)) for layer in model.moe_layers)
        }
        return placed

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return ExpertPath()

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        layers: dict[int, _Layer] = vars(self).get("_layers", {})
        swaps = []
        for number, counts in zip(routing.layers, routing.counts, strict=True):
            if (layer := layers.get(number)) is not None:
                layer.heat = heat = [KEPT_HEAT * h + n for h, n in zip(layer.heat, counts, strict=True)]
                hottest = sorted((e for e in range(len(heat)) if e not in layer.resident), key=lambda e: -heat[e])
                coldest = sorted(layer.resident, key=lambda e: heat[e])
                swaps += [(heat[i] - heat[o], number, i, o) for i, o in zip(hottest, coldest, strict=False)]
        moves = []
        for gain, number, comes, goes in sorted(swaps, key=lambda swap: -swap[0])[: self.moves_per_update // 2]:
            if gain > 0:
                layers[number].resident ^= {comes, goes}
                moves += [Move(number, goes, Tier.HOST), Move(number, comes, Tier.RESIDENT)]
        return tuple(moves)


@dataclass
class _Layer:
    resident: set[int]
    heat: list[float]
    """Of each expert: its routes, older ones counting less."""
