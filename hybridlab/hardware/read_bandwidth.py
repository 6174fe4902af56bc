"""How fast this machine reads main memory: the yardstick that decode kernels are held against.

The loop is published: `hybridlab.kernels.read_bandwidth_bytes` adds up a buffer with plain vector loads.
Without the compiled kernels NumPy's `bitwise_or.reduce` reads it instead, which is slower on some machines;
`loop` says which one ran. The buffer is filled before, so that no page is the shared zero page, and is far
larger than the L3 caches, so that next to nothing of it is cached when a repeat begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np

from hybridlab.errors import HybridlabError
from hybridlab.hardware.cores import detect_cores
from hybridlab.hardware.host_memory import detect_host_memory

_LEAST_BYTES = 1 << 30
_L3_MULTIPLE = 8


@dataclass(frozen=True)
class BandwidthProbe:
    """Rates in GB/s (1e9 bytes) over `repeats` reads of `buffer_bytes`: median, slowest and fastest."""

    threads: int
    median_gb_s: float
    min_gb_s: float
    max_gb_s: float
    repeats: int
    buffer_bytes: int
    loop: str
    """"native" or "numpy"."""

    def __str__(self) -> str:
        spread = f"{self.min_gb_s:.1f} to {self.max_gb_s:.1f}"
        plural = "" if self.threads == 1 else "s"
        size = f"{self.buffer_bytes / 2**20:.0f} MiB"
        return (
            f"{self.median_gb_s:.1f} GB/s with {self.threads} thread{plural}"
            f" ({spread} in {self.repeats} reads of {size}, {self.loop} loop)"
        )


def read_bandwidth_gb_s(
    threads: int, *, repeats: int = 7, buffer_bytes: int | None = None, loop: str = "auto"
) -> BandwidthProbe:
    """Measure main-memory reads with `threads` threads.

    Args:
        threads: at least 1; more than the usable cores measures contention.
        repeats: timed reads after one untimed.
        buffer_bytes: default 1 GiB or 8 times the L3 caches, but at most a quarter of the available memory.
        loop: "native", "numpy", or "auto" (native if a compiled kernel tier is active).

    Raises:
        HybridlabError: a count below 1, or an unknown or unavailable loop.
    """
    if threads < 1 or repeats < 1:
        raise HybridlabError(f"read bandwidth: expected threads, repeats >= 1, got {threads}, {repeats}")
    read, name = _reader(loop, threads)
    buffer = _filled(buffer_bytes if buffer_bytes is not None else _default_bytes(), threads)
    read(buffer)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        read(buffer)
        rates.append(buffer.nbytes / (time.perf_counter() - start) / 1e9)
    return BandwidthProbe(threads, median(rates), min(rates), max(rates), repeats, buffer.nbytes, name)


def _default_bytes() -> int:
    wanted = max(_LEAST_BYTES, _L3_MULTIPLE * (detect_cores().l3_bytes or 0))
    available = detect_host_memory().available_bytes
    return min(wanted, available // 4) if available else wanted


def _filled(num_bytes: int, threads: int) -> np.ndarray:
    if num_bytes < 4096:
        raise HybridlabError(f"read bandwidth: the buffer must hold at least 4096 bytes, got {num_bytes}")
    buffer = np.empty(num_bytes // 8, dtype=np.uint64)
    # First touch decides the NUMA node of a page: fill in the same slices as will be read.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(0x5A5A_5A5A_5A5A_5A5A), np.array_split(buffer, threads)))
    return buffer


def _reader(loop: str, threads: int) -> tuple[Callable[[np.ndarray], object], str]:
    """The function that reads a buffer of uint64 once, and its name."""
    if loop not in ("auto", "native", "numpy"):
        raise HybridlabError(f"read bandwidth: loop must be auto, native or numpy, got {loop!r}")
    if loop != "numpy":
        from hybridlab import kernels

        if kernels.tier() != "numpy":
            return (lambda buffer: kernels.read_bandwidth_bytes(buffer.view(np.uint8), threads)), "native"
        if loop == "native":
            raise HybridlabError("read bandwidth: no compiled kernel runs here; use loop='numpy'")
    pool = ThreadPoolExecutor(threads)  # the reader holds it; its idle threads end with the last reference

    def read(buffer: np.ndarray) -> None:
        list(pool.map(np.bitwise_or.reduce, np.array_split(buffer, threads)))

    return read, "numpy"
