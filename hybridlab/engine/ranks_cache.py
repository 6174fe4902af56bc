"""The KV cache of a rank: it holds the tokens of all ranks, which send each other what they compute in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from hybridlab.engine.collectives import Peers
from hybridlab.engine.kv_cache import KVStorage
from hybridlab.engine.ranks_share import Shares
from hybridlab.model.base import Context
from hybridlab.spec import ModelSpec


class SharedKV:
    """`KVStorage` over `inner`, with the same blocks on every rank. `shares` says whose rows are written next."""

    def __init__(self, inner: KVStorage, peers: Peers, model: ModelSpec, dtype: torch.dtype) -> None:
        self._inner, self._peers, self._dtype = inner, peers, dtype
        self._shapes = [entry.shape for entry in model.kv_entries]
        self.num_blocks, self.block_tokens = inner.num_blocks, inner.block_tokens
        self.shares = Shares((0,) * peers.size, torch.empty(0, dtype=torch.int64))

    def write(self, layer: int, slots_T: torch.Tensor, *entries: torch.Tensor) -> None:
        """Store this rank's entries and those of all others, which call this at the same point of the layer."""
        own = torch.cat([entry.to(self._dtype).flatten(1) for entry in entries], 1)
        rows = torch.cat(self._peers.exchange([own] * self._peers.size, self.shares.sizes))
        columns = rows.split([prod(shape) for shape in self._shapes], 1)
        both = zip(columns, self._shapes, strict=True)
        self._inner.write(layer, self.shares.slots, *(part.reshape(-1, *shape) for part, shape in both))

    def write_nothing(self, layer: int) -> None:
        """`write` of a rank without tokens."""
        self.write(layer, self.shares.slots[:0], *(torch.empty(0, *shape) for shape in self._shapes))

    def entries(self, layer: int) -> tuple[torch.Tensor, ...]:
        return self._inner.entries(layer)

    def begin(self) -> None:
        self._inner.begin()

    def context(
        self, block_table: Sequence[int], first_row: int, num_new: int, start: int
    ) -> tuple[Context, torch.Tensor]:
        return self._inner.context(block_table, first_row, num_new, start)

    def slots(self, new: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._inner.slots(new)

    def randomise(self, seed: int) -> None:
        self._inner.randomise(seed)

    def close(self) -> None:
        self._inner.close()
