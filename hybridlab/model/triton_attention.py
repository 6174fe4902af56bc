"""Decode attention in Triton: each request's context is cut into equal splits, which are computed side by side.

As flash-decoding (Dao et al., 2023). Lengths are read on the device, so that a captured step serves every length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

SPLITS = 32
"""Of a context; those beyond its end cost a launch slot and no memory traffic."""
TILE = 64
"""Cached tokens at a time."""
LEAST_ROWS = 16
"""Rows that a matrix product of the tensor cores has at least."""


@triton.jit
def _splits(
    q, keys, values, tables, lengths, acc_out, max_out, sum_out, scale, table_stride, slot_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + token)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    head = kv_head * GROUP + row
    q_at = (token * HEADS + head[:, None]) * DIM + dim[None, :]
    mine = row < GROUP
    q_tile = tl.load(q + q_at, mask=mine[:, None], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(first, last, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < last
        block = tl.load(tables + token * table_stride + position // BLOCK_TOKENS, mask=inside, other=0)
        slot = (block * BLOCK_TOKENS + position % BLOCK_TOKENS).to(tl.int64)
        at = slot[:, None] * slot_stride + kv_head * DIM + dim[None, :]
        k_tile = tl.load(keys + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(q_tile.to(WIDE), tl.trans(k_tile.to(WIDE))).to(tl.float32) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        kept = tl.exp(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        v_tile = tl.load(values + at, mask=inside[:, None], other=0.0)
        acc = acc * kept[:, None] + tl.dot(weights.to(WIDE), v_tile.to(WIDE)).to(tl.float32)
        top = new_top
    out = (token * HEADS + head) * SPLITS + split
    tl.store(max_out + out, top, mask=mine)
    tl.store(sum_out + out, total, mask=mine)
    tl.store(acc_out + out[:, None].to(tl.int64) * DIM + dim[None, :], acc, mask=mine[:, None])


@triton.jit
def _join(acc_in, max_in, sum_in, out, DIM: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM)
    tops = tl.load(max_in + row * SPLITS + split)
    weights = tl.exp(tops - tl.max(tops, 0))
    total = tl.sum(tl.load(sum_in + row * SPLITS + split) * weights, 0)
    acc = tl.load(acc_in + (row * SPLITS + split)[:, None].to(tl.int64) * DIM + dim[None, :])
    result = tl.sum(acc * weights[:, None], 0) / total
    tl.store(out + row * DIM + dim, result.to(out.dtype.element_ty))


def decode_attention(
    q_TND: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, tables: torch.Tensor,
    lengths: torch.Tensor, block_tokens: int,
) -> torch.Tensor:  # fmt: skip
    """See `cuda_attention.decode_attention`; head_dim is a power of two."""
    tokens, heads, dim = q_TND.shape
    groups = keys_SGD.shape[1]
    group = heads // groups
    q = q_TND.contiguous()
    tops, sums = torch.empty(2, tokens, heads, SPLITS, device=q.device).unbind(0)
    acc = torch.empty(tokens, heads, SPLITS, dim, device=q.device)
    out = torch.empty_like(q)
    splits: Any = _splits
    splits[(tokens, groups, SPLITS)](
        q, keys_SGD, values_SGD, tables, lengths, acc, tops, sums, dim**-0.5, tables.stride(0), keys_SGD.stride(0),
        HEADS=heads, GROUP=group, ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)), DIM=dim,
        BLOCK_TOKENS=block_tokens, SPLITS=SPLITS, TILE=TILE,
        # Triton's interpreter, which is what computes on the CPU, multiplies no BF16.
        WIDE=tl.bfloat16 if q.is_cuda else tl.float32, num_warps=4,
    )  # fmt: skip
    join: Any = _join
    join[(tokens * heads,)](acc, tops, sums, out, DIM=dim, SPLITS=SPLITS, num_warps=4)
    return out
