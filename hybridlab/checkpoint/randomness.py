"""Fast reproducible random weights, keyed by name: neither threads nor order matter.

16 random bits choose one of 65,536 table entries: one BF16 number or a pair of FP8 numbers. What is not in
the table (NaN codes) cannot be in a checkpoint. Large tensors take their magnitudes from windows, at random
places, of a pool filled in that way, and get independent random signs: several times faster, and tensors
remain uncorrelated.
"""

from __future__ import annotations

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np

from hybridlab.number_formats import float32_to_bf16, fp8_values

CHUNK_WORDS = 1 << 13
"""64-bit random words per step: with its output a step stays inside a core's second-level cache."""

POOL_WORDS = 1 << 20
SIGN_WORDS = 1 << 12
"""Random words that give the signs of one window; a window holds 8 (FP8) or 16 (BF16) times as many words."""

_SIGNS = {8: 0x8080808080808080, 16: 0x8000800080008000}

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


@cache
def fp8_pool() -> np.ndarray:
    """Random entries of `fp8_table`: uint64 [POOL_WORDS]."""
    return _pool(fp8_table(), "fp8 pool")


@cache
def bf16_pool(std: float) -> np.ndarray:
    """Random entries of `bf16_table(std)`: uint64 [POOL_WORDS]."""
    return _pool(bf16_table(std), "bf16 pool")


def _pool(table: np.ndarray, key: str) -> np.ndarray:
    words = np.empty(POOL_WORDS, np.uint64)
    fill(words.view(np.uint16), table, random_source(key))
    return words


def fill_signed(out: np.ndarray, pool: np.ndarray, source: np.random.SFC64) -> None:
    """Fill `out` (uint8 FP8 or uint16 BF16, contiguous) with windows of `pool` under random signs."""
    bits = 8 * out.itemsize
    data = out.reshape(-1).view(np.uint8)
    words = data[: data.size // 8 * 8].view(np.uint64)
    shifts = np.arange(bits, dtype=np.uint64)[:, None]
    signs = np.empty((bits, SIGN_WORDS), np.uint64)
    for start in range(0, words.size, signs.size):
        part = words[start : start + signs.size]
        raw = source.random_raw(SIGN_WORDS + 1)
        at = int(raw[-1]) % (POOL_WORDS - signs.size)
        # Each random bit becomes the sign of one number: shift it to the sign's place, mask the others.
        np.left_shift(raw[:-1], shifts, out=signs)
        np.bitwise_and(signs, np.uint64(_SIGNS[bits]), out=signs)
        np.bitwise_xor(signs.reshape(-1)[: part.size], pool[at : at + part.size], out=part)
    rest = data.size - words.nbytes
    data[words.nbytes :] = pool[:1].view(np.uint8)[:rest]


def uniform(source: np.random.SFC64, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1): float64 of the given shape."""
    return (source.random_raw(int(np.prod(shape))) >> 11).reshape(shape) * 2.0**-53
