"""Two microbatches fill each other's gaps: attention of one beside the experts of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybridlab.errors import StrategyError
from hybridlab.plans import Op, StepPlan, Tier
from hybridlab.spec import NEVER, HardwareSpec
from hybridlab.strategies.fields import check_positive


@dataclass(frozen=True)
class DualBatch:
    """Dual-batch attention-MoE overlap (paper, section 4) for decode steps of `min_requests` to `max_requests`.

    Two microbatches read the weights twice, so that they pay only where what they hide is more than that: None takes
    what was measured on this machine (`calibrated`), else from two requests, the fewest there can be, on.

    A layer's combine of one microbatch is put behind the attention of the other one, so that no lane waits for the
    experts that another lane still computes. Parts that come through the ring are computed by both microbatches one
    after the other, since the slot is free only then. Other steps run as with `prefetch`.
    """

    min_requests: int | None = None
    max_requests: int | None = None

    def __post_init__(self) -> None:
        check_positive("min_requests", self.min_requests, optional=True)
        check_positive("max_requests", self.max_requests, optional=True)
        least = max(2, self.min_requests or 2)
        if self.max_requests is not None and self.max_requests < least and self.min_requests != NEVER:
            raise StrategyError(f"max_requests: expected at least {least}, as min_requests, got {self.max_requests}")

    def calibrated(self, hardware: HardwareSpec) -> DualBatch:
        """This overlap with the threshold measured on `hardware`, unless one is given or none was measured."""
        measured, end = hardware.dual_batch_from_requests, hardware.dual_batch_to_requests
        if self.min_requests or measured is None:
            return self
        most = self.max_requests or (end and end - 1)
        never = most is not None and most < measured
        return replace(self, min_requests=NEVER if never else measured, max_requests=most)

    def num_microbatches(self, step: StepPlan) -> int:
        count, most = len(step.tokens), self.max_requests or NEVER
        return 2 if step.role == "decode" and max(2, self.min_requests or 2) <= count <= most else 1

    def arrange(self, ops: Sequence[Op]) -> Sequence[Op]:
        count = 1 + max(op.microbatch for op in ops)

        def stage(op: Op) -> tuple[int, bool, int]:
            if op.kind == "experts" and op.tier is Tier.STREAMED:  # behind the routers of all microbatches
                return (op.layer + 1) * count - 1, True, 1 + op.part
            # With several ranks, what experts add travels before it is combined.
            is_combine = op.kind in ("reduce", "combine")
            return (op.layer + is_combine) * count + op.microbatch, not is_combine, 0

        return sorted(ops, key=stage)
