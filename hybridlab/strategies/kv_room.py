"""KV cache arithmetic: what fits, and whom to preempt when nothing does.

Requests rank running before waiting, each in arrival order; a request may preempt only those that rank behind
it. So the first always gets on, and every queue drains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from hybridlab.plans import QueueView, RequestId, RunningRequest, StepPlan, WaitingRequest

AnyRequest = RunningRequest | WaitingRequest


def fit_step(queue: QueueView, step: StepPlan) -> StepPlan | None:
    """`step`, cut to what the KV cache holds: the safety net under schedulers that do not count KV tokens.

    Requests behind those of the step are preempted, then the step's own last ones; a prompt's share is cut to
    what fits. None if nothing of the step can be computed now.
    """
    room = KVRoom(queue)
    room.preempt(step.preempt)
    chosen: list[AnyRequest] = [r for r in queue.running if r.id in step.tokens]
    if len(chosen) < len(step.tokens):
        chosen += [r for r in queue.waiting if r.id in step.tokens]
    if sum(room.new_tokens(r, step.tokens[r.id]) for r in chosen) <= room.free_tokens:
        return step
    tokens: dict[RequestId, int] = {}
    for request in chosen:
        if request.id in room.preempted:
            continue
        room.make_room(request, step.tokens[request.id])
        count = min(step.tokens[request.id], room.most(request))
        if count > 0:
            room.take(request, count)
            tokens[request.id] = count
    return replace(step, tokens=tokens, preempt=tuple(room.preempted)) if tokens else None


class KVRoom:
    """Free KV tokens while a step is composed. Requests take whole blocks of `queue.kv_block_tokens`."""

    def __init__(self, queue: QueueView) -> None:
        self._queue = queue
        self.free_tokens = queue.free_kv_tokens
        self.preempted: list[RequestId] = []

    def fits(self, request: AnyRequest, num_tokens: int) -> bool:
        return self.new_tokens(request, num_tokens) <= self.free_tokens

    def most(self, request: AnyRequest) -> int:
        """The most tokens of `request` that fit now."""
        block = self._queue.kv_block_tokens
        return self._held(request) + self.free_tokens // block * block - request.context_tokens

    def take(self, request: AnyRequest, num_tokens: int) -> None:
        self.free_tokens -= self.new_tokens(request, num_tokens)

    def decodes(self) -> dict[RequestId, int]:
        """One token for each running request, earliest first, within the token budget.

        The latest holders are preempted when the cache is full.
        """
        tokens: dict[RequestId, int] = {}
        for request in self._queue.running[: self._queue.token_budget]:
            if request.id not in self.preempted and self.make_room(request, 1):
                self.take(request, 1)
                tokens[request.id] = 1
        return tokens

    def make_room(self, request: AnyRequest, num_tokens: int) -> bool:
        """Preempt holders of KV cache behind `request`, the last first, until `num_tokens` of it fit."""
        for victim in chain(reversed(self._queue.waiting), reversed(self._queue.running)):
            if self.fits(request, num_tokens) or victim.id == request.id:
                break
            if victim.allocated_kv_tokens and victim.id not in self.preempted:
                self.preempt((victim.id,))
        return self.fits(request, num_tokens)

    def preempt(self, request_ids: Sequence[RequestId]) -> None:
        """Give up the KV cache of these requests; their blocks count as free from here on."""
        for request in chain(self._queue.running, self._queue.waiting) if request_ids else ():
            if request.id in request_ids:
                self.preempted.append(request.id)
                self.free_tokens += max(0, request.allocated_kv_tokens - request.shared_kv_tokens)

    def decode_step(self) -> StepPlan | None:
        tokens = self.decodes()
        return StepPlan("decode", tokens, tuple(self.preempted)) if tokens else None

    def new_tokens(self, request: AnyRequest, num_tokens: int) -> int:
        """Tokens in new blocks that `request` takes to compute `num_tokens` more."""
        block = self._queue.kv_block_tokens
        needed = -(-(request.context_tokens + num_tokens) // block) * block - self._held(request)
        return needed if needed > 0 else 0

    def _held(self, request: AnyRequest) -> int:
        """Room that `request` need not take from the free blocks: its own, or what it will share when it starts."""
        # Whoever holds what it would share may be among the preempted.
        return request.allocated_kv_tokens or (0 if self.preempted else request.shared_kv_tokens)
