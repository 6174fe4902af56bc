"""Triton kernels of `fp8_twin`, by the same names; imported on first use. Nothing here waits for the host.

A tile is BLOCK_M routes of one expert by 128 columns. How many tiles an expert has is known on the device alone, so
the grid is an upper bound (one ragged tile per expert), and each program finds its expert in `ends`; those behind the
last end are done at once, so that routes to experts elsewhere cost nothing.

FP8 operands go to the tensor cores as they are. Beside BF16 activations, codes are widened in registers, which is
exact, and scales are applied to the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from hybridlab.model.fp8_twin import LEAST_BLOCK, MOST, Rows, Scaled
from hybridlab.spec import BLOCK_FP8

_MOST = tl.constexpr(MOST)
_LEAST = tl.constexpr(LEAST_BLOCK)


@triton.jit
def _encode(value):
    """E4M3FN codes (uint8) of float32 that round to 448 at most, to nearest even; by hand, since the conversion of
    Triton's interpreter is wrong for ties, subnormals and NaN."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 a code is a multiple of 2^-9, which is the last bit of a float32 near 2^14.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    return tl.where(size < 0x7F800000, ((bits >> 24) & 0x80) | code, 0x7F).to(tl.uint8)


@triton.jit
def _quantised(value):
    """Codes of a block [M, 128] of float32, and its scales [M]."""
    finite = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    most = tl.max(tl.where(finite, tl.abs(value), 0.0), 1)
    size = tl.maximum(most, _LEAST)
    scale = tl.where(most > 0, size * (1 / _MOST), 1.0)
    inverse = tl.div_rn(tl.zeros_like(size) + _MOST, size)
    return _encode(value * inverse[:, None]), scale


@triton.jit
def _quantise(x, codes, scale, rows, k, scale_block, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < k)[None, :]
    at = row[:, None] * k + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    code, factor = _quantised(value)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(codes + at, code, mask=inside)
    tl.store(scale + block * scale_block + row, factor, mask=row < rows)


@triton.jit
def _place(ends, experts, tile, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first route) of a tile; the expert is not below `experts` for tiles behind the last end."""
    numbers = tl.arange(0, EXPERTS)
    end = tl.load(ends + numbers, mask=numbers < experts, other=0)
    start = tl.load(ends + numbers - 1, mask=(numbers > 0) & (numbers < experts), other=0)
    tiles = tl.cumsum((end - start + BLOCK_M - 1) // BLOCK_M, 0)
    before = tiles <= tile
    first = tl.max(tl.where(before, end, 0), 0) + (tile - tl.max(tl.where(before, tiles, 0), 0)) * BLOCK_M
    return tl.sum(before.to(tl.int32), 0), first


@triton.jit
def _piece(at, column, k, EVEN: tl.constexpr):
    """Part of 128 columns, of which those behind k are 0."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=column < k, other=0.0)


@triton.jit
def _dot(a, b, factor_M, factor, WIDE: tl.constexpr):
    """a [M, 128] times b [128, N], times the scales."""
    if factor_M is None:
        return tl.dot(a.to(WIDE), b.to(WIDE)) * factor
    else:
        return tl.dot(a, b) * (factor_M * factor)[:, None]


@triton.jit
def _hidden(
    x, x_scale, rows, gate, up, gate_scale, up_scale, ends, out, out_scale, experts, n, k, grid_n, grid_k,
    x_scale_block, w_expert, scale_expert, out_scale_block,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    tile, tile_n = tl.program_id(0) // grid_n, tl.program_id(0) % grid_n
    expert, first = _place(ends, experts, tile, BLOCK_M, EXPERTS)  # pyright: ignore[reportGeneralTypeIssues]
    if expert >= experts:
        return
    route = first + tl.arange(0, BLOCK_M)
    inside = route < tl.load(ends + expert)
    row = tl.load(rows + route, mask=inside, other=0).to(tl.int64)
    column_n = tile_n * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK)
    x_at = x + row[:, None] * k + lane[None, :]
    far = expert.to(tl.int64)
    gate += far * w_expert
    up += far * w_expert
    w_at = tl.minimum(column_n, n - 1)[None, :] * k + lane[:, None]
    s_at = far * scale_expert + tile_n * grid_k
    g = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for block in range(grid_k):
        a = _piece(x_at, block * BLOCK + lane[None, :], k, EVEN)
        b = _piece(gate + w_at, block * BLOCK + lane[:, None], k, EVEN)
        c = _piece(up + w_at, block * BLOCK + lane[:, None], k, EVEN)
        factor = None if x_scale is None else tl.load(x_scale + block * x_scale_block + row)
        g += _dot(a, b, factor, tl.load(gate_scale + s_at + block), WIDE)
        u += _dot(a, c, factor, tl.load(up_scale + s_at + block), WIDE)
        x_at += BLOCK
        gate += BLOCK
        up += BLOCK
    value = g / (1.0 + tl.exp(-g)) * u  # columns behind n repeat the last one, which changes no scale
    at = route.to(tl.int64)[:, None] * n + column_n[None, :]
    kept = inside[:, None] & (column_n < n)[None, :]
    if x_scale is None:
        tl.store(out + at, value.to(tl.bfloat16), mask=kept)
    else:
        code, factor_out = _quantised(value)  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(out + at, code, mask=kept)
        tl.store(out_scale + tile_n * out_scale_block + route, factor_out, mask=inside)


