"""Whose KV cache a worker computes in, and where a request's cache lies between two workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from sys import maxsize
from typing import Protocol

from hybridlab.kv_blocks import BlockPool


class KVPools(Protocol):
    """The KV caches of all workers of a run."""

    @property
    def largest_context(self) -> int:
        """Tokens of the longest request that can be served whichever way it goes."""
        ...

    @property
    def transfer(self) -> BlockPool | None:
        """Blocks of the region through which requests go from one worker to another, if they do."""
        ...

    @property
    def piece_blocks(self) -> int:
        """Most blocks of a request that come from `transfer` before a step that others are part of."""
        ...

    def of(self, worker: str) -> BlockPool: ...

    def decodes(self, worker: str) -> bool:
        """Whether requests decode there; else their cache leaves when the prompt is computed."""
        ...


@dataclass(frozen=True, eq=False)
class OnePool:
    """All workers compute in the same cache."""

    pool: BlockPool
    transfer: BlockPool | None = None
    piece_blocks: int = maxsize

    @property
    def largest_context(self) -> int:
        return self.pool.num_blocks * self.pool.block_tokens

    def of(self, worker: str) -> BlockPool:
        return self.pool

    def decodes(self, worker: str) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class WorkerPools:
    """A cache for each worker. Those of `prefill` compute prompts alone, and leave them in `transfer` for the others.

    All have blocks of the same size.
    """

    pools: Mapping[str, BlockPool]
    prefill: frozenset[str]
    transfer: BlockPool
    piece_blocks: int = maxsize

    @property
    def largest_context(self) -> int:
        every = (*self.pools.values(), self.transfer)
        return min(pool.num_blocks * pool.block_tokens for pool in every)

    def of(self, worker: str) -> BlockPool:
        return self.pools[worker]

    def decodes(self, worker: str) -> bool:
        return worker not in self.prefill
