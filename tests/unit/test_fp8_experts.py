"""Activations quantised by blocks, products of FP8 blocks, and groups of experts made of them; on torch's CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from hybridlab.checkpoint.presets import preset_spec
from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.engine.cuda_memory import gpu_needs
from hybridlab.errors import ConfigError
from hybridlab.model import fp8_experts, fp8_twin
from hybridlab.model.expert_block import ExpertBlock
from hybridlab.model.fp8_experts import CodedGroupedExperts, Fp8GroupedExperts, expert_format
from hybridlab.model.fp8_twin import FLOAT32_UNIT, Scaled, error_bound, product, quantise
from hybridlab.number_formats import dequantise, fp8_values
from hybridlab.plans import PlacementPlan, Tier

VECTORS = Path(__file__).resolve().parents[1] / "data" / "kernels" / "fp8_vectors.npz"


def nearest_codes(x: np.ndarray) -> np.ndarray:
    """By search: the nearest of the 127 sizes, of two equally near ones the even code; beyond 448 the largest."""
    sizes = fp8_values()[:127].astype(np.float64)
    distance = np.abs(np.abs(x)[..., None] - sizes)
    # Half a tie goes to the even code: a preference too small to decide anything else.
    code = (distance + np.where(np.arange(127) % 2, 1e-12, 0.0)).argmin(-1)
    return (code + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def test_codes_are_the_nearest_even():
    sizes = fp8_values()[:127]
    ties = (sizes[1:] + sizes[:-1]) / 2
    near = np.concatenate([sizes, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    both = np.concatenate([near, -near])
    x = np.full((-(-len(both) // 127), 128), 448.0, np.float32)  # one 448 a block, so that its scale is 1
    x[:, 1:].reshape(-1)[:] = 0
    x[:, 1:] = np.pad(both, (0, x[:, 1:].size - len(both))).reshape(x[:, 1:].shape)
    got = quantise(torch.from_numpy(x))
    assert (got.scale == 1.0).all()
    np.testing.assert_array_equal(got.codes.numpy(), nearest_codes(x))


def test_a_block_has_its_own_scale_and_keeps_what_it_can():
    x = torch.zeros(4, 300)
    x[0, :128] = torch.linspace(-7, 7, 128)
    x[0, 128:256] = 3e-5
    x[1, 256:] = 1e30
    x[2, 5], x[2, 6], x[2, 7] = torch.nan, torch.inf, 2.0
    x[3, 0] = 1e-40
    got = quantise(x)
    assert got.codes.shape == (4, 300) and got.scale.shape == (4, 3)
    np.testing.assert_allclose(got.scale[0], [7 / 448, 3e-5 / 448, 1.0], rtol=1e-6)
    assert got.scale[1].tolist()[:2] == [1.0, 1.0] and got.scale[2, 0] == np.float32(2 / 448)
    assert got.codes[2, 5] == got.codes[2, 6] == 0x7F and got.codes[2, 7] == 0x7E
    assert (got.codes[3] == 0).all() and 0 < got.scale[3, 0] < 1e-30 and got.scale[3, 0] >= torch.finfo().tiny
    near = got.wide()[0]
    assert ((near - x[0]).abs() <= x[0].abs() / 16 + got.scale[0].repeat_interleave(128)[:300] * 2.0**-10).all()


def test_product_knows_the_vectors():
    """BF16 rows times FP8 blocks, against sums in float64 that were made elsewhere."""
    vectors = np.load(VECTORS)
    names = sorted({name.rsplit(".", 1)[0] for name in vectors if name.startswith("gemv")})
    assert len(names) == 8
    for name in names:
        x = torch.from_numpy(vectors[f"{name}.x"].astype(np.int32) << 16).view(torch.float32).to(torch.bfloat16)[None]
        w = Scaled(torch.from_numpy(vectors[f"{name}.q"])[None], torch.from_numpy(vectors[f"{name}.s"])[None])
        y = product(x, w, torch.tensor([1], dtype=torch.int32))[0].double().numpy()
        expected, size = vectors[f"{name}.y64"], vectors[f"{name}.absdot64"]
        assert (np.abs(y - expected) <= 2.0**-8 * np.abs(expected) + 140 * FLOAT32_UNIT * size).all()


def test_product_of_groups_is_within_half_its_bound_of_float64():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 200, 136), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1
    w = Scaled(codes, torch.rand(3, 2, 2, generator=generator))
    x = quantise(torch.randn(30, 136, generator=generator))
    ends = torch.tensor([10, 10, 25], dtype=torch.int32)
    got, bound = product(x, w, ends).double().numpy(), error_bound(x, w, ends, FLOAT32_UNIT).numpy()
    x64 = fp8_values()[x.codes.numpy()].astype(np.float64) * x.scale.numpy().repeat(128, 1)[:, :136]
    for expert, rows in ((0, slice(0, 10)), (2, slice(10, 25))):
        expected = x64[rows] @ dequantise(codes[expert].numpy(), w.scale[expert].numpy()).astype(np.float64).T
        assert (np.abs(got[rows] - expected) <= bound[rows] * 0.51 + 1e-30).all()
    assert (bound[25:] == 0).all()


def expert(rng: np.random.Generator, i: int, h: int) -> tuple[LinearWeights, LinearWeights, LinearWeights]:
    def linear(n: int, k: int) -> LinearWeights:
        codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
        codes[codes & 0x7F == 0x7F] = 1
        scale = rng.uniform(1e-4, 1e-3, (-(-n // 128), -(-k // 128))).astype(np.float32)
        return LinearWeights("", codes, scale)

    return linear(i, h), linear(i, h), linear(h, i)


@pytest.fixture(scope="module")
def group() -> tuple[torch.Tensor, ExpertBlock, list]:
    rng = np.random.default_rng(0)
    experts = [expert(rng, 136, 200) for _ in range(4)]
    block = ExpertBlock.of(experts[0])
    blocks = np.full((4, block.num_bytes), 0x7F, np.uint8)
    for place, one in zip(blocks, experts, strict=True):
        for offset, data in block.pieces(one):
            place[offset : offset + len(data)] = data
    return torch.from_numpy(blocks), block, experts


@pytest.mark.parametrize(("make", "tolerance"), [(Fp8GroupedExperts, 0.05), (CodedGroupedExperts, 0.01)])
def test_groups_compute_the_experts_that_are_here(group, make, tolerance):
    """RMS over RMS. E4M3 rounds by up to 2^-4, on average 2%, twice in a row; BF16 by 2^-9."""
    blocks, block, experts = group
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 200, generator=generator)
    ids = torch.randint(-1, 3, (20, 2), generator=generator)  # the fourth block is not in use
    ids[0] = -1
    weights = torch.rand(20, 2, generator=generator)
    got = make(blocks, block)(x, ids, weights, 3)
    expected = torch.zeros(20, 200, dtype=torch.float64)
    for token, slot in np.ndindex(20, 2):
        if ids[token, slot] >= 0:
            g, u, d = (torch.from_numpy(dequantise(w.weight, w.scale)).double() for w in experts[ids[token, slot]])
            row = x[token].double()
            expected[token] += weights[token, slot] * (d @ (functional.silu(g @ row) * (u @ row)))
    error = (got.double() - expected).norm() / expected.norm()
    assert got.dtype == torch.float32 and 1e-4 < error < tolerance
    assert (got[0] == 0).all()


def test_precision_chooses_the_group(group):
    blocks, block, _ = group
    cpu = torch.device("cpu")
    assert isinstance(expert_format("fp8", block, 4, cpu)(blocks), Fp8GroupedExperts)
    assert not isinstance(expert_format("bf16", block, 4, cpu)(blocks), Fp8GroupedExperts)


def test_fp8_on_a_gpu_needs_triton(group, monkeypatch):
    monkeypatch.setitem(sys.modules, "hybridlab.model.triton_grouped", None)
    with pytest.raises(ConfigError, match="precision is 'fp8', which needs Triton"):
        expert_format("fp8", group[1], 4, torch.device("cuda:0"))


def test_without_a_gpu_the_twin_computes(group):
    assert fp8_experts.grouped_kernels(group[0].device) is fp8_twin


def test_no_memory_is_planned_for_widened_experts():
    model, placed = preset_spec("tiny"), PlacementPlan(default_tier=Tier.RESIDENT)
    bf16, fp8 = (gpu_needs(model, placed, budget_bytes=2**33, precision=precision) for precision in ("bf16", "fp8"))
    assert bf16.fixed["widened experts"] == model.num_experts * 3 * model.moe_intermediate * model.hidden * 2
    assert fp8.fixed == {**bf16.fixed, "widened experts": 0}
