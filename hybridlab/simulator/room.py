"""What a machine cannot hold or run is refused before any time is simulated."""

from __future__ import annotations

from collections import Counter

from hybridlab.errors import MemoryBudgetError, StrategyError
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.simulator.cost_model import Number
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.shapes import ModelShape
from hybridlab.spec import ModelSpec


def needed_bytes(
    spec: ModelSpec, shape: ModelShape, placed: PlacementPlan, *, gpu: bool, kv_tokens: Number = 0
) -> tuple[Number, Number]:
    """(of the host's memory, of the GPU's), as numbers or arrays.

    Experts that are not resident are in the host's, and without a GPU everything; resident experts, the ring,
    everything else and the KV cache (BF16) in the GPU's. Of several ranks, that of the first one.
    """
    experts, others = shape.weight_bytes(spec)
    count = len(spec.moe_layers) * spec.num_experts
    each = experts / max(1, count)
    keys = [(layer, expert) for layer in spec.moe_layers for expert in range(spec.num_experts)]
    found = Counter(placed.tier(*key) for key in keys if placed.rank_of.get(key, 0) == 0)
    all_resident = sum(placed.tier(*key) is Tier.RESIDENT for key in keys)
    kv = kv_tokens * spec.num_layers * shape.kv_bytes
    if not gpu:
        return experts + others + kv, 0.0
    parts = -(-found[Tier.STREAMED] // max(1, len(spec.moe_layers) * placed.parts_per_layer))
    resident = found[Tier.RESIDENT] * each
    return experts - all_resident * each, resident + placed.ring_slots * parts * each + others + kv


def require_room(
    machine: Machine, spec: ModelSpec, shape: ModelShape, placed: PlacementPlan, *, gpu: bool, kv_tokens: int = 0
) -> None:
    """Refuse a model that does not fit: raises `MemoryBudgetError` with needed and there, `StrategyError` for a tier
    that a machine without a GPU does not have."""
    tiers = {placed.tier(layer, expert) for layer in spec.moe_layers for expert in range(spec.num_experts)}
    if not gpu and tiers - {Tier.HOST}:
        wrong = Tier.RESIDENT if Tier.RESIDENT in tiers else Tier.STREAMED
        raise StrategyError(f"the placement has {wrong} experts, the simulated machine has no GPU")
    host, device = needed_bytes(spec, shape, placed, gpu=gpu, kv_tokens=kv_tokens)
    for whose, needed, there_gb in (("host", host, machine.host_memory_gb), ("GPU", device, machine.gpu_memory_gb)):
        if needed > there_gb * 1e9:
            raise MemoryBudgetError(
                f"the simulated machine: {needed / 1e9:.1f} GB of the {whose}'s memory needed, {there_gb:.1f} GB there"
            )
