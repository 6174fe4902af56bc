"""All experts on the GPU for good: what the link costs is held against it."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec


@dataclass(frozen=True)
class AllResident:
    """For models that fit the GPU; without a GPU, the experts stay in host memory."""

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        return PlacementPlan(default_tier=Tier.HOST if hardware.device == "cpu" else Tier.RESIDENT)

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return ExpertPath()

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()
