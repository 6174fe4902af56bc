"""Triton's kernels against their twins: in Triton's interpreter wherever Triton is, and on the GPU where there is one.

`test_triton_interpreter.py` runs this file again with TRITON_INTERPRET=1. On a GPU, or there, the tests compare;
elsewhere they skip.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from hybridlab.model import cuda_attention, cuda_blocks, fp8_twin
from hybridlab.model.cuda_numerics import CudaBf16
from hybridlab.model.fp8_twin import FLOAT32_UNIT, HOPPER_UNIT, Scaled, error_bound

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
UNIT = FLOAT32_UNIT if INTERPRETED else HOPPER_UNIT
# The interpreter cuts float32 to BF16 instead of rounding: up to a unit in the last place, which is 2^-7.
CUT = 2.0**-7 if INTERPRETED else 0.0
# The interpreter is slow: it does again what other shapes have done with `make test-all` alone.
SHAPES = [(200, 136), pytest.param(128, 256, marks=[pytest.mark.slow] if INTERPRETED else [])]
# Tiles of 64 routes but for [200, 300], and a grid with tiles to spare but for the many ends.
ENDS = ([0, 20, 20, 90], [3], [0, 0], [64, 128, 129], [0, 0, 70, 70, 70], [200, 300], [50, 100, 150, 200, 250, 300])


@pytest.fixture
def kernels() -> Any:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device; test_triton_interpreter.py runs this one")
    from hybridlab.model import triton_grouped

    return triton_grouped


@pytest.fixture
def block_kernels(kernels) -> Any:
    from hybridlab.model import triton_kernels

    return triton_kernels


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE)


def weights(experts: int, n: int, k: int, *, seed: int = 0) -> Scaled:
    """As in a ring slot: strided views into one block of bytes per expert, with NaN in the bytes between."""
    generator = torch.Generator().manual_seed(seed)
    grid = (-(-n // 128), -(-k // 128))
    size, scale_at = n * k, -(-n * k // 64) * 64
    blocks = torch.full((experts, scale_at + 64 * grid[0] * grid[1]), 0x7F, dtype=torch.uint8)
    codes = torch.randint(0, 256, (experts, size), generator=generator, dtype=torch.uint8)
    blocks[:, :size] = torch.where(codes & 0x7F == 0x7F, 1, codes)
    scale = torch.rand(experts, grid[0] * grid[1], generator=generator) * 0.01 + 0.001
    blocks[:, scale_at : scale_at + 4 * scale.shape[1]] = scale.view(torch.uint8)
    blocks = blocks.to(DEVICE)
    factors = blocks[:, scale_at : scale_at + 4 * scale.shape[1]].view(torch.float32)
    return Scaled(blocks[:, :size].unflatten(1, (n, k)), factors.unflatten(1, grid))


@pytest.mark.parametrize("shape", [(3, 128, 256), (2, 200, 136), (1, 16, 1024)])
def test_widen(block_kernels, shape):
    experts, n, k = shape
    codes, scale = weights(experts, n, k)
    out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    powers = torch.exp2(torch.arange(scale.numel(), device=DEVICE) % 7 - 3.0).view_as(scale)
    block_kernels.widen(codes, powers, out)  # exact, so that rounding does not matter
    assert torch.equal(out, cuda_blocks.widen_blocks(codes, powers, twin=True))
    block_kernels.widen(codes, scale, out)
    twin = cuda_blocks.widen_blocks(codes, scale, twin=True).float()
    assert ((out.float() - twin).abs() <= CUT * twin.abs()).all()


def test_weighted_sum(block_kernels):
    y, factors = random(40, 1100).to(torch.bfloat16), random(33, 4)
    place = torch.randint(-1, 40, (33, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y[39] = torch.nan
    place[place == 39] = -1  # an expert elsewhere: what lies there is not read
    total = block_kernels.weighted_sum(y, place, factors)
    torch.testing.assert_close(total, cuda_blocks.weighted_sum(y, place, factors, twin=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "k"), [(1, 128), (50, 200), (33, 16), (7, 512)])
def test_quantise_is_its_twin_bit_for_bit(kernels, dtype, rows, k):
    x = random(rows, k) * torch.logspace(-30, 30, rows, device=DEVICE)[:, None]
    x[0, :16] = 0.0
    x[-1, 1], x[-1, 2], x[-1, 3] = torch.nan, torch.inf, -torch.inf
    ours, twin = kernels.quantise(x.to(dtype)), fp8_twin.quantise(x.to(dtype))
    assert torch.equal(ours.codes, twin.codes) and torch.equal(ours.scale, twin.scale)


def test_quantise_rounds_every_tie_as_its_twin(kernels):
    steps = torch.arange(127, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    ties = (steps[1:] + steps[:-1]) / 2
    near = torch.stack([ties, ties.nextafter(torch.zeros_like(ties)), ties.nextafter(torch.full_like(ties, 1e9))])
    x = torch.cat([torch.full((6, 1), 448.0, device=DEVICE), torch.cat([near, -near])], 1)
    ours, twin = kernels.quantise(x), fp8_twin.quantise(x)
    assert torch.equal(ours.codes, twin.codes) and torch.equal(ours.scale, torch.ones(6, 1, device=DEVICE))


@pytest.mark.parametrize("quantised", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product_is_within_the_bound_of_its_twin(kernels, quantised, ends, n, k):
    w, ends_E = weights(len(ends), n, k), torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    x_RK = random(ends[-1] + 40, k).to(torch.bfloat16)
    x_RK[ends[-1] :] = torch.nan  # routes to experts elsewhere
    x = fp8_twin.quantise(x_RK) if quantised else x_RK
    here = slice(0, ends[-1])
    ours, twin = kernels.product(x, w, ends_E)[here].float(), fp8_twin.product(x, w, ends_E)[here].float()
    bound = error_bound(x, w, ends_E, UNIT)[here] + CUT * twin.abs()
    assert ((ours - twin).abs() <= bound).all()
    if ends[-1]:
        assert (ours - twin).abs().median() <= (2.0**-13 * error_scale(x, w, ends_E)[here] + CUT * twin.abs()).median()


def error_scale(x: Any, w: Scaled, ends_E: torch.Tensor) -> torch.Tensor:
    """Sums of |x w|, without the twins' roundings to BF16."""
    return error_bound(x, w, ends_E, 1.0) / 132.0


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_hidden_in_fp8_is_a_code_from_its_twin_at_most(kernels, ends, n, k):
    gate, up = weights(len(ends), n, k), weights(len(ends), n, k, seed=1)
    ends_E = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    x, rows = fp8_twin.quantise(random(30, k)), torch.arange(ends[-1] + 40, device=DEVICE) * 7 % 30
    here = slice(0, ends[-1])
    ours, twin = (module.hidden(x, rows, gate, up, ends_E) for module in (kernels, fp8_twin))
    torch.testing.assert_close(ours.scale[here], twin.scale[here], rtol=1e-5 if INTERPRETED else 1e-2, atol=0)
    a, b = (fp8_twin.values(side.codes[here]) for side in (ours, twin))
    step = torch.maximum(b.abs() / 8, torch.full_like(b, 2.0**-9)) * 1.01
    # Tensor cores cut their sums: where gate and up cancel, that may be more than a code.
    routed = Scaled(*(part[rows] for part in x))
    g, u = (fp8_twin.product(routed, w, ends_E)[here].float() for w in (gate, up))
    dg, du = (error_bound(routed, w, ends_E, UNIT)[here] for w in (gate, up))
    factor = twin.scale[here].repeat_interleave(128, 1)[:, :n]
    assert ((a - b).abs() <= step + (1.1 * u.abs() * dg + (g.abs() + dg) * du) / factor).all()
    assert (a != b).sum() <= (0.001 if INTERPRETED else 0.1) * b.numel()


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_hidden_in_bf16_is_within_roundings_of_its_twin(kernels, ends):
    n, k = 200, 136
    gate, up = weights(len(ends), n, k), weights(len(ends), n, k, seed=1)
    ends_E = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    x, rows = random(30, k).to(torch.bfloat16), torch.arange(ends[-1] + 40, device=DEVICE) * 7 % 30
    here = slice(0, ends[-1])
    ours, twin = (module.hidden(x, rows, gate, up, ends_E)[here] for module in (kernels, fp8_twin))
    torch.testing.assert_close(ours, twin, rtol=2.0**-7, atol=1e-3)


