"""Moves between steps: when a placement is asked, what it is told, and which of its moves can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from hybridlab import lowering
from hybridlab.errors import StrategyError
from hybridlab.lowering import Planner
from hybridlab.moves import Mover
from hybridlab.plans import Move, PlacementPlan, StepPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.strategies.checks import TOY_CPU, TOY_GPU, TOY_MODEL
from hybridlab.strategies.overlap.sequential import Sequential
from hybridlab.strategies.placement.all_host import AllHost

LAYERS, E = TOY_MODEL.moe_layers, TOY_MODEL.num_experts  # layers 1, 2, 3 of eight experts
RESIDENT, STREAMED, HOST = Tier.RESIDENT, Tier.STREAMED, Tier.HOST
TWO_IN_LAYER_1 = {(1, 0): RESIDENT, (1, 1): RESIDENT}


class Backend:
    def __init__(self) -> None:
        self.counts = np.zeros((len(LAYERS), E), np.int64)
        self.taken = 0
        self.moves: list[tuple[Move, ...]] = []

    def take_routes(self) -> np.ndarray:
        self.taken += 1
        return self.counts

    def move(self, moves: Sequence[Move]) -> None:
        self.moves.append(tuple(moves))


@dataclass(frozen=True)
class Moving(AllHost):
    """Returns `answers` one after another."""

    answers: list[Any]
    update_every_steps: int = 3
    asked: list[RoutingStats] = field(default_factory=list)

    def update(self, routing):
        self.asked.append(routing)
        return self.answers.pop(0) if self.answers else ()


def planner_of(placement, placed, hardware=TOY_GPU) -> Planner:
    return Planner(TOY_MODEL, hardware, placement, Sequential(), placed)


def moved(moves, placed) -> PlacementPlan:
    return Mover(AllHost(), placed, TOY_MODEL).moved(placed, moves)


def test_a_placement_is_asked_every_so_many_steps_and_told_the_routes_since():
    placement, backend = Moving([]), Backend()
    planner = planner_of(placement, PlacementPlan())
    planner.update(backend, 0)
    assert (backend.taken, placement.asked) == (1, [])  # that starts the counting
    backend.counts[1, 4] = 7
    for _ in range(2):
        planner.update(backend, 1)
    planner.update(backend, 0)  # a new run goes on where the last one ended
    assert (backend.taken, placement.asked) == (1, [])
    planner.update(backend, 1)
    assert backend.taken == 2
    (routing,) = placement.asked
    assert routing.layers == LAYERS and routing.counts[1] == (0, 0, 0, 0, 7, 0, 0, 0)
    for _ in range(6):
        planner.update(backend, 1)
    assert len(placement.asked) == 3 and backend.moves == []


@pytest.mark.parametrize("hardware", [TOY_CPU, TOY_GPU], ids=lambda hardware: hardware.name)
def test_what_is_never_asked_costs_nothing(hardware):
    backend = Backend()
    placements = [AllHost(), Moving([], 0), *([Moving([], 1)] if hardware is TOY_CPU else [])]
    for placement in placements:
        planner = planner_of(placement, PlacementPlan(), hardware)
        for _ in range(5):
            planner.update(backend, 1)
    assert backend.taken == 0


def test_programs_follow_the_moves():
    placement = Moving([(Move(1, 0, HOST), Move(1, 5, RESIDENT))], 1)
    planner, backend = planner_of(placement, PlacementPlan(tier_of=TWO_IN_LAYER_1)), Backend()

    def resident() -> tuple[int, ...]:
        program = planner.program(planner.shape("main", StepPlan("decode", {"a": 1})))
        return next(op.experts for op in program.ops if op.tier is RESIDENT)

    assert resident() == (0, 1)
    planner.update(backend, 1)
    assert resident() == (1, 5)
    assert backend.moves == [(Move(1, 0, HOST), Move(1, 5, RESIDENT))]


def test_a_way_there_and_back_gives_the_plan_of_before():
    start = PlacementPlan(tier_of=TWO_IN_LAYER_1)
    there = moved([Move(1, 0, HOST), Move(1, 5, RESIDENT)], start)
    assert there != start
    back = Mover(AllHost(), start, TOY_MODEL).moved(there, [Move(1, 5, HOST), Move(1, 0, RESIDENT)])
    assert back == start and hash(back) == hash(start)


def test_moves_that_change_nothing_are_allowed():
    start = PlacementPlan(tier_of=TWO_IN_LAYER_1)
    assert moved([Move(1, 0, RESIDENT), Move(2, 3, HOST)], start) == start


@pytest.mark.parametrize("order", [1, -1])
def test_what_leaves_makes_room_whatever_the_order(order):
    moves = [Move(1, 0, HOST), Move(1, 7, RESIDENT)][::order]
    assert moved(moves, PlacementPlan(tier_of=TWO_IN_LAYER_1)).tier_of == {(1, 1): RESIDENT, (1, 7): RESIDENT}


RING = PlacementPlan(STREAMED, TWO_IN_LAYER_1, ring_slots=2, parts_per_layer=3)
HOSTS = {(layer, e): HOST for layer in LAYERS for e in range(6)}
SMALL_RING = PlacementPlan(STREAMED, HOSTS, ring_slots=2)


@pytest.mark.parametrize(
    ("placed", "moves", "words"),
    [
        (PlacementPlan(), [Move(1, 0, RESIDENT)], "expert 0 of layer 1 to resident: 1 experts would live on the GPU"),
        (PlacementPlan(tier_of=TWO_IN_LAYER_1), [Move(1, 1, HOST), Move(1, 2, RESIDENT), Move(1, 3, RESIDENT)],
         "expert 3 of layer 1 to resident: 3 experts would live on the GPU, place() planned 2 in that layer"),
        # Room in one layer is none in another.
        (PlacementPlan(tier_of=TWO_IN_LAYER_1), [Move(1, 1, HOST), Move(2, 1, RESIDENT)], "expert 1 of layer 2"),
        (PlacementPlan(), [Move(0, 1, HOST)], "expert 1 of layer 0 to host: the model does not have that expert"),
        (PlacementPlan(), [Move(1, 8, HOST)], "expert 8 of layer 1"),
        (PlacementPlan(), [Move(1, -1, HOST)], "expert -1 of layer 1"),
        (PlacementPlan(), [Move(1, 1, STREAMED)], "the plan has no ring (ring_slots = 0)"),
        (RING, [Move(1, 1, HOST), Move(1, 1, STREAMED)], "another move of the same update names that expert"),
        (SMALL_RING, [Move(3, 1, STREAMED)], "3 experts would be streamed, the ring's slots hold 2 in 1 parts"),
    ],
)  # fmt: skip
def test_moves_that_cannot_be_are_refused_by_name(placed, moves, words):
    with pytest.raises(StrategyError) as caught:
        moved(moves, placed)
    assert str(caught.value).startswith("placement AllHost: move of expert ") and words in str(caught.value)


def test_streamed_experts_may_fill_the_slots():
    """Layers 2 and 3 stream all eight, so that slots hold three and layer 1 may stream as many."""
    assert moved([Move(1, 0, STREAMED), Move(1, 1, STREAMED)], RING).tier_of == {}
    after = moved([Move(3, 1, STREAMED), Move(3, 7, HOST)], SMALL_RING)
    assert [e for e in range(E) if after.tier(3, e) is STREAMED] == [1, 6]


def test_a_refused_move_changes_nothing():
    placement = Moving([(Move(1, 0, RESIDENT),)], 1)
    planner, backend = planner_of(placement, PlacementPlan()), Backend()
    with pytest.raises(StrategyError, match="placement Moving: move of expert 0"):
        planner.update(backend, 1)
    assert planner.placed == PlacementPlan() and backend.moves == []


def test_a_tier_that_is_none_is_refused_where_it_is_named():
    with pytest.raises(StrategyError, match="'gpu' is not a valid Tier; expected one of resident, streamed, host"):
        Move(1, 0, "gpu")  # type: ignore[arg-type]
    assert Move(1, 0, "host").tier is HOST  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [None, [], (1,), Move(1, 0, HOST)])
def test_an_answer_that_is_no_tuple_of_moves_is_refused(answer):
    with pytest.raises(StrategyError, match=r"placement Moving: update\(\) returned .*, expected a tuple of Move"):
        planner_of(Moving([answer], 1), PlacementPlan()).update(Backend(), 1)


@pytest.mark.parametrize("every", [-1, 1.5, True, None])
def test_how_often_is_checked(every):
    with pytest.raises(StrategyError, match=r"placement Moving: update_every_steps is .*, expected an int >= 0"):
        planner_of(Moving([], every), PlacementPlan())


def test_programs_of_old_placements_are_let_go(monkeypatch):
    monkeypatch.setattr(lowering, "_KEPT_PROGRAMS", 3)
    moves = [(Move(1, e, HOST), Move(1, e + 1, RESIDENT)) for e in range(6)]
    planner, backend = planner_of(Moving(moves, 1), PlacementPlan(tier_of={(1, 0): RESIDENT})), Backend()
    prefill, decode = StepPlan("prefill", {"a": 9}), StepPlan("decode", {"a": 1})
    first = planner.shape("main", prefill)
    kept = planner.program(first)
    for _ in range(6):
        planner.update(backend, 1)
        planner.program(planner.shape("main", decode))
        assert planner.program(first) is kept  # what is used stays
    assert len(planner._programs) == 3
