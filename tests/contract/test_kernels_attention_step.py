"""What an attention layer in one call accepts, and the memory that attention is said to take."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hybridlab import kernels
from hybridlab.kernels import attention as kernels_attention
from hybridlab.kernels.attention import CachedRuns

H, N, G, D = 16, 4, 2, 8
SHAPES = {"q": (N * D, H), "k": (G * D, H), "v": (G * D, H), "o": (H, N * D)}
NORMS = [np.ones(length, np.float32) for length in (H, D, D)]
GOOD = CachedRuns([slice(0, 3)], np.array([2]))
ZEROS = np.zeros((9, G, D), np.uint16)
COMPILED = [name for name in kernels.supported_tiers() if name not in kernels_attention.UNCOMPILED]


def step_of(norms=NORMS, tiers=None, **shapes):
    q, k, v, o = (
        kernels.linear(np.zeros(shape, np.uint16), tier=(tiers or {}).get(name))
        for name, shape in (SHAPES | shapes).items()
    )
    return kernels_attention.attention_step(q, k, v, o, norms, 1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": (N * D, H + 1)}, "input norm: expected float32 [17]"),
        ({"q": (N * D - 1, H)}, "q: expected rows in a multiple of the 16 of k, got 31"),
        ({"q": (3 * D, H), "o": (H, 3 * D)}, "q: expected rows in a multiple of the 16 of k, got 24"),
        ({"k": (G * D - 1, H)}, "k: expected rows in heads of 8, got 15"),
        ({"k": (G * D, H + 1)}, "k: expected shape [16, 16], got [16, 17]"),
        ({"v": (G * D, H - 1)}, "v: expected shape [16, 16], got [16, 15]"),
        ({"v": (D, H)}, "v: expected shape [16, 16], got [8, 16]"),
        ({"o": (H, N * D + 1)}, "o: expected shape [16, 32], got [16, 33]"),
        ({"tiers": {"v": "numpy"}}, "v: expected the tier"),
        ({"norms": NORMS[:2]}, "norms: expected arrays"),
        ({"norms": [NORMS[0], None, NORMS[2]]}, "norms: expected arrays"),
        ({"norms": [NORMS[0].astype(np.float64), *NORMS[1:]]}, "input norm: expected float32 [16]"),
        ({"norms": [NORMS[0], NORMS[1].astype(np.float64), NORMS[2]]}, "q norm: expected float32 [8]"),
        ({"norms": [NORMS[0], NORMS[1], np.ones(D + 1, np.float32)]}, "k norm: expected float32 [8]"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(changes, words):
    if "tiers" in changes and not COMPILED:
        pytest.skip("without the compiled kernels there is no second tier to mix in")
    with pytest.raises(ValueError, match=re.escape(words)):
        step_of(**changes)


def read_only(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.skipif(not COMPILED, reason="this CPU or build has no compiled attention: nothing writes to the cache")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": np.array([9])}, "slots: expected slots from 0 to 8, got 9 to 9"),
        ({"slots": np.array([10**9])}, "slots: expected slots from 0 to 8"),
        ({"slots": np.array([-1])}, "slots: expected slots from 0 to 8, got -1"),
        ({"slots": [2]}, "slots: expected contiguous int64 [1], got list"),
        ({"slots": np.array([2, 3])}, "slots: expected contiguous int64 [1]"),
        ({"keys": read_only(ZEROS)}, "keys: expected a writeable array"),
        ({"values": read_only(ZEROS)}, "values: expected a writeable array"),
        ({"runs": CachedRuns([slice(0, 10)], np.array([2]))}, "runs: expected 1 requests"),
        ({"runs": CachedRuns([slice(0, 3)], np.array([1, 2]), [2])}, "runs: expected 1 requests"),
    ],
)
def test_wrong_arguments_of_a_step_are_named(changes, words):
    arguments = {
        "x": np.zeros((1, H), np.float32),
        "cosines": np.ones((1, D // 2), np.float32),
        "sines": np.zeros((1, D // 2), np.float32),
        "keys": ZEROS.copy(),
        "values": ZEROS.copy(),
        "slots": np.array([2]),
        "runs": GOOD,
    }
    step = step_of(tiers=dict.fromkeys(SHAPES, COMPILED[0]))
    assert step is not None
    step(**arguments, threads=1)
    with pytest.raises(ValueError, match=re.escape(words)):
        step(**(arguments | changes), threads=1)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "requests"),
    [(32, 4, 128, [(100, 1)] * 256), (32, 4, 128, [(4096, 8)] * 64), (8, 8, 64, [(64, 64)] * 9), (4, 1, 72, [(1, 1)])],
)
def test_the_workspace_bound_holds(heads, groups, size, requests):
    """Against the results that a step's pieces keep: (2 + D, padded) floats for each query, head and piece."""
    kept = sum(-(-tokens // 512) * queries for tokens, queries in requests) * heads * (2 + -(-size // 16) * 16) * 4
    tokens, queries = (sum(numbers) for numbers in zip(*requests, strict=True))
    for most in (queries, None):
        assert kernels_attention.workspace_bytes(heads, groups, size, 1, tokens, most) > kept
