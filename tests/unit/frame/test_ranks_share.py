"""Stripes: every token on one rank, causal work shared out evenly, one rank that draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridlab.batch import Entry, split
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.ranks_share import drawn_by, rows_of, share, shared_batch
from hybridlab.request import Sampling
from hybridlab.strategies.checks import TOY_MODEL

BLOCK = 4


def entry(name: str, count: int, start: int = 0, *, wants_token: bool = True) -> Entry:
    blocks = tuple(range(7, 7 + -(-(start + count) // BLOCK)))
    return Entry(name, tuple(range(count)), start, blocks, Sampling(), wants_token)


def seen(part: Entry) -> int:
    """Keys that the queries of `part` see in all."""
    return sum(range(part.start + 1, part.start + len(part.token_ids) + 1))


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 40)), min_size=1, max_size=5), st.integers(1, 8))
def test_each_token_is_on_one_rank_and_the_last_one_draws(sizes, ranks):
    entries = [entry(str(i), count, start, wants_token=i % 3 != 1) for i, (count, start) in enumerate(sizes)]
    shares = [share(entries, rank, ranks) for rank in range(ranks)]
    for each in entries:
        parts = [part for own in shares for part in own if part.id == each.id]
        found = [(part.start + i, token) for part in parts for i, token in enumerate(part.token_ids)]
        assert sorted(found) == [(each.start + i, token) for i, token in enumerate(each.token_ids)]
        drawing = [part for part in parts if part.wants_token]
        assert len(drawing) == each.wants_token
        assert all(part.start + len(part.token_ids) == each.context_tokens for part in drawing)
        assert sorted(row for rank in range(ranks) for row in rows_of(each, rank, ranks)) == list(
            range(len(each.token_ids))
        )
    for microbatches in (1, min(2, len(entries))):
        drawers = [drawn_by(entries, microbatches, rank, ranks) for rank in range(ranks)]
        assert sorted(rid for own in drawers for rid in own) == sorted(e.id for e in entries if e.wants_token)
        own = [share(group, 0, ranks) for group in split(entries, microbatches)]
        assert drawers[0] == {part.id for group in own for part in group if part.wants_token}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("start", [0, 1000])
def test_causal_work_is_the_same_for_all_ranks(ranks, start):
    prompt = entry("r", 4800, start)
    work = [sum(seen(part) for part in share([prompt], rank, ranks)) for rank in range(ranks)]
    assert sum(work) == seen(prompt)
    assert max(work) <= 1.001 * min(work)


def test_single_tokens_take_turns():
    entries = [entry(str(i), 1, 9) for i in range(8)]
    assert [len(share(entries, rank, 4)) for rank in range(4)] == [2, 2, 2, 2]
    assert [len(share(entries[:1], rank, 4)) for rank in range(4)] == [1, 0, 0, 0]


def test_a_rank_sees_its_rows_and_the_slots_of_all():
    cache = KVCache(TOY_MODEL, 32, BLOCK, torch.float32)
    entries = [entry("a", 9, 2), entry("b", 1, 5)]
    batches = [shared_batch(entries, cache, rank, 2) for rank in range(2)]
    assert [len(batch.token_ids) for _, batch, _ in batches] == list(batches[0][2].sizes)
    assert batches[0][2].sizes == batches[1][2].sizes
    slots = torch.cat([batch.slots for _, batch, _ in batches])
    for own, batch, shares in batches:
        assert torch.equal(shares.slots, slots)  # rank after rank
        for part, context in zip(own, batch.contexts, strict=True):
            rows = slice(context.first, context.last)
            assert batch.positions[rows].tolist() == list(range(part.start, part.context_tokens))
            assert batch.slots[rows].tolist() == [7 * BLOCK + p for p in range(part.start, part.context_tokens)]
            assert context.cached == slice(7 * BLOCK, 7 * BLOCK + part.context_tokens)
        assert batch.decode_runs is None  # a fused layer would keep its keys to itself
