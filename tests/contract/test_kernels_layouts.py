"""The packed layout against the row-major one: the same bytes back, the same bits out, on every tier."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab import kernels
from hybridlab.kernels import layouts as kernel_layouts

TIERS = kernels.supported_tiers()
COMPILED = [tier for tier in TIERS if tier != "numpy"]
SHAPES = [(1, 1), (16, 128), (17, 129), (63, 100), (64, 256), (65, 4), (130, 300), (200, 1100)]


def weight(rng: np.random.Generator, n: int, k: int, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    if kind == "bf16":
        bits = (rng.standard_normal((n, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits, None
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x81
    return codes, rng.uniform(0.01, 2, (-(-n // 128), -(-k // 128))).astype(np.float32)


@pytest.mark.parametrize("tier", COMPILED)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_exact_and_the_same_as_the_twins(
    monkeypatch: pytest.MonkeyPatch, tier: str, kind: str, shape: tuple[int, int]
) -> None:
    monkeypatch.setenv("HYBRIDLAB_ISA", tier)
    array, scale = weight(np.random.default_rng(shape), *shape, kind)
    packed = kernels.pack(array, scale, threads=2)
    assert packed.data.ctypes.data % 64 == 0
    np.testing.assert_array_equal(packed.unpack(), array)
    twin = kernel_layouts.aligned(packed.nbytes)
    kernel_layouts.pack_rows(array, twin)
    np.testing.assert_array_equal(packed.data, twin)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_layouts_give_the_same_bits_for_any_tokens_and_threads(tier: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for n, k in ((200, 300), (64, 128)):
        array, scale = weight(rng, n, k, kind)
        rows, tiles = kernels.linear(array, scale, tier=tier), kernels.linear(kernels.pack(array, scale), tier=tier)
        assert (rows.layout, tiles.layout) == ("rows", "tiles")
        assert (tiles.shape, tiles.tier) == ((n, k), tier)
        x = rng.standard_normal((300, k)).astype(np.float32)
        expected = rows(x, threads=1)
        for tokens in (*range(1, 18), 65, 256, 300):
            for layer, threads in ((rows, 2), (tiles, 1), (tiles, 3)):
                y = layer(x[:tokens], threads=threads)
                if tier == "numpy":  # its BLAS chooses an order of its own for each shape
                    np.testing.assert_allclose(y, expected[:tokens], rtol=1e-3, atol=1e-3 * np.abs(expected).max())
                else:
                    np.testing.assert_array_equal(y, expected[:tokens])


@pytest.mark.parametrize("tier", COMPILED)
def test_a_moe_layer_takes_either_layout_or_both(tier: str) -> None:
    rng = np.random.default_rng(2)
    experts, h, width = 5, 256, 192
    sides = [[weight(rng, *s, "fp8") for _ in range(experts)] for s in ((width, h), (width, h), (h, width))]
    ids = rng.integers(0, experts, (40, 3)).astype(np.int32)
    weights = rng.random((40, 3), dtype=np.float32)
    x = rng.standard_normal((40, h)).astype(np.float32) * 0.01

    def build(packed: set[int]) -> kernels.MoeLayer:
        arrays, scales = [], []
        for side in sides:
            made = [kernels.pack(w, s) if e in packed else w for e, (w, s) in enumerate(side)]
            arrays.append(made)
            scales.append([None if e in packed else s for e, (_, s) in enumerate(side)])
        return kernels.moe_layer(*arrays, *scales, tier=tier)

    expected = build(set())(x, ids, weights, threads=1)
    assert np.isfinite(expected).all()
    for packed in (set(range(experts)), {0, 3}):
        np.testing.assert_array_equal(build(packed)(x, ids, weights, threads=2), expected)


@pytest.mark.parametrize("tier", COMPILED)
def test_a_nan_code_in_a_packed_weight_spoils_its_row_only(tier: str) -> None:
    codes = np.full((100, 140), 0x38, np.uint8)
    codes[[3, 66, 99], [0, 139, 77]] = [0x7F, 0xFF, 0x7F]
    layer = kernels.linear(kernels.pack(codes, np.ones((1, 2), np.float32)), tier=tier)
    for tokens in (1, 2, 9):
        y = layer(np.ones((tokens, 140), np.float32), threads=2)
        assert sorted(set(np.nonzero(np.isnan(y))[1])) == [3, 66, 99]


def test_sizes_beyond_32_bits() -> None:
    """By arithmetic: 2^31 elements and more would not fit a test machine."""
    native = pytest.importorskip("hybridlab._kernels")
    for n, k, element in ((2**20, 2**13, 1), (2**21 + 1, 2**12 + 1, 2), (151936, 16384, 1)):
        assert native.packed_bytes(n, k, element) == kernel_layouts.packed_bytes(n, k, element) > 2**31
    assert kernel_layouts.packed_bytes(2**21 + 1, 2**12 + 1, 2) == (2**21 + 16) * (2**12 + 128) * 2


def test_wrong_arguments_name_themselves() -> None:
    codes, scale = weight(np.random.default_rng(3), 20, 30, "fp8")
    assert scale is not None
    packed = kernels.pack(codes, scale)
    assert repr(packed) == "Packed(FP8 [20, 30], 4096 bytes)"
    for call, message in (
        (lambda: kernels.pack(packed), "weight: is packed already"),  # type: ignore[arg-type]
        (lambda: kernels.pack(codes), "weight scale: expected C-contiguous float32"),
        (lambda: kernels.pack(codes, scale, threads=0), "threads: expected an integer"),
        (lambda: kernels.pack(codes.T, scale), "weight: expected C-contiguous"),
        (lambda: kernels.linear(packed, scale.copy()), "scale: a packed weight brings its own scale"),
        (lambda: kernels.linear(codes, np.full((1, 1), np.nan, np.float32)), r"weight scale: nan at \[0, 0\]"),
        (lambda: kernels.moe_layer([packed], [packed], [codes.T.copy()], down_scale=[scale.astype("f8")]), "down"),
        (lambda: kernels.pack(codes, scale, out=np.zeros(4096, np.uint8)[1:]), "out: expected uint8"),
        (lambda: kernels.Packed(packed.data[:64], (20, 30), packed.dtype, scale), "data: expected 4096 bytes"),
        (lambda: kernels.Packed(packed.data, (20, 30), packed.dtype, None), "scale: FP8 codes need one"),
        (lambda: kernels.multiply_rate(1, float("nan")), "seconds: expected a number above 0"),
        (lambda: kernels.multiply_rate(1, -1), "seconds: expected a number above 0"),
        (lambda: kernels.read_bandwidth_bytes(np.zeros(8, np.uint8), 1, loop=3), "loop: expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


ARRAYS = st.one_of(
    st.none(),
    st.integers(),
    st.builds(
        lambda shape, dtype, step, flip: (
            np.ones([s * step for s in shape], dtype)[tuple(slice(None, None, step) for _ in shape)].T
            if flip
            else np.ones([s * step for s in shape], dtype)[tuple(slice(None, None, step) for _ in shape)]
        ),
        st.lists(st.integers(0, 40), min_size=0, max_size=3),
        st.sampled_from(["u1", "u2", "f4", "f8", "i4", "i8", ">f4", "?"]),
        st.integers(1, 2),
        st.booleans(),
    ),
)


@settings(max_examples=300, deadline=None)
@given(w=ARRAYS, scale=ARRAYS, x=ARRAYS, out=ARRAYS, threads=st.sampled_from([1, 2, 0, -1, 10**6, 1.5, None]))
def test_any_argument_is_taken_or_refused_by_name(
    w: object, scale: object, x: object, out: object, threads: object
) -> None:
    """Nothing reaches C unchecked: a call works, or raises a ValueError that begins with an argument's name."""
    try:
        layer = kernels.linear(w, scale)  # type: ignore[arg-type]
        y = layer(x, out, threads=threads)  # type: ignore[arg-type]
        assert y.shape == (x.shape[0], w.shape[0])  # type: ignore[union-attr]
    except ValueError as error:
        assert str(error).split(":")[0].split(" ")[0] in ("weight", "scale", "x", "out", "threads"), error


@settings(max_examples=200, deadline=None)
@given(ids=ARRAYS, weights=ARRAYS, x=ARRAYS, out=ARRAYS, gate=ARRAYS, threads=st.sampled_from([1, 2, 0, None]))
def test_any_argument_of_a_moe_layer_too(
    ids: object, weights: object, x: object, out: object, gate: object, threads: object
) -> None:
    good = np.full((24, 40), 0x3F80, np.uint16)
    gates = [gate, good] if isinstance(gate, np.ndarray) else [good, good]
    try:
        layer = kernels.moe_layer(gates, [good, good], [good.T.copy(), good.T.copy()])
        y = layer(x, ids, weights, out, threads=threads)  # type: ignore[arg-type]
        assert y.shape == x.shape  # type: ignore[union-attr]
    except ValueError as error:
        names = ("gate", "up", "down", "x", "expert_ids", "expert_weights", "out", "threads")
        assert str(error).split(":")[0].split("[")[0].split(",")[0].split(" ")[0] in names, error
