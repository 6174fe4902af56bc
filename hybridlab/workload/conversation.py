"""Conversations of several turns, each turn behind everything that was said before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from hybridlab.workload.base import MAX_TOKENS, Count, Lengths, Row, WorkloadBase
from hybridlab.workload.synthetic import arrivals_rng

MAX_REQUESTS = 1_000_000


class ConversationWorkload(WorkloadBase):
    """`num_conversations` of `turns` turns; request c * turns + t is turn t of conversation c.

    A turn brings `prompt_tokens` of new text and is answered with `output_tokens`; the next one comes `think_s`
    seconds after the answer has ended, and is computed behind the conversation so far. All conversations begin
    with the same `system_tokens`, which count to the prompt of the first turn (lengths are scaled and clipped
    after they are added; only new text is clipped, not what was said before).

    Conversations start either at random times, `rate_req_s` of them per second on average (Poisson), or in a closed
    loop of `num_users`: a user starts the next conversation `think_s` after the last one has ended.
    """

    kind: Literal["conversation"]
    num_conversations: Count
    turns: Count
    system_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    prompt_tokens: Lengths
    output_tokens: Lengths
    think_s: float = Field(default=0.0, ge=0)
    rate_req_s: float | None = Field(default=None, gt=0)
    num_users: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "num_requests" in data:
            raise ValueError("'num_requests' follows from num_conversations * turns; leave it out")
        return data

    @model_validator(mode="after")
    def _one_start(self) -> ConversationWorkload:
        if (self.rate_req_s is None) == (self.num_users is None):
            raise ValueError("expected either 'rate_req_s' (Poisson starts) or 'num_users' (closed loop)")
        if self.num_requests > MAX_REQUESTS:
            raise ValueError(f"{self.num_requests:,} turns in all; expected at most {MAX_REQUESTS:,}")
        return self

    @property
    def num_requests(self) -> int:
        return self.num_conversations * self.turns

    def rows(self, base: Path) -> list[Row]:
        rng = arrivals_rng(self.seed)
        starts_s = self._starts(rng)
        shape = (self.num_conversations, self.turns)
        prompts = rng.integers(*self.prompt_tokens, shape, endpoint=True)
        outputs = rng.integers(*self.output_tokens, shape, endpoint=True)
        rows: list[Row] = []
        for number, (start_s, texts, answers) in enumerate(
            zip(starts_s, prompts.tolist(), outputs.tolist(), strict=True)
        ):
            before = None  # the last turn of the same user's conversation before this one
            if self.num_users is not None and number >= self.num_users:
                before = (number - self.num_users + 1) * self.turns - 1
            rows.append(
                Row(
                    arrival_s=start_s if before is None else self.think_s,
                    prompt_tokens=self.system_tokens + texts[0],
                    output_tokens=answers[0],
                    after=before,
                    blocks=(0,) if self.system_tokens else (),
                    block_tokens=max(1, self.system_tokens),
                )
            )
            for text, answer in zip(texts[1:], answers[1:], strict=True):
                rows.append(Row(self.think_s, text, answer, after=len(rows) - 1, continues=True))
        return rows

    def _starts(self, rng: np.random.Generator) -> list[float]:
        if self.rate_req_s is None:
            return [0.0] * self.num_conversations
        return np.cumsum(rng.exponential(1 / self.rate_req_s, self.num_conversations)).tolist()
