"""Profiles: every number has a source, and impossible ones are refused by name."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from hybridlab.errors import ConfigError
from hybridlab.simulator.machine import PROFILES, Machine, load_profile, parse_profile, profile_names

LEAST = """
host_memory_gb = { value = 64.0, source = "made up" }
host_peak_gb_s = { value = 50.0, source = "made up" }
cpu_cores = { value = 8, source = "made up" }
cpu_tflops = { value = 1.0, source = "made up" }
"""


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_has_a_source_for_every_number(name):
    profile = load_profile(name)
    assert profile.about and set(profile.sources) == {each.name for each in fields(Machine)}
    assert all(profile.sources.values())
    assert profile.machine.has_gpu == (profile.machine.num_gpus > 0)
    text = PROFILES.joinpath(f"{name}.toml").read_text()
    assert 'source = ""' not in text
    assert all(each.metadata["unit"] in profile._repr_html_() for each in fields(Machine))


def test_the_machines_of_the_question_are_there():
    wanted = {"rtx5090_2x_epyc9355", "2x_rtx5090_2x_epyc9355", "rtx4090_desktop", "rtx3090_desktop"}
    wanted |= {"rtx_pro6000_epyc9355", "h100_2x_xeon8480", "h200_2x_xeon8480", "desktop", "2x_epyc9355"}
    assert wanted <= set(profile_names())
    paper = load_profile("rtx5090_2x_epyc9355").machine
    assert (paper.host_peak_gb_s, paper.gpu_memory_gb) == (pytest.approx(24 * 8 * 6.4), 32.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host_peak_gb_s", 0.0),
        ("cpu_tflops", float("nan")),
        ("gpu_op_us", -1.0),
        ("net_gb_s", "fast"),
        ("cpu_cores", 0),
        ("cpu_overlap", 1.5),
    ],
)
def test_an_impossible_number_is_refused_by_name(name, value):
    machine = load_profile("desktop").machine
    with pytest.raises(ConfigError, match=f"mine: {name} is {value!r}, expected a finite number"):
        replace(machine, **{name: value}).check("mine")


@pytest.mark.parametrize("rate", ["link_gb_s", "gpu_read_gb_s", "gpu_tflops"])
def test_a_gpu_needs_its_rates(rate):
    machine = load_profile("rtx4090_desktop").machine
    with pytest.raises(ConfigError, match=f"{rate} is 0.0, a GPU needs a rate above 0"):
        replace(machine, **{rate: 0.0}).check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x =", "not TOML"),
        ('ram_gb = { value = 1.0, source = "x" }', "unknown parameter 'ram_gb'"),
        ("host_memory_gb = 64.0", "expected {value = NUMBER, source = TEXT}"),
        ('host_memory_gb = { value = 64.0, source = "" }', "expected {value = NUMBER, source = TEXT}"),
        ('host_memory_gb = { value = 64.0, source = "x" }', "host_peak_gb_s is missing"),
        (LEAST.replace("50.0", "0.0"), "host_peak_gb_s is 0.0"),
    ],
)
def test_a_bad_profile_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=f"mine: .*{message}"):
        parse_profile(text, "mine")


def test_a_profile_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text(LEAST)
    profile = load_profile(tmp_path / "mine.toml")
    assert profile.machine.host_memory_gb == 64.0 and not profile.machine.has_gpu
    assert profile.sources["gpu_op_us"].startswith("assumed")
    hardware = profile.machine.hardware("mine", gpu=False)
    assert (hardware.device, hardware.link_gb_s, hardware.num_cores) == ("cpu", None, 8)
    with pytest.raises(ConfigError, match="machine 'fast' is unknown, expected one of"):
        load_profile("fast")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "none.toml")
