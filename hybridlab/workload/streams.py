"""Streams of random numbers, each a function of the workload's seed and of what it is for."""

from __future__ import annotations

import numpy as np

BLOCK = 0  # tokens of a shared block, by id
SPREAD = 1  # arrivals inside a bin
GAPS = 2  # arrivals of a client's window
LENGTHS = 3  # lengths of a client's window


def stream(seed: int, purpose: int, *which: int) -> np.random.Generator:
    """Independent of the streams of other purposes, and of those of requests, which are keyed by (seed, index)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *which)))
