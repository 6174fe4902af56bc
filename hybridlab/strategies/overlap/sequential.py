"""No overlap: one op after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybridlab.plans import Op, StepPlan


@dataclass(frozen=True)
class Sequential:
    """Each op waits for the one before it, whatever its lane: the baseline that every overlap is held against.

    Of the same rank: ranks wait for each other where they exchange something, and nowhere else.
    """

    def num_microbatches(self, step: StepPlan) -> int:
        return 1

    def arrange(self, ops: Sequence[Op]) -> Sequence[Op]:
        chained = []
        before: dict[int, int] = {}
        for op in ops:
            previous = before.get(op.rank)
            needs = op.needs if previous is None or previous in op.needs else (*op.needs, previous)
            chained.append(replace(op, needs=needs))
            before[op.rank] = op.id
        return chained
