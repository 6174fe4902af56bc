"""First come, first served: whole prompts before decodes."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.plans import QueueView, StepPlan
from hybridlab.strategies.fields import check_positive
from hybridlab.strategies.kv_room import KVRoom


@dataclass(frozen=True)
class FCFS:
    """Prefill waiting prompts in arrival order, without overtaking; decode only when no prompt can be prefilled.

    A step prefills as many prompts as fit the token budget. A prompt starts only when all of it fits the KV
    cache. `chunk_tokens` bounds the prompt tokens of one step (None: the token budget alone).
    Gives the best TTFT of the head of the queue and the worst inter-token latency behind long prompts.
    """

    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        check_positive("chunk_tokens", self.chunk_tokens, optional=True)

    def schedule(self, queue: QueueView) -> StepPlan | None:
        room = KVRoom(queue)
        left = min(queue.token_budget, self.chunk_tokens or queue.token_budget)
        tokens: dict[str, int] = {}
        for request in queue.waiting:
            # With nothing running, KV cache is held by later, half-computed prompts only: take it back.
            if not tokens and not queue.running:
                room.make_room(request, request.remaining_prompt)
            count = min(request.remaining_prompt, left)
            if count <= 0 or not room.fits(request, request.remaining_prompt) or request.id in room.preempted:
                break
            # Reserve the whole prompt, so that a second one cannot take the room of its tail.
            room.take(request, request.remaining_prompt)
            tokens[request.id] = count
            left -= count
        if tokens:
            return StepPlan("prefill", tokens, tuple(room.preempted))
        return room.decode_step()
