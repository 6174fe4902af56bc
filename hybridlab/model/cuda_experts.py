"""A group of experts on a CUDA device: their bytes as they came from the checkpoint, widened when they are used.

Legend: T tokens, S slots of a token (top-k), R = T * S routes, E experts here, H hidden, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from hybridlab.model.cuda_blocks import weighted_sum, widen_blocks
from hybridlab.model.expert_block import ExpertBlock


class Workspace:
    """Room for the widened weights of one group, shared by all groups of a device: they are used one after another."""

    def __init__(self, experts: int, block: ExpertBlock, device: torch.device) -> None:
        i, h = block.weights[0][1]
        self.w13 = torch.empty(experts, 2 * i, h, dtype=torch.bfloat16, device=device)
        self.w2 = torch.empty(experts, h, i, dtype=torch.bfloat16, device=device)


class GroupedExperts:
    """Experts whose blocks lie one after another in `blocks` (uint8, flat)."""

    def __init__(self, blocks: torch.Tensor, block: ExpertBlock, workspace: Workspace) -> None:
        self._blocks = blocks.view(-1, block.num_bytes)
        self._block, self._workspace = block, workspace
        self._numbers = torch.arange(len(self._blocks), device=blocks.device)

    def __call__(
        self, x_TH: torch.Tensor, local_ids_TS: torch.Tensor, weights_TS: torch.Tensor, experts: int
    ) -> torch.Tensor:
        """float32 [T, H]: weighted sum over each token's experts that are here; ids below 0 are elsewhere.

        The first `experts` blocks are in use. Nothing waits for the host.
        """
        w13, w2 = self._widened(experts)
        slots = local_ids_TS.shape[1]
        key = torch.where(local_ids_TS < 0, experts, local_ids_TS).flatten()
        sorted_key, order = torch.sort(key, stable=True)
        # Not bincount: it would wait for the device, and the next loads would be enqueued only then.
        ends = torch.searchsorted(sorted_key, self._numbers[:experts], right=True, out_int32=True)
        x_RH = x_TH.to(torch.bfloat16)[order // slots]
        gate, up = _grouped(x_RH, w13, ends).chunk(2, dim=-1)
        y_RH = _grouped(functional.silu(gate) * up, w2, ends)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        place_TS = torch.where(local_ids_TS < 0, -1, place.view_as(local_ids_TS))
        return weighted_sum(y_RH, place_TS, weights_TS)

    def _widened(self, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up [E, 2 I, H], down [E, H, I]) as BF16."""
        i = self._block.weights[0][1][0]
        w13, w2 = self._workspace.w13[:experts], self._workspace.w2[:experts]
        targets = (w13[:, :i], w13[:, i:], w2)
        if self._block.scales:
            for codes, scale, target in zip(self._block.weights, self._block.scales, targets, strict=True):
                fp8, factors = self._view(codes, experts, torch.uint8), self._view(scale, experts, torch.float32)
                widen_blocks(fp8, factors, target)
        else:
            for field, target in zip(self._block.weights, targets, strict=True):
                target.copy_(self._view(field, experts, torch.bfloat16))
        return w13, w2

    def _view(self, field: tuple, experts: int, dtype: torch.dtype) -> torch.Tensor:
        offset, shape, _ = field
        size = shape[0] * shape[1] * dtype.itemsize
        flat = self._blocks[:experts, offset : offset + size]
        return flat.view(dtype).unflatten(1, shape)


def _grouped(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Rows [ends[e - 1], ends[e]) of x times w[e].T -> [R, N]; rows behind the last end are left as they come."""
    if x_RK.is_cuda:
        product: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm")  # noqa: B009
        return product(x_RK, w_ENK.transpose(1, 2), offs=ends_E)
    out = torch.zeros(len(x_RK), w_ENK.shape[1], dtype=x_RK.dtype)
    start = 0
    for weight, end in zip(w_ENK, ends_E.tolist(), strict=True):
        out[start:end] = functional.linear(x_RK[start:end], weight)
        start = end
    return out
