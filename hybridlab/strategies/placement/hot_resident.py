"""The experts that tokens choose most live on the GPU, as many as a byte budget holds."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.fields import check_budget, check_ring
from hybridlab.strategies.placement.budget import experts_within
from hybridlab.strategies.placement.paths import check_thresholds, hottest, path_of


@dataclass(frozen=True)
class HotResident:
    """The hottest experts of all layers, by their share of a layer's routes, on the GPU; the CPU computes the others.

    With `ring_slots`, the others stream in long steps, all or a share of them, as `streamed` chooses; thresholds were
    measured with all experts to stream, so that those of your own fit better here.
    Nothing known of the routes: the first experts of every layer.
    """

    gpu_gb: float | None = None
    ring_slots: int = 0
    parts_per_layer: int = 1
    stream_from_tokens: int | None = None
    mixed_from_tokens: int | None = None
    mixed_share: float | None = None
    min_expert_tokens: int | None = None

    def __post_init__(self) -> None:
        check_budget("gpu_gb", self.gpu_gb)
        check_ring(self.ring_slots, self.parts_per_layer, least_slots=0)
        check_thresholds(self)

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        if hardware.device == "cpu":
            return PlacementPlan(default_tier=Tier.HOST)
        experts, count = hottest(model, routing), experts_within(self.gpu_gb, model, hardware)
        rest = Tier.STREAMED if self.ring_slots else Tier.HOST
        tiers = dict.fromkeys(experts[:count], Tier.RESIDENT) | dict.fromkeys(experts[count:], rest)
        return PlacementPlan(rest, tiers, ring_slots=self.ring_slots, parts_per_layer=self.parts_per_layer)

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return path_of(num_tokens, self, placed, hardware)

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()
