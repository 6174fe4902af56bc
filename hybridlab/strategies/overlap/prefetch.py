"""Loads run as far ahead as the ring allows; computation keeps the plain order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridlab.plans import Op, StepPlan


@dataclass(frozen=True)
class Prefetch:
    """Stream-loading prefill (paper, section 1): while a layer computes, the link fills the slots of the next ones.

    Loads need nothing but a free slot, so that the plain order of a program already runs them ahead.
    """

    def num_microbatches(self, step: StepPlan) -> int:
        return 1

    def arrange(self, ops: Sequence[Op]) -> Sequence[Op]:
        return ops
