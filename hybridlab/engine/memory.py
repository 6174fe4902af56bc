"""One memory budget for weights, KV cache and workspace, planned before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybridlab.errors import MemoryBudgetError
from hybridlab.model.weight_layout import ARENA_BYTES
from hybridlab.spec import ModelSpec

GIB = 2**30
DEFAULT_KV_TOKENS = 32768
_RESERVE_BYTES = GIB // 2  # interpreter, torch, and what else the process needs


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, the budget they must fit, and the KV tokens that come of it."""

    parts: Mapping[str, int]
    budget_bytes: int
    kv_tokens: int

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        items = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items())
        return f"memory plan (GiB): {items}; total {self.total_bytes / GIB:.2f} of {self.budget_bytes / GIB:.2f}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td style='text-align:right'>{size / GIB:.3f}</td></tr>"
            for name, size in (
                *self.parts.items(),
                ("total", self.total_bytes),
                ("budget", self.budget_bytes),
            )
        )
        return f"<table><tr><th>purpose</th><th>GiB</th></tr>{rows}</table>"


def plan_memory(
    model: ModelSpec,
    *,
    weight_bytes: int,
    budget_bytes: int,
    token_budget: int,
    kv_tokens: int | None,
    kv_block_tokens: int,
    kv_element_bytes: int,
    precision_bytes: int,
    weight_layout: str = "rows",
    ring_bytes: int = 0,
) -> MemoryPlan:
    """Size the KV cache and check that all fits.

    `kv_tokens` None takes `DEFAULT_KV_TOKENS`, or what the budget leaves if that is less, but never less than
    one step's tokens. `precision_bytes` is what the precision needs beside the activations, `ring_bytes` the slots that
    experts are streamed through. Weights in "tiles" are a
    copy: the mapped pages they were made from count as page cache.
    Raises `MemoryBudgetError` with needed, free and what to lower.
    """
    per_token = model.kv_elements_per_token * kv_element_bytes
    workspace = _workspace_bytes(model, token_budget) + precision_bytes
    if weight_layout == "tiles":
        weight_bytes += ARENA_BYTES  # the last arena may be nearly empty
    fixed = weight_bytes + workspace + ring_bytes + _RESERVE_BYTES
    if kv_tokens is None:
        most = (budget_bytes - fixed) // per_token
        kv_tokens = max(token_budget, min(DEFAULT_KV_TOKENS, model.max_positions * 4, most))
    kv_tokens = -(-kv_tokens // kv_block_tokens) * kv_block_tokens
    parts = {
        "weights (packed)" if weight_layout == "tiles" else "weights (mapped)": weight_bytes,
        "KV cache": kv_tokens * per_token,
        "workspace": workspace,
        **({"ring": ring_bytes} if ring_bytes else {}),
        "reserve": _RESERVE_BYTES,
    }
    plan = MemoryPlan(parts, budget_bytes, kv_tokens)
    if plan.total_bytes > budget_bytes:
        raise MemoryBudgetError(
            f"{plan.total_bytes / GIB:.2f} GiB needed, {budget_bytes / GIB:.2f} GiB in the budget "
            f"({plan}); lower kv_tokens ({kv_tokens}) or token_budget ({token_budget}), or raise memory_gb"
        )
    return plan


def _workspace_bytes(model: ModelSpec, token_budget: int) -> int:
    """float32 activations of one step at its widest point, and the logits of 64 requests."""
    attention = (2 * model.num_heads + 4 * model.num_kv_heads) * model.head_dim
    experts = model.top_k * (2 * model.moe_intermediate + model.hidden)
    dense = 3 * model.dense_intermediate if model.dense_layers else 0
    rows = token_budget * (4 * model.hidden + max(attention, experts, dense)) * 4
    return rows + model.vocab * 4 * 64
