"""Random weights for `bench kernels`: views of a buffer far beyond the caches, never zeros.

Matrices are cut from the buffer one behind the other and from its start again when it ends, so that a byte is read
again only after all the others: a buffer of many times L3 keeps every call out of the cache.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from hybridlab.checkpoint import randomness
from hybridlab.hardware.cores import detect_cores
from hybridlab.hardware.host_memory import detect_host_memory
from hybridlab.kernels import layouts as kernel_layouts
from hybridlab.spec import BLOCK_FP8

ALIGN_BYTES = 64
BF16_STD = 0.02
L3_MULTIPLE = 8
LEAST_BYTES = 256 << 20
DEFAULT_L3_BYTES = 32 << 20
"""Where the system does not say how large L3 is."""

Matrix = tuple[NDArray[np.uint8], NDArray[np.float32]]


def out_of_cache_bytes() -> int:
    """Bytes of one buffer: 8 times L3, at least 256 MiB, at most an eighth of the free memory (there are five)."""
    available = detect_host_memory().available_bytes
    wanted = max(LEAST_BYTES, L3_MULTIPLE * l3_bytes())
    return min(wanted, max(available // 8, 32 << 20)) if available else wanted


def l3_bytes() -> int:
    """All L3 caches together, or a guess."""
    return detect_cores().l3_bytes or DEFAULT_L3_BYTES


def resident_bytes() -> int:
    """How much weights are kept in L3: a quarter of it, so that the read loop's buffer fits beside it."""
    return l3_bytes() // 4


class WeightPool:
    """FP8 codes and BF16 bits spread like those of a checkpoint; `num_bytes` of each, BF16 only when asked for."""

    def __init__(self, num_bytes: int, seed: int = 0) -> None:
        self.num_bytes = num_bytes
        self._seed = seed
        self._codes = aligned(num_bytes)
        randomness.fill_signed(self._codes, randomness.fp8_pool(), self._source("fp8"))
        self._bits: NDArray[np.uint16] | None = None
        self._at = 0

    def fp8(self, n: int, k: int) -> Matrix:
        """The next matrix: codes uint8 [n, k] and scales float32 [ceil(n / 128), ceil(k / 128)]."""
        grid = (ceil(n / BLOCK_FP8), ceil(k / BLOCK_FP8))
        base = 1 / (randomness.fp8_rms() * np.sqrt(k))
        scale = base * (0.75 + 0.5 * randomness.uniform(self._source(f"scale{self._at}"), grid))
        return self._next(self._codes, n * k).reshape(n, k), scale.astype(np.float32)

    def bf16(self, n: int, k: int) -> NDArray[np.uint16]:
        """The next matrix of BF16 bits: uint16 [n, k]."""
        if self._bits is None:
            self._bits = aligned(self.num_bytes).view(np.uint16)
            randomness.fill_signed(self._bits, randomness.bf16_pool(BF16_STD), self._source("bf16"))
        return self._next(self._bits, n * k).reshape(n, k)

    def read_buffer(self) -> NDArray[np.uint8]:
        """All of it, for the read loop."""
        return self._codes

    def some(self, num_bytes: int) -> NDArray[np.uint8]:
        """A copy of the first bytes of the FP8 codes."""
        return self._codes[:num_bytes].copy()

    def count(self, matrix_bytes: float) -> int:
        """How many matrices of that size it takes until the buffer starts again."""
        return max(1, int(self.num_bytes // matrix_bytes))

    def _next(self, buffer: np.ndarray, size: int) -> np.ndarray:
        if size > buffer.size:
            raise MemoryError(f"a matrix of {size * buffer.itemsize:,} bytes in a pool of {buffer.nbytes:,}")
        at = self._at if self._at + size * buffer.itemsize <= buffer.nbytes else 0
        self._at = at + -(-size * buffer.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        return buffer[at // buffer.itemsize :][:size]

    def _source(self, name: str) -> np.random.SFC64:
        return randomness.random_source(f"bench {self._seed}/{name}")


def aligned(num_bytes: int) -> NDArray[np.uint8]:
    """uint8 [num_bytes] (rounded down to whole cache lines) that begins at a cache line, not filled."""
    return kernel_layouts.aligned(num_bytes // ALIGN_BYTES * ALIGN_BYTES)
