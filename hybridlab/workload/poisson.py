"""Arrivals without memory: many independent users."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from hybridlab.workload.base import Row
from hybridlab.workload.synthetic import SyntheticWorkload, arrivals_rng


class PoissonWorkload(SyntheticWorkload):
    """Arrivals with exponential gaps at `rate_req_s` requests/s; the first comes after one gap."""

    kind: Literal["poisson"]
    rate_req_s: float = Field(gt=0)

    def rows(self, base: Path) -> list[Row]:
        rng = arrivals_rng(self.seed)
        return self.drawn(rng, np.cumsum(rng.exponential(1 / self.rate_req_s, self.num_requests)).tolist())
