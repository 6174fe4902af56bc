"""Which tokens of a step each rank computes: zig-zag stripes, so that causal attention is equal work for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hybridlab.batch import Entry, split
from hybridlab.engine.kv_cache import KVStorage
from hybridlab.model.base import MicroBatch
from hybridlab.plans import RequestId


def share(entries: Sequence[Entry], rank: int, num_ranks: int) -> tuple[Entry, ...]:
    """The stripes of `entries` that `rank` computes, as entries of their own; the one with the last token draws.

    Each request's new tokens are cut into 2n stripes, of which rank r of n has stripes r and 2n - 1 - r: an early one
    and a late one. From request to request the ranks turn, so that single tokens are shared out as well.
    """
    found: list[Entry] = []
    for turn, entry in enumerate(entries):
        place, count = (rank - turn) % num_ranks, len(entry.token_ids)
        stripes = [_stripe(count, number, num_ranks) for number in (place, 2 * num_ranks - 1 - place)]
        if stripes[0][1] == stripes[1][0]:  # neighbours
            stripes = [(stripes[0][0], stripes[1][1])]
        for first, last in stripes:
            if first < last:
                wants = entry.wants_token and last == count
                part = entry.token_ids[first:last]
                found.append(replace(entry, token_ids=part, start=entry.start + first, wants_token=wants))
    return tuple(found)


def rows_of(entry: Entry, rank: int, num_ranks: int) -> list[int]:
    """Which tokens of `entry`, alone in its step, `rank` has, in its order."""
    parts = share([entry], rank, num_ranks)
    return [row - entry.start for part in parts for row in range(part.start, part.start + len(part.token_ids))]


def drawn_by(entries: Sequence[Entry], num_microbatches: int, rank: int, num_ranks: int) -> set[RequestId]:
    """The requests whose next token `rank` draws."""
    groups = split(entries, num_microbatches)
    return {part.id for group in groups for part in share(group, rank, num_ranks) if part.wants_token}


def _stripe(count: int, number: int, num_ranks: int) -> tuple[int, int]:
    return count * number // (2 * num_ranks), count * (number + 1) // (2 * num_ranks)


@dataclass(frozen=True)
class Shares:
    """Of one microbatch: tokens of every rank, and the KV slots of all of them, rank after rank (int64)."""

    sizes: tuple[int, ...]
    slots: torch.Tensor


class SharedBatch(MicroBatch):
    """Some rows of a microbatch: keys of the other rows come from other ranks, between projections and attention."""

    @property
    def decode_runs(self) -> None:
        """A kernel that does a whole attention layer would leave the other ranks without this one's keys."""


def shared_batch(
    entries: Sequence[Entry], cache: KVStorage, rank: int, num_ranks: int
) -> tuple[tuple[Entry, ...], SharedBatch, Shares]:
    """What `rank` computes of a microbatch of whole `entries`, and who computes what."""
    own = share(entries, rank, num_ranks)
    ids: list[int] = []
    positions: list[int] = []
    contexts, slots, sizes = [], [], []
    for each in range(num_ranks):
        size = 0
        for part in share(entries, each, num_ranks):
            count = len(part.token_ids)
            context, new = cache.context(part.block_table, size, count, part.start)
            slots.append(new)
            size += count
            if each == rank:
                contexts.append(context)
                ids.extend(part.token_ids)
                positions.extend(range(part.start, part.start + count))
        sizes.append(size)
    shares = Shares(tuple(sizes), cache.slots(slots))
    tensors = torch.tensor(ids, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)
    return own, SharedBatch(*tensors, shares.slots.split(sizes)[rank], tuple(contexts)), shares
