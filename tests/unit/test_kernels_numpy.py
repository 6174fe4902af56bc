"""The NumPy twin against torch's own conversions."""

from __future__ import annotations

import numpy as np
import torch

from hybridlab import number_formats
from hybridlab.kernels import numpy_twin as kernels_numpy


def test_table_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(number_formats.fp8_values(), codes.view(torch.float8_e4m3fn).float().numpy())


def test_bf16_rounding_is_torchs() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    x = np.concatenate([bits.view(np.float32), special])
    np.testing.assert_array_equal(
        kernels_numpy.round_to_bf16(x), torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    )


def test_scales_cover_blocks_of_128_with_ragged_edges() -> None:
    codes = np.full((130, 129), 0x38, np.uint8)  # 1.0
    scale = np.array([[1, 2], [3, 4]], np.float32)
    w = kernels_numpy.dequantize((codes, scale))
    assert (w[:128, :128] == 1).all()
    assert (w[:128, 128] == 2).all()
    assert (w[128:, :128] == 3).all()
    assert (w[128:, 128] == 4).all()
    np.testing.assert_array_equal(kernels_numpy.dequantize((codes, scale), 120, 130), w[120:130])


def test_moe_is_the_formula() -> None:
    rng = np.random.default_rng(1)
    shapes = [(5, 7), (5, 7), (7, 5)]
    torch.manual_seed(0)
    dense = [torch.randn(2, *shape).to(torch.bfloat16) for shape in shapes]
    sides = [[(w.view(torch.uint16).numpy(), None) for w in side] for side in dense]
    x = torch.randn(3, 7).to(torch.bfloat16)
    ids = np.array([[0, 1], [1, -1], [1, 1]], np.int32)
    weights = rng.random((3, 2), dtype=np.float32)
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for t in range(3):
        for slot in range(2):
            if ids[t, slot] >= 0:
                gate, up, down = (side[ids[t, slot]].double() for side in dense)
                hidden = torch.nn.functional.silu(gate @ x[t].double()) * (up @ x[t].double())
                expected[t] += weights[t, slot] * (down @ hidden.to(torch.bfloat16).double())
    y = kernels_numpy.moe(x.float().numpy(), ids, weights, *sides, dtype=np.float64)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-12)
