"""Buffers between a CUDA device and the host's cores: for the ops that need them, and no more than a few steps'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import host_exchange
from hybridlab.engine.cuda_device import cuda_device
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.plans import StepPlan
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
