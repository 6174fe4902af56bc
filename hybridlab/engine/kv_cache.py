"""Storage of the paged KV cache. Which block belongs to whom is `hybridlab.kv_blocks`' business."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from hybridlab.model.base import Context, KVStore
from hybridlab.spec import ModelSpec


class KVStorage(KVStore, Protocol):
    """Where the KV cache lies: of these, the model knows `write` and `entries`."""

    num_blocks: int
    block_tokens: int

    def begin(self) -> None: ...

    def context(
        self, block_table: Sequence[int], first_row: int, num_new: int, start: int
    ) -> tuple[Context, torch.Tensor]: ...

    def slots(self, new: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def stored(self, layer: int) -> tuple[torch.Tensor, ...]:
        """All that is cached of a layer, between steps: to be copied from and to, by block."""
        ...

    def randomise(self, seed: int) -> None: ...

    def close(self) -> None: ...


class KVCache:
    """One tensor per layer and KV entry, [num_blocks * block_tokens, *entry shape]; a slot is a row of it."""

    def __init__(
        self, model: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._device = device
        rows = num_blocks * block_tokens
        self._layers = [
            tuple(torch.empty(rows, *entry.shape, dtype=dtype, device=device) for entry in model.kv_entries)
            for _ in range(model.num_layers)
        ]

    def begin(self) -> None:
        """A step begins: the contexts and slots that are asked for next are its own."""

    def write(self, layer: int, slots_T: torch.Tensor, *entries: torch.Tensor) -> None:
        """Store this layer's entries of T tokens at rows `slots_T`, in the order of `ModelSpec.kv_entries`."""
        for storage, entry in zip(self._layers[layer], entries, strict=True):
            storage.index_copy_(0, slots_T, entry.to(storage.dtype))

    def entries(self, layer: int) -> tuple[torch.Tensor, ...]:
        """This layer's storage, one tensor [slots, *shape] per entry; index it with `Context.cached`."""
        return self._layers[layer]

    def stored(self, layer: int) -> tuple[torch.Tensor, ...]:
        """The same tensors: all of it is here."""
        return self._layers[layer]

    def randomise(self, seed: int) -> None:
        """Fill with standard normal values."""
        generator = torch.Generator(self._layers[0][0].device).manual_seed(seed)
        for entries in self._layers:
            for storage in entries:
                storage.normal_(generator=generator)

    def context(
        self, block_table: Sequence[int], first_row: int, num_new: int, start: int
    ) -> tuple[Context, torch.Tensor]:
        """The `Context` of a request's new rows, and the slots (int64) that they are written to."""
        return block_context(block_table, self.block_tokens, first_row, num_new, start)

    def slots(self, new: Sequence[torch.Tensor]) -> torch.Tensor:
        """The slots of a microbatch from those of its requests, where `write` wants them: int64 [T]."""
        return torch.cat(list(new)).to(self._device)

    def close(self) -> None:
        """Give the memory up; idempotent."""
        self._layers.clear()


def block_context(
    block_table: Sequence[int], block_tokens: int, first_row: int, num_new: int, start: int
) -> tuple[Context, torch.Tensor]:
    """As `KVStorage.context`, of blocks of `block_tokens` slots."""
    size, total = block_tokens, start + num_new
    table = block_table[: -(-total // size)]
    if table[-1] - table[0] == len(table) - 1 and all(b - a == 1 for a, b in pairwise(table)):
        base = table[0] * size
        cached: slice | torch.Tensor = slice(base, base + total)
        new = torch.arange(base + start, base + total)
    else:
        blocks = torch.tensor(table, dtype=torch.int64)
        cached = (blocks[:, None] * size + torch.arange(size)).view(-1)[:total]
        new = cached[start:]
    return Context(first_row, first_row + num_new, start, cached), new
