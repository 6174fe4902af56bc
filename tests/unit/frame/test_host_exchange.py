"""Buffers between a CUDA device and the host's cores: for the ops that need them, and no more than a few steps'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import host_exchange
from hybridlab.engine.cuda_device import cuda_device
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.model.base import Routed
from hybridlab.plans import LaneKind, StepPlan
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import resolve

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_bf16"


@pytest.fixture
def exchange_and_planner():
    checkpoint = open_checkpoint(ORACLE)
    hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
    placement = resolve("placement", {"name": "streamed", "stream_from_tokens": 100})
    placed = placement.place(checkpoint.spec, hardware, RoutingStats())
    device = cuda_device(checkpoint, placed, 2, where="cpu")
    yield device.around.__self__, Planner(checkpoint.spec, hardware, placement, resolve("overlap", "prefetch"), placed)  # type: ignore[attr-defined]
    device.close()


def test_a_step_whose_experts_all_stream_has_no_buffers(exchange_and_planner):
    exchange, planner = exchange_and_planner
    for tokens, expected in ((99, 99), (100, 0)):
        program = planner.program(planner.shape("main", StepPlan("prefill", {"r": tokens})))
        assert exchange.step(program, [tokens]).tokens == expected


def test_buffers_of_few_tokens_are_kept(exchange_and_planner, monkeypatch):
    monkeypatch.setattr(host_exchange, "KEPT_TOKENS", 50)
    exchange, planner = exchange_and_planner
    program = planner.program(planner.shape("main", StepPlan("prefill", {"r": 9})))

    def begin(tokens: int) -> list[int]:
        """Buffers that are kept, those of the step last; it is given up before anything arrives."""
        with pytest.raises(KeyboardInterrupt), exchange.around(program, [tokens]):
            raise KeyboardInterrupt
        return [step.tokens for step in exchange._steps.values()]

    for tokens in (20, 30, 1, 70, 2):
        kept = begin(tokens)
        assert kept[-1] == tokens and (sum(kept) <= 50 or len(kept) == 1)
    for tokens in range(1, 20):
        assert len(begin(tokens % 10 + 1)) <= host_exchange.KEPT_STEPS


def test_fewer_rows_and_routes_than_there_is_room_for_are_computed_as_they_are(exchange_and_planner):
    """What another rank sends: its rows are not known before, and may be none."""
    exchange, planner = exchange_and_planner
    spec = planner.model
    program = planner.program(planner.shape("main", StepPlan("prefill", {"r": 9})))
    ops = [op for op in program.ops if op.lane.kind is LaneKind.CPU]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, spec.hidden, generator=generator)
    ids = torch.rand(9, spec.num_experts, generator=generator).topk(spec.top_k).indices.int()
    weights = torch.rand(9, spec.top_k, generator=generator)

    def computed(rows: slice, columns: slice, room: int) -> list[torch.Tensor]:
        routed = Routed(x[rows], ids[rows, columns].contiguous(), weights[rows, columns].contiguous())
        with exchange.around(program, [room]):
            return [exchange(op, routed).clone() for op in ops]

    everything = slice(None)
    for rows in (9, 5, 0):
        exact = computed(slice(rows), everything, rows) if rows else [x[:0]] * len(ops)
        for roomy, expected in zip(computed(slice(rows), everything, 20), exact, strict=True):
            assert torch.equal(roomy, expected)
    # Each route by itself, and the sum of all.
    parts = [computed(everything, slice(k, k + 1), 9) for k in range(spec.top_k)]
    for whole, *routes in zip(computed(everything, everything, 9), *parts, strict=True):
        torch.testing.assert_close(sum(routes), whole, rtol=1e-4, atol=1e-5)
        assert whole.abs().sum() > 0
