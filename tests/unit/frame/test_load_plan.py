"""Step and KV sizes that are chosen, where KV lives, and what is refused, with the numbers and before it is taken."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab.checkpoint import open_checkpoint, preset_spec
from hybridlab.engine import cuda_device, cuda_memory, runtime
from hybridlab.engine.load_plan import CPU_STEP, DEFAULT_KV_TOKENS, LEAST_STEP, plan_load
from hybridlab.engine.memory import GIB, MemoryPlan
from hybridlab.engine.ring import block_bytes
from hybridlab.errors import ConfigError, MemoryBudgetError
from hybridlab.model.numerics import WIDE_CACHE_BYTES, make_numerics
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec
from hybridlab.strategies.registry import resolve

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_bf16"
BIG = preset_spec("qwen3-30b-a3b")
MACHINE = HardwareSpec("a machine", "cuda", 16, 128 * GIB, 80 * 10**9)


def planned(model=BIG, placement: Any = "streamed", device: str = "cuda", **options: Any) -> MemoryPlan:
    vram_gb, host = options.pop("vram_gb", 80), options.pop("host_bytes", 128 * GIB)
    hardware = replace(MACHINE, device=device, gpu_memory_bytes=int(vram_gb * 1e9), host_memory_bytes=host)
    placed = resolve("placement", placement).place(model, hardware, RoutingStats())
    precision = options.pop("precision", "bf16")
    own = {"token_budget": None, "kv_tokens": None, "kv_block_tokens": 16, "threads": 4, "weight_bytes": 31 * GIB}
    numerics = make_numerics("bf16" if precision == "fp8" else precision, 4)
    return plan_load(model, placed, hardware, numerics, **{**own, "precision": precision, **options})


def fits(plan: MemoryPlan) -> bool:
    return all(one.total_bytes <= one.budget_bytes for one in (plan, plan.gpu) if one is not None)


@pytest.mark.parametrize("vram_gb", [80, 24])
def test_a_prompt_of_32k_is_one_step(vram_gb):
    plan = planned(vram_gb=vram_gb)
    assert plan.token_budget == BIG.max_positions >= 32768
    assert plan.kv_tokens >= plan.token_budget and not plan.kv_offloaded and fits(plan)
    assert plan.gpu is not None and (plan.gpu.token_budget, plan.gpu.kv_tokens) == (plan.token_budget, plan.kv_tokens)


@pytest.mark.parametrize("vram_gb", [7.5, 8, 8.5, 9, 10, 12, 16])
def test_the_step_is_the_largest_that_there_is_room_for(vram_gb):
    plan = planned(vram_gb=vram_gb)
    assert fits(plan) and 1 <= plan.token_budget <= plan.kv_tokens
    assert plan.token_budget < BIG.max_positions
    given = {"vram_gb": vram_gb, "kv_tokens": plan.kv_tokens}
    same = planned(**given)
    assert same.token_budget >= plan.token_budget and fits(same)
    if (
        not same.kv_offloaded and same.token_budget < same.kv_tokens
    ):  # one rounding step more would not fit beside the same KV
        gpu = cuda_memory.gpu_needs(
            BIG, resolve("placement", "streamed").place(BIG, MACHINE, RoutingStats()), budget_bytes=0
        )
        parts = gpu.parts(same.token_budget + 256, same.kv_tokens)
        assert sum(parts.values()) > vram_gb * 1e9


def test_steps_grow_with_the_memory():
    plans = [planned(vram_gb=gb / 4) for gb in range(30, 80)]
    steps = [plan.token_budget for plan in plans if not plan.kv_offloaded]
    assert steps == sorted(steps) and len(set(steps)) > 10


def test_what_is_given_wins():
    plan = planned(token_budget=777, kv_tokens=1000)
    assert (plan.token_budget, plan.kv_tokens) == (777, 1008)  # whole blocks
    assert planned(kv_tokens=4096).token_budget == 4096  # a step has no more tokens than the KV cache
    assert planned(token_budget=50_000).kv_tokens >= 50_000
    assert planned(token_budget=64).kv_tokens == DEFAULT_KV_TOKENS


def test_the_cpu_keeps_to_its_steps():
    plan = planned(device="cpu", placement="all_host")
    assert (plan.token_budget, plan.kv_tokens, plan.gpu) == (CPU_STEP, DEFAULT_KV_TOKENS, None)


def test_kv_that_does_not_fit_the_gpu_is_offloaded():
    tokens = 400_000
    token_bytes = BIG.kv_elements_per_token * 2
    here, there = planned(kv_tokens=tokens, vram_gb=80), planned(kv_tokens=tokens, vram_gb=24)
    assert (here.kv_offloaded, there.kv_offloaded) == (False, True)
    assert here.gpu and here.gpu.parts["KV cache"] == tokens * token_bytes
    assert not any("KV" in name for name in here.parts)
    assert there.parts["KV cache (offloaded)"] == tokens * token_bytes
    assert there.gpu and there.gpu.parts["KV cache (offloaded)"] == tokens * token_bytes * 2 // BIG.num_layers
    assert fits(here) and fits(there) and there.token_budget == BIG.max_positions
    assert "KV cache (offloaded)" in str(there) and "KV cache (offloaded)" in str(there.gpu)
    # A given step that leaves no room for its KV.
    assert planned(token_budget=100_000, vram_gb=24).kv_offloaded


def test_kv_stays_on_the_gpu_unless_steps_would_be_short():
    for gb in range(30, 80):
        plan = planned(vram_gb=gb / 4)
        if plan.kv_offloaded:
            continue
        assert plan.token_budget >= LEAST_STEP


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vram_gb": 4}, r"GiB of GPU memory needed, 3.73 GiB in the budget .*raise vram_gb"),
        ({"placement": "all_resident", "vram_gb": 24}, r"of GPU memory needed, 22.35 GiB .* fewer resident experts"),
        ({"placement": {"name": "streamed", "ring_slots": 40}, "vram_gb": 24}, r"ring_slots or raise its parts"),
        ({"token_budget": 10**6}, r"lower kv_tokens \(1000000\) or token_budget \(1000000\)"),
        ({"host_bytes": 16 * GIB}, r"GiB of host memory needed, 16.00 GiB .*take a smaller checkpoint \(the weights "),
        ({"free_bytes": 20 * GIB}, r"20.00 GiB in the budget .*or free memory"),
        ({"memory_gb": 20}, r"20.00 GiB in the budget .*or raise memory_gb"),
        ({"kv_tokens": 10**7}, r"host memory needed, 128.00 GiB in the budget .*lower kv_tokens \(10000000\)"),
        ({"device": "cpu", "placement": "all_host", "host_bytes": 8 * GIB}, r"take a smaller checkpoint"),
        ({"device": "emulated", "placement": "all_resident", "vram_gb": 24}, r"of GPU memory needed, 22.35 GiB"),
        ({"device": "emulated", "host_bytes": 24 * GIB}, r"24.00 GiB in the budget .*take a smaller checkpoint"),
        (
            {"pinnable_bytes": 4 * GIB},
            r"27.\d\d GiB of pinned memory needed \(experts \(pinned\) 27.\d\d GiB\), 4.00 GiB allowed by the memlock "
            r"limit; take a placement with more experts on the GPU for good, or raise that \(ulimit -l\)",
        ),
        ({"placement": "all_resident", "pinnable_bytes": 4 * GIB, "kv_tokens": 500_000}, r"lower kv_tokens \(500000\)"),
        (
            {"memory_gb": 100, "free_bytes": 20 * GIB},
            r"27.\d\d GiB of pinned memory needed .* 20.00 GiB free \(of the machine's memory, or its cgroup's\)",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, words):
    with pytest.raises(MemoryBudgetError) as caught:
        planned(**options)
    assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)


def test_the_pinned_experts_are_counted_once():
    plan = planned()
    assert plan.parts["experts (pinned)"] == 48 * 128 * block_bytes(BIG) > 27 * GIB
    assert not any("mapped" in name for name in plan.parts)
    resident = planned(placement="all_resident")
    assert resident.parts["workspace"] < plan.parts["workspace"]  # the host computes no experts


def test_captured_steps_have_a_share_where_steps_are_captured():
    share = cuda_memory.captured_bytes(BIG)
    assert cuda_memory.CAPTURED_LEAST < share < GIB
    here, offloaded = planned(), planned(kv_tokens=400_000, vram_gb=24)
    assert here.gpu and here.gpu.parts["captured steps"] == share
    assert offloaded.gpu and offloaded.kv_offloaded and "captured steps" not in offloaded.gpu.parts
    emulated = planned(device="emulated").gpu
    assert emulated and "captured steps" not in emulated.parts


def test_what_lives_on_the_gpu_is_not_pinned():
    plan = planned(placement="all_resident", pinnable_bytes=0, host_bytes=8 * GIB)
    assert "experts (pinned)" not in plan.parts and "experts (shared, not pinned)" not in plan.parts
    assert plan.parts["staging"] == max(2 * BIG.vocab * BIG.hidden, 128 * block_bytes(BIG))
    shared = planned(placement="all_resident", pinnable_bytes=0, shared=True)
    assert shared.parts["experts (shared, not pinned)"] == 48 * 128 * block_bytes(BIG)
    some = planned(placement={"name": "hot_resident", "gpu_gb": 10, "ring_slots": 2})
    resident = some.gpu.parts["resident experts"]  # type: ignore[union-attr]
    assert some.parts["experts (pinned)"] + resident == 48 * 128 * block_bytes(BIG)


def test_nothing_is_made_on_a_gpu_before_the_refusal(monkeypatch):
    """Too little GPU memory, pinnable memory, host memory: each is told before the device is built."""
    monkeypatch.setattr(cuda_device, "cuda_device", None)  # not callable
    for name in ("KVCache", "OffloadedKV", "WorkerThread"):
        monkeypatch.setattr(runtime, name, None)
    checkpoint = open_checkpoint(ORACLE)
    hardware = replace(MACHINE, host_memory_bytes=8 * GIB)
    placed = resolve("placement", "streamed").place(checkpoint.spec, hardware, RoutingStats())
    own: dict[str, Any] = {
        "precision": "bf16", "weight_layout": "rows", "threads": 2, "accelerator_threads": 0, "token_budget": 64,
        "kv_tokens": 64, "kv_block_tokens": 16, "memory_gb": None, "free_bytes": None, "quiet": True,
    }  # fmt: skip
    for gpu_free, pinnable, change, words in (
        (2**20, None, {}, "of GPU memory needed, 1.00 MiB in the budget"),
        (2**33, 4096, {}, "of pinned memory needed .* 0.00 GiB allowed by the memlock limit"),
        (2**33, None, {"free_bytes": 2**20}, "of host memory needed, 1.00 MiB in the budget"),
        (2**33, None, {"memory_gb": 1e-3}, "of host memory needed, 1.02 MiB in the budget"),
    ):
        monkeypatch.setattr(runtime, "free_memory_bytes", lambda *index, free=gpu_free: free)
        monkeypatch.setattr(runtime, "pinnable_bytes", lambda there=pinnable: there)
        with pytest.raises(MemoryBudgetError, match=words):
            runtime.Runtime(checkpoint, hardware, placed, **{**own, **change})


def test_both_sides_of_an_emulated_machine_keep_wide_weights():
    emulated, cpu = (
        planned(device=device, placement="all_host", precision="exact", token_budget=64, kv_tokens=64)
        for device in ("emulated", "cpu")
    )
    assert emulated.parts["workspace"] - cpu.parts["workspace"] == WIDE_CACHE_BYTES


def test_an_emulated_gpu_is_held_to_its_memory():
    """Also by a load: nothing is made for what does not fit."""
    with hl.load(ORACLE, device="emulated", threads=2, placement="all_resident", quiet=True) as engine:
        assert engine.memory.gpu is not None
        needed = engine.memory.gpu.parts["resident experts"]
    with pytest.raises(MemoryBudgetError, match="of GPU memory needed"):
        hl.load(ORACLE, device="emulated", threads=2, placement="all_resident", vram_gb=needed / 1e9, quiet=True)


def test_nothing_is_made_before_the_refusal(monkeypatch):
    for name in ("KVCache", "OffloadedKV", "cpu_device", "emulated_device", "WorkerThread"):
        monkeypatch.setattr(runtime, name, None)  # not callable
    impossible: tuple[dict[str, Any], ...] = (
        {"kv_tokens": 10**12},
        {"device": "emulated", "threads": 2, "vram_gb": 1e-5},
        {"device": "emulated", "threads": 2, "memory_gb": 1e-3},
        {"memory_gb": 1e-3},
    )
    for options in impossible:
        with pytest.raises(MemoryBudgetError):
            hl.load(ORACLE, **options)


def test_a_streamed_model_streams_as_it_is_loaded(capsys):
    """Without a word about sizes: the longest prompt is one step, and crosses the link."""
    with hl.load(ORACLE, device="emulated", threads=2, placement="streamed") as engine:
        positions = engine.spec.max_positions
        assert engine.token_budget == engine.memory.token_budget == positions
        printed = capsys.readouterr().err
        assert f"steps of {positions} tokens, KV for {engine.memory.kv_tokens}" in printed and "GPU memory" in printed
        assert f"steps of {positions} tokens" in engine._repr_html_()


def test_fp8_is_for_gpus_that_have_it():
    with pytest.raises(ConfigError, match=r"'fp8', device 'emulated' .* only on GPUs that have FP8"):
        hl.load(ORACLE, device="emulated", precision="fp8")
    assert planned(precision="fp8").gpu.parts.keys().isdisjoint({"widened experts"})  # type: ignore[union-attr]


def test_a_worker_that_is_started_again_has_the_sizes_of_the_first():
    """The queue of the parent goes by them."""
    with hl.load(ORACLE, worker="process", quiet=True) as engine:
        options = engine.runtime._remote._setup["options"]  # type: ignore[attr-defined]
        assert (options["token_budget"], options["kv_tokens"]) == (engine.memory.token_budget, engine.memory.kv_tokens)
        assert None not in (options["token_budget"], options["kv_tokens"])
