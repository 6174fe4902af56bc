"""The state of all requests of a run: what schedulers see, what a step computes, what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hybridlab.admission import Limits, why_refused
from hybridlab.batch import Entry, StepBatch, StepResult
from hybridlab.errors import RequestError, StrategyError
from hybridlab.kv_blocks import BlockPool
from hybridlab.plans import QueueView, RequestId, RunningRequest, StepPlan, WaitingRequest
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.spec import ModelSpec
from hybridlab.strategies.kv_room import fit_step
from hybridlab.validation import check_step


@dataclass
class _Live:
    """A request between arrival and end. `tokens` are prompt and output, `computed` of them are in the cache."""

    record: RequestRecord
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    in_flight: bool = False
    seen: WaitingRequest | RunningRequest | None = None

    @property
    def is_running(self) -> bool:
        return len(self.record.output) > 0 and self.computed == len(self.tokens) - 1

    def view(self, block_tokens: int) -> WaitingRequest | RunningRequest:
        if self.seen is None:
            allocated = len(self.blocks) * block_tokens
            request = self.record.request
            if self.is_running:
                self.seen = RunningRequest(request.id, self.computed, allocated)
            else:
                left = len(self.tokens) - self.computed
                self.seen = WaitingRequest(request.id, request.arrival_s, left, allocated, self.computed)
        return self.seen


class RequestQueue:
    """Requests by arrival. One per run; not thread-safe, except for `cancel`.

    Requests that can never be served are rejected at once; the others are not touched by it.
    """

    def __init__(self, requests: Iterable[Request], pool: BlockPool, model: ModelSpec, token_budget: int) -> None:
        self._pool, self._eos = pool, frozenset(model.eos_token_ids)
        self._budget = token_budget
        limits = Limits(pool.num_blocks * pool.block_tokens, model.max_positions, model.vocab)
        self.records: dict[RequestId, RequestRecord] = {}
        self._future: list[_Live] = []
        for request in requests:
            if request.id in self.records:
                raise RequestError(f"request id {request.id!r} occurs more than once")
            record = self.records[request.id] = RequestRecord(request)
            if reason := why_refused(request, limits):
                record.error = reason
                self._end(record, Status.REJECTED, "rejected", 0.0)
            else:
                self._future.append(_Live(record, [int(token) for token in request.prompt]))
        # Latest first, so that arrivals pop from the end; the sort is stable for equal times.
        self._future.reverse()
        self._future.sort(key=lambda live: -live.record.request.arrival_s)
        self._live: dict[RequestId, _Live] = {}
        self._cancelled: set[RequestId] = set()
        self._last_decode_s: float | None = None

    @property
    def live(self) -> bool:
        return bool(self._future or self._live)

    @property
    def in_flight(self) -> bool:
        return any(live.in_flight for live in self._live.values())

    @property
    def has_cancelled(self) -> bool:
        """Whether a cancelled request waits for `sweep_cancelled`."""
        return bool(self._cancelled)

    @property
    def next_arrival_s(self) -> float | None:
        return self._future[-1].record.request.arrival_s if self._future else None

    def view(self, worker: str, now_s: float) -> QueueView:
        """What a scheduler may know at `now_s`; requests in flight on another worker are left out."""
        self._admit(now_s)
        waiting, running = [], []
        for live in self._live.values():
            if not live.in_flight:
                seen = live.view(self._pool.block_tokens)
                (running if isinstance(seen, RunningRequest) else waiting).append(seen)
        return QueueView(
            now_s,
            worker,
            tuple(waiting),
            tuple(running),
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
        if not planned.tokens or (step := fit_step(view, planned)) is None:
            return None
        for rid in step.preempt:
            live = self._live[rid]
            self._pool.release(live.blocks)
            live.computed, live.seen = 0, None
        entries = []
        for rid, count in step.tokens.items():
            live = self._live[rid]
            end = live.computed + count
            self._pool.grow(live.blocks, end)
            if live.record.first_scheduled_s is None:
                live.record.first_scheduled_s = view.now_s
            live.record.status = Status.DECODE if live.is_running else Status.PREFILL
            live.in_flight = True
            entries.append(
                Entry(
                    rid,
                    live.tokens[live.computed : end],
                    live.computed,
                    tuple(live.blocks),
                    live.record.request.sampling,
                    end == len(live.tokens),
                )
            )
        return StepBatch(view.worker, step, tuple(entries))

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

    def sweep_cancelled(self, now_s: float) -> None:
        """End the requests that were cancelled and are not being computed; their blocks return."""
        for rid in tuple(self._cancelled):
            live = self._live.get(rid)
            if live is None:
                live = next((f for f in self._future if f.record.request.id == rid), None)
                if live is not None:
                    self._future.remove(live)
            elif live.in_flight:
                continue
            if live is not None:
                self._finish(live, Status.CANCELLED, "cancelled", now_s)
            self._cancelled.discard(rid)

    def _admit(self, now_s: float) -> None:
        while self._future and self._future[-1].record.request.arrival_s <= now_s:
            live = self._future.pop()
            self._live[live.record.request.id] = live

    def _draw(self, live: _Live, token: int, now_s: float) -> int:
        record, request = live.record, live.record.request
        live.tokens.append(token)
        record.output.append(token)
        record.token_times_s.append(now_s)
        if token in self._eos or token in request.stop_token_ids:
            self._finish(live, Status.FINISHED, "stop", now_s)
        elif len(record.output) >= request.max_tokens:
            self._finish(live, Status.FINISHED, "length", now_s)
        return token

    def _finish(self, live: _Live, status: Status, reason: str, now_s: float) -> None:
        self._pool.release(live.blocks)
        self._live.pop(live.record.request.id, None)
        self._end(live.record, status, reason, now_s)

    @staticmethod
    def _end(record: RequestRecord, status: Status, reason: str, now_s: float) -> None:
        record.status, record.finish_reason, record.finished_s = status, reason, now_s
