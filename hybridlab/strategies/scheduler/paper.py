"""The published policy of prefill-decode disaggregation (Wang et al., OSDI '26)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridlab.errors import StrategyError
from hybridlab.plans import QueueView, StepPlan, WaitingRequest
from hybridlab.strategies.fields import check_positive
from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill
from hybridlab.strategies.scheduler.fcfs import FCFS


@dataclass(frozen=True)
class Paper:
    """Short prompts beside decodes on the decode worker, long ones on the prefill worker, first come, first served.

    A prompt is long from `short_tokens` on; beside decodes it is computed in pieces of `chunk_tokens`. With one worker
    this is chunked prefill, but for a worker of several ranks: while nothing runs and no decode ended within the last
    `idle_s` seconds, a long prompt is computed on all of them, in steps as large as the token budget.
    """

    short_tokens: int = 2048
    idle_s: float = 300.0
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        check_positive("short_tokens", self.short_tokens)
        check_positive("chunk_tokens", self.chunk_tokens)
        if isinstance(self.idle_s, bool) or not isinstance(self.idle_s, int | float) or not self.idle_s >= 0:
            raise StrategyError(f"idle_s: expected a number >= 0, got {self.idle_s!r}")

    def schedule(self, queue: QueueView) -> StepPlan | None:
        # What has begun here stays, whoever began it.
        if queue.worker.startswith("prefill"):
            long = tuple(r for r in queue.waiting if self._is_long(r) or r.allocated_kv_tokens)
            return FCFS().schedule(replace(queue, waiting=long))
        beside = ChunkedPrefill(self.chunk_tokens)
        if queue.worker.startswith("decode"):
            short = tuple(r for r in queue.waiting if not self._is_long(r) or r.allocated_kv_tokens)
            return beside.schedule(replace(queue, waiting=short))
        if len(queue.rank_sets[0]) > 1 and self._is_idle(queue) and queue.waiting and self._is_long(queue.waiting[0]):
            step = FCFS().schedule(replace(queue, waiting=queue.waiting[:1]))
            if step is not None:
                return step
        step = beside.schedule(queue)
        return step and replace(step, ranks=queue.rank_sets[-1])

    def _is_long(self, request: WaitingRequest) -> bool:
        return request.computed_tokens + request.remaining_prompt >= self.short_tokens

    def _is_idle(self, queue: QueueView) -> bool:
        last_s = queue.last_decode_s
        return not queue.running and (last_s is None or queue.now_s - last_s > self.idle_s)
