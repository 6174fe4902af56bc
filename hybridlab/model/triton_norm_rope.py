"""Norm of each head and rotary embedding as one Triton kernel: a decode step is bound by the kernels it launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _norm_rope(x, weight, cosines, sines, out, eps, heads, HALF: tl.constexpr, ROWS: tl.constexpr, total):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of [T * N]
    inside = (row < total)[:, None]
    column = tl.arange(0, HALF)[None, :]
    first = row.to(tl.int64)[:, None] * (2 * HALF) + column
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + HALF, mask=inside, other=0.0).to(tl.float32)
    mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
    factor = (1.0 / tl.sqrt(mean + eps))[:, None]
    a = a * factor * tl.load(weight + column)
    b = b * factor * tl.load(weight + HALF + column)
    angle = (row // heads).to(tl.int64)[:, None] * HALF + column
    c, s = tl.load(cosines + angle, mask=inside, other=0.0), tl.load(sines + angle, mask=inside, other=0.0)
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + first + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def norm_rope(
    x_TND: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TF: torch.Tensor, sin_TF: torch.Tensor
) -> torch.Tensor:
    """x float32 or BF16 [T, N, D], weight float32, tables float32 [T, D / 2] -> BF16; D / 2 is a power of two."""
    tokens, heads, dim = x_TND.shape
    x, out = x_TND.contiguous(), torch.empty(x_TND.shape, dtype=torch.bfloat16, device=x_TND.device)
    rows = 8
    kernel: Any = _norm_rope
    kernel[(triton.cdiv(tokens * heads, rows),)](
        x, weight_D, cos_TF, sin_TF, out, eps, heads, HALF=dim // 2, ROWS=rows, total=tokens * heads, num_warps=4
    )
    return out
