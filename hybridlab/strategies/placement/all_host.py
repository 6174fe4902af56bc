"""All experts in host memory, computed by the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec


@dataclass(frozen=True)
class AllHost:
    """No expert crosses the link: the decode path of the paper, and the only one of a machine without a GPU."""

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        return PlacementPlan(default_tier=Tier.HOST)

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return ExpertPath()

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()
