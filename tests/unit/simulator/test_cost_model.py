"""Seconds and bytes of op kinds, worked out by hand where the numbers are round."""

from __future__ import annotations

from dataclasses import fields, replace
from math import isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_programs import MODEL, SHAPE, SLOW, machines, micros

from hybridlab.checkpoint import preset_spec
from hybridlab.checkpoint.schema import expected_tensors
from hybridlab.errors import ConfigError, MemoryBudgetError, PlanError, StrategyError
from hybridlab.plans import OP_KINDS, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.simulator.cost_model import FLOATS, Micro, OpClass, cost_model
from hybridlab.simulator.machine import load_profile
from hybridlab.simulator.room import require_room
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape, public_models

EVERYONE = tuple(range(MODEL.num_experts))
ROUND = replace(
    SLOW, host_peak_gb_s=1.0, host_read_efficiency=1.0, cpu_tflops=1e-3, cpu_flop_efficiency=1.0, cpu_op_us=7.0,
    gpu_read_gb_s=1.0, gpu_read_efficiency=1.0, gpu_tflops=1e-3, gpu_flop_efficiency=1.0, gpu_op_us=3.0,
    link_gb_s=1.0, link_latency_us=5.0,
)  # fmt: skip
V3, V3_SHAPE = public_models()["deepseek-ai/DeepSeek-V3"]


def of(kind, micro, machine=ROUND, shape=SHAPE, **fields):
    return cost_model(machine, shape, [micro])(OpClass(kind, fields.pop("on_cpu", False), 0, **fields))


def chosen(experts=EVERYONE, tier=Tier.HOST, arrived=frozenset(), min_tokens=0, routes=None):
    return (routes or Routes(MODEL)).chosen(1, experts, arrived, min_tokens, tier)


def test_a_load_takes_its_bytes_over_the_link_and_reads_them_from_dram():
    cost = of("load", Micro.decode(1.0, 0.0), num_experts=3)
    size = 3 * SHAPE.expert_weights * SHAPE.expert_bits / 8
    assert cost.alone_s == pytest.approx(5e-6 + size / 1e9)
    assert cost.dram_bytes == size == 3 * MODEL.expert_bytes


def test_one_token_reads_top_k_experts_and_many_read_all():
    size = MODEL.expert_bytes
    one = of("experts", Micro.decode(1.0, 0.0), on_cpu=True, chosen=chosen())
    assert one.dram_bytes == pytest.approx(MODEL.top_k * size)
    assert one.alone_s == pytest.approx(7e-6 + max(one.dram_bytes / 1e9, 2 * 2 * SHAPE.expert_weights / 1e9))
    many = of("experts", Micro.prefill(4096.0), on_cpu=True, chosen=chosen())
    assert many.dram_bytes == pytest.approx(MODEL.num_experts * size)
    assert many.alone_s == pytest.approx(7e-6 + 2 * 4096 * MODEL.top_k * SHAPE.expert_weights / 1e9)
    assert of("experts", Micro.decode(1.0, 0.0), chosen=chosen()).dram_bytes == 0


def test_fewer_bits_are_fewer_bytes():
    full, half = SHAPE.with_bits(8.0), SHAPE.with_bits(4.0)
    sizes = [of("load", Micro.decode(1.0, 0.0), shape=s, num_experts=1).dram_bytes for s in (full, half)]
    assert sizes[0] == 2 * sizes[1]
    with pytest.raises(ConfigError, match="expert_bits is 0"):
        SHAPE.with_bits(0)


def test_recorded_routes_that_are_skewed_touch_fewer_experts():
    row = (1000, 1000, 10, 10, 1, 1, 1, 1)
    skewed = Routes(MODEL, RoutingStats((row,) * len(MODEL.moe_layers), "skewed", MODEL.moe_layers))
    assert skewed.share_LE.sum(1) == pytest.approx(MODEL.top_k)
    assert skewed.share_LE.max() <= 1.0
    distinct = [float(chosen(routes=r).of(8.0, FLOATS)[0]) for r in (Routes(MODEL), skewed)]
    assert distinct[0] == pytest.approx(8 * (1 - 0.75**8))
    assert distinct[1] < 0.7 * distinct[0]


