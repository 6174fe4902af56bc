"""What a model takes of a GPU's memory: of a CUDA device, or of the one that device "emulated" stands for."""

from __future__ import annotations

from dataclasses import replace

from hybridlab.engine.memory import GIB, Needs
from hybridlab.engine.own_experts import own_experts
from hybridlab.engine.ring import block_bytes, slot_experts, slots_bytes
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.spec import ModelSpec

CONTEXT_BYTES = GIB
"""The CUDA context, cuBLAS workspaces and what the allocator cannot use."""
CUBLAS_BYTES = 64 * 2**20
"""Of these, what cuBLAS takes by way of torch's allocator: 32 MiB on Hopper for each stream that multiplies."""
NCCL_BYTES = 3 * GIB // 4
"""What ranks take for their exchanges: a process of two H100s had 1.6 GiB outside the allocator."""
HEAD_ROWS = 256
"""Rows whose logits are computed at once."""
CAPTURED_TOKENS = 256
"""Of all captured decode steps together, whose memory is planned: 16 steps of 1 to 16 requests have 136."""
CAPTURED_LEAST = 64 * 2**20
"""What torch's allocator takes of the device at least, in pieces of 2 and 20 MiB."""
PROJECTIONS, RESIDENT = "projections (BF16)", "resident experts"
OFFLOAD_BUFFERS = 2
"""Layers whose KV is on the device at once, where the KV cache is offloaded."""


def gpu_needs(
    model: ModelSpec,
    placed: PlacementPlan,
    *,
    budget_bytes: int,
    kv_element_bytes: int = 2,
    kv_offloaded: bool = False,
    context_bytes: int = CONTEXT_BYTES,
    nccl_bytes: int = NCCL_BYTES,
    captures: bool = True,
    precision: str = "bf16",
) -> Needs:
    """Projections, resident experts, ring, workspace, KV cache and activations, as `engine.cuda_device` takes them.

    Of rank 0 of `placed`, if experts are on other ranks too. With `captures`, decode steps are captured as graphs,
    unless KV is offloaded.
    """
    experts = [(layer, e) for layer, own in own_experts(placed, model).items() for e in own]
    resident = [key for key in experts if placed.tier(*key) is Tier.RESIDENT]
    of_a_layer = [sum(1 for key in resident if key[0] == layer) for layer in model.moe_layers]
    widened = max([slot_experts(placed, model), *of_a_layer]) * 3 * model.moe_intermediate * model.hidden * 2
    widened *= precision != "fp8"  # which multiplies them as they are
    kv_bytes = model.kv_elements_per_token * kv_element_bytes
    kv = "KV cache"
    if kv_offloaded:
        kv, kv_bytes = "KV cache (offloaded)", OFFLOAD_BUFFERS * kv_bytes // model.num_layers
    fixed = {
        PROJECTIONS: _projection_bytes(model),
        RESIDENT: len(resident) * block_bytes(model),
        "ring": slots_bytes(placed, model),
        "widened experts": widened,
        kv: 0,
        "activations": 0,
        "logits": HEAD_ROWS * model.vocab * (4 + 2),
        "captured steps": captured_bytes(model) if captures and not kv_offloaded else 0,
        "NCCL": nccl_bytes if any(placed.rank_of.values()) else 0,
        "context": context_bytes,
    }
    per_token = _activation_bytes(model)
    if any(placed.tier(*key) is Tier.HOST for key in experts):
        per_token += _exchange_bytes(model)
    if any(placed.rank_of.values()):
        per_token += _net_bytes(model)
    return Needs("GPU memory", budget_bytes, fixed, per_token, kv_bytes, "activations", kv)


def beside_others(needs: Needs, placed: PlacementPlan, *, pays: bool) -> Needs:
    """`needs` of one of several workers of a GPU, which have once what none of them writes to; one `pays` for it."""
    names = (PROJECTIONS,) if placed.movable else (PROJECTIONS, RESIDENT)
    fixed = {}
    for name, size in needs.fixed.items():
        is_shared = name in names
        fixed[f"{name}, of all workers" if is_shared else name] = size if pays or not is_shared else 0
    return replace(needs, fixed=fixed)


def outside_allocator_bytes(placed: PlacementPlan) -> int:
    """Of the plan of `gpu_needs`, what torch's allocator never sees."""
    return CONTEXT_BYTES - CUBLAS_BYTES + (NCCL_BYTES if any(placed.rank_of.values()) else 0)


def captured_bytes(model: ModelSpec) -> int:
    """The share of captured decode steps: a graph's memory is its own, whether it runs or not (`GraphCapture`)."""
    return CAPTURED_LEAST + CAPTURED_TOKENS * captured_token_bytes(model)


def captured_token_bytes(model: ModelSpec) -> int:
    """Of one request of a captured step: what every step takes for a token, and its logits."""
    return _activation_bytes(model) + _exchange_bytes(model) + model.vocab * (4 + 2)


def _projection_bytes(model: ModelSpec) -> int:
    heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.hidden * (2 * heads + 2 * groups) * 2
    dense = 3 * model.dense_intermediate * model.hidden * 2
    router = model.num_experts * model.hidden * 4
    tables = model.vocab * model.hidden * 2 * (1 if model.tie_embeddings else 2)
    return tables + sum(attention + (dense if i in model.dense_layers else router) for i in range(model.num_layers))


def _exchange_bytes(model: ModelSpec) -> int:
    """Of one token, where experts of the host take part in steps of any length: what goes down, and what comes up."""
    return 4 * (2 * model.hidden + 2 * model.top_k)


def _net_bytes(model: ModelSpec) -> int:
    """Of one token of all ranks: hidden states as sent, as they came and together; partial sums likewise."""
    return 6 * 4 * model.hidden


def _activation_bytes(model: ModelSpec) -> int:
    """Of one token at the widest point of a layer: in attention (float32 beside BF16), or its routes in the experts."""
    heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    stream = 3 * 4 * model.hidden
    attention = (heads + 2 * groups) * (4 + 2) + 3 * heads * 4
    routes = model.top_k * (4 * model.hidden + 8 * model.moe_intermediate + 5 * 8) + 2 * 4 * model.hidden
    dense = 4 * model.dense_intermediate * 2 if model.dense_layers else 0
    return stream + max(attention, routes, dense)
