"""A fixed number of users, each waiting for an answer before the next question."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hybridlab.workload.base import Count, Row
from hybridlab.workload.synthetic import SyntheticWorkload, arrivals_rng


class ClosedLoopWorkload(SyntheticWorkload):
    """`num_users` users send a request at time 0, and the next one `think_s` seconds after theirs has ended.

    User u sends requests u, u + num_users, u + 2 num_users, ...: `num_requests` in all, independent prompts.
    """

    kind: Literal["closed_loop"]
    num_users: Count
    think_s: float = Field(default=0.0, ge=0)

    def rows(self, base: Path) -> list[Row]:
        first = min(self.num_users, self.num_requests)
        delays_s = [0.0] * first + [self.think_s] * (self.num_requests - first)
        rows = self.drawn(arrivals_rng(self.seed), delays_s)
        return rows[:first] + [row._replace(after=index) for index, row in enumerate(rows[first:])]
