"""What a machine cannot hold or run is refused before any time is simulated."""

from __future__ import annotations

from hybridlab.errors import MemoryBudgetError, StrategyError
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.shapes import ModelShape
from hybridlab.spec import ModelSpec


def require_room(
    machine: Machine, spec: ModelSpec, shape: ModelShape, placed: PlacementPlan, *, gpu: bool, kv_tokens: int = 0
) -> None:
    """Refuse a model that does not fit.

    Experts that are not resident, and without a GPU everything, must fit the host's memory; resident experts, the ring,
    everything else and the KV cache (BF16) the GPU's. Raises `MemoryBudgetError` with needed and there,
    `StrategyError` for a tier that a machine without a GPU does not have.
    """
    experts, others = shape.weight_bytes(spec)
    count = len(spec.moe_layers) * spec.num_experts
    each = experts / max(1, count)
    tiers = {tier: 0 for tier in Tier}
    for layer in spec.moe_layers:
        for expert in range(spec.num_experts):
            tiers[placed.tier(layer, expert)] += 1
    kv = kv_tokens * spec.num_layers * shape.kv_bytes
    if not gpu:
        wrong = [tier for tier in (Tier.RESIDENT, Tier.STREAMED) if tiers[tier]]
        if wrong:
            raise StrategyError(f"the placement has {wrong[0]} experts, the simulated machine has no GPU")
        _require("the host", experts + others + kv, machine.host_memory_gb)
        return
    parts = -(-max((tiers[Tier.STREAMED], 1)) // max(1, len(spec.moe_layers) * placed.parts_per_layer))
    ring = placed.ring_slots * parts * each if tiers[Tier.STREAMED] else 0.0
    _require("the host", (count - tiers[Tier.RESIDENT]) * each, machine.host_memory_gb)
    _require("the GPU", tiers[Tier.RESIDENT] * each + ring + others + kv, machine.gpu_memory_gb)


def _require(whose: str, needed_bytes: float, there_gb: float) -> None:
    if needed_bytes > there_gb * 1e9:
        raise MemoryBudgetError(
            f"the simulated machine: {needed_bytes / 1e9:.1f} GB of {whose}'s memory needed, {there_gb:.1f} GB there"
        )
