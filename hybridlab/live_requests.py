"""Requests between arrival and end, and how a scheduler sees them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf

from hybridlab.kv_blocks import BlockPool
from hybridlab.plans import RunningRequest, WaitingRequest
from hybridlab.prefix_cache import Prefixes
from hybridlab.request import RequestRecord


@dataclass
class Live:
    """One request. `tokens` are prompt and output; `computed` of them are in the blocks of `table`.

    `keys` are those of its full blocks in the prefix cache, `entered` of its own blocks are known there. `found` counts
    the blocks of others that it will share when it starts.
    """

    record: RequestRecord
    tokens: list[int]
    computed: int = 0
    table: list[int] = field(default_factory=list)
    in_flight: bool = False
    keys: list[bytes] = field(default_factory=list)
    entered: int = 0
    found: int = 0
    seen: WaitingRequest | RunningRequest | None = None

    @property
    def is_running(self) -> bool:
        return len(self.record.output) > 0 and self.computed == len(self.tokens) - 1

    @property
    def deadline_s(self) -> float:
        limit_s, arrival_s = self.record.request.timeout_s, self.record.arrival_s
        return inf if limit_s is None or arrival_s is None else arrival_s + limit_s

    def start(self, pool: BlockPool, prefixes: Prefixes) -> None:
        """Take hold of the blocks that were found for it."""
        pool.share(self.table, [prefixes.block(key) for key in self.keys[: self.found]])
        self.computed, self.entered, self.found = self.found * pool.block_tokens, self.found, 0

    def give_up(self, pool: BlockPool) -> None:
        """Return every block; what was computed must be computed or found again."""
        pool.release(self.table)
        self.computed, self.entered, self.found, self.seen = 0, 0, 0, None

    def enter(self, prefixes: Prefixes, block_tokens: int) -> None:
        """Make the full blocks that were computed known to the prefix cache."""
        full = self.computed // block_tokens
        if full > self.entered:
            prefixes.extend_keys(self.keys, self.tokens)
            self.entered = prefixes.enter(self.keys[:full], self.table, self.entered)

    def find(self, prefixes: Prefixes, block_tokens: int) -> None:
        """Look for computed blocks of this prompt, while the request has none; its last token is always computed."""
        if len(self.keys) < len(self.tokens) // block_tokens:
            prefixes.extend_keys(self.keys, self.tokens)
        self.found = prefixes.count(self.keys, (len(self.tokens) - 1) // block_tokens, self.found)


def views(lives: Iterable[Live], pool: BlockPool, prefixes: Prefixes) -> list[WaitingRequest | RunningRequest]:
    """The requests that are not in flight: running before waiting, each by arrival."""
    # Those in flight count as ahead of all others. One that follows another may get to know its arrival late.
    ranked = sorted(lives, key=lambda live: (not live.in_flight, not live.is_running, live.record.arrival_s))
    shared = _shared_blocks(ranked, pool, prefixes)
    size = pool.block_tokens
    pairs = zip(ranked, shared, strict=True)
    return [_view(live, blocks * size, size) for live, blocks in pairs if not live.in_flight]


def _shared_blocks(ranked: Sequence[Live], pool: BlockPool, prefixes: Prefixes) -> list[int]:
    """For each request, how many leading blocks of its context those ahead of it hold.

    Whoever holds a known block holds those before it, so the first that nobody ahead holds can be bisected.
    """
    shared = []
    ahead: set[int] = set()  # blocks of requests ahead that others hold too
    behind = [live for live in ranked if live.table and not live.is_running and not live.in_flight]
    late = _held(behind)
    for live in ranked:
        if live.table:
            if behind and behind[0] is live:
                behind.pop(0)
                late = _held(behind)
            own = live.table[: live.entered]
            shared.append(_leading(len(own), lambda i, own=own: own[i] in ahead))
            ahead.update(own[: _leading(len(own), lambda i, own=own: pool.holders(own[i]) > 1)])
        else:
            # It looks for blocks, so it waits: all that hold some are ahead, but for prompts behind it.
            live.find(prefixes, pool.block_tokens)
            shared.append(_leading(live.found, _held_ahead(live.keys, pool, prefixes, late)))
    return shared


def _held(lives: Iterable[Live]) -> Counter[int]:
    return Counter(chain.from_iterable(live.table for live in lives))


def _held_ahead(
    keys: Sequence[bytes], pool: BlockPool, prefixes: Prefixes, late: Counter[int]
) -> Callable[[int], bool]:
    """Whether others than those behind hold the block of the key with a given index."""

    def is_held(index: int) -> bool:
        block = prefixes.block(keys[index])
        return pool.holders(block) > late[block]

    return is_held


def _leading(count: int, fulfils: Callable[[int], bool]) -> int:
    """How many of the first `count` fulfil what none behind the first that does not fulfils."""
    return bisect_left(range(count), True, key=lambda index: not fulfils(index))


def _view(live: Live, shared_kv_tokens: int, block_tokens: int) -> WaitingRequest | RunningRequest:
    """The same object while nothing has changed: a decode step then builds one per request that moved."""
    request, allocated = live.record.request, len(live.table) * block_tokens
    computed = live.computed + live.found * block_tokens
    seen = live.seen
    if seen is not None and seen.shared_kv_tokens == shared_kv_tokens and seen.context_tokens == computed:
        return seen
    if live.is_running:
        live.seen = RunningRequest(request.id, computed, allocated, shared_kv_tokens)
    else:
        left, arrival_s = len(live.tokens) - computed, live.record.arrival_s or 0.0
        live.seen = WaitingRequest(request.id, arrival_s, left, allocated, computed, shared_kv_tokens)
    return live.seen
