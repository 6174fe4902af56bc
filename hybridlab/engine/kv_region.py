"""Shared memory through which the KV cache of a request goes from one worker to another: a memfd, of which each has a
descriptor. Nothing of it is in /dev/shm, and it is gone with the last process that has it.

It has a header per block, then for each layer and KV entry the rows of all blocks, so that neighbouring blocks are one
copy of a layer, from or to a GPU as well. Which blocks are whose is the parent's business (`hybridlab.worker_pools`);
the headers say what a worker has left there, and are checked before any of it is used.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from math import prod

import numpy as np
import torch

from hybridlab.batch import HandOff
from hybridlab.engine.kv_cache import KVStorage
from hybridlab.engine.pinned import Pins
from hybridlab.spec import ModelSpec

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("state", "<u4"),
        ("ticket", "<u8"),
        ("step", "<u8"),
        ("num_tokens", "<u4"),
        ("index", "<u4"),
        ("layout", "<u8", 2),
        ("request", "<u8", 2),
    ]
)
MAGIC = 0x31564B48
EMPTY, LEFT, TAKEN = range(3)
_PAGE = mmap.PAGESIZE


class HandOffRefused(Exception):
    """What lies in the region is not what was to be taken from it; says what was expected, and what is there."""


def create_region(num_bytes: int) -> int:
    """A descriptor of so much memory, of which no process can change the size. It is taken as it is written."""
    descriptor = os.memfd_create("hybridlab-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return descriptor


def region_bytes(model: ModelSpec, num_blocks: int, block_tokens: int, item_bytes: int) -> int:
    """Of a region whose KV entries have `item_bytes` per number."""
    return _headers_bytes(num_blocks) + num_blocks * block_tokens * model.kv_elements_per_token * item_bytes


def request_digest(request_id: str) -> bytes:
    """16 bytes that stand for a request."""
    return blake2b(request_id.encode(), digest_size=16).digest()


class KVRegion:
    """The region as a worker has it, for a cache of `dtype` in blocks of `block_tokens`.

    With `pin` it is registered with CUDA, which then copies from and to it by itself; stderr says so if the driver
    refuses. Raises `ValueError` if the memory of `descriptor` has another size.
    """

    def __init__(
        self,
        descriptor: int,
        model: ModelSpec,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        *,
        pin: bool = False,
    ) -> None:
        expected = region_bytes(model, num_blocks, block_tokens, dtype.itemsize)
        if os.fstat(descriptor).st_size != expected:
            raise ValueError(f"a region of {os.fstat(descriptor).st_size} bytes, expected {expected}")
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        shapes = [tuple(entry.shape) for entry in model.kv_entries]
        layout = repr((model.num_layers, shapes, str(dtype), block_tokens)).encode()
        self._layout = np.frombuffer(blake2b(layout, digest_size=16).digest(), "<u8")
        memory = mmap.mmap(descriptor, expected)
        self._headers = np.frombuffer(memory, HEADER, num_blocks)
        content = torch.from_numpy(np.frombuffer(memory, np.uint8, offset=_headers_bytes(num_blocks)))
        sizes = [num_blocks * block_tokens * prod(shape) for shape in shapes] * model.num_layers
        parts = [part.view(num_blocks, -1) for part in content.view(dtype).split(sizes)]
        self._layers_NB = [parts[at : at + len(shapes)] for at in range(0, len(parts), len(shapes))]
        self._pins = Pins()
        if pin:
            self._pin(content)

    def leave(self, hand_off: HandOff, request: bytes, cache: KVStorage, blocks: Sequence[int]) -> None:
        """Copy what the first of `blocks` of `cache` hold into those of `hand_off`; `request` is a `request_digest`."""
        there, own = list(hand_off.blocks), torch.tensor(blocks[: len(hand_off.blocks)])
        self._headers["state"][there] = EMPTY
        for region_NB, storage_NB in self._pairs(cache):
            rows = storage_NB.index_select(0, own.to(storage_NB.device))
            for place, first, end in _runs(there):
                region_NB[first:end].copy_(rows[place : place + end - first], non_blocking=True)
        _wait(cache)
        self._headers[there] = self._expected(hand_off, request)

    def take(self, hand_off: HandOff, request: bytes, cache: KVStorage, blocks: Sequence[int]) -> None:
        """Copy the blocks of `hand_off`, or of a piece of it, into the first of `blocks` of `cache`, once.

        Raises `HandOffRefused` if another request, length, step, layout or type lies there, or what was taken before.
        """
        there, own = list(hand_off.blocks), torch.tensor(blocks[: len(hand_off.blocks)])
        found, expected = self._headers[there], self._expected(hand_off, request)
        for field in HEADER.names or ():
            if not np.array_equal(found[field], expected[field]):
                said = [str(header[field][0].tolist()) for header in (found, expected)]
                raise HandOffRefused(
                    f"KV hand-off {hand_off.ticket} of {hand_off.num_tokens} tokens: {field} is {said[0]}, expected "
                    f"{said[1]}"
                )
        for region_NB, storage_NB in self._pairs(cache):
            rows = torch.empty_like(region_NB[: len(there)], device=storage_NB.device)
            for place, first, end in _runs(there):
                rows[place : place + end - first].copy_(region_NB[first:end], non_blocking=True)
            storage_NB.index_copy_(0, own.to(storage_NB.device), rows)
        _wait(cache)
        self._headers["state"][there] = TAKEN

    def close(self) -> None:
        """Give what is pinned back to the driver; idempotent."""
        self._pins.close()

    def _expected(self, hand_off: HandOff, request: bytes) -> np.ndarray:
        headers = np.zeros(len(hand_off.blocks), HEADER)
        headers["magic"], headers["state"] = MAGIC, LEFT
        headers["ticket"], headers["step"] = hand_off.ticket, hand_off.step
        headers["num_tokens"], headers["index"] = hand_off.num_tokens, hand_off.first + np.arange(len(headers))
        headers["layout"], headers["request"] = self._layout, np.frombuffer(request, "<u8")
        return headers

    def _pairs(self, cache: KVStorage) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """([blocks of the region, numbers of one], [blocks of the cache, the same]) of every layer and entry."""
        for layer, parts in enumerate(self._layers_NB):
            for region_NB, storage in zip(parts, cache.stored(layer), strict=True):
                yield region_NB, storage.view(cache.num_blocks, -1)

    def _pin(self, content: torch.Tensor) -> None:
        try:
            self._pins.pin(content)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"hybridlab: KV goes through memory that is not pinned ({reason}), more slowly", file=sys.stderr)


def _runs(blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring blocks as (place of the first one in `blocks`, first, end)."""
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(blocks)) if b != a + 1), len(blocks)]
    return [(start, blocks[start], blocks[start] + end - start) for start, end in pairwise(cuts)]


def _wait(cache: KVStorage) -> None:
    """Until the copies of this thread are done, where they are a device's."""
    device = cache.stored(0)[0].device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _headers_bytes(num_blocks: int) -> int:
    return -(-num_blocks * HEADER.itemsize // _PAGE) * _PAGE
