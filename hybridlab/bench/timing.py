"""Timing side by side: every piece of work stands between two readings of the same ceilings.

A shared machine's memory and clock change from second to second. A rate is therefore compared with the rates of
published loops taken right before and right after it, never with a number from another time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import ceil, inf
from statistics import median, quantiles
from time import perf_counter, sleep
from typing import Any, Protocol

import numpy as np

from hybridlab import kernels

SAMPLE_S = 0.004
"""What one timed stretch takes at least, in whole calls: far above the clock's grain and a call's overhead."""
LEAST_TRIALS, MOST_TRIALS = 3, 200
MULTIPLY_S = 0.003


@dataclass(frozen=True)
class Reading:
    """Ceilings at one moment: bytes/s of the read loop, FLOP/s of the multiply loop."""

    read: float
    multiply: float


class Yardstick(Protocol):
    """What work is held against; `loop` names the read loop that was chosen."""

    loop: int

    def measure(self) -> Reading: ...


@dataclass(frozen=True)
class Work:
    """Calls to be timed, used in turn; `labels` are the columns that describe them.

    `weight_bytes` and `flop` are of one call. `resident`: all calls once more, untimed, before each timed stretch, so
    that their weights lie in the cache. `settle_s`: how long threads of this library spin after a call.
    """

    labels: Mapping[str, Any]
    calls: Sequence[Callable[[], object]]
    weight_bytes: float
    flop: float
    resident: bool = False
    settle_s: float = 0.0


@dataclass
class Samples:
    """Per trial: seconds of a call, seconds of it inside compiled code of ours, and the two readings' mean."""

    call_s: list[float] = field(default_factory=list)
    native_s: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


class Ceilings:
    """The best of the published read loops over `buffer` (uint8), and the multiply loop, on `threads` threads.

    The loop is chosen once. `resident`: the buffer fits the cache and is read once, untimed, before.
    """

    def __init__(
        self, buffer: np.ndarray, threads: int, *, resident: bool, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._threads, self._resident, self._clock = threads, resident, clock
        # Out of the cache every reading goes on where the last one ended.
        size = buffer.size if resident else max(1 << 20, min(buffer.size // 4, 128 << 20))
        self._parts = cycle([buffer[at : at + size] for at in range(0, buffer.size - size + 1, size)])
        self._passes = 1
        self.loop = 0
        if resident:
            self._passes = max(1, ceil(SAMPLE_S / 2 / (size / self._read(0))))
        rates = [median(self._read(loop) for _ in range(5)) for loop in range(len(kernels.READ_LOOPS))]
        self.loop = int(np.argmax(rates))

    def measure(self) -> Reading:
        return Reading(self._read(self.loop), kernels.multiply_rate(self._threads, MULTIPLY_S))

    def _read(self, loop: int) -> float:
        part = next(self._parts)
        if self._resident:
            kernels.read_bandwidth_bytes(part, self._threads, loop)
        start = self._clock()
        for _ in range(self._passes):
            kernels.read_bandwidth_bytes(part, self._threads, loop)
        return part.nbytes * self._passes / (self._clock() - start)


def time_together(
    works: Sequence[Work],
    yardstick: Yardstick,
    seconds: float,
    *,
    clock: Callable[[], float] = perf_counter,
    rest: Callable[[float], object] = sleep,
) -> list[Samples]:
    """Samples of each work: trials go over all of them in turn, at least three, until each has had its `seconds`.

    A slow one has had its time after fewer trials than the others.
    """
    turns = [cycle(work.calls) for work in works]
    counts = [_calls_per_sample(work, clock) for work in works]
    samples = [Samples() for _ in works]
    spent = [0.0] * len(works)
    for trial in range(MOST_TRIALS):
        waiting = [i for i in range(len(works)) if trial < LEAST_TRIALS or spent[i] < seconds]
        if not waiting:
            break
        before = yardstick.measure()
        for i in waiting:
            begin = clock()
            _sample(works[i], turns[i], counts[i], samples[i], clock)
            if works[i].settle_s:
                rest(works[i].settle_s)
            after = yardstick.measure()
            samples[i].readings.append(Reading((before.read + after.read) / 2, (before.multiply + after.multiply) / 2))
            before = after
            spent[i] += clock() - begin
    return samples


def _sample(
    work: Work, turn: Iterator[Callable[[], object]], count: int, found: Samples, clock: Callable[[], float]
) -> None:
    if work.resident:
        for call in work.calls:
            call()
    native = kernels.native_seconds()
    start = clock()
    for _ in range(count):
        next(turn)()
    found.call_s.append((clock() - start) / count)
    found.native_s.append((kernels.native_seconds() - native) / count)


def _calls_per_sample(work: Work, clock: Callable[[], float]) -> int:
    """Warm up (pages, pools, code) and see how long a call takes."""
    took = inf
    for call in (work.calls[0], work.calls[-1]):
        start = clock()
        call()
        took = min(took, clock() - start)
    return max(1, min(5000, ceil(SAMPLE_S / max(took, 1e-9))))


def row_of(work: Work, samples: Samples, baseline: Samples | None) -> dict[str, Any]:
    """One row of the table: medians over the trials, with quartiles (`_q1`, `_q3`) as the noise.

    `times_slower` is the median of the trials' ratios to the trial beside it of `baseline`, whatever that is.
    """
    seconds, readings = samples.call_s, samples.readings
    rates = [work.weight_bytes / s for s in seconds]
    flops = [work.flop / s for s in seconds]
    read = [rate / reading.read for rate, reading in zip(rates, readings, strict=True)]
    multiply = [flop / reading.multiply for flop, reading in zip(flops, readings, strict=True)]
    row = {
        **work.labels,
        "trials": len(seconds),
        **_spread("call_s", seconds),
        "weight_bytes": work.weight_bytes,
        "weights_gb_s": median(rates) / 1e9,
        "gflop_s": median(flops) / 1e9,
        "read_gb_s": median(reading.read for reading in readings) / 1e9,
        "multiply_gflop_s": median(reading.multiply for reading in readings) / 1e9,
        **_spread("read_fraction", read),
        **_spread("multiply_fraction", multiply),
        "flop_per_byte": work.flop / work.weight_bytes,
        "python_share": 1 - sum(samples.native_s) / sum(seconds) if any(samples.native_s) else float("nan"),
    }
    ratios = [] if baseline is None else [a / b for a, b in zip(seconds, baseline.call_s, strict=False)]
    return {**row, **_spread("times_slower", ratios or [float("nan")])}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {name: values[0], f"{name}_q1": values[0], f"{name}_q3": values[0]}
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}
