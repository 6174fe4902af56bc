"""Block-scaled FP8 products of groups of rows, in torch: the twin that `triton_grouped` is held against.

Activations are quantised to E4M3FN with one scale per row and 128 columns, weights come with one per 128 x 128 block.
A product is, for each 128 columns of K, a float32 sum of products of codes, times both scales, added up in float32.

Legend: T tokens, R routes sorted by expert, E experts, N output columns, K input columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from hybridlab.spec import BLOCK_FP8

MOST = 448.0
"""The largest E4M3FN value."""
LEAST_BLOCK = 2.0**-100
"""Blocks whose largest value is below it are scaled as if it were this, so that no scale is subnormal."""
FLOAT32_UNIT = 2.0**-24
HOPPER_UNIT = 2.0**-13
"""Tensor cores of Hopper align FP8 products to the largest one and cut what is below 13 fraction bits."""


class Scaled(NamedTuple):
    """E4M3FN codes (uint8) and float32 scales: [R, K] with [R, ceil(K/128)], or [E, N, K] with
    [E, ceil(N/128), ceil(K/128)]."""

    codes: torch.Tensor
    scale: torch.Tensor

    def wide(self) -> torch.Tensor:
        """float32: codes times scales."""
        columns = self.scale.repeat_interleave(BLOCK_FP8, -1)[..., : self.codes.shape[-1]]
        if self.codes.dim() == 3:
            columns = columns.repeat_interleave(BLOCK_FP8, -2)[:, : self.codes.shape[-2]]
        return values(self.codes) * columns


Rows = Scaled | torch.Tensor
"""Activations [R, K]: quantised, or BF16 that stay as they are."""


def values(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of E4M3FN codes (uint8, rows contiguous)."""
    return codes.contiguous().view(torch.float8_e4m3fn).float()


def quantise(x_RK: torch.Tensor) -> Scaled:
    """BF16 or float32 -> codes to nearest even, scale = largest finite size of a block / 448; a block of zeros has
    scale 1. NaN, and an infinity, which E4M3FN lacks, become 0x7F."""
    k = x_RK.shape[1]
    padded = functional.pad(x_RK.float(), (0, -k % BLOCK_FP8)).unflatten(1, (-1, BLOCK_FP8))
    finite = padded.isfinite()
    most = torch.where(finite, padded.abs(), 0.0).amax(-1)
    size = most.clamp(min=LEAST_BLOCK)
    scale = torch.where(most > 0, size * (1 / MOST), 1.0)
    # Not MOST / size, which is a rounded reciprocal times MOST.
    scaled = padded * (torch.full_like(size, MOST) / size)[..., None]
    rounded = torch.where(finite, scaled, torch.nan).to(torch.float8_e4m3fn)
    codes = rounded.view(torch.uint8).flatten(1)[:, :k].contiguous()
    return Scaled(codes, scale)


def hidden(x: Rows, rows_R: torch.Tensor, gate: Scaled, up: Scaled, ends_E: torch.Tensor) -> Rows:
    """silu(x gate.T) * (x up.T) of the routes, route r being row `rows_R[r]` of x -> [R, I], quantised if x is.

    Nothing is rounded between the products and the quantisation (or the rounding to BF16).
    Rows behind the last end are anything.
    """
    picked = Scaled(x.codes[rows_R], x.scale[rows_R]) if isinstance(x, Scaled) else x[rows_R]
    wide = functional.silu(_product(picked, gate, ends_E)) * _product(picked, up, ends_E)
    return quantise(wide) if isinstance(x, Scaled) else wide.to(torch.bfloat16)


def product(x: Rows, w: Scaled, ends_E: torch.Tensor) -> torch.Tensor:
    """BF16 [R, N]: rows [ends[e - 1], ends[e]) of x times w[e].T; rows behind the last end are anything."""
    return _product(x, w, ends_E).to(torch.bfloat16)


def _product(x: Rows, w: Scaled, ends_E: torch.Tensor) -> torch.Tensor:
    x_RK = values(x.codes) if isinstance(x, Scaled) else x.float()
    n = w.codes.shape[1]
    out = torch.zeros(len(x_RK), n, device=x_RK.device)
    start = 0
    for codes, scale, end in zip(w.codes, w.scale, ends_E.tolist(), strict=True):
        w_NK, columns = values(codes), scale.repeat_interleave(BLOCK_FP8, 0)[:n]
        for block in range(scale.shape[1]):
            part = slice(block * BLOCK_FP8, (block + 1) * BLOCK_FP8)
            factor = columns[:, block]
            if isinstance(x, Scaled):
                factor = x.scale[start:end, block, None] * factor
            out[start:end] += functional.linear(x_RK[start:end, part], w_NK[:, part]) * factor
        start = end
    return out


def error_bound(x: Rows, w: Scaled, ends_E: torch.Tensor, unit: float) -> torch.Tensor:
    """float32 [R, N]: how far apart two BF16 `product`s of the same codes may be; rows behind the last end are 0.

    Products of codes are exact in float32, so only sums and scales round. Within a block, in any order, a sum of 128
    terms is off by at most 128 units of sum|x w|: FLOAT32_UNIT, or HOPPER_UNIT for its tensor cores (four
    instructions, each adding 32 products to the running sum, that cut 33 numbers: 132). Both scales and the sum over
    blocks add K/128 + 3 roundings in float32. Two such sums, and two roundings to BF16 (2^-8 of |y| each), lie between.
    """
    sizes = Scaled(x.codes & 0x7F, x.scale) if isinstance(x, Scaled) else x.abs()
    total = _product(sizes, Scaled(w.codes & 0x7F, w.scale), ends_E)
    blocks = w.scale.shape[2]
    own = 132 * unit + (blocks + 3) * FLOAT32_UNIT
    twin = (128 + blocks + 3) * FLOAT32_UNIT
    return (own + twin) * total + 2.0**-7 * _product(x, w, ends_E).abs()
