"""Requests between arrival and end, and how a scheduler sees them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf

from hybridlab.batch import HandOff
from hybridlab.kv_blocks import BlockPool
from hybridlab.plans import RunningRequest, WaitingRequest
from hybridlab.prefix_cache import Prefixes
from hybridlab.request import RequestRecord


@dataclass
class Live:
    """One request, the `number`th that arrived. `tokens` are prompt and output; `computed` of them are in the blocks of
    `table`.

    `keys` are those of its full blocks in the prefix cache, `entered` of its own blocks are known there. `found` counts
    the blocks of others that it will share when it starts. `home` is the pool of its blocks. Between two workers it has
    none: its cache is in `left`, in the blocks `leased`. `replays` counts the steps that were lost with a worker.
    """

    record: RequestRecord
    tokens: list[int]
    number: int = 0
    computed: int = 0
    table: list[int] = field(default_factory=list)
    in_flight: bool = False
    keys: list[bytes] = field(default_factory=list)
    entered: int = 0
    found: int = 0
    home: BlockPool | None = None
    may_decode: bool = True
    """At its home; elsewhere it waits until all of it is computed, with what it drew before a preemption."""
    left: HandOff | None = None
    leased: list[int] = field(default_factory=list)
    replays: int = 0
    seen: WaitingRequest | RunningRequest | None = None

    @property
    def rank(self) -> tuple[float, int]:
        """Arrivals in their order. One that follows another may get to know its arrival late."""
        return self.record.arrival_s or 0.0, self.number

    @property
    def is_running(self) -> bool:
        return self.may_decode and self.computed + 1 == len(self.tokens) and bool(self.record.output)

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
    # Those in flight count as ahead of all others.
    ranked = sorted(lives, key=_place_in_view)
    shared = _shared_blocks(ranked, pool, prefixes)
    size = pool.block_tokens
    pairs = zip(ranked, shared, strict=True)
    return [_view(live, blocks * size, size) for live, blocks in pairs if not live.in_flight]


def _place_in_view(live: Live) -> tuple[bool, bool, float, int]:
    return not live.in_flight, not live.is_running, live.record.arrival_s or 0.0, live.number


def _shared_blocks(ranked: Sequence[Live], pool: BlockPool, prefixes: Prefixes) -> list[int]:
    """For each request, how many leading blocks of its context those ahead of it hold.

    Whoever holds a known block holds those before it, so the first that nobody ahead holds can be bisected.
    """
    shared = []
    if not pool.num_shared and all(live.table for live in ranked):
        return [0] * len(ranked)
    ahead: set[int] = set()  # blocks of requests ahead that others hold too
    behind = [live for live in ranked if live.table and not live.is_running and not live.in_flight]
    late = _held(behind)
    for live in ranked:
        if live.table:
            if behind and behind[0] is live:
                behind.pop(0)
                late = _held(behind)
            if not live.entered or not pool.num_shared:
                shared.append(0)
                continue
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


class Lives:
    """All requests between arrival and end, so kept that one that only waits costs nothing in a step.

    `untouched` hold no blocks and are not computed, by arrival; `others` are all the rest. `timed` have a deadline.
    """

    def __init__(self, pool: BlockPool, prefixes: Prefixes, transfer: BlockPool | None = None) -> None:
        self._pool, self._prefixes, self._transfer = pool, prefixes, transfer
        self.all: dict[str, Live] = {}
        self.others: dict[str, Live] = {}
        self.untouched: list[Live] = []
        self.timed: dict[str, Live] = {}
        self._count = 0
        self._seen: list[WaitingRequest] | None = []
        """What a scheduler sees of `untouched`, where none of them finds blocks; None if that is to be worked out."""
        self._waiting: tuple[WaitingRequest, ...] | None = ()
        """The same, as long as nothing was changed in it."""
        self._version = prefixes.version

    def admit(self, record: RequestRecord) -> None:
        live = Live(record, [int(token) for token in record.prompt], self._count)
        self._count += 1
        self.all[record.request.id] = live
        if live.deadline_s < inf:
            self.timed[record.request.id] = live
        self._insert(live)

    def touch(self, live: Live) -> None:
        """It will be computed."""
        if live.record.request.id not in self.others:
            place = self._place(live.rank)
            del self.untouched[place]
            if self._seen is not None:
                del self._seen[place]
            self._waiting = None
            self.others[live.record.request.id] = live

    def give_up(self, live: Live) -> None:
        """Its blocks return; it will be computed anew."""
        self._release(live)
        if self.others.pop(live.record.request.id, None) is not None:
            self._insert(live)

    def remove(self, live: Live) -> None:
        rid = live.record.request.id
        self.touch(live)
        self._release(live)
        del self.others[rid], self.all[rid]
        self.timed.pop(rid, None)

    def arrive(self, live: Live) -> None:
        """What was left for it is in its own blocks."""
        if self._transfer is not None:
            self._transfer.release(live.leased)
        live.left = None

    def leave(self, live: Live, hand_off: HandOff) -> None:
        """Its cache is where any worker can take it from; its blocks return."""
        assert live.home is not None
        live.home.release(live.table)
        live.home, live.may_decode, live.left = None, True, hand_off

    def views(self, pool: BlockPool | None = None) -> tuple[tuple[WaitingRequest, ...], tuple[RunningRequest, ...]]:
        """(waiting, running), without those in flight or in another pool, each by arrival."""
        if self._version != self._prefixes.version or self._seen is None:
            self._version, self._waiting = self._prefixes.version, None
            found = [self._look(live) for live in self.untouched]
            self._seen = None if None in found else [seen for seen in found if seen is not None]
        if self._seen is None:  # what they share depends on all others
            seen = views(self.all.values(), self._pool, self._prefixes)
            waiting = [request for request in seen if isinstance(request, WaitingRequest)]
            return tuple(waiting), tuple(request for request in seen if isinstance(request, RunningRequest))
        here = [live for live in self.others.values() if live.home in (None, pool or self._pool)]
        seen = views(here, pool or self._pool, self._prefixes)
        running = tuple(request for request in seen if isinstance(request, RunningRequest))
        begun = [request for request in seen if isinstance(request, WaitingRequest)]
        if not begun:
            if self._waiting is None:
                self._waiting = tuple(self._seen)
            return self._waiting, running
        waiting = list(self._seen)
        for count, request in enumerate(begun):
            waiting.insert(count + self._place(self.all[request.id].rank), request)
        return tuple(waiting), running

    def _release(self, live: Live) -> None:
        live.give_up(live.home or self._pool)
        live.home, live.may_decode = None, True
        self.arrive(live)

    def _insert(self, live: Live) -> None:
        place = self._place(live.rank)
        self.untouched.insert(place, live)
        self._waiting = None
        if self._seen is not None:
            seen = self._look(live)
            self._seen = None if seen is None else [*self._seen[:place], seen, *self._seen[place:]]

    def _place(self, rank: tuple[float, int]) -> int:
        return bisect_left(self.untouched, rank, key=lambda live: live.rank)

    def _look(self, live: Live) -> WaitingRequest | None:
        """What is seen of an untouched request; None if it finds blocks."""
        live.find(self._prefixes, self._pool.block_tokens)
        seen = None if live.found else _view(live, 0, self._pool.block_tokens)
        return seen if isinstance(seen, WaitingRequest) else None
