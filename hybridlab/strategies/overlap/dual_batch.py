"""Two microbatches fill each other's gaps: attention of one beside the experts of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridlab.plans import Op, StepPlan, Tier
from hybridlab.strategies.fields import check_positive


@dataclass(frozen=True)
class DualBatch:
    """Dual-batch attention-MoE overlap (paper, section 4) for decode steps of at least `min_requests` requests.

    A layer's combine of one microbatch is put behind the attention of the other one, so that no lane waits for the
    experts that another lane still computes. Parts that come through the ring are computed by both microbatches one
    after the other, since the slot is free only then. Other steps run as with `prefetch`.
    """

    min_requests: int = 2

    def __post_init__(self) -> None:
        check_positive("min_requests", self.min_requests)

    def num_microbatches(self, step: StepPlan) -> int:
        return 2 if step.role == "decode" and len(step.tokens) >= max(2, self.min_requests) else 1

    def arrange(self, ops: Sequence[Op]) -> Sequence[Op]:
        count = 1 + max(op.microbatch for op in ops)

        def stage(op: Op) -> tuple[int, bool, int]:
            if op.kind == "experts" and op.tier is Tier.STREAMED:  # behind the routers of all microbatches
                return (op.layer + 1) * count - 1, True, 1 + op.part
            is_combine = op.kind == "combine"
            return (op.layer + is_combine) * count + op.microbatch, not is_combine, 0

        return sorted(ops, key=stage)
