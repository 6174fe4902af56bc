"""Chunked prefill: decodes first, prompts in pieces beside them (Sarathi-Serve, OSDI '24)."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import QueueView, StepPlan
from hybridlab.strategies.fields import check_positive
from hybridlab.strategies.kv_room import KVRoom


@dataclass(frozen=True)
class ChunkedPrefill:
    """Every running request decodes in every step; what is left of the budget goes to prompts in arrival order.

    `chunk_tokens` bounds the prompt tokens of one step, and so the longest gap between two tokens of a user.
    """

    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        check_positive("chunk_tokens", self.chunk_tokens)

    def schedule(self, queue: QueueView) -> StepPlan | None:
        room = KVRoom(queue)
        tokens = room.decodes()
        decodes = len(tokens)
        left = min(queue.token_budget - decodes, self.chunk_tokens)
        for request in queue.waiting:
            if not tokens:
                room.make_room(request, min(request.remaining_prompt, left))
            count = min(request.remaining_prompt, left, room.most(request))
            if count <= 0 or request.id in room.preempted:
                break
            room.take(request, count)
            tokens[request.id] = count
            left -= count
        if not tokens:
            return None
        role = "decode" if len(tokens) == decodes else "mixed" if decodes else "prefill"
        return StepPlan(role, tokens, tuple(room.preempted))
