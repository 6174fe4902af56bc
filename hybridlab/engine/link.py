"""The emulated link: a real copy between two places in host memory, at an optional cap."""

from __future__ import annotations

from time import perf_counter, sleep

import numpy as np

PIECE_BYTES = 1 << 20
"""What is copied between two looks at the clock."""

LATE_S = 1e-3
"""After so long, the link was idle: time that is not made up for."""


class CopyLink:
    """Copies one thing after another; `gb_s` (1e9 bytes/s) caps the rate, None leaves it to the memory."""

    def __init__(self, gb_s: float | None = None) -> None:
        self._bytes_per_s = None if gb_s is None else gb_s * 1e9
        self._free_s = 0.0

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy flat uint8 arrays of one length; returns when the last byte has arrived."""
        if self._bytes_per_s is None:
            target[...] = source
            return
        # The time is kept over many small copies, so that a late wake-up is made up for by the next ones.
        now_s = perf_counter()
        if now_s - self._free_s > LATE_S:
            self._free_s = now_s
        for at in range(0, len(source), PIECE_BYTES):
            piece = source[at : at + PIECE_BYTES]
            target[at : at + len(piece)] = piece
            self._free_s += len(piece) / self._bytes_per_s
            if (wait_s := self._free_s - perf_counter()) > 0:
                sleep(wait_s)
