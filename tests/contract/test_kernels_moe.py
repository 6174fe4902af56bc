"""A whole MoE layer as one call, on every tier, against a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from hybridlab import kernels
from hybridlab.kernels import numpy_twin as kernels_numpy

TIERS = kernels.supported_tiers()
COMPILED = [tier for tier in TIERS if tier != "numpy"]
E, H, WIDTH, K_SLOTS = 6, 320, 200, 3


def bf16(x: np.ndarray) -> np.ndarray:
    return kernels_numpy.round_to_bf16(x.astype(np.float32))


class Layer:
    """Random weights of one kind, as the kernels take them."""

    def __init__(self, kind: str, absent: tuple[int, ...] = (), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sides = []
        for shape in ((WIDTH, H), (WIDTH, H), (H, WIDTH)):
            self.sides.append([None if e in absent else self._matrix(rng, shape, kind) for e in range(E)])

    @staticmethod
    def _matrix(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> kernels_numpy.Matrix:
        if kind == "bf16":
            bits = bf16(rng.standard_normal(shape) * 0.08).view(np.uint32) >> 16
            return bits.astype(np.uint16), None
        codes = rng.integers(0, 256, shape, dtype=np.uint8)
        codes[codes & 0x7F == 0x7F] = 0x03
        grid = (-(-shape[0] // 128), -(-shape[1] // 128))
        return codes, rng.uniform(2e-4, 2e-3, grid).astype(np.float32)

    def build(self, tier: str) -> kernels.MoeLayer:
        weights = [[m and m[0] for m in side] for side in self.sides]
        scales = [[m and m[1] for m in side] for side in self.sides]
        return kernels.moe_layer(*weights, *scales, tier=tier)

    def reference(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return kernels_numpy.moe(x, ids, weights, *self.sides, dtype=np.float64)


def routing(rng: np.random.Generator, tokens: int, low: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = rng.integers(low, E, (tokens, K_SLOTS)).astype(np.int32)
    return ids, rng.random((tokens, K_SLOTS), dtype=np.float32)


def assert_close(y: np.ndarray, reference: np.ndarray) -> None:
    """The BF16 rounding of the hidden states may tip over either way: 1/256 of a few elements of the sum."""
    assert np.isfinite(y).all()
    assert np.abs(y - reference).max() <= 2e-3 * np.abs(reference).max()
    assert np.sqrt(np.mean((y - reference) ** 2)) <= 2e-4 * np.sqrt(np.mean(reference**2))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_matches_float64_for_any_number_of_tokens(tier: str, kind: str) -> None:
    layer = Layer(kind)
    rng = np.random.default_rng(1)
    moe = layer.build(tier)
    for tokens in range(1, 41) if tier != "numpy" else (1, 7, 40):
        x = bf16(rng.standard_normal((tokens, H)))
        ids, weights = routing(rng, tokens, low=-1)
        assert_close(moe(x, ids, weights, threads=2), layer.reference(x, ids, weights))


@pytest.mark.parametrize("tier", COMPILED)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_bits_do_not_depend_on_companions_or_threads(tier: str, kind: str) -> None:
    moe = Layer(kind).build(tier)
    rng = np.random.default_rng(2)
    x = bf16(rng.standard_normal((33, H)))
    ids, weights = routing(rng, 33, low=-1)
    alone = np.concatenate([moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], threads=1) for t in range(len(x))])
    for tokens in (1, 2, 9, 33):
        for threads in (1, 2, 3):
            y = moe(x[:tokens], ids[:tokens], weights[:tokens], threads=threads)
            np.testing.assert_array_equal(y, alone[:tokens])


@pytest.mark.parametrize("tier", TIERS)
def test_one_hot_expert(tier: str) -> None:
    layer = Layer("fp8")
    rng = np.random.default_rng(3)
    x = bf16(rng.standard_normal((40, H)))
    ids = np.full((40, K_SLOTS), 4, np.int32)
    weights = rng.random((40, K_SLOTS), dtype=np.float32)
    assert_close(layer.build(tier)(x, ids, weights, threads=2), layer.reference(x, ids, weights))


@pytest.mark.parametrize("tier", TIERS)
def test_skipped_slots_add_nothing(tier: str) -> None:
    moe = Layer("fp8").build(tier)
    rng = np.random.default_rng(4)
    x = bf16(rng.standard_normal((2, H)))
    weights = np.array([[0.5, np.nan, 0.25], [np.nan, np.nan, np.nan]], np.float32)
    ids = np.array([[1, -1, 3], [-1, -7, -1]], np.int32)
    y = moe(x, ids, weights, threads=2)
    kept = moe(x[:1], np.array([[1, 3]], np.int32), np.array([[0.5, 0.25]], np.float32), threads=1)
    np.testing.assert_array_equal(y[:1], kept)
    assert not y[1].any()


@pytest.mark.parametrize("tier", TIERS)
def test_absent_experts(tier: str) -> None:
    layer = Layer("fp8", absent=(0, 3))
    moe = layer.build(tier)
    rng = np.random.default_rng(5)
    x = bf16(rng.standard_normal((4, H)))
    ids = np.array([[1, 2, 4], [5, -1, 1], [2, 2, 2], [-1, -1, 4]], np.int32)
    weights = rng.random((4, K_SLOTS), dtype=np.float32)
    assert_close(moe(x, ids, weights, threads=2), layer.reference(x, ids, weights))
    one = 3 * H * WIDTH + 4 * (2 * 2 * 3 + 3 * 2)
    assert moe.expert_bytes == [0, one, one, 0, one, one]
    with pytest.raises(ValueError, match="expert_ids: expert 3 is not present"):
        moe(x, np.where(ids == 5, 3, ids).astype(np.int32), weights, threads=1)


@pytest.mark.parametrize("tier", COMPILED)
def test_more_slots_than_one_pass_takes(tier: str) -> None:
    """Prefills are cut to bound scratch memory; the cut must not show."""
    layer = Layer("fp8")
    moe = layer.build(tier)
    rng = np.random.default_rng(6)
    tokens = 1500  # 4,500 slots
    x = bf16(rng.standard_normal((tokens, H)))
    ids, weights = routing(rng, tokens)
    y = moe(x, ids, weights, threads=2)
    np.testing.assert_array_equal(y[1360:1370], moe(x[1360:1370], ids[1360:1370], weights[1360:1370], threads=1))
    assert_close(y[1300:1400], layer.reference(x[1300:1400], ids[1300:1400], weights[1300:1400]))
