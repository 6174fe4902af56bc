"""Shared memory through which the KV cache of a request goes from one worker to another: a memfd, of which each has a
descriptor. Nothing of it is in /dev/shm, and it is gone with the last process that has it.

It has a header per block, then the blocks: for each layer and KV entry, the rows of its tokens. Which blocks are whose
is the parent's business (`hybridlab.worker_pools`); the headers say what a worker has left there, and are checked
before any of it is used.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from hashlib import blake2b
from math import prod

import numpy as np
import torch

from hybridlab.batch import HandOff
from hybridlab.engine.kv_cache import KVStorage
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

    Raises `ValueError` if the memory of `descriptor` has another size.
    """

    def __init__(
        self, descriptor: int, model: ModelSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype
    ) -> None:
        expected = region_bytes(model, num_blocks, block_tokens, dtype.itemsize)
        if os.fstat(descriptor).st_size != expected:
            raise ValueError(f"a region of {os.fstat(descriptor).st_size} bytes, expected {expected}")
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._num_layers = model.num_layers
        self._widths = [block_tokens * prod(entry.shape) * dtype.itemsize for entry in model.kv_entries]
        shapes = [tuple(entry.shape) for entry in model.kv_entries]
        layout = repr((model.num_layers, shapes, str(dtype), block_tokens)).encode()
        self._layout = np.frombuffer(blake2b(layout, digest_size=16).digest(), "<u8")
        self._memory = mmap.mmap(descriptor, expected)
        self._headers = np.frombuffer(self._memory, HEADER, num_blocks)
        content = np.frombuffer(self._memory, np.uint8, offset=_headers_bytes(num_blocks))
        self._blocks_NB = torch.from_numpy(content).view(num_blocks, -1)

    def leave(self, hand_off: HandOff, request: bytes, cache: KVStorage, blocks: Sequence[int]) -> None:
        """Copy what the first of `blocks` of `cache` hold into those of `hand_off`; `request` is a `request_digest`."""
        there, own = torch.tensor(hand_off.blocks), torch.tensor(blocks[: len(hand_off.blocks)])
        self._headers["state"][there.numpy()] = EMPTY
        for columns, storage_NB in self._columns(cache):
            rows = storage_NB.index_select(0, own.to(storage_NB.device))
            self._blocks_NB[:, columns].index_copy_(0, there, rows.cpu())
        self._headers[there.numpy()] = self._expected(hand_off, request)

    def take(self, hand_off: HandOff, request: bytes, cache: KVStorage, blocks: Sequence[int]) -> None:
        """Copy the blocks of `hand_off` into the first of `blocks` of `cache`, once.

        Raises `HandOffRefused` if another request, length, step, layout or type lies there, or what was taken before.
        """
        there, own = torch.tensor(hand_off.blocks), torch.tensor(blocks[: len(hand_off.blocks)])
        found, expected = self._headers[there.numpy()], self._expected(hand_off, request)
        for field in HEADER.names or ():
            if not np.array_equal(found[field], expected[field]):
                said = [str(header[field][0].tolist()) for header in (found, expected)]
                raise HandOffRefused(
                    f"KV hand-off {hand_off.ticket} of {hand_off.num_tokens} tokens: {field} is {said[0]}, expected "
                    f"{said[1]}"
                )
        for columns, storage_NB in self._columns(cache):
            rows = self._blocks_NB[:, columns].index_select(0, there)
            storage_NB.index_copy_(0, own.to(storage_NB.device), rows.to(storage_NB.device))
        self._headers["state"][there.numpy()] = TAKEN

    def _expected(self, hand_off: HandOff, request: bytes) -> np.ndarray:
        headers = np.zeros(len(hand_off.blocks), HEADER)
        headers["magic"], headers["state"] = MAGIC, LEFT
        headers["ticket"], headers["step"] = hand_off.ticket, hand_off.step
        headers["num_tokens"], headers["index"] = hand_off.num_tokens, np.arange(len(headers))
        headers["layout"], headers["request"] = self._layout, np.frombuffer(request, "<u8")
        return headers

    def _columns(self, cache: KVStorage):
        """(columns of a block, uint8 [blocks of the cache, their bytes]) of every layer and entry."""
        start = 0
        for layer in range(self._num_layers):
            for width, storage in zip(self._widths, cache.entries(layer), strict=True):
                yield slice(start, start + width), storage.view(cache.num_blocks, -1).view(torch.uint8)
                start += width


def _headers_bytes(num_blocks: int) -> int:
    return -(-num_blocks * HEADER.itemsize // _PAGE) * _PAGE
