"""Stored number formats: BF16 and FP8 (E4M3FN) as integer codes, converted by NumPy alone."""

from __future__ import annotations

from functools import cache

import numpy as np

FP8_NAN_CODES = (0x7F, 0xFF)
"""E4M3FN has no infinity; these two codes are NaN, never +-480."""


def bf16_to_float32(codes: np.ndarray) -> np.ndarray:
    """Widen BF16 codes (uint16, any shape) to float32, exactly."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 (any shape, no NaN) to BF16 codes (uint16), to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


@cache
def fp8_values() -> np.ndarray:
    """The value of each of the 256 E4M3FN codes: float32 [256], NaN at 0x7F and 0xFF, read-only."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[list(FP8_NAN_CODES)] = np.nan
    values = np.where(code < 128, magnitude, -magnitude).astype(np.float32)
    values.flags.writeable = False
    return values


def dequantise(codes: np.ndarray, scale: np.ndarray, block: int = 128) -> np.ndarray:
    """Values of a block-scaled FP8 matrix: float32 [N, K].

    `codes` is uint8 [N, K], `scale` float32 [ceil(N / block), ceil(K / block)]; scales are multiplied and
    edge blocks may be ragged (the rule of DeepSeek-V3's `weight_dequant`).
    """
    rows, cols = codes.shape
    grid = np.repeat(np.repeat(scale, block, axis=0)[:rows], block, axis=1)[:, :cols]
    return fp8_values()[codes] * grid
