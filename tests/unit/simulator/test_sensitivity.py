"""What a machine does with a model, by the ways that its memory allows, and what an upgrade saves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridlab.errors import ConfigError, MemoryBudgetError
from hybridlab.plans import Role, Tier
from hybridlab.simulator.machine import load_profile
from hybridlab.simulator.sensitivity import (
    UPGRADES,
    decode_rows,
    machine_rows,
    prefill_rows,
    sensitivity_rows,
    upgrade_rows,
    ways,
)
from hybridlab.simulator.shapes import public_models

SPEC, SHAPE = public_models()["Qwen/Qwen3-30B-A3B"]
MACHINE = load_profile("rtx4090_desktop").machine
SMALL = replace(MACHINE, gpu_memory_gb=8.0)


def names(machine, role: Role = "prefill", kv_tokens=1024):
    return [way.name for way in ways(machine, SPEC, SHAPE, role=role, kv_tokens=kv_tokens)]


def test_memory_decides_which_ways_there_are():
    assert names(MACHINE) == ["experts on the CPU", "experts streamed"]
    assert names(MACHINE, "decode") == ["experts on the CPU"]
    assert names(replace(MACHINE, gpu_memory_gb=48.0), "decode") == ["experts on the GPU"]
    assert names(load_profile("desktop").machine) == ["all on the CPU"]
    assert names(replace(MACHINE, gpu_memory_gb=48.0)) == ["experts on the GPU"]
    with pytest.raises(MemoryBudgetError, match=r"GB of VRAM needed beside the experts, 2\.0 GB there"):
        names(replace(MACHINE, gpu_memory_gb=2.0))
    with pytest.raises(MemoryBudgetError, match=r"29\.0 GB of experts, 4\.0 GB of host memory there"):
        names(replace(MACHINE, host_memory_gb=4.0))
    with pytest.raises(MemoryBudgetError, match=r"GB of host memory needed, 16\.0 GB there"):
        names(replace(load_profile("desktop").machine, host_memory_gb=16.0))


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"host_peak_gb_s is 0\.0"):
        prefill_rows(replace(MACHINE, host_peak_gb_s=0.0), SPEC, SHAPE, [512])
    with pytest.raises(ConfigError, match=r"link_gb_s is 0\.0"):
        decode_rows(replace(MACHINE, link_gb_s=0.0), SPEC, SHAPE, [1], 512)
    with pytest.raises(ConfigError, match=r"link_gb_s is 0\.0"):
        upgrade_rows(MACHINE, SPEC, SHAPE, prompt_tokens=512, context_tokens=512, upgrades={"none": {"link_gb_s": 0.0}})
    with pytest.raises(ConfigError, match="prompt_tokens is 0, expected a whole number from 1"):
        prefill_rows(MACHINE, SPEC, SHAPE, [0])
    with pytest.raises(ConfigError, match="num_requests is 0"):
        decode_rows(MACHINE, SPEC, SHAPE, [0], 512)
    with pytest.raises(ConfigError, match="context_tokens is -3"):
        decode_rows(MACHINE, SPEC, SHAPE, [1], -3)


def test_vram_that_is_left_holds_whole_layers():
    def resident(machine, role: Role = "decode"):
        way = ways(machine, SPEC, SHAPE, role=role, kv_tokens=1024)[-1]
        placed = way.program.shape.placement
        return sum(placed.tier(layer, 127) is Tier.RESIDENT for layer in SPEC.moe_layers)

    counts = [resident(replace(MACHINE, gpu_memory_gb=gb)) for gb in (4.0, 8.0, 16.0, 24.0)]
    assert counts == sorted(counts) and 0 < counts[1] < counts[-1] < len(SPEC.moe_layers)
    assert counts[-1] - 3 < resident(MACHINE, "prefill") < counts[-1]  # the ring takes two of them
    layer_gb = SHAPE.weight_bytes(SPEC)[0] / len(SPEC.moe_layers) / 1e9
    assert counts[2] - counts[1] == pytest.approx(8.0 / layer_gb, abs=1)


def test_a_ring_has_parts_where_two_layers_do_not_fit():
    spec, shape = public_models()["deepseek-ai/DeepSeek-V3"]
    paper = load_profile("rtx5090_2x_epyc9355").machine
    ring = ways(paper, spec, shape, role="prefill", kv_tokens=1024)[-1].program.shape.placement
    assert (ring.ring_slots, ring.parts_per_layer) == (2, 2)  # 18 GB of projections, 11.3 GB a layer, 32 GB


def test_rows_are_simulated_and_longer_prompts_stream():
    rows = prefill_rows(SMALL, SPEC, SHAPE, [128, 8192])
    at = {(row["way"], row["prompt_tokens"]): row["ttft_s"] for row in rows}
    assert at["experts on the CPU", 128] < at["experts streamed", 128]
    assert at["experts streamed", 8192] < at["experts on the CPU", 8192]
    assert {row["evidence"] for row in rows} == {"simulated"}
    one, four = decode_rows(SMALL, SPEC, SHAPE, [1, 4], 1024)
    assert one["tpot_s"] < four["tpot_s"] and four["tokens_per_s"] == pytest.approx(4 / four["tpot_s"])


def test_upgrades_save_where_something_binds():
    rows = {row["change"]: row for row in upgrade_rows(SMALL, SPEC, SHAPE, prompt_tokens=4096, context_tokens=1024)}
    assert list(rows) == ["as it is", *UPGRADES]
    assert (rows["as it is"]["ttft_saved"], rows["as it is"]["tpot_saved"]) == (0, 0)
    assert all(row["ttft_saved"] >= -1e-12 and row["tpot_saved"] >= -1e-12 for row in rows.values())
    assert rows["twice the DRAM channels"]["tpot_saved"] > 0.2 > rows["twice the VRAM's rate"]["tpot_saved"]
    assert rows["twice the link"]["ttft_saved"] > 0.2 and rows["twice the link"]["tpot_saved"] == 0
    assert rows["twice the VRAM"]["tpot_saved"] > 0.05 and rows["twice the VRAM"]["ttft_saved"] > 0.05
    desktop = upgrade_rows(load_profile("desktop").machine, SPEC, SHAPE, prompt_tokens=512, context_tokens=512)
    assert [row["change"] for row in desktop] == ["as it is", "twice the DRAM channels", "twice the CPU cores"]
    with pytest.raises(ConfigError, match="upgrade 'more of it': a machine has no parameter 'vram'"):
        wrong = {"more of it": {"vram": 2.0}}
        upgrade_rows(SMALL, SPEC, SHAPE, prompt_tokens=64, context_tokens=64, upgrades=wrong)


def test_derivatives_are_what_a_percent_more_does():
    pytest.importorskip("jax")
    given = {"prompt_tokens": 4096, "context_tokens": 1024}
    rows = {row["parameter"]: row for row in sensitivity_rows(SMALL, SPEC, SHAPE, **given)}
    assert max(rows, key=lambda name: abs(rows[name]["ttft"])) in ("link_gb_s", "gpu_tflops", "gpu_flop_efficiency")
    for name in ("link_gb_s", "host_peak_gb_s"):
        more = {"a percent more": {name: 1.01}}
        _, changed = upgrade_rows(SMALL, SPEC, SHAPE, **given, upgrades=more)
        row = rows.get(name, {"ttft": 0.0, "tpot": 0.0})
        assert -100 * changed["ttft_saved"] == pytest.approx(row["ttft"], abs=0.02)
        assert -100 * changed["tpot_saved"] == pytest.approx(row["tpot"], abs=0.02)


def test_machines_beside_each_other_and_why_one_cannot():
    machines = {"small": SMALL, "tiny": replace(SMALL, gpu_memory_gb=1.0)}
    small, tiny = machine_rows(machines, SPEC, SHAPE, prompt_tokens=4096, context_tokens=1024)
    assert (small["machine"], small["prefill_way"]) == ("small", "experts streamed")
    assert small["tokens_per_s"] == pytest.approx(1 / small["tpot_s"])
    assert "ttft_s" not in tiny and "1.0 GB there" in tiny["prefill_way"]