def test_a_hot_expert_counts_once_and_the_others_take_what_it_cannot():
    stats = RoutingStats(((98, 1, 1, 0, 0, 0, 0, 0),), "hot", (1,))
    assert Routes(MODEL, stats).share_LE[0].tolist() == pytest.approx([1.0, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert Routes(MODEL, stats).share_LE[1] == pytest.approx(0.25)


def test_what_arrived_runs_on_the_gpu_from_min_tokens_and_on_the_cpu_below():
    arrived = frozenset(EVERYONE[:4])
    for tokens, on_gpu in ((8.0, 0.0), (64.0, 4.0)):  # 2 and 16 tokens an expert
        gpu = chosen(EVERYONE[:4], Tier.STREAMED, arrived, 4)
        cpu = chosen(EVERYONE, Tier.HOST, arrived, 4)
        routed = [float(each.of(tokens, FLOATS)[1]) for each in (gpu, cpu)]
        assert sum(routed) == pytest.approx(tokens * MODEL.top_k)
        assert routed[0] == pytest.approx(on_gpu * tokens * MODEL.top_k / MODEL.num_experts)


def test_attention_grows_with_what_it_looks_at():
    short, long = (of("attention", Micro.decode(1.0, n)).alone_s for n in (100.0, 100_000.0))
    assert long - short > 99_000 * SHAPE.kv_bytes / 1e9 * 0.99
    assert of("attention", Micro.decode(1.0, 100.0), on_cpu=True).dram_bytes > 0


def test_latent_attention_expands_keys_where_that_is_less_work():
    """Of a long prompt; one token behind it attends in the latent space."""
    machine = load_profile("rtx5090_2x_epyc9355").machine
    prompt = Micro.prefill(32768.0)
    least = 2 * prompt.tokens * V3_SHAPE.attention_weights / (machine.gpu_tflops * machine.gpu_flop_efficiency * 1e12)
    attention_flop_s = machine.gpu_tflops * machine.gpu_attention_efficiency * 1e12
    least += prompt.pairs * V3_SHAPE.pair_flop_expanded / attention_flop_s
    assert of("attention", prompt, machine, V3_SHAPE).alone_s == pytest.approx(least + machine.gpu_op_us * 1e-6)
    wide = replace(V3_SHAPE, pair_flop_expanded=V3_SHAPE.pair_flop)
    token = Micro.decode(1.0, 32768.0)
    assert of("attention", token, machine, V3_SHAPE) == of("attention", token, machine, wide)


@given(machines(), micros, st.sampled_from(OP_KINDS), st.booleans())
def test_every_kind_of_a_plan_has_a_finite_cost(machine, micro, kind, on_cpu):
    cost = of(kind, micro, machine, on_cpu=on_cpu, chosen=chosen(), num_experts=2, ranks=2)
    assert isfinite(cost.alone_s) and cost.alone_s > 0 and isfinite(cost.dram_bytes) and cost.dram_bytes >= 0


def test_ranks_share_tokens_and_send_what_the_exchange_says():
    micro = Micro.prefill(100.0)
    alone, two = (of("attention", micro, ranks=n, all_tokens=n == 1).alone_s for n in (1, 2))
    assert two < alone
    routes, wire = Routes(MODEL), MODEL.hidden * ROUND.wire_bytes / (ROUND.net_gb_s * 1e9)
    for exchange, rows in (("small_ep", 1.0), ("dispatch_per_route", 1.0), ("dispatch_per_rank", 1 - 6 / 28)):
        assert routes.rows_sent(exchange, 2) == pytest.approx(rows)
        sent = of("reduce", micro, ranks=2, rows=rows, all_tokens=False)
        assert sent.alone_s == pytest.approx(ROUND.net_latency_us * 1e-6 + 50 * rows * wire)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(PlanError, match="op kind 'dream' is unknown to the cost model, expected one of embed"):
        of("dream", Micro.decode(1.0, 0.0))


def test_a_microbatch_counts_tokens_pairs_context_and_rows():
    micro = Micro.of([(3, 10, True), (2, 0, False)])
    assert micro == Micro(tokens=5.0, pairs=11 + 12 + 13 + 1 + 2, context=15.0, rows=1.0)
    assert Micro.of([(1, 7, True)] * 4) == Micro.decode(4.0, 7.0)
    assert Micro.of([(9, 0, True)]) == Micro.prefill(9.0)


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_a_shape_weighs_what_its_checkpoint_does(dtype):
    spec = preset_spec("qwen3-30b-a3b", dtype=dtype)
    stored = sum(tensor.num_bytes for tensor in expected_tensors(spec))
    assert sum(ModelShape.of(spec).weight_bytes(spec)) == pytest.approx(stored, rel=2e-3)


def test_public_shapes_have_their_published_sizes():
    def billions(name):
        spec, shape = public_models()[name]
        assert all(isfinite(getattr(shape, each.name)) for each in fields(shape))
        return sum(replace(shape, expert_bits=8, dense_bits=8, head_bits=8).weight_bytes(spec)) / 1e9

    assert billions("deepseek-ai/DeepSeek-V3") == pytest.approx(671, rel=0.01)
    assert billions("Qwen/Qwen3-235B-A22B") == pytest.approx(235, rel=0.01)
    assert billions("moonshotai/Kimi-K2-Instruct") == pytest.approx(1026, rel=0.02)
    assert billions("mistralai/Mixtral-8x7B-v0.1") == pytest.approx(46.7, rel=0.01)


def test_a_model_that_no_memory_holds_is_refused_with_the_numbers():
    small, paper = (load_profile(name).machine for name in ("desktop", "rtx5090_2x_epyc9355"))
    with pytest.raises(MemoryBudgetError, match=r"6\d\d\.\d GB of the host's memory needed, 192.0 GB there"):
        require_room(small, V3, V3_SHAPE, PlacementPlan(), gpu=False)
    require_room(paper, V3, V3_SHAPE, PlacementPlan(), gpu=True)
    with pytest.raises(MemoryBudgetError, match=r"of the GPU's memory needed, 32\.0 GB there"):
        require_room(paper, V3, V3_SHAPE, PlacementPlan(Tier.RESIDENT), gpu=True)
    with pytest.raises(MemoryBudgetError, match="of the GPU's memory"):
        require_room(paper, V3, V3_SHAPE, PlacementPlan(Tier.STREAMED, ring_slots=2), gpu=True)
    require_room(paper, V3, V3_SHAPE, PlacementPlan(Tier.STREAMED, ring_slots=2, parts_per_layer=8), gpu=True)
    with pytest.raises(StrategyError, match="resident experts, the simulated machine has no GPU"):
        require_room(small, V3, V3_SHAPE, PlacementPlan(Tier.RESIDENT), gpu=False)
