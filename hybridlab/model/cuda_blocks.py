"""Block-scaled FP8 to BF16, and weighted sums over a token's experts: Triton on a GPU, torch elsewhere.

Legend: E experts, N rows, K columns, T tokens, S slots of a token, H hidden.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from hybridlab.spec import BLOCK_FP8


def widen_blocks(
    codes_ENK: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None, *, twin: bool = False
) -> torch.Tensor:
    """FP8 E4M3FN codes (uint8 [E, N, K], rows contiguous) times float32 scales [E, ceil(N/128), ceil(K/128)] -> BF16.

    `twin` takes the torch version on a GPU too, which the kernel is held against.
    """
    if out is None:
        out = torch.empty(codes_ENK.shape, dtype=torch.bfloat16, device=codes_ENK.device)
    in_triton = codes_ENK.is_cuda and not twin and _has_fp8(codes_ENK.device)
    if in_triton and (kernels := triton_module("triton_kernels")) is not None:
        kernels.widen(codes_ENK, scale, out)
        return out
    n, k = codes_ENK.shape[1:]
    for expert, blocks, target in zip(codes_ENK, scale, out, strict=True):
        wide = blocks.repeat_interleave(BLOCK_FP8, 0)[:n].repeat_interleave(BLOCK_FP8, 1)[:, :k]
        target.copy_(expert.contiguous().view(torch.float8_e4m3fn).float() * wide)
    return out


def weighted_sum(
    y_RH: torch.Tensor, place_TS: torch.Tensor, weights_TS: torch.Tensor, *, twin: bool = False
) -> torch.Tensor:
    """float32 [T, H]: sum over slots, in their order, of weight * y[place]; a place below 0 adds nothing.

    y BF16 [R, H], place int64, weights float32.
    """
    if y_RH.is_cuda and not twin and (kernels := triton_module("triton_kernels")) is not None:
        return kernels.weighted_sum(y_RH, place_TS, weights_TS)
    out = torch.zeros(len(place_TS), y_RH.shape[1], device=y_RH.device)
    for place, weight in zip(place_TS.T, weights_TS.T, strict=True):
        rows = torch.where((place >= 0)[:, None], y_RH[place.clamp(min=0)].float(), 0.0)
        out += weight[:, None] * rows
    return out


@cache
def triton_module(name: str) -> ModuleType | None:
    """`hybridlab.model.<name>`, or None beside a torch without Triton."""
    try:
        return import_module(f"hybridlab.model.{name}")
    except ImportError:
        return None


@cache
def _has_fp8(device: torch.device) -> bool:
    """Triton knows the type on Ada GPUs and later ones; torch converts it on all."""
    return torch.cuda.get_device_capability(device) >= (8, 9)
