"""Stream-loading prefill: no expert lives on the GPU, all of them pass through its ring."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import ExpertPath, Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.fields import check_positive, check_ring

PAPER_TOKENS = 4096
"""Below it the published system computes experts on the CPU (paper, section 1)."""


@dataclass(frozen=True)
class Streamed:
    """Steps of at least `stream_from_tokens` tokens stream every expert once; shorter ones use the CPU's experts.

    `stream_from_tokens` None takes what was measured on this machine (`HardwareSpec.stream_from_tokens`), else the
    paper's 4,096. A ring slot holds one of a layer's `parts_per_layer` groups of experts.
    """

    ring_slots: int = 2
    parts_per_layer: int = 1
    stream_from_tokens: int | None = None

    def __post_init__(self) -> None:
        check_ring(self.ring_slots, self.parts_per_layer, least_slots=1)
        check_positive("stream_from_tokens", self.stream_from_tokens, optional=True)

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        if hardware.device == "cpu":  # no link to stream over
            return PlacementPlan(default_tier=Tier.HOST)
        return PlacementPlan(Tier.STREAMED, ring_slots=self.ring_slots, parts_per_layer=self.parts_per_layer)

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return path_of(num_tokens, self.stream_from_tokens, hardware)

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()


def path_of(num_tokens: int, stream_from_tokens: int | None, hardware: HardwareSpec) -> ExpertPath:
    """Every streamed expert crosses the link, or none; None takes the machine's threshold, else the paper's."""
    least = stream_from_tokens or hardware.stream_from_tokens or PAPER_TOKENS
    return ExpertPath() if num_tokens >= least else ExpertPath(prefetch=())
