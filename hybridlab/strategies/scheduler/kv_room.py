"""KV cache arithmetic that schedulers share: what fits, and whom to preempt when nothing does."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from hybridlab.plan import QueueView, RequestId, RunningRequest, StepPlan, WaitingRequest

AnyRequest = RunningRequest | WaitingRequest


class KVRoom:
    """Free KV tokens while a step is composed. Requests take whole blocks of `queue.kv_block_tokens`."""

    def __init__(self, queue: QueueView) -> None:
        self._queue = queue
        self.free_tokens = queue.free_kv_tokens
        self.preempted: list[RequestId] = []

    def fits(self, request: AnyRequest, num_tokens: int) -> bool:
        return self._new_tokens(request, num_tokens) <= self.free_tokens

    def most(self, request: AnyRequest) -> int:
        """The most tokens of `request` that fit now."""
        block = self._queue.kv_block_tokens
        return request.allocated_kv_tokens + self.free_tokens // block * block - request.context_tokens

    def take(self, request: AnyRequest, num_tokens: int) -> None:
        self.free_tokens -= self._new_tokens(request, num_tokens)

    def decodes(self) -> dict[RequestId, int]:
        """One token for each running request, earliest first, within the token budget.

        The latest holders are preempted when the cache is full.
        """
        tokens: dict[RequestId, int] = {}
        victims = self._victims()
        for request in self._queue.running[: self._queue.token_budget]:
            while request.id not in self.preempted and not self.fits(request, 1):
                self._preempt(next(victims))
            if request.id not in self.preempted:
                self.take(request, 1)
                tokens[request.id] = 1
        return tokens

    def make_room(self, request: WaitingRequest, num_tokens: int) -> bool:
        """Preempt the latest holders of KV cache until `num_tokens` of `request` fit."""
        for victim in self._victims():
            if self.fits(request, num_tokens) or victim.id == request.id:
                break
            self._preempt(victim)
        return self.fits(request, num_tokens)

    def decode_step(self) -> StepPlan | None:
        tokens = self.decodes()
        return StepPlan("decode", tokens, tuple(self.preempted)) if tokens else None

    def _victims(self) -> Iterator[AnyRequest]:
        """Holders of KV cache from the last to be served on: waiting from the end, then running from the end."""
        for request in (*reversed(self._queue.waiting), *reversed(self._queue.running)):
            if request.allocated_kv_tokens and request.id not in self.preempted:
                yield request

    def _preempt(self, request: AnyRequest) -> None:
        self.preempted.append(request.id)
        self.free_tokens += request.allocated_kv_tokens

    def _new_tokens(self, request: AnyRequest, num_tokens: int) -> int:
        block = self._queue.kv_block_tokens
        blocks = ceil((request.context_tokens + num_tokens) / block)
        return max(0, blocks * block - request.allocated_kv_tokens)
