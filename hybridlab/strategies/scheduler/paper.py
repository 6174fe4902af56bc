"""The published policy of prefill-decode disaggregation (Wang et al., OSDI '26)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridlab.errors import StrategyError
from hybridlab.plans import QueueView, StepPlan, WaitingRequest
from hybridlab.spec import NEVER, HardwareSpec
from hybridlab.strategies.fields import check_positive
from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill
from hybridlab.strategies.scheduler.fcfs import FCFS

LONG_TOKENS = 2048
"""From where a prompt is long, where nothing was measured."""


@dataclass(frozen=True)
class Paper:
    """Short prompts beside decodes on the decode worker, long ones on the prefill worker, first come, first served.

    A prompt is long from `short_tokens` on (None: from where streaming its experts was measured to be faster than
    computing them on the CPU, see `calibrated`; else 2,048); beside decodes it is computed in pieces of `chunk_tokens`.
    With one worker this is chunked prefill. If that has several ranks, the first one computes alone: but while nothing
    runs and no decode ended within the last `idle_s` seconds, a long prompt is computed on all ranks, in steps as large
    as the token budget.
    """

    short_tokens: int | None = None
    idle_s: float = 300.0
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        check_positive("short_tokens", self.short_tokens, optional=True)
        check_positive("chunk_tokens", self.chunk_tokens)
        if isinstance(self.idle_s, bool) or not isinstance(self.idle_s, int | float) or not self.idle_s >= 0:
            raise StrategyError(f"idle_s: expected a number >= 0, got {self.idle_s!r}")

    def calibrated(self, hardware: HardwareSpec) -> Paper:
        """This scheduler with the threshold measured on `hardware`, unless one is given or streaming never paid."""
        measured = hardware.stream_from_tokens
        if self.short_tokens is not None or measured is None or measured == NEVER:
            return self
        return replace(self, short_tokens=measured)

    def schedule(self, queue: QueueView) -> StepPlan | None:
        # What has begun here stays, whoever began it.
        if queue.worker.startswith("prefill"):
            long = tuple(r for r in queue.waiting if self._is_long(r) or r.allocated_kv_tokens)
            return FCFS().schedule(replace(queue, waiting=long))
        beside = ChunkedPrefill(self.chunk_tokens)
        if queue.worker.startswith("decode"):
            short = tuple(r for r in queue.waiting if not self._is_long(r) or r.allocated_kv_tokens)
            return beside.schedule(replace(queue, waiting=short))
        if len(queue.rank_sets) == 1:
            return beside.schedule(queue)
        if self._is_idle(queue) and queue.waiting and self._is_long(queue.waiting[0]):
            step = FCFS().schedule(replace(queue, waiting=queue.waiting[:1]))
            if step is not None:
                return step
        step = beside.schedule(queue)
        return step and replace(step, ranks=queue.rank_sets[-1])

    def _is_long(self, request: WaitingRequest) -> bool:
        return request.computed_tokens + request.remaining_prompt >= (self.short_tokens or LONG_TOKENS)

    def _is_idle(self, queue: QueueView) -> bool:
        last_s = queue.last_decode_s
        return not queue.running and (last_s is None or queue.now_s - last_s > self.idle_s)
