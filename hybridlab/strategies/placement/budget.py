"""How many experts fit the bytes that a placement may take of the GPU."""

from __future__ import annotations

from hybridlab.errors import StrategyError
from hybridlab.spec import HardwareSpec, ModelSpec

DEFAULT_SHARE = 0.5
"""Of the GPU's memory, where a placement names no budget: the rest is for attention, KV cache and activations."""


def experts_within(gpu_gb: float | None, model: ModelSpec, hardware: HardwareSpec) -> int:
    """Whole experts in `gpu_gb` (1e9 bytes), or in half of the GPU's memory if that is None; at most all of them.

    Raises StrategyError naming `gpu_gb` if it is no number >= 0.
    """
    if gpu_gb is not None and (isinstance(gpu_gb, bool) or not isinstance(gpu_gb, int | float) or not gpu_gb >= 0):
        raise StrategyError(f"gpu_gb: expected a number >= 0 or None, got {gpu_gb!r}")
    budget_bytes = DEFAULT_SHARE * hardware.gpu_memory_bytes if gpu_gb is None else gpu_gb * 1e9
    everything = len(model.moe_layers) * model.num_experts
    return int(min(everything, budget_bytes // model.expert_bytes))
