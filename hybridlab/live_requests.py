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

    `keys` are those of its full blocks in the prefix cache, `entered` of its own blocks are known there. `found` are
    the blocks of others that it will share when it starts.
    """

    record: RequestRecord
    tokens: list[int]
    computed: int = 0
    table: list[int] = field(default_factory=list)
    in_flight: bool = False
    keys: list[bytes] = field(default_factory=list)
    entered: int = 0
    found: list[int] = field(default_factory=list)
    seen: WaitingRequest | RunningRequest | None = None

    @property
    def is_running(self) -> bool:
        return len(self.record.output) > 0 and self.computed == len(self.tokens) - 1

    @property
    def deadline_s(self) -> float:
        limit_s, arrival_s = self.record.request.timeout_s, self.record.arrival_s
        return inf if limit_s is None or arrival_s is None else arrival_s + limit_s

    def start(self, pool: BlockPool) -> None:
        """Take hold of the blocks that were found for it."""
        pool.share(self.table, self.found)
        self.computed, self.entered, self.found = len(self.found) * pool.block_tokens, len(self.found), []

    def give_up(self, pool: BlockPool) -> None:
        """Return every block; what was computed must be computed or found again."""
        pool.release(self.table)
        self.computed, self.entered, self.found, self.seen = 0, 0, [], None

    def enter(self, prefixes: Prefixes, block_tokens: int) -> None:
        """Make the full blocks that were computed known to the prefix cache."""
        full = self.computed // block_tokens
        if full > self.entered:
            prefixes.extend_keys(self.keys, self.tokens)
            self.entered = prefixes.enter(self.keys[:full], self.table, self.entered)

    def find(self, prefixes: Prefixes, block_tokens: int) -> None:
        """Look for computed blocks of this prompt, while the request has none; its last token is always computed."""
        if not self.table:
            prefixes.extend_keys(self.keys, self.tokens)
            self.found = prefixes.find(self.keys[: (len(self.tokens) - 1) // block_tokens])


def views(lives: Iterable[Live], pool: BlockPool, prefixes: Prefixes) -> list[WaitingRequest | RunningRequest]:
    """The requests that are not in flight: running before waiting, each by arrival."""
    # Those in flight count as ahead of all others. The sort is stable: by arrival among equals.
    ranked = sorted(lives, key=lambda live: (not live.in_flight, not live.is_running))
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
    for live in ranked:
        if live.table:
            if behind and behind[0] is live:
                behind.pop(0)
            own = live.table[: live.entered]
            shared.append(_leading(own, ahead.__contains__))
            ahead.update(own[: _leading(own, lambda block: pool.holders(block) > 1)])
        else:
            # It looks for blocks, so it waits: all that hold some are ahead, but for prompts behind it.
            live.find(prefixes, pool.block_tokens)
            holders = Counter(chain.from_iterable(other.table for other in behind))
            shared.append(_leading(live.found, lambda block, late=holders: pool.holders(block) > late[block]))
    return shared


def _leading(blocks: Sequence[int], fulfils: Callable[[int], bool]) -> int:
    """How many of the first blocks fulfil what no block behind the first that does not fulfils."""
    return bisect_left(blocks, True, key=lambda block: not fulfils(block))


def _view(live: Live, shared_kv_tokens: int, block_tokens: int) -> WaitingRequest | RunningRequest:
    """The same object while nothing has changed: a decode step then builds one per request that moved."""
    request, allocated = live.record.request, len(live.table) * block_tokens
    computed = live.computed + len(live.found) * block_tokens
    seen = live.seen
    if seen is not None and seen.shared_kv_tokens == shared_kv_tokens and seen.context_tokens == computed:
        return seen
    if live.is_running:
        live.seen = RunningRequest(request.id, computed, allocated, shared_kv_tokens)
    else:
        left, arrival_s = len(live.tokens) - computed, live.record.arrival_s or 0.0
        live.seen = WaitingRequest(request.id, arrival_s, left, allocated, computed, shared_kv_tokens)
    return live.seen
