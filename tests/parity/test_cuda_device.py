"""device="cuda" against the oracles: on the GPU where there is one, and the same code on torch's CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from hybridlab.batch import Entry
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.kv_cache import KVCache
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.model.cuda_blocks import weighted_sum, widen_blocks
from hybridlab.plans import StepPlan
from hybridlab.request import Sampling
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import resolve

HAS_GPU = torch.cuda.is_available()
NO_GPU = pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param(CUDA, marks=[NO_GPU, pytest.mark.gpu]))
PLACEMENTS = {
    "all_host": "all_host",
    "all_resident": "all_resident",
    "streamed": {"name": "streamed", "stream_from_tokens": 1},
    "streamed in parts": {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 4, "parts_per_layer": 3},
    "hot_resident": {"name": "hot_resident", "gpu_gb": 1e-4, "ring_slots": 2, "stream_from_tokens": 1},
    "layer_split": {"name": "layer_split", "gpu_gb": 3e-4},
}


@pytest.fixture(params=PLACEMENTS)
def placement(request):
    return resolve("placement", PLACEMENTS[request.param])


@pytest.fixture(params=WHERE)
def executor(request, oracle, placement) -> Iterator[tuple[Executor, Planner]]:
    checkpoint = open_checkpoint(oracle.folder)
    hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
    placed = placement.place(checkpoint.spec, hardware, RoutingStats())
    device = cuda_device(checkpoint, placed, 2, where=request.param)
    cache = KVCache(checkpoint.spec, 16, 16, torch.bfloat16, device.torch_device)
    overlap = resolve("overlap", "prefetch")
    yield Executor(device, cache), Planner(checkpoint.spec, hardware, placement, overlap, placed)
    device.close()


def test_prompts_are_within_the_bf16_tolerances(oracle, executor):
    run, planner = executor
    errors, agree = [], []
    for request, expected in zip(oracle.prompts, oracle.logits, strict=True):
        ids = tuple(request["prompt"])
        # In two chunks where there is room for them: the second one attends to the first one's keys.
        cuts = (0, len(ids)) if len(ids) < 8 else (0, len(ids) // 2, len(ids))
        rows = []
        for start, end in pairwise(cuts):
            program = planner.program(planner.shape("main", StepPlan("prefill", {"r": end - start})))
            entry = Entry("r", ids[start:end], start, tuple(range(16)), Sampling(), wants_token=True)
            rows.append(run.logits(program, entry).numpy())
        got = np.concatenate(rows)
        assert got.dtype == np.float32 and got.shape == expected.shape
        errors.append(np.abs(got - expected).ravel())
        agree.append(got.argmax(-1) == expected.argmax(-1))
    assert np.median(np.concatenate(errors)) <= oracle.expected["tol_bf16_median"]
    assert np.concatenate(agree).mean() >= oracle.expected["bf16_top1_agree"] - 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device: Triton's kernels cannot run")
@pytest.mark.parametrize("shape", [(3, 128, 256), (2, 200, 136), (1, 16, 1024)])
def test_kernels_equal_their_twins(shape):
    generator = torch.Generator("cuda").manual_seed(0)
    experts, n, k = shape
    codes = torch.randint(0, 256, shape, generator=generator, device="cuda", dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1  # no NaN, which equals nothing
    scale = torch.rand(experts, -(-n // 128), -(-k // 128), generator=generator, device="cuda")
    assert torch.equal(widen_blocks(codes, scale), widen_blocks(codes, scale, twin=True))
    y = torch.randn(40, k, generator=generator, device="cuda").to(torch.bfloat16)
    place = torch.randint(-1, 40, (n, 4), generator=generator, device="cuda")
    weights = torch.rand(n, 4, generator=generator, device="cuda")
    torch.testing.assert_close(weighted_sum(y, place, weights), weighted_sum(y, place, weights, twin=True))


def test_widening_knows_every_code_and_ragged_edges():
    codes = torch.arange(256, dtype=torch.uint8).repeat(130)[: 130 * 200].view(1, 130, 200)
    scale = torch.tensor([[[0.5, 2.0], [3.0, 0.25]]])
    wide = widen_blocks(codes, scale)[0].float()
    values = codes[0].view(torch.float8_e4m3fn).float()
    expected = torch.empty_like(values)
    for row, column in np.ndindex(130, 200):
        expected[row, column] = values[row, column] * scale[0, row // 128, column // 128]
    torch.testing.assert_close(wide, expected.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
