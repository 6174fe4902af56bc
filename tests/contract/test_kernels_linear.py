"""What every kernel tier owes its callers: exact codes, bounded error, the same bits however work is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab import kernels, number_formats
from hybridlab.kernels import numpy_twin as kernels_numpy

TIERS = kernels.supported_tiers()
COMPILED = [tier for tier in TIERS if tier != "numpy"]
VECTORS = Path(__file__).resolve().parents[1] / "data" / "kernels" / "fp8_vectors.npz"
SHAPES = [(1, 1), (3, 5), (5, 127), (128, 128), (130, 257), (40, 192), (257, 1000), (33, 2048 + 72)]


def bf16(x: np.ndarray) -> np.ndarray:
    return kernels_numpy.round_to_bf16(x.astype(np.float32))


def activations(rng: np.random.Generator, tokens: int, k: int) -> np.ndarray:
    return bf16(rng.standard_normal((tokens, k)))


def weight(rng: np.random.Generator, n: int, k: int, kind: str) -> kernels_numpy.Matrix:
    if kind == "bf16":
        bits = bf16(rng.standard_normal((n, k)) * 0.1).view(np.uint32) >> 16
        return bits.astype(np.uint16), None
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x01
    return codes, rng.uniform(1e-4, 1e-2, (-(-n // 128), -(-k // 128))).astype(np.float32)


def assert_within_bound(y: np.ndarray, x: np.ndarray, matrix: kernels_numpy.Matrix) -> None:
    """|y - y64| <= 16 * 2^-24 * sum |w x|, for x that is BF16 already."""
    w = kernels_numpy.dequantize(matrix).astype(np.float64)
    bound = 16 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w).T)
    assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound).all()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("row_k", [1, 64, 130])
def test_every_code_has_its_value(tier: str, flush: bool, row_k: int) -> None:
    """All 256 codes at every place of a row, subnormals included, whatever the caller's denormal setting."""
    codes = np.zeros((256, row_k), np.uint8)
    expected = np.load(VECTORS)["decode"]
    places = sorted({0, 1, 2, 3, 31, 63, 64, 129} & set(range(row_k)))
    torch.set_flush_denormal(flush)
    try:
        for place in places:
            codes[:] = 0
            codes[:, place] = np.arange(256)
            x = np.ones((1, row_k), np.float32)
            y = kernels.linear(codes, np.ones((2, -(-row_k // 128)), np.float32), tier=tier)(x, threads=1)
            np.testing.assert_array_equal(y[0], expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("tier", TIERS)
def test_a_nan_code_spoils_its_row_only(tier: str) -> None:
    for tokens in (1, 3, 9):
        for code in (0x7F, 0xFF):
            codes = np.full((300, 200), 0x7E, np.uint8)  # 448, the largest value
            codes[7, 199] = codes[130, 0] = codes[299, 64] = code
            y = kernels.linear(codes, np.ones((3, 2), np.float32), tier=tier)(
                np.zeros((tokens, 200), np.float32), threads=2
            )
            assert sorted(set(np.nonzero(np.isnan(y))[1])) == [7, 130, 299]


@pytest.mark.parametrize("tier", TIERS)
def test_reference_vectors(tier: str) -> None:
    data = np.load(VECTORS)
    names = sorted({key.rsplit(".", 1)[0] for key in data.files if key.startswith("gemv")})
    assert names
    for name in names:
        x = number_formats.bf16_to_float32(data[f"{name}.x"])[None]
        y = kernels.linear(data[f"{name}.q"], data[f"{name}.s"], tier=tier)(x, threads=2)[0]
        assert (np.abs(y - data[f"{name}.y64"]) <= 16 * 2.0**-24 * data[f"{name}.absdot64"]).all(), name


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_bound_on_ragged_shapes(tier: str, kind: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    matrix = weight(rng, *shape, kind)
    x = activations(rng, 3, shape[1])
    assert_within_bound(kernels.linear(*matrix, tier=tier)(x, threads=2), x, matrix)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("magnitude", [1e-41, 1e-30, 1e-12, 1e12, 1e30])
def test_error_bound_holds_for_tiny_and_huge_activations(tier: str, magnitude: float) -> None:
    rng = np.random.default_rng(3)
    matrix = weight(rng, 20, 300, "fp8")
    x = bf16(rng.standard_normal((2, 300)) * magnitude)
    assert_within_bound(kernels.linear(*matrix, tier=tier)(x, threads=1), x, matrix)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 300), k=st.integers(1, 400), tokens=st.integers(1, 10))
def test_error_bound_on_any_shape(tier: str, seed: int, n: int, k: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    for kind in ("fp8", "bf16"):
        matrix = weight(rng, n, k, kind)
        x = activations(rng, tokens, k)
        assert_within_bound(kernels.linear(*matrix, tier=tier)(x, threads=1), x, matrix)


@pytest.mark.parametrize("tier", TIERS)
def test_activations_are_rounded_to_bf16(tier: str) -> None:
    """To nearest, ties to even; infinities and NaN survive."""
    x = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.4e38, np.inf, np.nan]], np.float32)
    eye = (np.eye(6) * 0x38).astype(np.uint8)  # 1.0
    one = np.ones((1, 1), np.float32)
    for i, want in enumerate([1.0, 1 + 2.0**-6, 1 + 2.0**-7, np.inf, np.inf, np.nan]):
        only = np.where(np.arange(6) == i, x, 0).astype(np.float32)
        y = kernels.linear(eye, one, tier=tier)(only, threads=1)
        np.testing.assert_array_equal(y[0, i], np.float32(want))


@pytest.mark.parametrize("tier", COMPILED)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_bits_do_not_depend_on_tokens_or_threads(tier: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    n, k = 150, 1100
    layer = kernels.linear(*weight(rng, n, k, kind), tier=tier)
    x = activations(rng, 65, k)
    alone = np.concatenate([layer(x[t : t + 1], threads=1) for t in range(len(x))])
    for tokens in (*range(1, 10), 17, 65):
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(layer(x[:tokens], threads=threads), alone[:tokens])


@pytest.mark.parametrize("tier", COMPILED)
def test_bits_do_not_depend_on_the_rows_that_share_a_matrix(tier: str) -> None:
    rng = np.random.default_rng(6)
    codes, scale = weight(rng, 384, 256, "fp8")
    assert scale is not None
    x = activations(rng, 2, 256)
    whole = kernels.linear(codes, scale, tier=tier)(x, threads=2)
    part = kernels.linear(codes[256:], scale[2:], tier=tier)(x, threads=1)
    np.testing.assert_array_equal(whole[:, 256:], part)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_weights_at_any_address_read_only(tier: str, offset: int) -> None:
    rng = np.random.default_rng(7)
    for kind in ("fp8", "bf16"):
        matrix = weight(rng, 70, 200, kind)
        moved = tuple(None if a is None else _displaced(a, offset) for a in matrix)
        x = activations(rng, 2, 200)
        expected = kernels.linear(*matrix, tier=tier)(x, threads=1)
        assert moved[0] is not None
        np.testing.assert_array_equal(kernels.linear(moved[0], moved[1], tier=tier)(x, threads=2), expected)


def _displaced(array: np.ndarray, offset: int) -> np.ndarray:
    """A read-only copy at an address that is `offset` bytes off, its end flush with the end of its buffer."""
    raw = np.zeros(array.nbytes + 64, np.uint8)
    start = (-raw.ctypes.data) % 64 + offset
    raw = raw[: start + array.nbytes]
    raw[start:] = np.frombuffer(array.tobytes(), np.uint8)
    raw.flags.writeable = False
    return raw[start:].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("tier", TIERS)
def test_never_reads_past_a_mapped_file(tier: str, tmp_path: Path) -> None:
    """The last byte of the weight is the last byte of its last page: one byte more would be a fault."""
    rng = np.random.default_rng(8)
    n, k = 37, 4096 // 37
    codes, scale = weight(rng, n, k, "fp8")
    size = 4096
    (tmp_path / "w").write_bytes(bytes(size - codes.nbytes) + codes.tobytes())
    mapped = np.memmap(tmp_path / "w", np.uint8, "r")[size - codes.nbytes :].reshape(n, k)
    x = activations(rng, 1, k)
    np.testing.assert_array_equal(
        kernels.linear(mapped, scale, tier=tier)(x, threads=1),
        kernels.linear(codes, scale, tier=tier)(x, threads=1),
    )


@pytest.mark.parametrize("tier", TIERS)
def test_out_is_filled_and_returned(tier: str) -> None:
    rng = np.random.default_rng(9)
    layer = kernels.linear(*weight(rng, 10, 30, "fp8"), tier=tier)
    x = activations(rng, 4, 30)
    out = np.full((4, 10), np.nan, np.float32)
    assert layer(x, out, threads=1) is out
    np.testing.assert_array_equal(out, layer(x, threads=1))
    assert layer(x[:0], threads=2).shape == (0, 10)
    assert layer.shape == (10, 30)
    assert layer.weight_bytes == 10 * 30 + 4
