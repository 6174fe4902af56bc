"""Triton kernels of `cuda_blocks`; imported on first use."""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from hybridlab.spec import BLOCK_FP8


@triton.jit
def _widen(
    codes, scale, out, n, k, grid_n, grid_k, codes_expert, codes_row, scale_expert, out_expert, out_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block_n, block_k = tile // grid_k, tile % grid_k
    row = block_n * BLOCK + tl.arange(0, BLOCK)[:, None].to(tl.int64)
    column = block_k * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < n) & (column < k)
    value = tl.load(codes + expert * codes_expert + row * codes_row + column, mask=inside, other=0.0)
    factor = tl.load(scale + expert * scale_expert + block_n * grid_k + block_k)
    wide = (value.to(tl.float32) * factor).to(tl.bfloat16)
    tl.store(out + expert * out_expert + row * out_row + column, wide, mask=inside)


def widen(codes_ENK: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """See `cuda_blocks.widen_blocks`."""
    experts, n, k = codes_ENK.shape
    grid_n, grid_k = -(-n // BLOCK_FP8), -(-k // BLOCK_FP8)
    codes = codes_ENK.view(torch.float8_e4m3fn)
    kernel: Any = _widen
    kernel[(grid_n * grid_k, experts)](
        codes, scale, out, n, k, grid_n, grid_k, codes.stride(0), codes.stride(1), scale.stride(0), out.stride(0),
        out.stride(1), BLOCK=BLOCK_FP8, num_warps=8,
    )  # fmt: skip


@triton.jit
def _weighted_sum(y, place, weights, out, slots, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(slots):
        at = tl.load(place + token * slots + slot)
        weight = tl.load(weights + token * slots + slot)
        row = tl.load(y + at * width + column, mask=inside & (at >= 0), other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out + token * width + column, total, mask=inside)


def weighted_sum(y_RH: torch.Tensor, place_TS: torch.Tensor, weights_TS: torch.Tensor) -> torch.Tensor:
    """See `cuda_blocks.weighted_sum`."""
    tokens, slots = place_TS.shape
    width = y_RH.shape[1]
    out = torch.empty(tokens, width, device=y_RH.device)
    kernel: Any = _weighted_sum
    kernel[(tokens, triton.cdiv(width, 1024))](
        y_RH, place_TS.contiguous(), weights_TS.contiguous(), out, slots, width, BLOCK=1024, num_warps=4
    )
    return out
