"""What each built-in placement decides, by hand: which experts, which tier, which path."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hybridlab as hl
from hybridlab.errors import StrategyError
from hybridlab.plans import ExpertPath, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import NEVER
from hybridlab.strategies import registry
from hybridlab.strategies.checks import TOY_CPU, TOY_GPU, TOY_MODEL
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.strategies.placement.all_resident import AllResident
from hybridlab.strategies.placement.budget import experts_within
from hybridlab.strategies.placement.hot_resident import HotResident
from hybridlab.strategies.placement.layer_split import LayerSplit
from hybridlab.strategies.placement.streamed import Streamed

NOTHING = RoutingStats()
LAYERS, EXPERTS = TOY_MODEL.moe_layers, range(TOY_MODEL.num_experts)  # layers 1, 2, 3 of eight experts
ALL = {(layer, expert) for layer in LAYERS for expert in EXPERTS}
HALF_A_GPU = replace(TOY_GPU, gpu_memory_bytes=2 * 5 * TOY_MODEL.expert_bytes)


def gb(experts: float) -> float:
    return experts * TOY_MODEL.expert_bytes / 1e9


def stats(*rows: tuple[int, ...], layers: tuple[int, ...] = LAYERS) -> RoutingStats:
    return RoutingStats(rows, "by hand", layers)


SKEWED = stats((0, 9, 0, 1, 0, 0, 0, 0), (50, 0, 0, 0, 0, 20, 30, 0), (1, 1, 1, 1, 1, 1, 1, 1))
"""Shares: layer 1: 0.9 and 0.1; layer 2: 0.5, 0.3, 0.2; layer 3: 0.125 each."""


def resident(placement, routing=NOTHING, hardware=TOY_GPU) -> set[tuple[int, int]]:
    placed = placement.place(TOY_MODEL, hardware, routing)
    return {key for key in ALL if placed.tier(*key) is Tier.RESIDENT}


@pytest.mark.parametrize(
    "placement",
    [
        *(Streamed(slots, parts, 1) for slots, parts in ((1, 1), (1, 8), (5, 3))),
        HotResident(0),
        HotResident(1e9),
        HotResident(gb(7), ring_slots=1, parts_per_layer=8, stream_from_tokens=1),
        LayerSplit(0),
        LayerSplit(1e9),
    ],
    ids=repr,
)
def test_fields_at_their_ends_pass_the_checks(placement):
    hl.check_placement(placement)


@pytest.mark.parametrize("name", registry.names("placement"))
def test_without_a_gpu_every_expert_stays_in_host_memory(name):
    placed = registry.resolve("placement", name).place(TOY_MODEL, TOY_CPU, SKEWED)
    assert {placed.tier(*key) for key in ALL} == {Tier.HOST}


@pytest.mark.parametrize("name", registry.names("placement"))
def test_equal_questions_get_equal_answers(name):
    placement = registry.resolve("placement", name)
    placed = placement.place(TOY_MODEL, TOY_GPU, SKEWED)
    assert placed == placement.place(TOY_MODEL, TOY_GPU, SKEWED)
    for tokens in (1, 100, 10**5):
        assert placement.expert_path(tokens, placed, TOY_GPU) == placement.expert_path(tokens, placed, TOY_GPU)


def test_all_host_and_all_resident_place_every_expert_alike():
    assert AllHost().place(TOY_MODEL, TOY_GPU, SKEWED) == PlacementPlan(Tier.HOST)
    assert AllResident().place(TOY_MODEL, TOY_GPU, SKEWED) == PlacementPlan(Tier.RESIDENT)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, set()),
        (0.99, set()),
        (1, {(1, 1)}),
        (2, {(1, 1), (2, 0)}),
        (3.5, {(1, 1), (2, 0), (2, 6)}),
        (4, {(1, 1), (2, 0), (2, 6), (2, 5)}),
        # 0.125 each beats the 0.1 of layer 1; among equals the lower numbers.
        (6, {(1, 1), (2, 0), (2, 6), (2, 5), (3, 0), (3, 1)}),
        (13, {(1, 1), (2, 0), (2, 6), (2, 5), (1, 3)} | {(3, e) for e in EXPERTS}),
        (24, ALL),
        (1e6, ALL),
        (float("inf"), ALL),
    ],
)
def test_hot_resident_takes_the_hottest_by_their_share_of_a_layer(count, expected):
    assert resident(HotResident(gb(count)), SKEWED) == expected


def test_a_busy_layer_does_not_crowd_out_the_others():
    """A layer that was counted a thousand times as often is no hotter for it."""
    routing = stats((3, 1, 0, 0, 0, 0, 0, 0), (1000, 1000, 1000, 1000, 0, 0, 0, 0), (7, 0, 0, 0, 0, 0, 0, 3))
    assert resident(HotResident(gb(2)), routing) == {(3, 0), (1, 0)}


@pytest.mark.parametrize("routing", [NOTHING, stats(*[(0,) * 8] * 3)], ids=["nothing known", "nothing counted"])
def test_nothing_known_of_the_routes_gives_the_first_experts_of_every_layer(routing):
    assert resident(HotResident(gb(7)), routing) == {(layer, e) for layer in LAYERS for e in (0, 1)} | {(1, 2)}


def test_layers_that_were_not_counted_are_cold():
    routing = stats((0, 0, 0, 0, 0, 0, 0, 5), layers=(2,))
    assert resident(HotResident(gb(1)), routing) == {(2, 7)}
    assert resident(HotResident(gb(2)), routing) == {(2, 7), (1, 0)}


@pytest.mark.parametrize(
    ("count", "layers"), [(0, ()), (7.9, ()), (8, (1,)), (15, (1,)), (16, (1, 2)), (24, (1, 2, 3)), (1e9, (1, 2, 3))]
)
def test_layer_split_takes_whole_layers_in_order(count, layers):
    assert resident(LayerSplit(gb(count)), SKEWED) == {(layer, e) for layer in layers for e in EXPERTS}
    rest = LayerSplit(gb(count)).place(TOY_MODEL, TOY_GPU, SKEWED)
    assert all(rest.tier(*key) in (Tier.RESIDENT, Tier.HOST) for key in ALL)


def test_without_a_budget_half_of_the_gpus_memory_is_taken():
    assert experts_within(None, TOY_MODEL, HALF_A_GPU) == 5
    assert len(resident(HotResident(), SKEWED, HALF_A_GPU)) == 5
    assert resident(LayerSplit(), SKEWED, HALF_A_GPU) == set()
    assert experts_within(gb(7), TOY_MODEL, HALF_A_GPU) == 7  # what was asked for counts, not what there is


def test_those_that_are_not_hot_are_streamed_if_there_is_a_ring():
    placement = HotResident(gb(4), ring_slots=3, parts_per_layer=2)
    placed = placement.place(TOY_MODEL, TOY_GPU, SKEWED)
    assert {key for key in ALL if placed.tier(*key) is Tier.STREAMED} == ALL - resident(placement, SKEWED)
    assert (placed.ring_slots, placed.parts_per_layer) == (3, 2)
    assert HotResident(gb(4)).place(TOY_MODEL, TOY_GPU, SKEWED).default_tier is Tier.HOST


def test_streamed_streams_everything_through_its_ring():
    placed = Streamed(3, 4).place(TOY_MODEL, TOY_GPU, SKEWED)
    assert {placed.tier(*key) for key in ALL} == {Tier.STREAMED}
    assert (placed.ring_slots, placed.parts_per_layer) == (3, 4)


@pytest.mark.parametrize("cls", [Streamed, HotResident])
@pytest.mark.parametrize(
    ("own", "measured", "least"), [(None, None, 4096), (None, 700, 700), (50, 700, 50), (50, None, 50), (1, None, 1)]
)
def test_steps_stream_from_the_given_the_measured_or_the_published_number_of_tokens(cls, own, measured, least):
    placement, machine = cls(ring_slots=2, stream_from_tokens=own), replace(TOY_GPU, stream_from_tokens=measured)
    placed = placement.place(TOY_MODEL, machine, NOTHING)
    assert placement.expert_path(least, placed, machine) == ExpertPath(prefetch=None)
    assert placement.expert_path(10**6, placed, machine) == ExpertPath(prefetch=None)
    if least > 1:
        assert placement.expert_path(least - 1, placed, machine) == ExpertPath(prefetch=())


MEASURED = replace(TOY_GPU, stream_from_tokens=700, mixed_from_tokens=100, mixed_to_tokens=900, mixed_share=0.25,
                   min_expert_tokens=3)  # fmt: skip


@pytest.mark.parametrize("cls", [Streamed, HotResident])
@pytest.mark.parametrize(
    ("fields", "hardware", "bounds"),
    [
        ({}, MEASURED, (100, 900)),
        ({}, replace(MEASURED, mixed_from_tokens=NEVER), (700, 700)),
        ({}, replace(MEASURED, mixed_to_tokens=NEVER), (100, NEVER)),
        ({}, replace(MEASURED, mixed_from_tokens=NEVER, stream_from_tokens=NEVER), (NEVER, NEVER)),
        ({"stream_from_tokens": 50}, MEASURED, (50, 50)),
        ({"mixed_from_tokens": 20}, MEASURED, (20, 900)),
        ({"mixed_from_tokens": 20}, TOY_GPU, (20, 4096)),
        ({"mixed_from_tokens": 20, "stream_from_tokens": 30}, MEASURED, (20, 30)),
        ({"mixed_from_tokens": 40, "stream_from_tokens": 30}, MEASURED, (30, 30)),
    ],
)
def test_steps_between_the_cpus_and_the_streamed_ones_are_mixed(cls, fields, hardware, bounds):
    placement = cls(ring_slots=2, **fields)
    placed = placement.place(TOY_MODEL, hardware, NOTHING)

    def kind(tokens):
        prefetch = placement.expert_path(tokens, placed, hardware).prefetch
        return "streamed" if prefetch is None else "mixed" if prefetch else "cpu"

    mixed_from, stream_from = bounds
    around = sorted({tokens for bound in bounds for tokens in (bound - 1, bound) if 1 <= tokens < NEVER} | {1, 10**6})
    expected = ["streamed" if n >= stream_from else "mixed" if n >= mixed_from else "cpu" for n in around]
    assert [kind(tokens) for tokens in around] == expected


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.3, 3), (0.01, 1), (1, 8)])
def test_the_mixed_path_streams_a_share_of_each_layers_hottest_experts(share, count):
    placement = Streamed(mixed_from_tokens=1, mixed_share=share, min_expert_tokens=5)
    placed = placement.place(TOY_MODEL, TOY_GPU, SKEWED)
    path = placement.expert_path(7, placed, TOY_GPU)
    assert path.min_tokens == 5
    assert path.prefetch is not None
    by_heat = ([1, 3, 0, 2, 4, 5, 6, 7], [0, 6, 5, 1, 2, 3, 4, 7], list(EXPERTS))
    assert path.prefetch == (frozenset(), *(frozenset(order[:count]) for order in by_heat))


def test_what_is_hot_on_the_gpu_is_not_streamed_and_no_ring_mixes_nothing():
    placement = HotResident(gb(4), ring_slots=1, mixed_from_tokens=1, mixed_share=0.5)
    placed = placement.place(TOY_MODEL, TOY_GPU, SKEWED)
    prefetch = placement.expert_path(7, placed, TOY_GPU).prefetch
    assert prefetch is not None
    assert [len(experts) for experts in prefetch] == [0, 4, 3, 4]  # half of 7, 5 and 8 experts
    assert {placed.tier(layer, e) for layer, experts in enumerate(prefetch) for e in experts} == {Tier.STREAMED}
    without = HotResident(gb(4), mixed_from_tokens=1)
    assert without.expert_path(7, without.place(TOY_MODEL, TOY_GPU, SKEWED), TOY_GPU) == ExpertPath(prefetch=())


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        *[(name, "gpu_gb", value, "a number >= 0 or None") for name in ("hot_resident", "layer_split")
          for value in (-1, -0.5, float("nan"), "4", True)],
        *[("streamed", "ring_slots", value, "an integer >= 1") for value in (0, -1, 2.0, True, None)],
        *[("hot_resident", "ring_slots", value, "an integer >= 0") for value in (-1, 0.0, False, "", None)],
        *[(name, "parts_per_layer", value, "an integer from 1 to 8") for name in ("streamed", "hot_resident")
          for value in (0, 9, 2.0, None)],
        *[(name, "stream_from_tokens", value, "an integer >= 1 or None") for name in ("streamed", "hot_resident")
          for value in (0, -5, 4096.0, True)],
        *[("streamed", name, 0, "an integer >= 1 or None") for name in ("mixed_from_tokens", "min_expert_tokens")],
        *[(name, "mixed_share", value, "a number above 0, at most 1, or None") for name in ("streamed", "hot_resident")
          for value in (0, 1.01, -0.5, "half", True, float("nan"))],
    ],
)  # fmt: skip
def test_fields_are_checked_when_the_strategy_is_made(name, field, value, expected):
    with pytest.raises(StrategyError) as caught:
        registry.resolve("placement", {"name": name, field: value})
    assert f"{field}: expected {expected}, got {value!r}" in str(caught.value)
