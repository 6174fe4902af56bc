"""No overlap: one op after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from hybridlab.plans import Op, StepPlan


@dataclass(frozen=True)
class Sequential:
    """Each op waits for the one before it, whatever its lane: the baseline that every overlap is held against."""

    def num_microbatches(self, step: StepPlan) -> int:
        return 1

    def arrange(self, ops: Sequence[Op]) -> Sequence[Op]:
        chained = [*ops[:1]]
        for previous, op in pairwise(ops):
            needs = op.needs if previous.id in op.needs else (*op.needs, previous.id)
            chained.append(replace(op, needs=needs))
        return chained
