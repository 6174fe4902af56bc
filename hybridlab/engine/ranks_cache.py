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
    """`KVStorage` over `inner`, with the same blocks on every rank. `shares` says whose rows are written next; None:
    this rank's, and the others do not get to know them before `catch_up`."""

    def __init__(self, inner: KVStorage, peers: Peers, model: ModelSpec, dtype: torch.dtype) -> None:
        self._inner, self._peers, self._dtype = inner, peers, dtype
        self._num_layers, self._shapes = model.num_layers, [entry.shape for entry in model.kv_entries]
        self.num_blocks, self.block_tokens = inner.num_blocks, inner.block_tokens
        self.shares: Shares | None = None

    def write(self, layer: int, slots_T: torch.Tensor, *entries: torch.Tensor) -> None:
        """Store this rank's entries and those of all others, which call this at the same point of the layer."""
        if self.shares is None:
            self._inner.write(layer, slots_T, *entries)
            return
        own = self._rows(entries)
        rows = self._peers.exchange([own] * self._peers.size, self.shares.sizes)
        self._store(layer, self.shares.slots, torch.cat(rows))

    def write_nothing(self, layer: int) -> None:
        """`write` of a rank without tokens."""
        assert self.shares is not None
        none = self.shares.slots[:0]
        self.write(layer, none, *(torch.empty(0, *shape, device=none.device) for shape in self._shapes))

    def catch_up(self, blocks: Sequence[int]) -> None:
        """Have what the first rank has in `blocks`; between steps, and all ranks call this alike."""
        first, size = self._peers.rank == 0, self.block_tokens
        places = (torch.tensor(blocks)[:, None] * size + torch.arange(size)).view(-1)
        slots, sizes = self._inner.slots([places]), [len(places), *[0] * (self._peers.size - 1)]
        with torch.inference_mode():
            for layer in range(self._num_layers):
                stored = self._inner.stored(layer)  # maybe in the host's memory
                wanted = (slots if first else slots[:0]).to(stored[0].device)
                rows = self._rows([storage[wanted] for storage in stored]).to(slots.device)
                found = self._peers.exchange([rows] * self._peers.size, sizes)[0]
                if not first:
                    self._store(layer, slots, found)

    def _rows(self, entries: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([entry.to(self._dtype).flatten(1) for entry in entries], 1)

    def _store(self, layer: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        columns = rows.split([prod(shape) for shape in self._shapes], 1)
        both = zip(columns, self._shapes, strict=True)
        self._inner.write(layer, slots, *(part.reshape(-1, *shape) for part, shape in both))

    def entries(self, layer: int) -> tuple[torch.Tensor, ...]:
        return self._inner.entries(layer)

    def stored(self, layer: int) -> tuple[torch.Tensor, ...]:
        return self._inner.stored(layer)

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
