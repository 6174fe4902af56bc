"""Drawing the next token: greedy, or by temperature and top-p with a counter-based generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hybridlab.batch import Entry
from hybridlab.plans import RequestId
from hybridlab.request import Sampling


def draw_all(logits_RV: torch.Tensor, entries: Sequence[Entry]) -> dict[RequestId, int]:
    """The next token of each entry, a row each; where the logits are if all are greedy, so that ids alone travel."""
    if all(entry.sampling.temperature == 0 for entry in entries):
        return dict(zip((entry.id for entry in entries), logits_RV.argmax(-1).tolist(), strict=True))
    pairs = zip(logits_RV.cpu(), entries, strict=True)
    return {entry.id: draw(logits, entry.sampling, entry.context_tokens - 1) for logits, entry in pairs}


def draw(logits_V: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The token that follows `position`. Depends on (seed, position) and the logits alone, never on the batch."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits = logits_V.double().numpy()
    with np.errstate(over="ignore"):  # a tiny temperature: all but the largest go to -inf
        probs = np.exp((logits - logits.max()) / sampling.temperature)
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order])
    # The smallest set whose mass reaches top_p; at least one token.
    kept = order[: int(np.searchsorted(mass, sampling.top_p)) + 1]
    generator = np.random.Generator(np.random.Philox(key=np.array([sampling.seed % 2**64, position], np.uint64)))
    cumulative = np.cumsum(probs[kept])
    return int(kept[min(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"), len(kept) - 1)])
