"""Which experts one rank has, where the others are on other ranks."""

from __future__ import annotations

from hybridlab.plans import PlacementPlan
from hybridlab.spec import ModelSpec


def own_experts(placed: PlacementPlan, model: ModelSpec) -> dict[int, list[int]]:
    """MoE layer -> its experts that `placed` has on rank 0: all of them where nothing has a rank."""
    return {
        layer: [e for e in range(model.num_experts) if placed.rank_of.get((layer, e), 0) == 0]
        for layer in model.moe_layers
    }
