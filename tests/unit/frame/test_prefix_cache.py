"""Prefix reuse on the real engine: fewer tokens computed, the same tokens drawn."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import hybridlab as hl
from hybridlab.kv_blocks import BlockPool
from hybridlab.prefix_cache import PrefixCache
from hybridlab.request import Status

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_fp8_128"
SYSTEM = tuple(range(1, 41))


def serve(requests, scheduler="fcfs", **options):
    with hl.load(ORACLE, precision="exact", quiet=True, **{"kv_tokens": 1024, **options}) as engine:
        records = engine.serve(requests, scheduler).records
    assert all(record.status is Status.FINISHED for record in records)
    return records


def conversation(turns: int = 4, think_s: float = 0.0) -> list[hl.Request]:
    """Turn i says five tokens after the answer to turn i - 1."""
    requests = [hl.Request("t0", SYSTEM, 7)]
    for i in range(1, turns):
        text = tuple(50 + 5 * i + j for j in range(5))
        requests.append(hl.Request(f"t{i}", text, 7, think_s, after=f"t{i - 1}", continues=True))
    return requests


def test_a_further_turn_computes_only_what_is_new():
    records = serve(conversation())
    for before, turn in pairwise(records):
        assert turn.prompt == (*before.prompt, *before.output, *turn.request.prompt)
        computed_before = len(before.prompt) + len(before.output) - 1  # nobody computed the last token
        assert turn.cached_tokens == computed_before // 16 * 16
        assert turn.arrival_s == before.finished_s


@pytest.mark.parametrize("scheduler", ["fcfs", {"name": "chunked_prefill", "chunk_tokens": 7}], ids=str)
@pytest.mark.parametrize("kv_tokens", [1024, 192], ids="kv{}".format)
def test_tokens_are_identical_with_reuse_on_and_off(scheduler, kv_tokens):
    """Shared beginnings of several lengths, conversations, and a cache so small that blocks are evicted."""
    others = [hl.Request(f"s{i}", (*SYSTEM[: 8 * i], 60 + i), 6) for i in range(1, 6)]
    requests = [*conversation(), *others]
    on = serve(requests, scheduler, kv_tokens=kv_tokens, token_budget=64)
    off = serve(requests, scheduler, kv_tokens=kv_tokens, token_budget=64, prefix_cache=False)
    assert [record.output for record in on] == [record.output for record in off]
    assert sum(record.cached_tokens for record in on) > 0
    assert sum(record.cached_tokens for record in off) == 0


def test_requests_of_one_step_do_not_find_each_other_but_later_ones_do():
    same = [hl.Request(f"r{i}", SYSTEM, 2) for i in range(2)]
    later = hl.Request("late", SYSTEM, 2, after="r0")
    records = serve([*same, later])
    assert [record.cached_tokens for record in records] == [0, 0, 32]  # of 40 tokens: two full blocks
    assert len({tuple(record.output) for record in records}) == 1


def test_those_that_computed_the_same_beginning_together_find_their_own_text_again():
    first = [hl.Request(f"u{i}", (*SYSTEM, *range(50 + 10 * i, 58 + 10 * i)), 9) for i in range(3)]
    second = [hl.Request(f"v{i}", (5, 6), 2, after=f"u{i}", continues=True) for i in range(3)]
    records = serve([*first, *second])
    assert [record.cached_tokens for record in records] == [0, 0, 0, 48, 48, 48]  # of 40 + 8 + 8 computed


def test_evicted_blocks_are_those_released_longest_ago_and_the_ends_of_prefixes_first():
    pool = BlockPool(4, 2)
    cache = PrefixCache(pool)
    keys: dict[str, list[bytes]] = {}
    for name in ("a", "b"):
        table: list[int] = []
        pool.grow(table, 4)
        keys[name] = []
        cache.extend_keys(keys[name], [ord(name)] * 4)
        assert cache.enter(keys[name], table, 0) == 2
        pool.release(table)
    assert pool.free_tokens == 8  # known content, but free
    table = []
    pool.grow(table, 2)
    assert [cache.count(keys[name], 2, 0) for name in ("a", "b")] == [1, 2]
    with pytest.raises(ValueError, match="holds nothing to share"):
        pool.share([], table)


def test_a_turn_after_a_request_that_did_not_finish_is_refused_by_name():
    turns = conversation(3)
    turns[0] = hl.Request("t0", SYSTEM, 7, timeout_s=1e-9)
    with hl.load(ORACLE, precision="exact", quiet=True, kv_tokens=1024) as engine:
        records = engine.serve(turns).records
    assert (records[0].status, records[0].finish_reason) == (Status.CANCELLED, "timeout")
    assert "not finished 1e-09 s after its arrival" in records[0].error
    assert records[1].status is records[2].status is Status.REJECTED
    assert records[1].error == "continues request 't0', which was cancelled"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (hl.Request("x", (1,), 1, after="nobody"), "after names 'nobody', which is not among the requests"),
        (hl.Request("x", (1,), 1, after="x"), "after names 'x', which waits for itself in the end"),
        (hl.Request("x", (1,), 1, continues=True), "continues is set, but after names no request"),
        (hl.Request("x", (1,), 1, timeout_s=0.0), "timeout_s is 0.0, expected a finite number > 0"),
        (hl.Request("x", (1,) * 60, 1, after="good", continues=True), "need 64 KV tokens, the cache holds 48"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_never_be_served_is_refused_at_once(request_, words):
    good = hl.Request("good", (1, 2, 3), 2)
    with hl.load(ORACLE, precision="exact", quiet=True, kv_tokens=48, token_budget=16) as engine:
        records = {record.request.id: record for record in engine.serve([good, request_]).records}
    assert records["x"].status is Status.REJECTED and words in records["x"].error
    assert records["good"].status is Status.FINISHED
