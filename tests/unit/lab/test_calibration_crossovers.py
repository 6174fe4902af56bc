"""Thresholds from curves made by formula: where lines cross, where they never do, and what noise may move."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from calibrated import LINK_S, TOKENS, calibration, cpu_s, point, points

from hybridlab.calibration.crossovers import crossover, mixed_range
from hybridlab.calibration.results import CPU, DUAL, MIXED, PLAIN, STREAMED, Crossovers
from hybridlab.spec import NEVER, HardwareSpec

RISING = {n: cpu_s(n) for n in TOKENS}
FLAT = dict.fromkeys(TOKENS, LINK_S)


def test_lines_cross_between_the_sizes_where_they_would_be_equal() -> None:
    assert crossover(RISING, FLAT) == 100
    assert crossover({10: 1.0, 1000: 100.0}, {10: 10.0, 1000: 10.0}) == 100


def test_a_size_where_both_are_equal_is_left_to_the_path_before() -> None:
    assert crossover({1: 1.0, 10: 2.0, 100: 9.0}, {1: 2.0, 10: 2.0, 100: 2.0}) == 11


def test_never_and_always() -> None:
    assert crossover({n: cpu_s(n) / 1e6 for n in TOKENS}, FLAT) == NEVER
    assert crossover({n: 1.0 for n in TOKENS}, FLAT) == TOKENS[0]
    assert crossover(FLAT, FLAT) == NEVER  # no gain, no change
    assert crossover(FLAT, {n: 0.99 * LINK_S for n in TOKENS}) == NEVER  # nor for one that may be noise


def test_sizes_that_a_path_left_out_count_as_lost() -> None:
    short = {n: s for n, s in RISING.items() if n <= 256}
    assert crossover(short, FLAT) == 100
    assert crossover({1: 0.5}, {1: 1.0, 4: 1.0}) == 4


def test_one_noisy_point_moves_no_threshold_far() -> None:
    slow_link = {**FLAT, 4096: 5 * RISING[4096]}  # the last of all
    assert crossover(RISING, slow_link) == 100
    fast_link = {**FLAT, 1: RISING[1] / 2}
    assert crossover(RISING, fast_link) == 100


@pytest.mark.parametrize("seed", range(20))
def test_noise_moves_a_threshold_by_about_as_much(seed: int) -> None:
    rng = random.Random(seed)
    cpu = {n: s * rng.uniform(0.9, 1.1) for n, s in RISING.items()}
    link = {n: s * rng.uniform(0.9, 1.1) for n, s in FLAT.items()}
    mixed = {n: max(LINK_S, s) / 2 * rng.uniform(0.9, 1.1) for n, s in RISING.items()}
    assert 70 < crossover(cpu, link) < 140
    found = mixed_range(cpu, mixed, link)
    assert 35 < found.begin < 70 and 140 < found.end < 280 and 1.0 < found.gain < 2.0


def test_mixed_pays_where_neither_side_is_far_ahead() -> None:
    sizes = (*TOKENS, 100)  # where the mixed path turns from the link to the CPU
    mixed = {n: max(LINK_S, cpu_s(n)) / 2 for n in sizes}
    found = mixed_range({n: cpu_s(n) for n in sizes}, mixed, dict.fromkeys(sizes, LINK_S))
    assert (found.begin, found.end) == (50, 200)
    assert found.gain == pytest.approx((1.28 * 2.0) ** 0.5)  # at 64 and at 100
    assert mixed_range(RISING, {n: 1.01 * s for n, s in RISING.items()}, FLAT)[:2] == (NEVER, 100)
    everywhere = mixed_range(RISING, {n: 1e-6 for n in TOKENS}, FLAT)
    assert everywhere[:2] == (1, NEVER)


def test_thresholds_of_all_points() -> None:
    found = Crossovers.of(points())
    assert found.stream_from_tokens == 100
    assert (found.mixed_share, found.min_expert_tokens) == (0.25, 1)  # 4.8 ms at 64 tokens, the half share takes 5.0
    assert found.mixed_from_tokens is not None and found.mixed_to_tokens is not None
    assert found.mixed_from_tokens < 64 < found.mixed_to_tokens < 256
    assert found.mixed_gain == pytest.approx(6.4 / 4.8)
    # 0.002 + 0.001 n meets 0.00025 + 0.0015 n at 3.5
    assert (found.dual_batch_from_requests, found.dual_batch_to_requests) == (2, 4)


def test_a_variant_must_save_more_than_noise_to_be_taken() -> None:
    plain = [one for one in points() if one.path in (CPU, STREAMED) or one.share == 0.5]
    fussy = [replace(one, min_tokens=4, step_s=0.995 * one.step_s) for one in plain if one.path == MIXED]
    assert Crossovers.of([*plain, *fussy]).min_expert_tokens == 1
    better = [replace(one, step_s=0.9 * one.step_s) for one in fussy]
    assert Crossovers.of([*plain, *better]).min_expert_tokens == 4


def test_dual_batch_that_never_pays() -> None:
    slower = [point(PLAIN, n, 0.001) for n in (2, 4)] + [point(DUAL, n, 0.002) for n in (2, 4)]
    found = Crossovers.of(slower)
    assert (found.dual_batch_from_requests, found.dual_batch_to_requests) == (NEVER, NEVER)
    assert found.lines() == ["dual batch beats plain decode never"]


def test_a_gain_within_the_spread_of_repeats_is_none() -> None:
    """One size where dual batch seems 8% faster, on repeats that differ by more than that."""
    plain = [point(PLAIN, n, 0.010) for n in (2, 4, 8)]
    dual = [point(DUAL, n, s) for n, s in ((2, 0.020), (4, 0.0092), (8, 0.020))]
    assert Crossovers.of([*plain, *dual]).dual_batch_from_requests == NEVER
    steady = [replace(one, layer_s_min=one.layer_s, layer_s_max=one.layer_s) for one in dual]
    found = Crossovers.of([*plain, *steady])
    assert found.dual_batch_from_requests == 4 and found.dual_batch_to_requests == 5
    noisy = dict.fromkeys(TOKENS, 0.2)
    assert crossover(FLAT, {n: 0.9 * LINK_S for n in TOKENS}, noisy) == NEVER
    assert crossover(FLAT, {n: 0.7 * LINK_S for n in TOKENS}, noisy) == TOKENS[0]


def test_what_was_not_measured_is_not_decided() -> None:
    assert Crossovers.of([]) == Crossovers()
    assert Crossovers().lines() == ["too little was measured for a threshold"]
    short = [one for one in points() if one.kind == "prefill" and one.tokens <= 4]
    assert Crossovers.of(short).stream_from_tokens == NEVER
    assert Crossovers.of(short, whole=False) == Crossovers()  # longer prompts were to come


def test_thresholds_reach_the_hardware() -> None:
    found = calibration()
    hardware = found.applied(HardwareSpec("a GPU", "cuda", 16, 2**36, 2**34, link_gb_s=50.0))
    assert (hardware.stream_from_tokens, hardware.mixed_share, hardware.dual_batch_from_requests) == (100, 0.25, 2)
    assert (hardware.link_gb_s, hardware.calibrated) == (50.0, "2026-11-25, code c0de")


def test_a_calibration_says_what_it_found() -> None:
    text = str(calibration())
    assert "a-model on a GPU, a CPU, 16 threads, device cuda (measured, 2026-11-25)" in text
    assert "streaming all experts beats the CPU from 100 tokens" in text
    assert "mixed (25% streamed, the CPU computes the rest) beats both from" in text
    assert "CPU experts  streamed  mixed 50%  mixed 25%" in text
    assert "interrupted" in str(replace(calibration(), complete=False))
    slow = [replace(one, step_s=1e3) for one in points() if one.path == STREAMED]
    never = calibration([one for one in points() if one.path == CPU] + slow)
    assert "streaming all experts beats the CPU never" in str(never)
    assert never.as_dict()["crossovers"]["stream_from_tokens"] == "never"
    assert "<pre>" in calibration()._repr_html_()
