"""What synthetic workloads share: lengths that are one number or uniform over a range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridlab.workload.base import CountedWorkload, Lengths, Row


class SyntheticWorkload(CountedWorkload):
    """`num_requests` requests whose lengths are drawn independently of each other and of the arrivals."""

    prompt_tokens: Lengths
    output_tokens: Lengths

    def drawn(self, rng: np.random.Generator, arrivals_s: Sequence[float]) -> list[Row]:
        """A row for each arrival, its lengths drawn from `rng`."""
        n = len(arrivals_s)
        prompts, outputs = (rng.integers(*span, n, endpoint=True) for span in (self.prompt_tokens, self.output_tokens))
        return [Row(*row) for row in zip(arrivals_s, prompts.tolist(), outputs.tolist(), strict=True)]


def arrivals_rng(seed: int) -> np.random.Generator:
    """The stream of arrivals and lengths, apart from the per-request streams of token ids."""
    return np.random.default_rng([seed, 0, 1])
