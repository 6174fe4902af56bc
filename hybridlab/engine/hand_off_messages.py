"""A KV hand-off as bytes: a head, the blocks of the region, those of the worker's own cache; all little-endian."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from hybridlab.batch import HandOff
from hybridlab.engine.channel import ProtocolError
from hybridlab.engine.kv_region import request_digest

_HEAD = struct.Struct("<QQIIII16s")  # ticket, step, tokens, first block, blocks of the region, own blocks, request


def pack_hand_off(hand_off: HandOff, blocks: Sequence[int]) -> bytes:
    """`blocks` are those of the worker that leaves or takes it."""
    counts = hand_off.num_tokens, hand_off.first, len(hand_off.blocks), len(blocks)
    head = _HEAD.pack(hand_off.ticket, hand_off.step, *counts, request_digest(hand_off.id))
    return head + np.array([*hand_off.blocks, *blocks], "<i4").tobytes()


def unpack_hand_off(
    body: memoryview, num_region_blocks: int, num_blocks: int, block_tokens: int
) -> tuple[HandOff, bytes, list[int]]:
    """The hand-off, its request's digest, the own blocks; raises `ProtocolError` for what this worker does not have."""
    if len(body) < _HEAD.size:
        raise ProtocolError(f"a hand-off of {len(body)} bytes")
    ticket, step, num_tokens, first, num_there, num_own, request = _HEAD.unpack_from(body)
    if len(body) != _HEAD.size + 4 * (num_there + num_own):
        raise ProtocolError(f"a hand-off of {len(body)} bytes for {num_there} blocks")
    numbers = np.frombuffer(body, "<i4", offset=_HEAD.size).tolist()
    there, own = numbers[:num_there], numbers[num_there:]
    if not 1 <= num_there <= -(-num_tokens // block_tokens) - first or num_own < num_there:
        raise ProtocolError(
            f"a hand-off of {num_tokens} tokens in {num_there} blocks, the first one {first}, from or to {num_own}"
        )
    for blocks, count in ((there, num_region_blocks), (own, num_blocks)):
        if not 0 <= min(blocks) <= max(blocks) < count or len(set(blocks)) != len(blocks):
            raise ProtocolError(f"KV blocks {min(blocks)} to {max(blocks)} of {count}, for a hand-off")
    return HandOff(ticket, "", num_tokens, step, tuple(there), first), request, own