@triton.jit
def _product(
    x, x_scale, w, w_scale, ends, out, experts, n, k, grid_n, grid_k, x_scale_block, w_expert, scale_expert,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    tile, tile_n = tl.program_id(0) // grid_n, tl.program_id(0) % grid_n
    expert, first = _place(ends, experts, tile, BLOCK_M, EXPERTS)  # pyright: ignore[reportGeneralTypeIssues]
    if expert >= experts:
        return
    end = tl.load(ends + expert)
    route = first + tl.arange(0, BLOCK_M)
    row = tl.minimum(route, end - 1).to(tl.int64)
    column_n = tile_n * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK)
    x_at = x + row[:, None] * k + lane[None, :]
    far = expert.to(tl.int64)
    w += far * w_expert
    w_at = tl.minimum(column_n, n - 1)[None, :] * k + lane[:, None]
    s_at = w_scale + far * scale_expert + tile_n * grid_k
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for block in range(grid_k):
        a = _piece(x_at, block * BLOCK + lane[None, :], k, EVEN)
        b = _piece(w + w_at, block * BLOCK + lane[:, None], k, EVEN)
        factor = None if x_scale is None else tl.load(x_scale + block * x_scale_block + row)
        total += _dot(a, b, factor, tl.load(s_at + block), WIDE)
        x_at += BLOCK
        w += BLOCK
    at = route.to(tl.int64)[:, None] * n + column_n[None, :]
    tl.store(out + at, total.to(tl.bfloat16), mask=(route < end)[:, None] & (column_n < n)[None, :])


def quantise(x_RK: torch.Tensor) -> Scaled:
    """See `fp8_twin.quantise`."""
    (rows, k), x = x_RK.shape, x_RK.contiguous()
    out = _room(rows, k, x.device)
    kernel: Any = _quantise
    grid = (-(-rows // 32), out.scale.shape[1])
    kernel[grid](x, out.codes, out.scale, rows, k, out.scale.stride(1), BLOCK_M=32, BLOCK=BLOCK_FP8, num_warps=4)
    return out


def hidden(x: Rows, rows_R: torch.Tensor, gate: Scaled, up: Scaled, ends_E: torch.Tensor) -> Rows:
    """See `fp8_twin.hidden`."""
    routes, n = len(rows_R), gate.codes.shape[1]
    codes, scale, block = _parts(x)
    if scale is None:
        result: Rows = torch.empty(routes, n, dtype=torch.bfloat16, device=codes.device)
        out, out_scale, out_block = result, None, 0
    else:
        result = _room(routes, n, codes.device)
        out, out_scale, out_block = result.codes, result.scale, result.scale.stride(1)
    numbers, shape = _numbers(gate, routes, ends_E, wide=scale is None)
    kernel: Any = _hidden
    kernel[shape](
        codes, scale, rows_R, _fp8(gate.codes), _fp8(up.codes), gate.scale, up.scale, ends_E, out, out_scale,
        len(ends_E), n, gate.codes.shape[2], *gate.scale.shape[1:], block, gate.codes.stride(0), gate.scale.stride(0),
        out_block, **numbers,
    )  # fmt: skip
    return result


def product(x: Rows, w: Scaled, ends_E: torch.Tensor) -> torch.Tensor:
    """See `fp8_twin.product`."""
    codes, scale, block = _parts(x)
    n = w.codes.shape[1]
    out = torch.empty(len(codes), n, dtype=torch.bfloat16, device=codes.device)
    numbers, shape = _numbers(w, len(codes), ends_E, wide=scale is None)
    kernel: Any = _product
    kernel[shape](
        codes, scale, _fp8(w.codes), w.scale, ends_E, out, len(ends_E), n, w.codes.shape[2], *w.scale.shape[1:],
        block, w.codes.stride(0), w.scale.stride(0), **numbers,
    )  # fmt: skip
    return out


def _numbers(w: Scaled, routes: int, ends_E: torch.Tensor, *, wide: bool) -> tuple[dict[str, Any], tuple[int]]:
    """The kernel's constants, and its grid."""
    experts, (_, grid_n, _) = len(ends_E), w.scale.shape
    block_m = 64 if wide or routes <= 64 * experts else 128
    constants = {
        "BLOCK_M": block_m,
        "BLOCK": BLOCK_FP8,
        "EXPERTS": triton.next_power_of_2(experts),
        "EVEN": w.codes.shape[2] % BLOCK_FP8 == 0,
        # Triton's interpreter, which is what computes on the CPU, multiplies no BF16.
        "WIDE": tl.bfloat16 if ends_E.is_cuda else tl.float32,
        "num_warps": 8 if wide else block_m // 16,
        "num_stages": 2 if wide else 3,
    }
    return constants, ((-(-routes // block_m) + experts) * grid_n,)


def _parts(x: Rows) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """(codes or BF16 [R, K], scales, elements from a block's scales to the next one's)."""
    if not isinstance(x, Scaled):
        return x.contiguous(), None, 0
    scale = x.scale if x.scale.stride(0) == 1 else x.scale.T.contiguous().T
    return _fp8(x.codes.contiguous()), scale, scale.stride(1)


def _room(rows: int, k: int, device: torch.device) -> Scaled:
    """Codes [R, K] and scales [R, ceil(K/128)], those of a block side by side: a tile reads a column of them."""
    scale = torch.empty(-(-k // BLOCK_FP8), rows, device=device).T
    return Scaled(torch.empty(rows, k, dtype=torch.uint8, device=device), scale)


def _fp8(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.float8_e4m3fn)
