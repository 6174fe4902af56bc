"""Ranks as threads of this process, each with its own end of a real group: cheap enough for every size."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch._C._distributed_c10d import HashStore

from hybridlab.engine.collectives import GlooPeers

T = TypeVar("T")


def on_ranks(size: int, work: Callable[[GlooPeers], T], *, timeout_s: float = 60.0) -> list[T]:
    """What `work` returns on each rank; what it raises on the first one that raises."""
    store = HashStore()
    with ThreadPoolExecutor(size) as pool:
        made = pool.map(lambda rank: GlooPeers("test", store, rank, size, timeout_s=timeout_s), range(size))
        return list(pool.map(work, list(made)))
