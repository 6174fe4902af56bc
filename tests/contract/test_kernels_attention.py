"""Attention over the paged cache against float64, and the bits that must not depend on what runs beside it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab import kernels
from hybridlab.kernels import attention as kernels_attention
from hybridlab.kernels import numpy_twin as kernels_numpy
from hybridlab.kernels.attention import CachedRuns
from hybridlab.number_formats import bf16_to_float32

TIERS = kernels.supported_tiers()
SLOTS = 1200


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch):
    monkeypatch.setenv("HYBRIDLAB_ISA", request.param)
    return request.param


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def bf16_bits(x):
    return (kernels_numpy.round_to_bf16(x).view(np.uint32) >> 16).astype(np.uint16)


def entries(seed, groups, size, slots=SLOTS):
    return bf16_bits(normal(seed, slots, groups, size)), bf16_bits(normal(seed + 1, slots, groups, size))


def scattered(seed, count, slots=SLOTS):
    return np.random.default_rng(seed).permutation(slots)[:count].astype(np.int64)


def attend(q, keys, values, cached, *, threads=1):
    """All queries `q` [T, N, D] of one request."""
    slots = np.arange(cached.start, cached.stop) if isinstance(cached, slice) else cached
    runs = CachedRuns([cached], slots[-len(q) :].copy(), [len(q)])
    return kernels_attention.attend(q, keys, values, runs, threads=threads)


def check(tier, got, q, keys, values, cached):
    """Against float64. VDPBF16PS takes q and the probabilities as BF16: each is off by 2^-9 at most, which moves the
    weight of a token, relative to others, by twice that; the rest is float32."""
    rounds = "bf16" in tier and keys.shape[2] % 8 == 0
    groups, size = keys.shape[1:]
    wide_q = (kernels_numpy.round_to_bf16(q) if rounds else q).astype(np.float64)
    k, v = bf16_to_float32(keys[cached]).astype(np.float64), bf16_to_float32(values[cached]).astype(np.float64)
    start = len(k) - len(q)
    for t in range(len(q)):
        seen = start + t + 1
        scores = np.einsum("grd,cgd->grc", wide_q[t].reshape(groups, -1, size), k[:seen]) / np.sqrt(size)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        expected = np.einsum("grc,cgd->grd", probs, v[:seen])
        scale = np.einsum("grc,cgd->grd", probs, np.abs(v[:seen]))
        bound = (2**-8 if rounds else 2e-6) * scale + 1e-7
        assert (np.abs(got[t].reshape(expected.shape) - expected) <= bound).all()


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 127, 128, 129, 511, 512, 513, 1000])
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 2, 16), (16, 1, 72), (4, 4, 128)])
def test_one_query_of_ragged_contexts(tier, count, heads, groups, size):
    q, (keys, values) = normal(0, 1, heads, size), entries(1, groups, size)
    for cached in (slice(100, 100 + count), scattered(3, count)):
        check(tier, attend(q, keys, values, cached, threads=2), q, keys, values, cached)


@pytest.mark.parametrize("size", [8, 24, 32, 40, 64, 96, 128, 136, 256, 20, 6])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (10, 2), (7, 7), (32, 2)])
def test_many_queries_of_all_shapes_of_heads(tier, heads, groups, size):
    q, (keys, values) = normal(0, 21, heads, size), entries(1, groups, size, 60)
    for cached in (slice(3, 24), scattered(2, 55, 60)):
        check(tier, attend(q, keys, values, cached, threads=2), q, keys, values, cached)


@pytest.mark.parametrize(("heads", "size"), [(2, 64), (1, 40)])
def test_short_prompts_of_single_heads_after_any_context(tier, heads, size):
    """As many key/value heads as query heads: each row of a product sees a token more than the one before."""
    keys, values = entries(1, heads, size, 64)
    for start in range(41):
        for queries in range(1, 25):
            q, cached = normal(start, queries, heads, size), slice(0, start + queries)
            check(tier, attend(q, keys, values, cached), q, keys, values, cached)


def test_a_long_prompt(tier):
    q, (keys, values) = normal(0, 1100, 8, 64), entries(1, 2, 64)
    cached = scattered(3, 1100)
    check(tier, attend(q, keys, values, cached, threads=2), q, keys, values, cached)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), tier=st.sampled_from([t for t in TIERS if t not in ("portable", "numpy")] or ["numpy"]))
def test_bits_do_not_depend_on_chunks_threads_or_companions(data, tier):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRIDLAB_ISA", tier)
        groups, per, size = data.draw(st.sampled_from([(1, 1, 64), (2, 5, 32), (4, 8, 24), (1, 16, 128)]))
        prompts = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=3))
        keys, values = entries(1, groups, size, 2000)
        spare = scattered(2, 2000, 2000)
        own = [spare[600 * i : 600 * i + n].copy() for i, n in enumerate(prompts)]
        q = [normal(3 + i, n, groups * per, size) for i, n in enumerate(prompts)]
        whole = [attend(q[i], keys, values, own[i]) for i in range(len(prompts))]
        done = [0] * len(prompts)
        while any(d < n for d, n in zip(done, prompts, strict=True)):
            live = [i for i, n in enumerate(prompts) if done[i] < n]
            live = live if len(live) == 1 else data.draw(st.permutations(live))[: data.draw(st.integers(1, len(live)))]
            takes = [data.draw(st.sampled_from([1, 2, 7, 64, 600])) for _ in live]
            ends = [min(done[i] + n, prompts[i]) for i, n in zip(live, takes, strict=True)]
            if data.draw(st.booleans()) and takes == [1] * len(live):  # the step of a decoding batch: skip ahead
                ends = [prompts[i] for i in live]
            rows = [np.s_[done[i] : end] for i, end in zip(live, ends, strict=True)]
            runs = CachedRuns(
                [own[i][:end].copy() for i, end in zip(live, ends, strict=True)],
                np.concatenate([own[i][r] for i, r in zip(live, rows, strict=True)]),
                [r.stop - r.start for r in rows],
            )
            step_q = np.concatenate([q[i][r] for i, r in zip(live, rows, strict=True)])
            got = kernels_attention.attend(step_q, keys, values, runs, threads=data.draw(st.integers(1, 3)))
            want = np.concatenate([whole[i][r] for i, r in zip(live, rows, strict=True)])
            np.testing.assert_array_equal(got, want)
            for i, end in zip(live, ends, strict=True):
                done[i] = end


def test_slots_in_a_row_and_a_table_of_them_give_the_same_bits(tier):
    q, (keys, values) = normal(0, 3, 8, 32), entries(1, 2, 32)
    run, table = slice(7, 907), np.arange(7, 907)
    np.testing.assert_array_equal(attend(q, keys, values, run), attend(q, keys, values, table, threads=2))


@pytest.mark.parametrize("queries", [1, 40])
def test_huge_scores_do_not_overflow(tier, queries):
    q, (keys, values) = normal(0, queries, 4, 16) * np.float32(1e15), entries(1, 2, 16)
    keys = bf16_bits(bf16_to_float32(keys) * np.float32(1e15))
    cached = slice(0, 700)
    got = attend(q, keys, values, cached)
    assert np.isfinite(got).all()
    # The largest score takes it all.
    wide = kernels_numpy.round_to_bf16(q).astype(np.float64).reshape(queries, 2, 2, 16)
    scores = np.einsum("tgrd,cgd->tgrc", wide, bf16_to_float32(keys[cached]).astype(np.float64))
    scores[:, :, :, :] += np.where(np.arange(700) <= 700 - queries + np.arange(queries)[:, None], 0, -np.inf)[
        :, None, None
    ]
    best = bf16_to_float32(values[cached])[scores.argmax(-1), np.arange(2)[:, None]]
    np.testing.assert_array_equal(got.reshape(best.shape), best)


def test_equal_values_come_out_as_they_are(tier):
    q, (keys, _) = normal(0, 30, 4, 16), entries(1, 2, 16)
    values = np.full_like(keys, 0x3FC0)
    np.testing.assert_allclose(attend(q, keys, values, slice(0, 900)), 1.5, rtol=2e-6)


@pytest.mark.parametrize("spoilt", ["keys", "values"])
@pytest.mark.parametrize("queries", [1, 30])
def test_nan_in_the_cache_spoils_its_own_request_only(tier, spoilt, queries):
    q, (keys, values) = normal(0, 2 * queries, 8, 16), entries(1, 2, 16)
    cached = [slice(0, 600), np.arange(600, 1200)]
    slots = np.concatenate((np.arange(600 - queries, 600), np.arange(1200 - queries, 1200)))
    runs = CachedRuns(cached, slots, [queries, queries])
    clean = kernels_attention.attend(q, keys, values, runs, threads=2)
    {"keys": keys, "values": values}[spoilt][100] = 0x7FC0
    got = kernels_attention.attend(q, keys, values, runs, threads=2)
    assert np.isnan(got[:queries]).all()
    np.testing.assert_array_equal(got[queries:], clean[queries:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7F80, 0xFFC0])
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 1, 64), (2, 2, 64), (6, 2, 40), (70, 1, 32)])
def test_what_a_later_token_holds_is_not_seen(tier, heads, groups, size, bits):
    """Infinite or NaN as it may be: in a short prompt, in one of many blocks, and at the seam of two pieces."""
    for start, queries, spoilt in ((0, 20, 19), (0, 20, 0), (37, 60, 64), (500, 30, 511), (500, 30, 512)):
        q, (keys, values) = normal(0, queries, heads, size), entries(1, groups, size)
        for cached in (slice(5, 5 + start + queries), scattered(2, start + queries)):
            clean = attend(q, keys, values, cached)
            slot = cached.start + spoilt if isinstance(cached, slice) else cached[spoilt]
            kept = keys[slot].copy(), values[slot].copy()
            keys[slot] = values[slot] = bits
            got, before = attend(q, keys, values, cached), max(spoilt - start, 0)
            np.testing.assert_array_equal(got[:before], clean[:before])
            assert not np.isfinite(got[before:]).any()
            keys[slot], values[slot] = kept


def test_slots_after_the_context_are_not_read(tier):
    q, (keys, values) = normal(0, 3, 8, 16), entries(1, 2, 16)
    clean = attend(q, keys, values, slice(0, 77))
    keys[77:] = values[77:] = 0x7FC0
    np.testing.assert_array_equal(attend(q, keys, values, slice(0, 77)), clean)


BAD_RUNS = [
    (([], np.zeros(0, np.int64)), "cached: expected at least one request"),
    (([slice(2, 2)], np.zeros(1, np.int64)), "cached: slice(2, 2, None) is not a run"),
    (([slice(-1, 2)], np.zeros(1, np.int64)), "is not a run"),
    (([slice(None, 2)], np.zeros(1, np.int64)), "is not a run"),
    (([slice(0, 4, 2)], np.zeros(1, np.int64)), "is not a run"),
    (([np.arange(3.0)], np.zeros(1, np.int64)), "cached: expected a slice or a non-empty int64 array"),
    (([np.array([1, -1])], np.zeros(1, np.int64)), "cached: expected contiguous slots >= 0"),
    (([np.arange(6)[::2]], np.zeros(1, np.int64)), "cached: expected contiguous"),
    (([slice(0, 3)], np.zeros(1, np.int64), [1, 1]), "queries: expected 1 numbers, got 2"),
    (([slice(0, 3)], np.zeros(4, np.int64), [4]), "queries: expected 1 to 3"),
    (([slice(0, 3)], np.zeros(1, np.int64), [0]), "queries: expected 1 to 3"),
    (([slice(0, 3)], np.zeros(2, np.int64)), "slots: expected 1 contiguous int64"),
    (([slice(0, 3)], np.zeros(1, np.int32)), "slots: expected 1 contiguous int64"),
    (([slice(0, 3)], -np.ones(1, np.int64)), "slots: expected 1 contiguous int64 slots >= 0"),
    (([slice(0, 3)], [0]), "slots: expected 1 contiguous int64 slots >= 0, got list"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_RUNS)
def test_wrong_runs_are_named(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        CachedRuns(*arguments)


def test_runs_keep_their_arrays_not_the_list_of_them():
    cached, table = [np.arange(4)], np.arange(4)
    runs = CachedRuns(cached, np.array([3]))
    cached.clear()
    (row, seen), *others = runs.pieces()
    assert row == 0 and np.array_equal(np.asarray(seen), table) and not others


GOOD = CachedRuns([slice(0, 3)], np.array([2]))
ZEROS = np.zeros((9, 2, 8), np.uint16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, ZEROS, ZEROS, GOOD), "q: expected float32"),
        ((normal(0, 1, 4, 9), ZEROS, ZEROS, GOOD), "q: expected float32 [1, 4, 8]"),
        ((normal(0, 2, 4, 8), ZEROS, ZEROS, GOOD), "q: expected float32 [1, 4, 8]"),
        ((normal(0, 1, 4, 16)[:, :, ::2], ZEROS, ZEROS, GOOD), "q: expected a C-contiguous"),
        ((normal(0, 1, 5, 8), ZEROS, ZEROS, GOOD), "G a divisor of 5 heads"),
        ((normal(0, 1, 0, 8), ZEROS, ZEROS, GOOD), "G a divisor of 0 heads"),
        ((normal(0, 1, 4, 8), ZEROS.astype(np.float32), ZEROS, GOOD), "keys: expected uint16"),
        ((normal(0, 1, 4, 8), ZEROS, ZEROS[:8], GOOD), "values: expected C-contiguous"),
        ((normal(0, 1, 4, 8), ZEROS[:, :0], ZEROS[:, :0], GOOD), "keys: expected C-contiguous"),
        ((normal(0, 1, 4, 8), ZEROS, ZEROS[:, ::-1], GOOD), "values: expected C-contiguous"),
        ((normal(0, 1, 4, 8), ZEROS, ZEROS, CachedRuns([slice(0, 10)], np.array([9]))), "runs: expected slots from 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        kernels_attention.attend(*arguments, threads=1)


@pytest.mark.parametrize("threads", [0, -1, 1.5, None, 2000])
def test_a_wrong_number_of_threads_is_named(threads):
    with pytest.raises(ValueError, match="threads: expected an integer"):
        kernels_attention.attend(normal(0, 1, 4, 8), ZEROS, ZEROS, GOOD, threads=threads)
