"""A scheduler that does what the contract allows and nobody would."""

from __future__ import annotations

import dataclasses
import random

from hybridlab.plans import QueueView, StepPlan


@dataclasses.dataclass(frozen=True)
class Anything:
    """Any step that the contract allows, preemptions included: what a user's scheduler may do."""

    seed: int

    def schedule(self, queue: QueueView) -> StepPlan | None:
        rng = random.Random(f"{self.seed}/{queue.now_s}")
        everyone = [*queue.running, *queue.waiting]
        chosen = rng.sample(everyone, rng.randint(0, len(everyone)))
        tokens, left = {}, queue.token_budget
        for request in chosen:
            most = 1 if request in queue.running else request.remaining_prompt  # type: ignore[union-attr]
            if left > 0:
                tokens[request.id] = rng.randint(1, min(most, left))
                left -= tokens[request.id]
        holders = [r.id for r in everyone if r.id not in tokens and r.allocated_kv_tokens]
        preempt = tuple(rid for rid in holders if rng.random() < 0.2)
        return StepPlan("mixed", tokens, preempt) if tokens else None
