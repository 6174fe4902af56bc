"""The experts that tokens choose most live on the GPU, as many as a byte budget holds."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.fields import check_budget, check_positive, check_ring
from hybridlab.strategies.placement.budget import experts_within
from hybridlab.strategies.placement.streamed import path_of


@dataclass(frozen=True)
class HotResident:
    """The hottest experts of all layers, by their share of a layer's routes, on the GPU; the CPU computes the others.

    With `ring_slots`, steps of at least `stream_from_tokens` tokens stream the others instead (as `streamed` does, with
    the same default).
    Nothing known of the routes: the first experts of every layer.
    """

    gpu_gb: float | None = None
    ring_slots: int = 0
    parts_per_layer: int = 1
    stream_from_tokens: int | None = None

    def __post_init__(self) -> None:
        check_budget("gpu_gb", self.gpu_gb)
        check_ring(self.ring_slots, self.parts_per_layer, least_slots=0)
        check_positive("stream_from_tokens", self.stream_from_tokens, optional=True)

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        if hardware.device == "cpu":
            return PlacementPlan(default_tier=Tier.HOST)
        share = {
            (layer, expert): count / max(1, sum(row))
            for layer, row in zip(routing.layers, routing.counts, strict=True)
            for expert, count in enumerate(row)
        }
        experts = [(layer, e) for e in range(model.num_experts) for layer in model.moe_layers]
        hottest = sorted(experts, key=lambda key: -share.get(key, 0.0))  # stable: lower numbers first among equals
        resident = dict.fromkeys(hottest[: experts_within(self.gpu_gb, model, hardware)], Tier.RESIDENT)
        rest = Tier.STREAMED if self.ring_slots else Tier.HOST
        return PlacementPlan(rest, resident, ring_slots=self.ring_slots, parts_per_layer=self.parts_per_layer)

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return path_of(num_tokens, self.stream_from_tokens, hardware)

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()
