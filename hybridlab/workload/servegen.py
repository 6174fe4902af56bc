"""ServeGen's models of clients in production (alibaba/ServeGen): arrivals and lengths are drawn, not replayed.

Xiang et al., "ServeGen: Workload Characterization and Generation of Large Language Model Serving in Production",
NSDI '26.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
from pydantic import Field

from hybridlab.errors import ConfigError
from hybridlab.workload.archive import members_hash, read_members
from hybridlab.workload.base import Row
from hybridlab.workload.servegen_files import DATASET, TRACE, Distribution, Window, read_lengths, read_windows
from hybridlab.workload.streams import GAPS, LENGTHS, stream
from hybridlab.workload.trace import TraceWorkload

MAX_WINDOW_REQUESTS = 1_000_000


class _Arrival(NamedTuple):
    time_s: float
    window: Window
    number: int
    """Which of the window's requests, from 0."""


class ServeGenWorkload(TraceWorkload):
    """The first `num_requests` requests from `start_s` seconds of the clients in `path`, a folder or a tar archive.

    A client is a pair of files: NAME-trace.csv has a line per window (start in s, requests/s, coefficient of
    variation, "Gamma" or "Weibull", its shape and its scale; nothing happens where the rate is 0), NAME-dataset.json
    has, per window of lengths, the probabilities of input_tokens and output_tokens (reasoning included).

    A window of w seconds at rate r has r * w requests, as many as were counted in it (a fraction is one more request
    with that probability). The gaps between them follow the family and its shape, which alone says how bursty they
    are, and are scaled to fill the window, as in ServeGen; so neither the family's scale nor the coefficient of
    variation is needed. Two things differ. There the gaps begin at the window's start, where all bursty clients then
    have a burst; here they begin at a random time and go around the window's end. There one random number gives
    both lengths of a request, so that long prompts have long outputs; here they are independent.

    What a client does in a window depends on (seed, client, window) alone, not on what is chosen of it.
    """

    kind: Literal["servegen"]
    start_s: float = Field(default=0.0, ge=0)

    def rows(self, base: Path) -> list[Row]:
        path = base / self.path
        windows = read_windows(path, read_members(path, lambda name: name.endswith(TRACE)))
        arrivals = self._first(path, windows)
        drawn = self._lengths(path, arrivals)
        return self.timed([Row(a.time_s, *drawn[a.window][a.number]) for a in arrivals])

    def content_hash(self, base: Path) -> str | None:
        return members_hash(base / self.path, lambda name: name.endswith((TRACE, DATASET)))

    def _first(self, path: Path, windows: Sequence[Window]) -> list[_Arrival]:
        """The chosen arrivals in order. `windows` are ordered by their start."""
        arrivals: list[_Arrival] = []
        for index, window in enumerate(windows):
            if window.end_s > self.start_s:
                times_s = _arrival_times(path, window, stream(self.seed, GAPS, *_key(window)))
                arrivals += [_Arrival(t, window, n) for n, t in enumerate(times_s) if t >= self.start_s]
            later = windows[index + 1].start_s if index + 1 < len(windows) else math.inf
            # Looked at once per start of windows; what comes later arrives later.
            if later > window.start_s and sum(arrival.time_s < later for arrival in arrivals) >= self.num_requests:
                break
        if len(arrivals) < self.num_requests:
            end_s = max((window.end_s for window in windows), default=0.0)
            raise ConfigError(
                f"{path}: {len(arrivals)} requests from {self.start_s:g} s to the end at {end_s:g} s;"
                f" workload.num_requests asks for {self.num_requests}"
            )
        arrivals.sort(key=lambda arrival: (arrival.time_s, arrival.window.client, arrival.number))
        return arrivals[: self.num_requests]

    def _lengths(self, path: Path, arrivals: Sequence[_Arrival]) -> dict[Window, list[tuple[int, int]]]:
        """(prompt, output) tokens of the requests of every window that has arrivals."""
        counts: dict[Window, int] = {}
        for arrival in arrivals:
            counts[arrival.window] = max(counts.get(arrival.window, 0), arrival.number + 1)
        files = {window.client + DATASET for window in counts}
        members = read_members(path, files.__contains__)
        result = {}
        for window, (prompts, outputs) in read_lengths(path, members, counts).items():
            rngs = [stream(self.seed, LENGTHS, *_key(window), part) for part in range(2)]
            drawn = _draw(prompts, rngs[0], counts[window]), _draw(outputs, rngs[1], counts[window])
            result[window] = list(zip(*drawn, strict=True))
        return result


def _draw(distribution: Distribution, rng: np.random.Generator, count: int) -> list[int]:
    """Tokens of `count` requests, at least 1 each."""
    lengths, cumulated = distribution
    index = np.searchsorted(cumulated, rng.random(count), side="right")
    return np.maximum(lengths[np.minimum(index, len(lengths) - 1)], 1).tolist()


def _key(window: Window) -> tuple[int, int]:
    return crc32(window.client.rsplit("/", 1)[-1].encode()), round(window.start_s * 1000)


def _arrival_times(path: Path, window: Window, rng: np.random.Generator) -> list[float]:
    """Arrivals of one client in one window, in seconds of the trace."""
    length_s = window.end_s - window.start_s
    expected = window.rate_req_s * length_s
    if expected > MAX_WINDOW_REQUESTS:
        raise ConfigError(
            f"{path}: {window.client}{TRACE}: {expected:.3g} requests in the window at {window.start_s:g} s;"
            f" expected at most {MAX_WINDOW_REQUESTS:,}"
        )
    count = math.floor(expected + rng.random())
    if not count:
        return []
    # Logarithms of the gaps, for gamma variates of small shape are smaller than any number:
    # G(a) = G(a + 1) * U^(1/a); a Weibull variate is E^(1/a).
    if window.family == "Gamma":
        logs = np.log(rng.standard_gamma(window.shape + 1, count)) + np.log1p(-rng.random(count)) / window.shape
    else:
        logs = np.log(rng.standard_exponential(count)) / window.shape
    gaps = np.exp(logs - logs.max())
    around = (rng.random() + np.cumsum(gaps) / gaps.sum()) % 1.0
    return (window.start_s + length_s * np.sort(around)).tolist()
