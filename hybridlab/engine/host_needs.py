"""What a model takes of the host's memory on each device."""

from __future__ import annotations

from hybridlab.engine.memory import GIB, Needs
from hybridlab.engine.own_experts import own_experts
from hybridlab.engine.ring import block_bytes
from hybridlab.model.weight_layout import ARENA_BYTES
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.spec import ModelSpec

RESERVE_BYTES = GIB // 2
"""Interpreter, torch, and what else the process needs."""
PINNED, OFFLOADED = "experts (pinned)", "KV cache (offloaded)"
"""Purposes whose memory is pinned."""
SHARED = "experts (shared, not pinned)"
LOGITS_OF = 64
"""Requests whose logits are held at once."""


def host_needs(
    model: ModelSpec,
    *,
    weight_bytes: int,
    budget_bytes: int,
    kv_token_bytes: int,
    precision_bytes: int,
    weight_layout: str = "rows",
    ring_bytes: int = 0,
) -> Needs:
    """Where the host's cores compute, device "emulated" included: weights, KV cache, workspace and ring.

    `precision_bytes` is what the precision needs beside the activations. Weights in "tiles" are a copy: the mapped
    pages they were made from count as page cache.
    """
    packed = weight_layout == "tiles"
    fixed = {
        "weights (packed)" if packed else "weights (mapped)": weight_bytes + (ARENA_BYTES if packed else 0),
        "KV cache": 0,
        "workspace": precision_bytes + LOGITS_OF * 4 * model.vocab,
        "ring": ring_bytes,
        "reserve": RESERVE_BYTES,
    }
    return Needs("memory", budget_bytes, fixed, _token_bytes(model), kv_token_bytes, "workspace")


def host_needs_beside_gpu(
    model: ModelSpec,
    placed: PlacementPlan,
    *,
    budget_bytes: int,
    kv_token_bytes: int,
    shared: bool = False,
) -> Needs:
    """Beside a CUDA device: a pinned copy of `kept_experts`, and what the host's cores need to compute some of them.

    Of rank 0, if other ranks have some. Experts that are not kept pass through a staging buffer, a layer at a time;
    `shared` memory has them beside the others. Once copied, the mapped checkpoint is page cache. `kv_token_bytes` is 0
    unless the KV cache is offloaded.
    """
    kept = kept_experts(placed, model)
    passing = [len(own) - len(kept[layer]) for layer, own in own_experts(placed, model).items()]
    fixed = {
        PINNED: sum(map(len, kept.values())) * block_bytes(model),
        SHARED: shared * sum(passing) * block_bytes(model),
        "staging": max(2 * model.vocab * model.hidden, max(passing) * block_bytes(model)),
        "workspace": LOGITS_OF * 4 * model.vocab,
        "reserve": RESERVE_BYTES,
    }
    token_bytes = _expert_bytes(model) if any(kept.values()) else 0
    return Needs("host memory", budget_bytes, fixed, token_bytes, kv_token_bytes, "workspace", OFFLOADED)


def kept_experts(placed: PlacementPlan, model: ModelSpec) -> dict[int, list[int]]:
    """Layer -> experts (of rank 0) that host memory keeps for a CUDA device: those that are streamed, computed by the
    host, or may come to be. Not those that live on the GPU for good."""
    return {
        layer: [e for e in own if placed.movable or placed.tier(layer, e) is not Tier.RESIDENT]
        for layer, own in own_experts(placed, model).items()
    }


def _token_bytes(model: ModelSpec) -> int:
    """float32 activations of one token of a step, at its widest point."""
    attention = (2 * model.num_heads + 4 * model.num_kv_heads) * model.head_dim
    dense = 3 * model.dense_intermediate if model.dense_layers else 0
    return max((4 * model.hidden + max(attention, dense)) * 4, _expert_bytes(model))


def _expert_bytes(model: ModelSpec) -> int:
    """float32 activations of one token in a layer's experts, what goes in and comes out included."""
    return (4 * model.hidden + model.top_k * (2 * model.moe_intermediate + model.hidden)) * 4
