"""Arrivals of chosen burstiness."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from hybridlab.workload.base import Row
from hybridlab.workload.synthetic import SyntheticWorkload, arrivals_rng


class GammaWorkload(SyntheticWorkload):
    """Arrivals with gamma-distributed gaps: `rate_req_s` requests/s, coefficient of variation `cv` of the gaps.

    `cv` 1 is Poisson, above 1 bursty, below 1 regular. Shape 1 / cv^2, scale cv^2 / rate_req_s, as in the client of
    `vllm bench serve` (its `--burstiness` is the shape). The first request comes after one gap.
    """

    kind: Literal["gamma"]
    rate_req_s: float = Field(gt=0)
    cv: float = Field(ge=0.01, le=100)

    def rows(self, base: Path) -> list[Row]:
        rng = arrivals_rng(self.seed)
        gaps_s = rng.gamma(1 / self.cv**2, self.cv**2 / self.rate_req_s, self.num_requests)
        return self.drawn(rng, np.cumsum(gaps_s).tolist())
