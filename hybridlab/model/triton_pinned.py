"""A kernel that reads pinned host memory over the link; imported on first use."""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _read(source, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Not from a cache: the line may have been read for the step before.
    tl.store(out + at, tl.load(source + at, mask=at < size, volatile=True), mask=at < size)


def read_pinned(out: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Enqueue: `out` becomes a copy of `source`, which is pinned; contiguous, of one shape and type. Returns `out`.

    A copy of the stream would wait for the copy engine, where the experts of a whole layer may be before it.
    """
    kernel: Any = _read
    kernel[(triton.cdiv(out.numel(), 1024),)](source, out, out.numel(), BLOCK=1024, num_warps=4)
    return out
