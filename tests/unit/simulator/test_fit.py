"""Fits: what was put in comes out, with intervals that hold it; profiles with intervals survive their file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hybridlab.checkpoint.presets import preset_spec
from hybridlab.errors import ConfigError
from hybridlab.plans import Tier
from hybridlab.simulator.configurations import configuration_rows
from hybridlab.simulator.cost_model import Micro, OpClass, cost_model, dram_bytes_s
from hybridlab.simulator.fit import Observed, fit
from hybridlab.simulator.machine import Machine, Profile, load_profile, parse_profile, profile_dict, profile_text
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape

SPEC = preset_spec("qwen3-7b-a1b", dtype="fp8", layers=4)
SHAPE = ModelShape.of(SPEC)
CHOSEN = Routes(SPEC).chosen(0, tuple(range(SPEC.num_experts)), frozenset(), 0, Tier.HOST)
START = Machine(64.0, 40.0, 8.0, 1.0, cpu_narrow_tokens=8.0)
TRUE = replace(
    START,
    host_read_efficiency=0.9,
    cpu_flop_efficiency=0.6,
    cpu_dense_flop_ratio=1.4,
    cpu_overlap=0.3,
    cpu_wide_read=0.45,
    cpu_op_us=25.0,
)
NAMES = (
    *("host_read_efficiency", "cpu_flop_efficiency", "cpu_dense_flop_ratio", "cpu_overlap", "cpu_wide_read"),
    "cpu_op_us",
)


def points(noise: float = 0.0) -> list[Observed]:
    rng = np.random.default_rng(0)
    found = []
    for kind in ("attention", "router", "experts", "head"):
        cls = OpClass(kind, True, 0, 0, CHOSEN if kind == "experts" else None)
        micros = [Micro.decode(float(n), 256.0) for n in (1, 2, 4, 8, 12, 24)]
        micros += [Micro.prefill(float(n)) for n in (16, 64, 256, 1024)]
        for micro in micros:
            seconds = float(cost_model(TRUE, SHAPE, [micro])(cls).alone_s)
            found.append(Observed(cls, micro, seconds * float(np.exp(noise * rng.standard_normal())), 0.25))
    return found


def test_exact_points_give_the_parameters_back():
    found = fit(START, SHAPE, points(), NAMES)
    for name in NAMES:
        assert getattr(found.machine, name) == pytest.approx(getattr(TRUE, name), rel=0.05), (
            name
        )  # the prior pulls a little
    assert np.abs(found.errors).max() < 0.02
    assert found.machine.cpu_cores == START.cpu_cores


def test_noisy_points_give_intervals_that_hold_the_parameters():
    found = fit(START, SHAPE, points(noise=0.05), NAMES)
    inside = 0
    for name in NAMES:
        low, high = found.intervals[name]
        assert low < getattr(found.machine, name) < high
        inside += low <= getattr(TRUE, name) <= high
    assert inside >= len(NAMES) - 1
    wider = fit(START, SHAPE, points(noise=0.15), NAMES).intervals
    assert np.ptp(wider["host_read_efficiency"]) > np.ptp(found.intervals["host_read_efficiency"])


def test_what_no_point_tells_stays_where_it_started():
    heads = [point for point in points() if point.cls.kind == "head"]
    found = fit(START, SHAPE, heads, ("host_read_efficiency", "cpu_flop_efficiency", "cpu_wide_expert_read"))
    assert found.machine.cpu_wide_expert_read == pytest.approx(0.98, abs=5e-3)
    low, high = found.intervals["cpu_wide_expert_read"]
    assert high - low > 0.5


def test_fewer_points_than_parameters_are_refused():
    with pytest.raises(ConfigError, match="2 measured ops for 6 parameters"):
        fit(START, SHAPE, points()[:2], NAMES)


def test_what_does_not_hide_is_added_and_wide_reads_begin_beyond_the_group():
    cls, cost = OpClass("head", True, 0), lambda machine, n: cost_model(machine, SHAPE, [Micro.decode(n, 1.0)])

    def seconds(machine: Machine, n: float) -> float:
        return float(cost(replace(machine, cpu_op_us=0.0), n)(cls).alone_s)

    read_s = SHAPE.vocab * SHAPE.hidden * 2 / (40e9 * START.host_read_efficiency)
    flop_s = 2 * 8 * SHAPE.vocab * SHAPE.hidden / (1e12 * START.cpu_flop_efficiency)
    assert seconds(START, 8.0) == pytest.approx(max(read_s, flop_s))
    assert seconds(replace(START, cpu_overlap=0.0), 8.0) == pytest.approx(read_s + flop_s)
    slow = replace(START, cpu_wide_read=0.5, cpu_overlap=0.0)
    assert seconds(slow, 8.0) == pytest.approx(read_s + flop_s)
    assert seconds(slow, 9.0) == pytest.approx(2 * read_s + flop_s * 9 / 8)


def test_a_profile_survives_its_file():
    names = [each for each in TRUE.__dataclass_fields__ if getattr(TRUE, each) != 1e9]
    sources = {name: f'about "{name}"' for name in TRUE.__dataclass_fields__}
    profile = Profile("mine", "a machine", TRUE, sources, {"cpu_overlap": (0.2, 0.4)})
    again = parse_profile(profile_text(profile, names), "mine")
    assert again.machine == TRUE
    assert again.intervals == {"cpu_overlap": (0.2, 0.4)} and again.sources["cpu_overlap"] == 'about "cpu_overlap"'
    told = profile_dict(again)["parameters"]["cpu_overlap"]
    assert told["value"] == 0.3 and told["interval"] == [0.2, 0.4] and told["unit"].startswith("share")
    assert "cpu_overlap 0.3 (0.2 to 0.4)" in str(again)


@pytest.mark.parametrize("interval", ["[0.4, 0.2]", "[0.1]", '"wide"', "[nan, 1.0]", "[0.0, inf]"])
def test_impossible_intervals_are_refused_by_name(interval):
    entry = f'cpu_overlap = {{ value = 0.3, source = "x", interval = {interval} }}\n'
    with pytest.raises(ConfigError, match=r"cpu_overlap\.interval"):
        parse_profile(profile_text(Profile("", "", START, dict.fromkeys(START.__dataclass_fields__, "x")), [
            "host_memory_gb", "host_peak_gb_s", "cpu_cores", "cpu_tflops"]) + entry, "mine")  # fmt: skip


def test_an_emulated_accelerator_takes_cores_of_the_host_and_its_copies_too():
    """Two lanes that multiply leave each other alone on their cores; a copy is a third that they share them with."""
    pair = replace(
        START, cpu_cores=1.0, host_shared_ratio=1.3, gpu_memory_gb=64.0, gpu_read_gb_s=40.0, gpu_tflops=1.0,
        link_gb_s=5.0, gpu_dram_bytes=1.0, gpu_cores=1.0, link_dram_bytes=2.0, link_core_gb_s=10.0,
    )  # fmt: skip
    total = dram_bytes_s(pair)[1]

    def share(machine: Machine, kind: str, on_cpu: bool, tokens: float = 4096.0) -> float:
        cls = OpClass(kind, on_cpu, 0, 8 if kind == "load" else 0)
        cost = cost_model(machine, SHAPE, [Micro.prefill(tokens)])(cls)
        return float(cost.dram_bytes / cost.alone_s / total)

    assert share(pair, "attention", True) == pytest.approx(0.5) == share(pair, "attention", False)
    assert share(pair, "load", False) == pytest.approx(0.25, rel=0.05)  # half of a core
    assert share(replace(pair, link_gb_s=10.0), "load", False) == pytest.approx(0.5, rel=0.05)
    assert share(replace(pair, gpu_cores=0.0), "attention", True) < 0.2
    assert share(replace(pair, gpu_cores=0.0, gpu_dram_bytes=0.0), "attention", False) == 0.0


def test_step_maps_refuse_an_emulated_accelerator():
    machine = replace(load_profile("rtx4090_desktop").machine, gpu_dram_bytes=1.0)
    with pytest.raises(ConfigError, match="gpu_dram_bytes"):
        configuration_rows(machine, SPEC, SHAPE, 4)


def test_every_drawn_machine_is_there_under_every_strategy():
    rows = configuration_rows(load_profile("rtx4090_desktop").machine, SPEC, SHAPE, 3)
    assert {len(column) for column in rows.values()} == {12}
    assert sorted(rows["machine"]) == sorted([0, 1, 2] * 4) and len(set(rows["strategy"])) == 4
    assert np.isfinite(rows["ttft_s"]).all() and (rows["output_tokens_per_s"] > 0).all()
    of_first = rows["ttft_s"][rows["machine"] == 0]
    assert len(set(of_first.tolist())) == 2  # prompts do not know how tokens are decoded
