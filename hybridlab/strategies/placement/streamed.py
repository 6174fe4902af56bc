"""Stream-loading prefill: no expert lives on the GPU, all of them pass through its ring."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.fields import check_ring
from hybridlab.strategies.placement.paths import check_thresholds, hottest, path_of


@dataclass(frozen=True)
class Streamed:
    """Steps of at least `stream_from_tokens` tokens stream every expert once; shorter ones use the CPU's experts.

    Steps in between, from `mixed_from_tokens`, stream `mixed_share` of each layer's experts, the hottest first, while
    the CPU computes the rest and those that arrive for fewer than `min_expert_tokens` tokens.
    None takes what `hybridlab calibrate` measured on this machine for this model, else streams from the paper's 4,096
    and mixes nothing; with a `stream_from_tokens` of your own, nothing is mixed unless you say from when.
    A ring slot holds one of a layer's `parts_per_layer` groups of experts.
    """

    ring_slots: int = 2
    parts_per_layer: int = 1
    stream_from_tokens: int | None = None
    mixed_from_tokens: int | None = None
    mixed_share: float | None = None
    min_expert_tokens: int | None = None

    def __post_init__(self) -> None:
        check_ring(self.ring_slots, self.parts_per_layer, least_slots=1)
        check_thresholds(self)

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        if hardware.device == "cpu":  # no link to stream over
            return PlacementPlan(default_tier=Tier.HOST)
        tiers = dict.fromkeys(hottest(model, routing), Tier.STREAMED)
        return PlacementPlan(Tier.STREAMED, tiers, ring_slots=self.ring_slots, parts_per_layer=self.parts_per_layer)

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return path_of(num_tokens, self, placed, hardware)

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()
