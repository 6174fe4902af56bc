"""The state of all requests of a run: what schedulers see, what a step computes, what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from math import inf

from hybridlab.admission import Limits, why_refused
from hybridlab.arrivals import Arrivals
from hybridlab.batch import Entry, HandOff, StepBatch, StepResult
from hybridlab.errors import StrategyError
from hybridlab.kv_blocks import BlockPool
from hybridlab.live_requests import Live, Lives
from hybridlab.plans import QueueView, RequestId, StepPlan
from hybridlab.prefix_cache import NoPrefixes, Prefixes
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.spec import ModelSpec
from hybridlab.strategies.kv_room import fit_step
from hybridlab.validation import check_step
from hybridlab.worker_pools import KVPools, OnePool

_TICKETS = count(1)


class RequestQueue:
    """Requests by arrival. One per run; not thread-safe, except for `cancel`.

    Requests that can never be served are rejected at once; the others are not touched by it. `prefixes` finds
    computed blocks of earlier requests with the same beginning, in the one pool of all workers. A request whose step is
    lost with a worker is computed again, up to `replays` times; then it fails. `rank_sets` are as in `QueueView`.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        pool: BlockPool | KVPools,
        model: ModelSpec,
        token_budget: int,
        prefixes: Prefixes | None = None,
        *,
        replays: int = 0,
        rank_sets: tuple[tuple[int, ...], ...] = ((0,),),
    ) -> None:
        self._pools = pools = OnePool(pool) if isinstance(pool, BlockPool) else pool
        self._eos = frozenset(model.eos_token_ids)
        self._prefixes = prefixes or NoPrefixes()
        self._budget, self._most_replays, self._rank_sets = token_budget, replays, rank_sets
        limits = Limits(pools.largest_context, model.max_positions, model.vocab)
        self._arrivals = Arrivals(requests, lambda request, context: why_refused(request, limits, context))
        self._lives = Lives(pools.transfer or pools.of(""), self._prefixes, pools.transfer)
        self._live = self._lives.all
        self._cancelled: set[RequestId] = set()
        self._last_decode_s: float | None = None
        self._num_steps = 0

    @property
    def records(self) -> dict[RequestId, RequestRecord]:
        return self._arrivals.records

    @property
    def live(self) -> bool:
        return bool(self._live) or self._arrivals.expected

    @property
    def in_flight(self) -> bool:
        return any(live.in_flight for live in self._lives.others.values())

    @property
    def has_cancelled(self) -> bool:
        """Whether a cancelled request waits for `sweep`."""
        return bool(self._cancelled)

    @property
    def next_arrival_s(self) -> float | None:
        """When the next request arrives; None if none will, or only after another has ended."""
        return self._arrivals.next_s

    @property
    def next_event_s(self) -> float | None:
        """When the queue changes by itself: the next arrival, or the next deadline of a request."""
        waiting = (live.deadline_s for live in self._lives.timed.values() if not live.in_flight)
        deadline_s = min(waiting, default=inf)
        event_s = min(deadline_s, inf if self.next_arrival_s is None else self.next_arrival_s)
        return None if event_s == inf else event_s

    def view(self, worker: str, now_s: float) -> QueueView:
        """What a scheduler may know at `now_s`; requests in flight, or in the cache of another worker, are left out."""
        self._admit(now_s)
        pool = self._pools.of(worker)
        waiting, running = self._lives.views(pool)
        return QueueView(
            now_s,
            worker,
            waiting,
            running if self._pools.decodes(worker) else (),
            self._budget,
            pool.free_tokens,
            pool.block_tokens,
            self._last_decode_s,
            self._rank_sets,
        )

    def start(self, view: QueueView, planned: StepPlan, scheduler_name: str) -> StepBatch | None:
        """Bind a step to tokens and blocks, cut to what the KV cache holds; None if nothing of it fits now.

        Raises `StrategyError` naming the scheduler and what it broke.
        """
        if problems := check_step(view, planned):
            raise StrategyError(f"scheduler {scheduler_name}: {'; '.join(problems)}")
        if not planned.tokens:
            return None
        if planned.preempt:  # what that frees is only known once it is done: blocks may be shared
            self._preempt(planned.preempt)
            view = self.view(view.worker, view.now_s)
        if (step := fit_step(view, replace(planned, preempt=()))) is None:
            return None
        self._preempt(step.preempt)
        step = replace(step, preempt=planned.preempt + step.preempt)
        decodes = self._pools.decodes(view.worker)
        if not decodes and (step := self._that_can_leave(step)) is None:
            return None
        starting, pool = [self._live[rid] for rid in step.tokens], self._pools.of(view.worker)
        for live in starting:  # all of them before any grows: growing may evict what was found
            self._lives.touch(live)
            if not live.table and live.left is None:
                live.start(pool, self._prefixes)
            live.home, live.may_decode = pool, decodes
            if live.record.first_scheduled_s is None:
                live.record.first_scheduled_s, live.record.cached_tokens = view.now_s, live.computed
        self._num_steps += 1
        shares = zip(starting, step.tokens.values(), strict=True)
        entries = tuple(self._entry(live, num_tokens, pool, decodes=decodes) for live, num_tokens in shares)
        return self._in_pieces(StepBatch(view.worker, step, entries))

    def apply(self, results: Sequence[StepResult]) -> list[tuple[RequestRecord, int]]:
        """Take in finished steps; return (record, token) for every token drawn, in order."""
        events: list[tuple[RequestRecord, int]] = []
        for result in results:
            block_tokens = self._pools.of(result.batch.worker).block_tokens
            for entry in result.batch.brings:
                live = self._live[entry.id]
                live.in_flight, live.seen = False, None
                # Where the step failed, nobody knows whether the piece was taken.
                if not self._has_failed(live, result, again=bool(result.error)):
                    assert live.left is not None and entry.fetch is not None
                    count = len(entry.fetch.blocks)
                    live.left = replace(live.left, blocks=live.left.blocks[count:], first=live.left.first + count)
            for entry in result.batch.entries:
                live = self._live[entry.id]
                live.in_flight, live.seen = False, None
                if (result.error or result.lost) and self._has_failed(live, result, again=result.lost):
                    continue
                if self._last_decode_s != result.end_s and live.is_running:
                    self._last_decode_s = result.end_s
                live.computed = entry.context_tokens
                if entry.fetch is not None:
                    self._lives.arrive(live)
                if entry.leave is not None:
                    self._lives.leave(live, entry.leave)
                else:
                    live.enter(self._prefixes, block_tokens)
                if entry.wants_token and entry.id not in self._cancelled:
                    events.append((live.record, self._draw(live, result.tokens[entry.id], result.end_s)))
        return events

    def cancel(self, request_id: RequestId) -> bool:
        """Ask for the end of a request, from any thread, any number of times; False if it has ended already."""
        record = self.records.get(request_id)
        if record is None or record.is_final:
            return False
        self._cancelled.add(request_id)
        return True

    def sweep(self, now_s: float) -> None:
        """Take in what has arrived; end what was cancelled or is past its deadline and not being computed."""
        self._admit(now_s)  # also while a worker computes: an arrival that is past is no event to wait for
        for rid in tuple(self._cancelled):
            live = self._live.get(rid)
            if live is None:
                self._arrivals.cancel(rid, now_s)
            elif live.in_flight:
                continue
            else:
                self._finish(live, Status.CANCELLED, "cancelled", now_s)
            self._cancelled.discard(rid)
        for live in [live for live in self._lives.timed.values() if live.deadline_s <= now_s and not live.in_flight]:
            live.record.error = f"not finished {live.record.request.timeout_s:g} s after its arrival"
            self._finish(live, Status.CANCELLED, "timeout", now_s)

    def lose_cache(self, worker: str = "") -> None:
        """What the worker's cache held is gone: requests that are not in flight keep their tokens, and are computed
        anew."""
        pool = self._pools.of(worker)
        for live in tuple(self._lives.others.values()):
            if not live.in_flight and live.home is pool:
                self._lives.give_up(live)
        pool.evict_kept()

    def _admit(self, now_s: float) -> None:
        for record in self._arrivals.until(now_s):
            self._lives.admit(record)

    def _preempt(self, request_ids: Iterable[RequestId]) -> None:
        for rid in request_ids:
            self._lives.give_up(self._live[rid])

    def _that_can_leave(self, step: StepPlan) -> StepPlan | None:
        """`step` without the prompts that it would end and that nothing could take yet; None if nothing is left."""
        assert self._pools.transfer is not None
        tokens, free = {}, self._pools.transfer.free_tokens // self._pools.transfer.block_tokens
        for rid, num_tokens in step.tokens.items():
            live = self._live[rid]
            if self._leaves(live, live.computed + num_tokens):
                needed = self._pools.transfer.blocks_for(len(live.tokens))
                if needed > free:
                    continue
                free -= needed
            tokens[rid] = num_tokens
        return replace(step, tokens=tokens) if tokens else None

    def _in_pieces(self, batch: StepBatch) -> StepBatch:
        """`batch`, for others do not wait until more than a piece of a cache has come: before each of their steps one
        piece comes, and the request is part of the step that can bring the rest."""
        most = self._pools.piece_blocks
        large = {e.id: e for e in batch.entries if e.fetch is not None and len(e.fetch.blocks) > most}
        if not large or len(large) == len(batch.entries):
            return batch
        for rid in large:
            self._live[rid].in_flight, self._live[rid].seen = False, None
        first = next(iter(large.values()))
        assert first.fetch is not None
        self._live[first.id].in_flight = True
        piece = replace(first, fetch=replace(first.fetch, blocks=first.fetch.blocks[:most]))
        tokens = {rid: count for rid, count in batch.step.tokens.items() if rid not in large}
        entries = tuple(entry for entry in batch.entries if entry.id not in large)
        return StepBatch(batch.worker, replace(batch.step, tokens=tokens), entries, (piece,))

    def _has_failed(self, live: Live, result: StepResult, *, again: bool) -> bool:
        """Whether its step did; `again`: it is computed once more, if it has not been yet."""
        if again and live.replays < self._most_replays:
            live.replays += 1
            self._lives.give_up(live)
        elif result.error:
            live.record.error = result.error
            self._finish(live, Status.FAILED, "failed", result.end_s)
        return bool(result.error)

    @staticmethod
    def _leaves(live: Live, end: int) -> bool:
        """Whether a request that has `end` tokens computed goes on to decode."""
        return end == len(live.tokens) and len(live.record.output) + 1 < live.record.request.max_tokens

    def _entry(self, live: Live, num_tokens: int, pool: BlockPool, *, decodes: bool) -> Entry:
        end, leave = live.computed + num_tokens, None
        pool.grow(live.table, end)
        if not decodes and self._leaves(live, end):
            assert self._pools.transfer is not None
            self._pools.transfer.grow(live.leased, end)
            leave = HandOff(next(_TICKETS), live.record.request.id, end, self._num_steps, tuple(live.leased))
        live.record.status = Status.DECODE if live.is_running else Status.PREFILL
        live.in_flight = True
        request = live.record.request
        tokens = live.tokens[live.computed : end]
        wants = end == len(live.tokens)
        table = tuple(live.table)
        return Entry(request.id, tokens, live.computed, table, request.sampling, wants, live.left, leave)

    def _draw(self, live: Live, token: int, now_s: float) -> int:
        record, request = live.record, live.record.request
        live.tokens.append(token)
        record.output.append(token)
        record.token_times_s.append(now_s)
        if token in self._eos or token in request.stop_token_ids:
            self._finish(live, Status.FINISHED, "stop", now_s)
        elif len(record.output) >= request.max_tokens:
            self._finish(live, Status.FINISHED, "length", now_s)
        return token

    def _finish(self, live: Live, status: Status, reason: str, now_s: float) -> None:
        self._lives.remove(live)
        self._cancelled.discard(live.record.request.id)
        self._arrivals.end(live.record, status, reason, now_s)
