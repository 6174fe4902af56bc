"""The small operations between matrix products: compiled against the NumPy twin and against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab import kernels
from hybridlab.kernels import attention as kernels_attention
from hybridlab.kernels import numpy_twin as kernels_numpy
from hybridlab.kernels import router as kernels_router

TIERS = kernels.supported_tiers()


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch):
    monkeypatch.setenv("HYBRIDLAB_ISA", request.param)
    return request.param


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def bf16_bits(x):
    return (kernels_numpy.round_to_bf16(x).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("width", [1, 7, 8, 64, 100, 2048])
def test_rms_norm(tier, width):
    x, w = normal(0, 3, width), normal(1, width)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6) * w
    np.testing.assert_allclose(kernels.rms_norm(x, w, 1e-6), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (4, 16), (3, 36), (32, 128)])
def test_norm_rope(tier, heads, size):
    x, w = normal(0, 5, heads, size), normal(1, size)
    angles = normal(2, 5, size // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6) * w
    turned = (normed[..., : size // 2] + 1j * normed[..., size // 2 :]) * np.exp(1j * angles.astype(np.float64))[
        :, None
    ]
    expected = np.concatenate((turned.real, turned.imag), -1)
    np.testing.assert_allclose(kernels_attention.norm_rope(x, w, 1e-6, cos, sin), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    experts=st.integers(1, 70),
    data=st.data(),
    normalise=st.booleans(),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 99),
)
def test_routing_takes_the_largest_and_the_lower_id_among_equals(experts, data, normalise, levels, seed):
    top_k = data.draw(st.integers(1, experts))
    logits = np.random.default_rng(seed).integers(0, levels, (4, experts)).astype(np.float32)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    probs = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    weights = np.take_along_axis(probs / probs.sum(-1, keepdims=True), order, -1)
    if normalise:
        weights /= weights.sum(-1, keepdims=True)
    for name in TIERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HYBRIDLAB_ISA", name)
            ids, got = kernels.route(logits, top_k, normalise)
        assert ids.dtype == np.int32 and (ids == order).all()
        np.testing.assert_allclose(got, weights, rtol=1e-4, atol=1e-7)


def test_routing_of_nan_stays_inside_the_experts(tier):
    ids, _ = kernels.route(np.full((2, 9), np.nan, np.float32), 4, True)
    assert ids.min() >= 0 and ids.max() < 9 and len(set(ids[0].tolist())) == 4


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_whole_attention_step_equals_its_parts(fp8, threads, tokens):
    hidden, heads, groups, size, slots = 96, 4, 2, 24, 64
    rng = np.random.default_rng(0)

    def linear(n, k):
        if fp8:
            scale = rng.uniform(0.001, 0.002, (-(-n // 128), -(-k // 128))).astype(np.float32)
            return kernels.linear(rng.integers(0, 0x7F, (n, k)).astype(np.uint8), scale)
        return kernels.linear(bf16_bits(normal(n + k, n, k) / 8))

    q, k, v, o = linear(96, hidden), linear(48, hidden), linear(48, hidden), linear(hidden, 96)
    norms = [normal(5, hidden), normal(6, size), normal(7, size)]
    step = kernels_attention.attention_step(q, k, v, o, norms, 1e-6)
    if step is None:
        assert kernels.tier() == "numpy"
        return
    x, angles = normal(8, tokens, hidden), normal(9, tokens, size // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    keys, values = bf16_bits(normal(10, slots, groups, size)), bf16_bits(normal(11, slots, groups, size))
    # Odd tokens have scattered contexts; each sees its own slot last.
    cached = [np.array([50, 3, 40 + t], np.int64) if t % 2 else slice(4 * t, 4 * t + 4) for t in range(tokens)]
    new = np.array([c.stop - 1 if isinstance(c, slice) else c[-1] for c in cached], np.int64)

    want_keys, want_values = keys.copy(), values.copy()
    normed = kernels.rms_norm(x, norms[0], 1e-6)
    heads_q = kernels_attention.norm_rope(q(normed, threads=1).reshape(tokens, heads, size), norms[1], 1e-6, cos, sin)
    heads_k = kernels_attention.norm_rope(k(normed, threads=1).reshape(tokens, groups, size), norms[2], 1e-6, cos, sin)
    want_keys[new] = bf16_bits(heads_k)
    want_values[new] = bf16_bits(v(normed, threads=1).reshape(tokens, groups, size))
    mixed = np.stack(
        [kernels_attention.attend_one(heads_q[t], want_keys, want_values, cached[t], threads=1) for t in range(tokens)]
    )
    want = x + o(mixed.reshape(tokens, -1), threads=1)

    got = step(x, cos, sin, keys, values, new, kernels_attention.CachedRuns(cached, new), threads=threads)
    assert (keys == want_keys).all() and (values == want_values).all()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kernels.rms_norm(np.ones((2, 3)), normal(0, 3), 1e-6), "x: expected a 2-D float32"),
        (lambda: kernels.rms_norm(normal(0, 2, 3), normal(0, 4), 1e-6), r"weight: expected float32 \[3\]"),
        (lambda: _norm_rope(normal(0, 2, 3), normal(0, 3), normal(0, 1), normal(0, 1)), "x: expected"),
        (lambda: _norm_rope(normal(0, 2, 1, 4), normal(0, 4), normal(0, 2, 2), normal(0, 2, 3)), "sines"),
        (lambda: kernels.route(normal(0, 2, 3), 4, True), "top_k: expected 1 to 3, got 4"),
        (lambda: _attend(slice(0, 1), dtype="float32"), "keys: expected uint16"),
        (lambda: _attend(slice(0, 10)), "not a run of the 9 slots"),
        (lambda: _attend(np.array([0, 9])), "slots from 0 to 8"),
        (lambda: _attend(np.array([-1])), "slots from 0 to 8"),
        (lambda: _attend(np.array([], np.int64)), "non-empty int64"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _norm_rope(x, weight, cosines, sines):
    return kernels_attention.norm_rope(x, weight, 1e-6, cosines, sines)


def _attend(cached, dtype="uint16"):
    keys = np.zeros((9, 2, 8), dtype)
    return kernels_attention.attend_one(normal(0, 4, 8), keys, keys, cached, threads=1)


@pytest.mark.parametrize("tier", kernels.supported_tiers())
@pytest.mark.parametrize("tokens", [0, 1, 3, 20])
def test_router_step_is_the_norm_the_logits_and_the_choice(
    monkeypatch: pytest.MonkeyPatch, tier: str, tokens: int
) -> None:
    monkeypatch.setenv("HYBRIDLAB_ISA", tier)
    rng = np.random.default_rng(7)
    gate = kernels.linear((rng.standard_normal((24, 200)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    norm, x = rng.standard_normal(200).astype(np.float32), rng.standard_normal((tokens, 200)).astype(np.float32)
    normed, ids, weights = kernels_router.RouterStep(gate, norm, 1e-6, 5, True)(x, threads=2)
    expected = kernels.rms_norm(x, norm, 1e-6)
    expected_ids, expected_weights = kernels.route(gate(expected, threads=1), 5, True)
    np.testing.assert_array_equal(normed, expected)
    if tier == "numpy":  # its BLAS may order the logits' sums differently
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-4)
    else:
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(weights, expected_weights)


def test_router_step_refuses_misfits_by_name() -> None:
    gate = kernels.linear(np.zeros((8, 16), np.uint16))
    norm = np.ones(16, np.float32)
    for call, message in (
        (lambda: kernels_router.RouterStep(gate, norm[:8], 1e-6, 2, True), "norm: expected float32"),
        (lambda: kernels_router.RouterStep(gate, norm, 1e-6, 9, True), "top_k: expected 1 to 8, got 9"),
        (lambda: kernels_router.RouterStep(gate, norm, 1e-6, 2, True)(np.ones((1, 8), np.float32), threads=1), "x: "),
        (lambda: kernels_router.RouterStep(gate, norm, 1e-6, 2, True)(np.ones((1, 16), np.float32), threads=0), "thre"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