def test_a_block_of_zeros_and_columns_behind_the_edge_do_not_reach_a_scale(kernels):
    """The last block of 136 columns holds 8; a tile computes 128, and the others must not count."""
    gate, up = weights(1, 136, 128), weights(1, 136, 128, seed=1)
    gate.codes[:, 128:] = 0
    ends_E = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    out = kernels.hidden(fp8_twin.quantise(random(5, 128)), torch.arange(5, device=DEVICE), gate, up, ends_E)
    assert (out.scale[:, 1] == 1.0).all() and (out.codes[:, 128:] & 0x7F == 0).all()
    assert (out.scale[:, 0] != 1.0).all()


@pytest.mark.parametrize(("heads", "groups", "dim", "block"), [(8, 2, 64, 16), (3, 3, 32, 8), (16, 1, 128, 7)])
def test_decode_attention_sees_what_each_table_and_length_name(kernels, heads, groups, dim, block):
    from hybridlab.model.base import DecodeBatch
    from hybridlab.model.triton_attention import decode_attention

    generator = torch.Generator().manual_seed(heads)
    lengths = torch.tensor([1, 70, 300, 2048 if DEVICE == "cuda" else 129], dtype=torch.int32)
    blocks = int(lengths.max()) // block + 1
    slots = len(lengths) * blocks
    tables = torch.randperm(slots, generator=generator).view(len(lengths), blocks).to(DEVICE, torch.int32)
    q, keys, values = (
        torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)
        for shape in ((len(lengths), heads, dim), (slots * block, groups, dim), (slots * block, groups, dim))
    )
    nothing = torch.empty(0, dtype=torch.int64)
    batch = DecodeBatch(nothing, nothing, nothing, (), tables, lengths.to(DEVICE), block)
    expected = cuda_attention.decode_attention(q, keys, values, batch, twin=True)
    got = decode_attention(q, keys, values, batch.tables, batch.lengths, block)
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(5, 3, 32), (70, 1, 128), (1, 8, 64)])
def test_norm_rope_equals_the_twin_up_to_bf16(kernels, tokens, heads, dim):
    from hybridlab.model.triton_norm_rope import norm_rope

    x, weight, angle = random(tokens, heads, dim), random(dim) + 1, random(tokens, dim // 2, scale=3.0)
    got = norm_rope(x, weight, 1e-6, angle.cos(), angle.sin()).float()
    expected = CudaBf16("cpu").norm_rope(x.cpu(), weight.cpu(), 1e-6, angle.cos().cpu(), angle.sin().cpu()).float()
    torch.testing.assert_close(got.cpu(), expected, rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 7), (3, 1024), (5, 2049)])
def test_pinned_memory_is_read_as_it_is_now(block_kernels, shape):
    from hybridlab.model.triton_pinned import read_pinned

    source = torch.zeros(shape)
    source = source if INTERPRETED else source.pin_memory()
    out = torch.full(shape, torch.nan, device=DEVICE)
    for seed in range(3):  # a line that was read before may not be read from a cache
        source.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(read_pinned(out, source).cpu(), source)
