"""Whole layers' experts on the GPU, the others' on the CPU: how llama.cpp splits a model."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.fields import check_budget
from hybridlab.strategies.placement.budget import experts_within


@dataclass(frozen=True)
class LayerSplit:
    """The experts of the first layers on the GPU, as many whole layers as `gpu_gb` holds."""

    gpu_gb: float | None = None

    def __post_init__(self) -> None:
        check_budget("gpu_gb", self.gpu_gb)

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        if hardware.device == "cpu":
            return PlacementPlan(default_tier=Tier.HOST)
        layers = experts_within(self.gpu_gb, model, hardware) // model.num_experts
        resident = {(layer, e): Tier.RESIDENT for layer in model.moe_layers[:layers] for e in range(model.num_experts)}
        return PlacementPlan(Tier.HOST, resident)

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return ExpertPath()

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()
