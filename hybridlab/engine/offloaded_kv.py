"""The KV cache in pinned host memory, with two layers of it on the device at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from hybridlab.engine.kv_cache import block_context
from hybridlab.engine.pinned import Pins, pages
from hybridlab.errors import HybridlabError, MemoryBudgetError
from hybridlab.model.base import Context
from hybridlab.spec import ModelSpec

BUFFERS = 2
GAP_BLOCKS = 4
"""So many blocks that nobody asked for are copied along rather than begin another copy."""
Rows = list[tuple[int, int]]
"""Neighbouring slots as (first, end)."""


class OffloadedKV:
    """As `kv_cache.KVCache`, for numerics that store through `write`; a layer has a buffer on the device only in turn.

    When an op first asks for a layer, what this step's requests have cached of it is copied into the buffer that was
    not used for longest, and so is the next layer's, while this one computes. New rows go to the buffer and to the
    host. Copies, both ways, are on a stream of their own, in the order in which they are enqueued: a layer that is
    asked for again has the rows that were written meanwhile. On device "cpu" they are made at once.
    Raises `MemoryBudgetError` if the driver will not pin the memory.
    """

    def __init__(
        self, model: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._device = torch.device(device)
        self._shapes = [(num_blocks * block_tokens, *entry.shape) for entry in model.kv_entries]
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in self._shapes]
        self._pins = Pins()
        self._host: list[tuple[torch.Tensor, ...]] = []
        for _ in range(model.num_layers):
            room = pages(sum(sizes))
            if self._device.type == "cuda":
                self._pin(room, model.num_layers * sum(sizes))
            parts = zip(room.split(sizes), self._shapes, strict=True)
            self._host.append(tuple(part.view(dtype).view(shape) for part, shape in parts))
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._buffers = [_Buffer(self._shapes, dtype, self._device) for _ in range(BUFFERS)]
        self._old_blocks: list[Sequence[int]] = []
        self._old_rows: Rows | None = None
        self._new_rows: dict[int, tuple[torch.Tensor, Rows]] = {}

    def begin(self) -> None:
        """A step begins: what the buffers hold is of the last one."""
        for buffer in self._buffers:
            buffer.layer = None
        self._old_blocks.clear()
        self._old_rows = None
        self._new_rows.clear()

    def context(
        self, block_table: Sequence[int], first_row: int, num_new: int, start: int
    ) -> tuple[Context, torch.Tensor]:
        """As `KVCache.context`; what the request has cached will be brought to the device."""
        self._old_blocks.append(block_table[: -(-start // self.block_tokens)])
        return block_context(block_table, self.block_tokens, first_row, num_new, start)

    def slots(self, new: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `KVCache.slots`; `write` knows a tensor that was made here."""
        here = torch.cat(list(new))
        there = here.to(self._device)
        cuts = [0, *((here[1:] - here[:-1] != 1).nonzero().flatten() + 1).tolist(), len(here)]
        self._new_rows[id(there)] = there, [(int(here[a]), int(here[b - 1]) + 1) for a, b in pairwise(cuts)]
        return there

    def write(self, layer: int, slots_T: torch.Tensor, *entries: torch.Tensor) -> None:
        """As `KVCache.write`; `slots_T` comes from `slots`, of this step."""
        if (known := self._new_rows.get(id(slots_T))) is None:
            raise HybridlabError("an offloaded KV cache writes to slots of its own step, made by slots()")
        there = self.entries(layer)
        rows = [entry.to(storage.dtype).contiguous() for storage, entry in zip(there, entries, strict=True)]
        for storage, entry in zip(there, rows, strict=True):
            storage.index_copy_(0, slots_T, entry)
        self._follow()
        with torch.cuda.stream(self._stream):
            for target, entry in zip(self._host[layer], rows, strict=True):
                at = 0
                for first, end in known[1]:
                    target[first:end].copy_(entry[at : at + end - first], non_blocking=True)
                    at += end - first
                if self._stream is not None:
                    entry.record_stream(self._stream)

    def entries(self, layer: int) -> tuple[torch.Tensor, ...]:
        """As `KVCache.entries`: this layer's buffer on the device, in which the slots of this step's requests hold."""
        buffer = self._bring(layer)
        if buffer.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(buffer.ready)
        if layer + 1 < len(self._host):
            self._bring(layer + 1)
        return buffer.entries

    def stored(self, layer: int) -> tuple[torch.Tensor, ...]:
        """This layer in host memory, with all that was written to it."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._host[layer]

    def randomise(self, seed: int) -> None:
        """Fill with standard normal values."""
        generator = torch.Generator().manual_seed(seed)
        for entries in self._host:
            for storage in entries:
                storage.normal_(generator=generator)

    def close(self) -> None:
        """Give the memory up, pinned or on the device; idempotent."""
        self._pins.close()
        for held in (self._host, self._buffers, self._new_rows):
            held.clear()

    def _bring(self, layer: int) -> _Buffer:
        """The buffer of `layer`, its copies enqueued: the one that was not asked for longest, if there is none yet."""
        found = next((buffer for buffer in self._buffers if buffer.layer == layer), None)
        if found is None:
            found = self._buffers[0]
            self._follow()  # whoever reads what is there now is done by then
            with torch.cuda.stream(self._stream):
                for target, source in zip(found.entries, self._host[layer], strict=True):
                    for first, end in self._rows:
                        target[first:end].copy_(source[first:end], non_blocking=True)
                if self._stream is not None:
                    found.ready = torch.cuda.Event()
                    found.ready.record(self._stream)
            found.layer = layer
        self._buffers.remove(found)
        self._buffers.append(found)
        return found

    def _follow(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @property
    def _rows(self) -> Rows:
        """What this step's requests had cached when it began, in few runs of whole blocks."""
        if self._old_rows is None:
            tables = [np.empty(0, np.int64), *(np.asarray(table, np.int64) for table in self._old_blocks)]
            blocks = np.unique(np.concatenate(tables))
            cuts = [0, *(np.flatnonzero(np.diff(blocks) > 1 + GAP_BLOCKS) + 1).tolist(), len(blocks)]
            runs = [(blocks[a], blocks[b - 1] + 1) for a, b in pairwise(cuts) if a < b]
            size = self.block_tokens
            self._old_rows = [(int(first) * size, int(end) * size) for first, end in runs]
        return self._old_rows

    def _pin(self, room: torch.Tensor, total_bytes: int) -> None:
        try:
            self._pins.pin(room)
        except RuntimeError as error:
            done = len(self._host) * room.nbytes
            self._pins.close()
            raise MemoryBudgetError(
                f"pinned {done / 1e9:.2f} of {total_bytes / 1e9:.2f} GB of KV cache, then the driver refused "
                f"({str(error).splitlines()[0]}); lower kv_tokens, or raise the memlock limit"
            ) from None


class _Buffer:
    """Room for one layer, which layer's rows it holds, and when they will have come."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self.entries = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        self.layer: int | None = None
        self.ready: torch.cuda.Event | None = None
