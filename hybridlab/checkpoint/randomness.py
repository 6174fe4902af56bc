"""Fast reproducible random weights: 16 random bits choose one of 65,536 table entries.

An entry is one BF16 number or a pair of FP8 numbers, so one gather makes either format, and what cannot be in
the table (NaN codes) cannot be in a checkpoint. Streams are keyed by name: neither threads nor order matter.
"""

from __future__ import annotations

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np

from hybridlab.checkpoint.formats import float32_to_bf16, fp8_values

CHUNK_WORDS = 1 << 13
"""64-bit random words per step: with its output a step stays inside a core's second-level cache."""

FP8_STD = 448 / 4.1
"""Standard deviation of FP8 values before scaling: the largest of 128x128 Gaussians then reaches 448."""


def random_source(key: str) -> np.random.SFC64:
    """A random stream that depends on the key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


@cache
def normal_quantiles(num: int) -> np.ndarray:
    """The middle quantiles of `num` equal slices of N(0, 1), ascending: float64 [num]."""
    inverse = NormalDist().inv_cdf
    upper = [inverse((i + 0.5) / num) for i in range(num // 2, num)]
    return np.array([-z for z in reversed(upper)] + upper)


@cache
def _fp8_quantiles() -> np.ndarray:
    """256 E4M3 codes spread like N(0, FP8_STD): uint8 [256]."""
    values = np.where(np.isnan(fp8_values()), np.inf, fp8_values()).astype(np.float64)
    distance = np.abs(values[None, :] - FP8_STD * normal_quantiles(256)[:, None])
    return distance.argmin(axis=1).astype(np.uint8)


@cache
def fp8_rms() -> float:
    """Root mean square of the FP8 values that `fp8_table` draws."""
    return float(np.sqrt(np.mean(fp8_values()[_fp8_quantiles()].astype(np.float64) ** 2)))


@cache
def fp8_table() -> np.ndarray:
    """All pairs of FP8 quantiles: uint16 [65536]."""
    codes = _fp8_quantiles()
    return np.stack(np.broadcast_arrays(codes[:, None], codes[None, :]), axis=-1).reshape(-1).view(np.uint16)


@cache
def bf16_table(std: float, mean: float = 0.0) -> np.ndarray:
    """Quantiles of N(mean, std) as BF16 codes: uint16 [65536]."""
    return float32_to_bf16((mean + std * normal_quantiles(1 << 16)).astype(np.float32))


def fill(out: np.ndarray, table: np.ndarray, source: np.random.SFC64) -> None:
    """Fill `out` (uint8 or uint16, contiguous) with random entries of a uint16 [65536] table."""
    data = out.reshape(-1).view(np.uint8)
    pairs = data[: data.size // 2 * 2].view(np.uint16)
    for start in range(0, pairs.size, 4 * CHUNK_WORDS):
        part = pairs[start : start + 4 * CHUNK_WORDS]
        index = source.random_raw((part.size + 3) // 4).view(np.uint16)[: part.size]
        # Every uint16 is a valid index; "wrap" spares the check that "raise" would copy the output for.
        np.take(table, index, out=part, mode="wrap")
    if data.size % 2:
        data[-1] = table[source.random_raw(1)[0] & 0xFFFF] & 0xFF


def uniform(source: np.random.SFC64, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1): float64 of the given shape."""
    return (source.random_raw(int(np.prod(shape))) >> 11).reshape(shape) * 2.0**-53
