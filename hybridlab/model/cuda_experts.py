"""A group of experts on a CUDA device: their bytes as they came from the checkpoint, widened when they are used.

Legend: T tokens, S slots of a token (top-k), R = T * S routes, E experts here, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from hybridlab.model.cuda_blocks import weighted_sum, widen_blocks
from hybridlab.model.expert_block import ExpertBlock


class ExpertGroup(Protocol):
    """Experts whose blocks lie one after another in a tensor (uint8) that a ring fills or that stays."""

    def __call__(
        self, x_TH: torch.Tensor, local_ids_TS: torch.Tensor, weights_TS: torch.Tensor, experts: int
    ) -> torch.Tensor:
        """float32 [T, H]: weighted sum over each token's experts that are here; ids below 0 are elsewhere.

        The first `experts` blocks are in use. Nothing waits for the host.
        """
        ...


MakeGroup = Callable[[torch.Tensor], ExpertGroup]
"""From blocks (uint8, one after another) to the group that computes with them."""


class Routes(NamedTuple):
    """Routes sorted by expert: their tokens [R], where each expert's end (int32 [E]), and the place of each in the
    order, -1 for those to experts elsewhere, which come last ([T, S])."""

    tokens_R: torch.Tensor
    ends_E: torch.Tensor
    place_TS: torch.Tensor


def sort_routes(local_ids_TS: torch.Tensor, numbers_E: torch.Tensor) -> Routes:
    """`numbers_E` is arange(E) on the device."""
    key = torch.where(local_ids_TS < 0, len(numbers_E), local_ids_TS).flatten()
    sorted_key, order = torch.sort(key, stable=True)
    # Not bincount: it would wait for the device, and the next loads would be enqueued only then.
    ends = torch.searchsorted(sorted_key, numbers_E, right=True, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Routes(order // local_ids_TS.shape[1], ends, torch.where(local_ids_TS < 0, -1, place.view_as(local_ids_TS)))


def block_field(blocks: torch.Tensor, field: tuple, dtype: torch.dtype) -> torch.Tensor:
    """[E, rows, columns] of `field` (see `ExpertBlock`) over blocks [E, num_bytes]; nothing is copied."""
    offset, shape, _ = field
    size = shape[0] * shape[1] * dtype.itemsize
    return blocks[:, offset : offset + size].view(dtype).unflatten(1, shape)


class Workspace:
    """Room for the widened weights of one group, shared by all groups of a device: they are used one after another."""

    def __init__(self, experts: int, block: ExpertBlock, device: torch.device) -> None:
        i, h = block.weights[0][1]
        self.w13 = torch.empty(experts, 2 * i, h, dtype=torch.bfloat16, device=device)
        self.w2 = torch.empty(experts, h, i, dtype=torch.bfloat16, device=device)


class GroupedExperts:
    """Weights widened to BF16 in `workspace`, then torch's grouped products."""

    def __init__(self, blocks: torch.Tensor, block: ExpertBlock, workspace: Workspace) -> None:
        self._blocks = blocks.view(-1, block.num_bytes)
        self._block, self._workspace = block, workspace
        self._numbers = torch.arange(len(self._blocks), device=blocks.device)

    def __call__(
        self, x_TH: torch.Tensor, local_ids_TS: torch.Tensor, weights_TS: torch.Tensor, experts: int
    ) -> torch.Tensor:
        w13, w2 = self._widened(experts)
        routes = sort_routes(local_ids_TS, self._numbers[:experts])
        x_RH = x_TH.to(torch.bfloat16)[routes.tokens_R]
        gate, up = grouped_product(x_RH, w13, routes.ends_E).chunk(2, dim=-1)
        y_RH = grouped_product(functional.silu(gate) * up, w2, routes.ends_E)
        return weighted_sum(y_RH, routes.place_TS, weights_TS)

    def _widened(self, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up [E, 2 I, H], down [E, H, I]) as BF16."""
        i = self._block.weights[0][1][0]
        w13, w2 = self._workspace.w13[:experts], self._workspace.w2[:experts]
        blocks, targets = self._blocks[:experts], (w13[:, :i], w13[:, i:], w2)
        if self._block.scales:
            for codes, scale, target in zip(self._block.weights, self._block.scales, targets, strict=True):
                widen_blocks(block_field(blocks, codes, torch.uint8), block_field(blocks, scale, torch.float32), target)
        else:
            for field, target in zip(self._block.weights, targets, strict=True):
                target.copy_(block_field(blocks, field, torch.bfloat16))
        return w13, w2


def grouped_product(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
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
