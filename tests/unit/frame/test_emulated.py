"""`hl.load(device="emulated")`: options, the memory plan, and errors in the middle of a step."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab.engine.ring import slots_bytes
from hybridlab.errors import ConfigError, HybridlabError, MemoryBudgetError, PlanError, StrategyError
from hybridlab.hardware import detect
from hybridlab.plans import ExpertPath, PlacementPlan, Tier
from hybridlab.request import Status
from hybridlab.strategies.placement.all_host import AllHost

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_bf16"
STREAMED = {"name": "streamed", "stream_from_tokens": 1}


def load(**options) -> hl.Engine:
    return hl.load(ORACLE, **{"device": "emulated", "threads": 2, "quiet": True, "kv_tokens": 512, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accelerator_threads": 0}, "accelerator_threads is 0, expected an int from 1 to threads - 1"),
        ({"accelerator_threads": 2}, "accelerator_threads is 2"),
        ({"accelerator_threads": True}, "accelerator_threads is True"),
        ({"accelerator_threads": 1.0}, "accelerator_threads is 1.0"),
        ({"threads": 1}, "device 'emulated' needs 2 threads, one for each side; there is 1"),
        ({"link_gb_s": 0}, "link_gb_s is 0, expected a finite number > 0"),
        ({"link_gb_s": -1.0}, "link_gb_s is -1.0"),
        ({"link_gb_s": float("inf")}, "link_gb_s is inf"),
        ({"link_gb_s": "fast"}, "link_gb_s is 'fast'"),
        ({"vram_gb": 0.0}, "vram_gb is 0.0"),
        ({"vram_gb": float("nan")}, "vram_gb is nan"),
        ({"vram_gb": True}, "vram_gb is True"),
        ({"device": "emulate"}, "device 'emulate' is not available"),
        ({"device": "cpu", "accelerator_threads": 1}, "accelerator_threads is for device 'emulated', not for 'cpu'"),
        ({"device": "cpu", "link_gb_s": 5.0}, "link_gb_s is for device 'emulated', not for 'cpu'"),
        ({"device": "auto", "vram_gb": 5.0}, "vram_gb is for devices 'emulated' and 'cuda', not for 'cpu'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named_in_one_line(options, words):
    with pytest.raises(ConfigError) as caught:
        load(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@dataclass(frozen=True)
class Places(AllHost):
    """Places as it is told, and keeps what machine it was told of."""

    plan: PlacementPlan = field(default_factory=PlacementPlan)
    path: ExpertPath = field(default_factory=ExpertPath)
    seen: list = field(default_factory=list)

    def place(self, model, hardware, routing):
        self.seen.append(hardware)
        return self.plan

    def expert_path(self, num_tokens, placed, hardware):
        return self.path


def test_placements_plan_with_the_emulated_machine():
    placement = Places()
    load(placement=placement, vram_gb=0.5, link_gb_s=7.5).close()
    load(placement=placement).close()
    capped, free = placement.seen
    assert (capped.device, capped.gpu_memory_bytes, capped.link_gb_s) == ("emulated", 5 * 10**8, 7.5)
    assert (free.gpu_memory_bytes, free.link_gb_s) == (detect().host_memory_bytes, None)


def test_both_sides_get_their_threads(monkeypatch):
    with load(threads=3, accelerator_threads=1, placement="hot_resident", precision="bf16") as engine:
        runtime: Any = engine.runtime
        device = runtime._device
        host = device.experts[Tier.HOST]
        assert (device.model._numerics.threads, host._numerics.threads) == (1, 2)
    with load(threads=4) as engine:
        runtime = engine.runtime
        assert runtime._device.model._numerics.threads == 2


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (PlacementPlan(Tier.STREAMED, ring_slots=0), "placement Places: ring_slots: expected an integer >= 1, got 0"),
        (PlacementPlan(Tier.HOST, {(0, 1): Tier.STREAMED}), "ring_slots: expected an integer >= 1"),
        (PlacementPlan(Tier.STREAMED, ring_slots=2, parts_per_layer=0), "parts_per_layer: expected an integer from 1"),
        (PlacementPlan(Tier.STREAMED, ring_slots=2, parts_per_layer=9), "parts_per_layer: expected an integer from 1"),
        (PlacementPlan(ring_slots=-1), "ring_slots: expected an integer >= 0, got -1"),
    ],
)
def test_a_ring_that_cannot_be_is_refused_at_load(plan, words):
    with pytest.raises(StrategyError, match=words):
        load(placement=Places(plan))


def test_a_prefetch_of_too_few_layers_is_named():
    path = ExpertPath(prefetch=(frozenset({0}),))
    with (
        load(placement=Places(PlacementPlan(Tier.STREAMED, ring_slots=2), path)) as engine,
        pytest.raises(StrategyError, match="prefetches for 1 layers, the model has 3"),
    ):
        engine.generate([1, 2, 3], 2)


def test_the_memory_plan_counts_the_ring(capsys):
    with load(placement=STREAMED, quiet=False) as engine:
        assert engine.memory.parts["ring"] == slots_bytes(engine.planner.placed, engine.spec) > 0
        assert f"ring {engine.memory.parts['ring'] / 2**30:.2f}" in capsys.readouterr().err
        with load(placement="all_host") as plain:
            assert "ring" not in plain.memory.parts
            assert engine.memory.total_bytes - engine.memory.parts["ring"] == plain.memory.total_bytes


def test_a_ring_that_is_too_big_is_refused_with_the_numbers():
    slots = 10**6
    with pytest.raises(MemoryBudgetError) as caught:
        load(placement={**STREAMED, "ring_slots": slots}, memory_gb=4)
    expert = 3 * 24 * 64 * 2
    ring_gib = slots * 8 * (expert + 6 * 64) / 2**30
    assert f"ring {ring_gib:.2f}" in str(caught.value) and "4.00 GiB in the budget" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lane_that_fails_fails_the_requests_of_its_step_only(monkeypatch):
    before = set(threading.enumerate())
    with load(placement=STREAMED, overlap="dual_batch") as engine:
        runtime: Any = engine.runtime
        experts = runtime._device.experts
        real = experts[Tier.STREAMED]

        def fails_for_long_prompts(op, routed):
            if len(routed.x_TH) > 20:
                raise RuntimeError("planted")
            return real(op, routed)

        monkeypatch.setitem(experts, Tier.STREAMED, fails_for_long_prompts)
        requests = [hl.Request("long", (1,) * 30, 2), hl.Request("short", (1,), 2, arrival_s=0.2)]
        for _ in range(2):
            long, short = engine.serve(requests).records
            assert long.status is Status.FAILED and "planted" in long.error
            assert short.status is Status.FINISHED and len(short.output) == 2
        engine.lone_runtime.wait_mapped()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("hybridlab-")]


def test_a_plan_error_on_a_lane_ends_the_run_in_one_line_and_the_engine_goes_on(monkeypatch):
    with load(placement=STREAMED, precision="exact") as engine:
        expected = engine.generate([5, 6, 7], 4)
        runtime: Any = engine.runtime
        device = runtime._device
        with monkeypatch.context() as patched:
            patched.setattr(device.load.__self__, "_holds", _Forgetful([None] * 2))
            with pytest.raises(PlanError, match=r"slot \d of the ring does not hold part 0 of layer 0"):
                engine.generate([5, 6, 7], 4)
        assert engine.generate([5, 6, 7], 4) == expected


class _Forgetful(list):
    def __setitem__(self, index, value):
        super().__setitem__(index, None)


def test_an_engine_may_be_closed_at_any_time():
    engine = load(placement=STREAMED)
    stream = engine.stream([1, 2, 3], 50)
    next(stream)
    engine.close()
    with pytest.raises(HybridlabError, match="closed"):
        list(stream)
    load(placement=STREAMED).close()  # nothing has run
