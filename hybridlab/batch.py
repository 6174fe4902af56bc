"""A scheduler's step bound to tokens and KV blocks, and what came of it: the currency between queue and backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridlab.plans import RequestId, Span, StepPlan
from hybridlab.request import Sampling


@dataclass(frozen=True, slots=True)
class HandOff:
    """A request's KV cache on its way from one worker to another: `num_tokens` in `blocks` of what both can reach.

    `ticket` is its own, never used again in this process; `step` is the one of the run that computed the last of it.
    A piece of it has some of the blocks, from the `first`th on.
    """

    ticket: int
    id: RequestId
    num_tokens: int
    step: int
    blocks: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One request's share of a step.

    `token_ids` are computed at positions `start`, `start` + 1, ...; `block_table` covers all of them.
    `wants_token` asks for the token that follows the last one. Before the step, the blocks are filled from `fetch`;
    after it they are left in `leave`, for another worker.
    """

    id: RequestId
    token_ids: Sequence[int]
    start: int
    block_table: tuple[int, ...]
    sampling: Sampling
    wants_token: bool
    fetch: HandOff | None = None
    leave: HandOff | None = None

    @property
    def context_tokens(self) -> int:
        """Tokens in the KV cache once the step is done."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step as a worker receives it. Pieces of caches come for `brings` first, of which nothing is computed yet."""

    worker: str
    step: StepPlan
    entries: tuple[Entry, ...]
    brings: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """A finished step. `error` is set when it failed as a whole; `tokens` holds the drawn tokens otherwise.

    `lost`: it failed with its worker, and may succeed on another.
    """

    batch: StepBatch
    start_s: float
    end_s: float
    tokens: Mapping[RequestId, int] = field(default_factory=dict)
    spans: Sequence[Span] = ()
    error: str = ""
    lost: bool = False


def split(entries: Sequence[Entry], count: int) -> list[tuple[Entry, ...]]:
    """The microbatches of a step: `count` runs of about equal token counts, none empty (there are `count` entries)."""
    if count == 1:
        return [tuple(entries)]
    total = sum(len(entry.token_ids) for entry in entries)
    groups: list[list[Entry]] = [[]]
    done = 0
    for i, entry in enumerate(entries):
        must_open = len(entries) - i == count - len(groups)
        wants_open = len(groups) < count and done >= total * len(groups) / count
        if groups[-1] and (must_open or wants_open):
            groups.append([])
        groups[-1].append(entry)
        done += len(entry.token_ids)
    return [tuple(group) for group in groups]


OnRoute = Callable[[int, Sequence[Entry], np.ndarray], np.ndarray | None]
"""Called after each router with the layer, the entries computed, and the chosen experts int32 [T, K] of their tokens.

What it returns, if anything, takes the place of the choice.
"""
