"""One microbatch on its way through the layers, and the tokens of requests as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hybridlab.batch import Entry
from hybridlab.engine.kv_cache import KVStorage
from hybridlab.engine.sampling import draw_all
from hybridlab.model.base import MicroBatch, Routed
from hybridlab.plans import RequestId, Tier


@dataclass
class Running:
    """`batch` and what the ops make of it, one after another."""

    entries: tuple[Entry, ...]
    batch: MicroBatch
    x_TH: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    routed: Mapping[Tier, Routed] = field(default_factory=dict)
    """The router's choice, as far as each tier computes it."""
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    """What each "experts" op, by its id, adds: lanes finish in any order, sums are made in one."""
    logits: torch.Tensor | None = None


def micro_batch(entries: Sequence[Entry], cache: KVStorage) -> MicroBatch:
    """The tokens of `entries` one after another; KV slots where `cache` wants them."""
    ids: list[int] = []
    positions: list[int] = []
    contexts, slots = [], []
    for entry in entries:
        count = len(entry.token_ids)
        context, new = cache.context(entry.block_table, len(ids), count, entry.start)
        contexts.append(context)
        slots.append(new)
        ids.extend(entry.token_ids)
        positions.extend(range(entry.start, entry.start + count))
    return MicroBatch(torch.tensor(ids), torch.tensor(positions), cache.slots(slots), tuple(contexts))


def drawn_tokens(micros: Iterable[Running]) -> dict[RequestId, int]:
    """The next token of every entry that wants one, from the logits of its microbatch."""
    tokens: dict[RequestId, int] = {}
    for micro in micros:
        drawing = [entry for entry in micro.entries if entry.wants_token]
        if drawing:
            assert micro.logits is not None
            tokens.update(draw_all(micro.logits, drawing))
    return tokens
