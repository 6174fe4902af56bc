"""How many experts fit the bytes that a placement may take of the GPU."""

from __future__ import annotations

from hybridlab.spec import HardwareSpec, ModelSpec

DEFAULT_SHARE = 0.5
"""Of the GPU's memory, where a placement names no budget: the rest is for attention, KV cache and activations."""


def experts_within(gpu_gb: float | None, model: ModelSpec, hardware: HardwareSpec) -> int:
    """Whole experts in `gpu_gb` (1e9 bytes), or in half of the GPU's memory if that is None; at most all of them."""
    budget_bytes = DEFAULT_SHARE * hardware.gpu_memory_bytes if gpu_gb is None else gpu_gb * 1e9
    everything = len(model.moe_layers) * model.num_experts
    return int(min(everything * model.expert_bytes, budget_bytes) // model.expert_bytes)
