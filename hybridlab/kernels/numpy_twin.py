"""The NumPy twin of the compiled kernels: slow, short, and the oracle of their tests.

Legend: N rows (outputs), K columns (inputs), T tokens, E experts, k slots, H model width, I expert width.
Arguments have been checked by `hybridlab.kernels`. `dtype` is the arithmetic: float32, as in the kernels, or
float64 for reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridlab.number_formats import bf16_to_float32, fp8_values

BLOCK = 128
ROWS_AT_A_TIME = 1024  # bounds the dequantised copy

Matrix = tuple[NDArray[Any], NDArray[np.float32] | None]
"""(weight [N, K] uint8 FP8 codes or uint16 BF16 bits, scale [ceil(N/128), ceil(K/128)] or None)"""


def round_to_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """`x` rounded to BF16, to nearest even, as float32; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def dequantize(matrix: Matrix, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
    """Rows [first, last) of a weight as float32; FP8 is multiplied by its block's scale."""
    weight, scale = matrix
    rows = weight[first:last]
    if scale is None:
        return bf16_to_float32(rows)
    n, k = rows.shape
    per_row = scale[np.arange(first, first + n) // BLOCK]
    return fp8_values()[rows] * np.repeat(per_row, BLOCK, axis=1)[:, :k]


def linear(x: NDArray[np.float32], matrix: Matrix, dtype: type = np.float32) -> NDArray[Any]:
    """x [T, K] (rounded to BF16 first) times the weight's transpose -> [T, N] of `dtype`."""
    x_TK = round_to_bf16(x).astype(dtype)
    out_TN = np.empty((len(x), len(matrix[0])), dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN codes and infinities are the caller's data
        for n in range(0, out_TN.shape[1], ROWS_AT_A_TIME):
            out_TN[:, n : n + ROWS_AT_A_TIME] = x_TK @ dequantize(matrix, n, n + ROWS_AT_A_TIME).astype(dtype).T
    return out_TN


def moe(
    x: NDArray[np.float32],
    expert_ids: NDArray[np.int32],
    expert_weights: NDArray[np.float32],
    gate: Sequence[Matrix | None],
    up: Sequence[Matrix | None],
    down: Sequence[Matrix | None],
    dtype: type = np.float32,
) -> NDArray[Any]:
    """x [T, H], ids and weights [T, k] -> [T, H] of `dtype`.

    The sum, in slot order, of weight * down(bf16(silu(gate x) * up x)); negative ids skip their slot.
    """
    out_TH = np.zeros(x.shape, dtype)
    y_TkH = np.zeros((*expert_ids.shape, x.shape[1]), dtype)
    for e in np.unique(expert_ids[expert_ids >= 0]):
        tokens, slots = np.nonzero(expert_ids == e)
        gate_e, up_e, down_e = gate[e], up[e], down[e]
        assert gate_e is not None and up_e is not None and down_e is not None  # checked by the caller
        g, u = linear(x[tokens], gate_e, dtype), linear(x[tokens], up_e, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            hidden = g / (1 + np.exp(-g)) * u
        y_TkH[tokens, slots] = linear(hidden.astype(np.float32), down_e, dtype)
    for slot in range(expert_ids.shape[1]):
        used = expert_ids[:, slot] >= 0
        out_TH[used] += expert_weights[used, slot, None].astype(dtype) * y_TkH[used, slot]
    return out_TH


def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float) -> NDArray[np.float32]:
    """x [..., H] / sqrt(mean(x^2) + eps) * weight."""
    scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(eps))
    return x * scale * weight


def norm_rope(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
) -> NDArray[np.float32]:
    """RMS norm of each head of x [T, N, D], then rotation of (first half, second half) by angles [T, D/2]."""
    a, b = np.split(rms_norm(x, weight, eps), 2, axis=-1)
    c, s = cosines[:, None], sines[:, None]
    return np.concatenate((a * c - b * s, b * c + a * s), axis=-1, dtype=np.float32)


def route(logits: NDArray[np.float32], top_k: int, normalise: bool) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The top_k largest of softmax(logits [T, E]), descending, the lower id first among equals."""
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(exp / exp.sum(-1, keepdims=True), ids, axis=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids.astype(np.int32), weights


def attend_one(q: NDArray[np.float32], keys: NDArray[np.uint16], values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """q [N, D] over the cached BF16 keys and values [C, G, D], N / G query heads to each of the G."""
    heads, size = q.shape
    k_GDC, v_GCD = bf16_to_float32(keys).transpose(1, 2, 0), bf16_to_float32(values).transpose(1, 0, 2)
    scores = q.reshape(keys.shape[1], -1, size) @ k_GDC / np.float32(np.sqrt(size))
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return (exp / exp.sum(-1, keepdims=True) @ v_GCD).reshape(heads, size).astype(np.float32)


def read_words(words: NDArray[np.uint64]) -> int:
    """Sum (mod 2^64) of 64-bit words."""
    return int(words.sum(dtype=np.uint64))
