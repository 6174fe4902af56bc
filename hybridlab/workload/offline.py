"""Everything is asked at once: the workload of batch throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hybridlab.workload.base import Row
from hybridlab.workload.synthetic import SyntheticWorkload, arrivals_rng


class OfflineWorkload(SyntheticWorkload):
    """Every request is there at time 0."""

    kind: Literal["offline"]

    def rows(self, base: Path) -> list[Row]:
        return self.drawn(arrivals_rng(self.seed), [0.0] * self.num_requests)
