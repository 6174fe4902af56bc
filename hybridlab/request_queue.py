"""The state of all requests of a run: what schedulers see, what a step computes, what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

from hybridlab.admission import Limits, why_refused
from hybridlab.arrivals import Arrivals
from hybridlab.batch import Entry, StepBatch, StepResult
from hybridlab.errors import StrategyError
from hybridlab.kv_blocks import BlockPool
from hybridlab.live_requests import Live, Lives
from hybridlab.plans import QueueView, RequestId, StepPlan
from hybridlab.prefix_cache import NoPrefixes, Prefixes
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.spec import ModelSpec
from hybridlab.strategies.kv_room import fit_step
from hybridlab.validation import check_step


class RequestQueue:
    """Requests by arrival. One per run; not thread-safe, except for `cancel`.

    Requests that can never be served are rejected at once; the others are not touched by it. `prefixes` finds
    computed blocks of earlier requests with the same beginning.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        pool: BlockPool,
        model: ModelSpec,
        token_budget: int,
        prefixes: Prefixes | None = None,
    ) -> None:
        self._pool, self._eos = pool, frozenset(model.eos_token_ids)
        self._prefixes = prefixes or NoPrefixes()
        self._budget = token_budget
        limits = Limits(pool.num_blocks * pool.block_tokens, model.max_positions, model.vocab)
        self._arrivals = Arrivals(requests, lambda request, context: why_refused(request, limits, context))
        self._lives = Lives(pool, self._prefixes)
        self._live = self._lives.all
        self._cancelled: set[RequestId] = set()
        self._last_decode_s: float | None = None

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
        """What a scheduler may know at `now_s`; requests in flight on another worker are left out."""
        self._admit(now_s)
        waiting, running = self._lives.views()
        return QueueView(
            now_s,
            worker,
            waiting,
            running,
            self._budget,
            self._pool.free_tokens,
            self._pool.block_tokens,
            self._last_decode_s,
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
        starting = [self._live[rid] for rid in step.tokens]
        for live in starting:  # all of them before any grows: growing may evict what was found
            self._lives.touch(live)
            if not live.table:
                live.start(self._pool, self._prefixes)
            if live.record.first_scheduled_s is None:
                live.record.first_scheduled_s, live.record.cached_tokens = view.now_s, live.computed
        entries = tuple(self._entry(live, count) for live, count in zip(starting, step.tokens.values(), strict=True))
        return StepBatch(view.worker, step, entries)

    def apply(self, results: Sequence[StepResult]) -> list[tuple[RequestRecord, int]]:
        """Take in finished steps; return (record, token) for every token drawn, in order."""
        events: list[tuple[RequestRecord, int]] = []
        for result in results:
            for entry in result.batch.entries:
                live = self._live[entry.id]
                live.in_flight, live.seen = False, None
                if result.error:
                    live.record.error = result.error
                    self._finish(live, Status.FAILED, "failed", result.end_s)
                    continue
                if live.is_running:
                    self._last_decode_s = result.end_s
                live.computed = entry.context_tokens
                live.enter(self._prefixes, self._pool.block_tokens)
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

    def lose_cache(self) -> None:
        """What the KV cache held is gone: requests that are not in flight keep their tokens and are computed anew."""
        for live in tuple(self._lives.others.values()):
            if not live.in_flight:
                self._lives.give_up(live)
        self._pool.evict_kept()

    def _admit(self, now_s: float) -> None:
        for record in self._arrivals.until(now_s):
            self._lives.admit(record)

    def _preempt(self, request_ids: Iterable[RequestId]) -> None:
        for rid in request_ids:
            self._lives.give_up(self._live[rid])

    def _entry(self, live: Live, count: int) -> Entry:
        end = live.computed + count
        self._pool.grow(live.table, end)
        live.record.status = Status.DECODE if live.is_running else Status.PREFILL
        live.in_flight = True
        request = live.record.request
        tokens = live.tokens[live.computed : end]
        return Entry(request.id, tokens, live.computed, tuple(live.table), request.sampling, end == len(live.tokens))

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
