"""What a model takes of a CUDA device, planned before anything is allocated there."""

from __future__ import annotations

from hybridlab.engine.memory import GIB, MemoryPlan
from hybridlab.engine.ring import block_bytes, slot_experts, slots_bytes
from hybridlab.errors import MemoryBudgetError
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.spec import ModelSpec

CONTEXT_BYTES = GIB
"""The CUDA context, cuBLAS workspaces and what the allocator cannot use."""


def plan_vram(
    model: ModelSpec, placed: PlacementPlan, *, budget_bytes: int, token_budget: int, kv_tokens: int
) -> MemoryPlan:
    """Bytes by purpose for steps of up to `token_budget` tokens; raises `MemoryBudgetError` with what to lower."""
    experts = [(layer, e) for layer in model.moe_layers for e in range(model.num_experts)]
    resident = [key for key in experts if placed.tier(*key) is Tier.RESIDENT]
    of_a_layer = [sum(1 for key in resident if key[0] == layer) for layer in model.moe_layers]
    slot = slot_experts(placed, model)
    widened = max([slot, *of_a_layer]) * 3 * model.moe_intermediate * model.hidden * 2
    parts = {
        "projections (BF16)": _projection_bytes(model),
        "resident experts": len(resident) * block_bytes(model),
        "ring": slots_bytes(placed, model),
        "widened experts": widened,
        "KV cache": kv_tokens * model.kv_elements_per_token * 2,
        "activations": token_budget * _activation_bytes(model),
        "context": CONTEXT_BYTES,
    }
    plan = MemoryPlan(parts, budget_bytes, kv_tokens)
    if plan.total_bytes > budget_bytes:
        needed, there = f"{plan.total_bytes / GIB:.2f} GiB", f"{budget_bytes / GIB:.2f} GiB"
        raise MemoryBudgetError(
            f"{needed} of GPU memory needed, {there} in the budget ({plan}); "
            f"lower token_budget ({token_budget}), kv_tokens ({kv_tokens}), the placement's ring_slots or gpu_gb, or "
            "raise its parts_per_layer"
        )
    return plan


def _projection_bytes(model: ModelSpec) -> int:
    heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.hidden * (2 * heads + 2 * groups) * 2
    dense = 3 * model.dense_intermediate * model.hidden * 2
    router = model.num_experts * model.hidden * 4
    tables = model.vocab * model.hidden * 2 * (1 if model.tie_embeddings else 2)
    return tables + sum(attention + (dense if i in model.dense_layers else router) for i in range(model.num_layers))


def _activation_bytes(model: ModelSpec) -> int:
    """Of one token at the widest point of a layer: in attention (float32 beside BF16), or its routes in the experts."""
    heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    stream = 3 * 4 * model.hidden
    attention = (heads + 2 * groups) * (4 + 2) + 3 * heads * 4
    routes = model.top_k * (4 * model.hidden + 8 * model.moe_intermediate + 5 * 8) + 2 * 4 * model.hidden
    dense = 4 * model.dense_intermediate * 2 if model.dense_layers else 0
    return stream + max(attention, routes, dense)
