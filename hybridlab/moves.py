"""Experts that change their tier between two steps: when a placement is asked, and which of its moves can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from hybridlab.errors import StrategyError
from hybridlab.plans import Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import ModelSpec
from hybridlab.strategies.base import Placement


class Movable(Protocol):
    """What moves ask of a backend, between steps alone."""

    def take_routes(self) -> np.ndarray:
        """int64 [MoE layers, experts]: routes since the last call. The first call starts the counting, with zeros."""
        ...

    def move(self, moves: Sequence[Move]) -> None:
        """Bring experts to where they are from the next step on; what leaves a tier makes room for what comes."""
        ...


class Mover:
    """Asks `placement` every `update_every_steps` steps, if it has that and it is not 0.

    The device has the room that `planned`, the plan of `place`, asked for: in each layer so many resident experts, and
    slots for parts of so many streamed ones. Raises `StrategyError` for an impossible `update_every_steps`.
    """

    def __init__(self, placement: Placement, planned: PlacementPlan, model: ModelSpec) -> None:
        every = getattr(placement, "update_every_steps", 0)
        self._placement, self._model, self.every_steps = placement, model, every
        self._name = f"placement {type(placement).__name__}"
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise StrategyError(f"{self._name}: update_every_steps is {every!r}, expected an int >= 0")
        self._most_resident = {layer: self._count(planned, layer, Tier.RESIDENT) for layer in model.moe_layers}
        streamed = max((self._count(planned, layer, Tier.STREAMED) for layer in model.moe_layers), default=0)
        self._slot_experts = -(-streamed // max(1, planned.parts_per_layer))
        self._steps: int | None = None
        """Since the placement was last asked; None: the backend does not count yet."""

    def ask(self, backend: Movable, num_steps: int) -> tuple[Move, ...]:
        """The moves that are due after `num_steps` more steps."""
        if not self.every_steps:
            return ()
        if self._steps is None:
            backend.take_routes()
            self._steps = 0
        self._steps += num_steps
        if self._steps < self.every_steps:
            return ()
        self._steps = 0
        rows = tuple(map(tuple, backend.take_routes().tolist()))
        return self.wanted(RoutingStats(rows, "steps of late", self._model.moe_layers))

    def wanted(self, routing: RoutingStats) -> tuple[Move, ...]:
        """What the placement makes of `routing`; raises `StrategyError` unless that is a tuple of moves."""
        moves = self._placement.update(routing)
        if not isinstance(moves, tuple) or not all(isinstance(move, Move) for move in moves):
            raise StrategyError(f"{self._name}: update() returned {moves!r:.60}, expected a tuple of Move")
        return moves

    def moved(self, placed: PlacementPlan, moves: Sequence[Move]) -> PlacementPlan:
        """`placed` after all of `moves`; raises `StrategyError` naming one that cannot be."""
        tiers = dict(placed.tier_of)
        for i, move in enumerate(moves):
            self._check(move, moves[:i], placed)
            tiers[move.layer, move.expert] = move.tier
        # Without what the default says anyway, places that are alike have equal plans, which share their programs.
        tiers = {key: tier for key, tier in tiers.items() if tier is not placed.default_tier}
        after = replace(placed, tier_of=tiers)
        for layer in {move.layer: None for move in moves}:
            self._check_room(after, [move for move in moves if move.layer == layer])
        return after

    def _check(self, move: Move, earlier: Sequence[Move], placed: PlacementPlan) -> None:
        if move.layer not in self._model.moe_layers or not 0 <= move.expert < self._model.num_experts:
            raise self._refusal(move, "the model does not have that expert")
        if move.tier is Tier.STREAMED and not placed.ring_slots:
            raise self._refusal(move, "the plan has no ring (ring_slots = 0)")
        if any((move.layer, move.expert) == (other.layer, other.expert) for other in earlier):
            raise self._refusal(move, "another move of the same update names that expert")

    def _check_room(self, after: PlacementPlan, moves: Sequence[Move]) -> None:
        """Of one layer."""
        layer, parts = moves[0].layer, after.parts_per_layer
        found, most = self._count(after, layer, Tier.RESIDENT), self._most_resident[layer]
        if found > most:
            culprit = [move for move in moves if move.tier is Tier.RESIDENT][-1]
            raise self._refusal(culprit, f"{found} experts would live on the GPU, place() planned {most} in that layer")
        found, most = self._count(after, layer, Tier.STREAMED), self._slot_experts * parts
        if found > most:
            culprit = [move for move in moves if move.tier is Tier.STREAMED][-1]
            raise self._refusal(
                culprit, f"{found} experts would be streamed, the ring's slots hold {most} in {parts} parts"
            )

    def _count(self, placed: PlacementPlan, layer: int, tier: Tier) -> int:
        return sum(placed.tier(layer, expert) is tier for expert in range(self._model.num_experts))

    def _refusal(self, move: Move, why: str) -> StrategyError:
        what = f"move of expert {move.expert} of layer {move.layer} to {move.tier}"
        return StrategyError(f"{self._name}: {what}: {why}")
