"""Kernels that hand over by themselves: they write to pinned memory, and spin on a word there. Not in the engine."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _send(x, ids, weights, host_x, host_ids, host_weights, word, x_size, routes, BLOCK: tl.constexpr):
    # One program, so that a barrier stands between its last store and the word.
    for start in range(0, x_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(host_x + at, tl.load(x + at, mask=at < x_size), mask=at < x_size)
    for start in range(0, routes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(host_ids + at, tl.load(ids + at, mask=at < routes), mask=at < routes)
        tl.store(host_weights + at, tl.load(weights + at, mask=at < routes), mask=at < routes)
    tl.debug_barrier()
    tl.atomic_xchg(word, 1, sem="release", scope="sys")


def send(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, host_x: torch.Tensor, host_ids: torch.Tensor,
    host_weights: torch.Tensor, word: torch.Tensor,
) -> None:  # fmt: skip
    """Enqueue: what the host's experts need goes into pinned memory, then `word` (int32, one element) becomes 1.

    x float32 [T, H], ids int32 [T, K], weights float32 [T, K]; all contiguous.
    """
    kernel: Any = _send
    kernel[(1,)](
        x, ids, weights, host_x, host_ids, host_weights, word, x.numel(), ids.numel(), BLOCK=4096, num_warps=16
    )


@triton.jit
def _receive(word, host_out, out, size, BLOCK: tl.constexpr):
    seen = tl.load(word, volatile=True)
    while seen == 0:
        seen = tl.load(word, volatile=True)
    tl.debug_barrier()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Not from a cache: the line may have been read for the step before.
    tl.store(out + at, tl.load(host_out + at, mask=at < size, volatile=True), mask=at < size)


def receive(word: torch.Tensor, host_out: torch.Tensor, out: torch.Tensor) -> None:
    """Enqueue: wait until the host has set `word`, then copy its float32 results from pinned memory to `out`."""
    kernel: Any = _receive
    kernel[(triton.cdiv(out.numel(), 1024),)](word, host_out, out, out.numel(), BLOCK=1024, num_warps=4)
