"""`lru_cache` by hand: who comes in, who goes, and that it keeps to its room and to its number of moves."""

from __future__ import annotations

import random

import pytest

from hybridlab.errors import StrategyError
from hybridlab.moves import Mover
from hybridlab.plans import Move, Tier
from hybridlab.routing import RoutingStats, hit_rate
from hybridlab.strategies import registry
from hybridlab.strategies.checks import TOY_CPU, TOY_GPU, TOY_MODEL
from hybridlab.strategies.placement.hot_resident import HotResident
from hybridlab.strategies.placement.lru_cache import LruCache

NOTHING = RoutingStats()
LAYERS, E = TOY_MODEL.moe_layers, TOY_MODEL.num_experts  # layers 1, 2, 3 of eight experts


def cache_of(experts: int, **fields) -> LruCache:
    return LruCache(experts * TOY_MODEL.expert_bytes / 1e9, **fields)


def seen(**counts: dict[int, int]) -> RoutingStats:
    """Routes of late: `layer_1={4: 10}` is ten of expert 4 in layer 1."""
    rows = [counts.get(f"layer_{layer}", {}) for layer in LAYERS]
    return RoutingStats(tuple(tuple(row.get(e, 0) for e in range(E)) for row in rows), "by hand", LAYERS)


def swap(layer: int, goes: int, comes: int) -> tuple[Move, Move]:
    return Move(layer, goes, Tier.HOST), Move(layer, comes, Tier.RESIDENT)


def test_it_starts_as_hot_resident():
    routing = seen(layer_1={3: 5, 4: 1}, layer_2={7: 2}, layer_3={0: 1, 1: 1})
    for stats in (NOTHING, routing):
        expected = HotResident(4 * TOY_MODEL.expert_bytes / 1e9).place(TOY_MODEL, TOY_GPU, stats)
        assert cache_of(4).place(TOY_MODEL, TOY_GPU, stats) == expected


def test_a_hot_expert_takes_the_place_of_the_coldest_of_its_layer():
    cache = cache_of(6)
    cache.place(TOY_MODEL, TOY_GPU, NOTHING)  # experts 0 and 1 of every layer
    assert cache.update(seen(layer_2={0: 3, 1: 2, 6: 4})) == swap(2, 1, 6)
    assert cache.update(seen(layer_2={0: 3, 6: 4})) == ()


def test_use_of_late_weighs_more():
    cache = cache_of(3)
    cache.place(TOY_MODEL, TOY_GPU, NOTHING)  # expert 0 of every layer
    assert cache.update(seen(layer_1={0: 10, 5: 8})) == ()
    assert cache.update(seen(layer_1={0: 8, 5: 10})) == swap(1, 0, 5)  # 16.0 to 16.4


def test_where_most_is_gained_moves_first_and_only_so_many():
    cache = cache_of(6, moves_per_update=3)
    cache.place(TOY_MODEL, TOY_GPU, NOTHING)
    routing = seen(layer_1={2: 10, 3: 9}, layer_2={0: 5, 1: 1, 7: 30}, layer_3={4: 2})
    assert cache.update(routing) == swap(2, 1, 7)
    quiet = seen()
    assert cache.update(quiet) == swap(1, 0, 2)
    assert cache.update(quiet) == swap(1, 1, 3)
    assert cache.update(quiet) == swap(3, 0, 4)
    assert cache.update(quiet) == ()


def test_an_update_may_turn_a_whole_cache_over():
    cache = cache_of(6)
    placed = cache.place(TOY_MODEL, TOY_GPU, NOTHING)
    hot = seen(**{f"layer_{layer}": {6: 2, 7: 1} for layer in LAYERS})
    assert hit_rate(placed, hot) == 0
    moves = cache.update(hot)
    assert sorted((move.layer, move.expert) for move in moves if move.tier is Tier.RESIDENT) == [
        (layer, e) for layer in LAYERS for e in (6, 7)
    ]
    assert hit_rate(Mover(cache, placed, TOY_MODEL).moved(placed, moves), hot) == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("experts", "most"), [(1, 2), (5, 4), (13, 32), (24, 32)])
def test_room_and_number_of_moves_are_kept(experts, most, seed):
    rng = random.Random(seed)
    cache = cache_of(experts, moves_per_update=most)
    start = placed = cache.place(TOY_MODEL, TOY_GPU, NOTHING)
    mover = Mover(cache, start, TOY_MODEL)
    for _ in range(30):
        rows = tuple(tuple(rng.choice((0, 0, 0, 1, 50)) for _ in range(E)) for _ in LAYERS)
        moves = mover.wanted(RoutingStats(rows, "random", LAYERS))
        assert len(moves) <= most
        placed = mover.moved(placed, moves)  # refuses more in a layer than were planned
        resident = [(layer, e) for layer in LAYERS for e in range(E) if placed.tier(layer, e) is Tier.RESIDENT]
        assert len(resident) == experts


@pytest.mark.parametrize(("hardware", "gpu_gb"), [(TOY_CPU, None), (TOY_GPU, 0)])
def test_without_room_nothing_moves(hardware, gpu_gb):
    cache = LruCache(gpu_gb)
    cache.place(TOY_MODEL, hardware, NOTHING)
    assert cache.update(seen(layer_1={3: 100})) == ()


def test_what_it_counted_is_no_part_of_what_a_run_is_known_by():
    cache = cache_of(6)
    before = registry.describe(cache)
    cache.place(TOY_MODEL, TOY_GPU, NOTHING)
    cache.update(seen(layer_1={3: 100}))
    assert registry.describe(cache) == before and cache == cache_of(6)
    placed = cache.place(TOY_MODEL, TOY_GPU, NOTHING)  # begins anew
    assert cache.update(seen(layer_1={4: 1})) == swap(1, 0, 4)
    assert placed == cache_of(6).place(TOY_MODEL, TOY_GPU, NOTHING)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("update_every_steps", 0, "an integer >= 1"),
        ("moves_per_update", 1, "an integer >= 2"),
        ("moves_per_update", 4.0, "an integer >= 2"),
        ("gpu_gb", -1, "a number >= 0 or None"),
    ],
)
def test_fields_are_checked(field, value, expected):
    with pytest.raises(StrategyError, match=f"{field}: expected {expected}, got {value}"):
        registry.resolve("placement", {"name": "lru_cache", field: value})
