"""What an executor runs on: a model, lanes, and for each tier who computes its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.lane_threads import LaneThreads
from hybridlab.engine.lanes import Lanes, TurnTakingLanes
from hybridlab.engine.link import CopyLink
from hybridlab.engine.ring import Ring, slot_experts
from hybridlab.errors import PlanError
from hybridlab.model import build_model
from hybridlab.model.base import Model, Routed
from hybridlab.model.expert_block import experts_of
from hybridlab.model.numerics import Bf16, ExpertsFn, Numerics
from hybridlab.plans import Move, Op, PlacementPlan, Program, Span, Tier

TierExperts = Callable[[Op, Routed], torch.Tensor]
"""(an "experts" op, the router's choice) -> the part that the op's experts have in the results, [T, H]."""


Execute = Callable[[Op], None]
Replay = Callable[[float], tuple[Span, ...]]
"""(the clock's start) -> the spans of a step that was captured."""
Capture = Callable[[Program, Sequence[int], Execute, Callable[[], None]], Replay]
"""(a program, tokens of its microbatches, what runs an op, what comes before the first) -> all that, to be replayed on
the tensors that it was captured with; it has run once before."""


def nothing_around(program: Program, tokens: Sequence[int]) -> AbstractContextManager[object]:
    """`Device.around` where lanes bring all that they need."""
    return nullcontext()


def nothing_to_bring(moves: Sequence[Move]) -> None:
    """`Device.move` where every tier reaches every expert."""


@dataclass(frozen=True)
class Device:
    """`load` fills a ring slot; `move` brings experts to new tiers between steps; `close` ends the lanes' threads."""

    model: Model
    lanes: Lanes
    experts: Mapping[Tier, TierExperts]
    load: Callable[[Op], None]
    close: Callable[[], None]
    torch_device: str = "cpu"
    """Where the KV cache lies."""
    move: Callable[[Sequence[Move]], None] = nothing_to_bring
    around: Callable[[Program, Sequence[int]], AbstractContextManager[object]] = nothing_around
    """A run of a program, with so many tokens in its microbatches, happens inside."""
    capture: Capture | None = None


def cpu_device(checkpoint: Checkpoint, numerics: Numerics, threads: int) -> Device:
    """One pool of all cores: lanes take turns, and every expert is where the others are."""
    model = build_model(checkpoint, numerics, threads)

    def compute(op: Op, routed: Routed) -> torch.Tensor:
        return model.experts(op.layer, routed, op.experts)

    return Device(model, TurnTakingLanes(), {Tier.HOST: compute, Tier.RESIDENT: compute}, no_link, lambda: None)


def emulated_device(
    checkpoint: Checkpoint,
    accelerator: Numerics,
    host: Numerics,
    placed: PlacementPlan,
    accelerator_threads: int,
    link: CopyLink,
    *,
    poison: bool = False,
) -> Device:
    """Two sets of cores that work at the same time, one in the accelerator's place; copies are the link between them.

    Resident experts stay where the checkpoint is mapped: that memory is the accelerator's too. One that moves in takes
    its time on the link, with a copy that nobody reads. For studying overlap.
    """
    model = build_model(checkpoint, accelerator, accelerator_threads)
    on_host = _HostExperts(model, host)

    def resident(op: Op, routed: Routed) -> torch.Tensor:
        return model.experts(op.layer, routed, op.experts)

    def move(moves: Sequence[Move]) -> None:
        for each in moves:
            if each.tier is Tier.RESIDENT:
                for linear in (group[each.expert] for group in model.expert_weights(each.layer)):
                    for array in (linear.weight, linear.scale):
                        if array is not None:
                            source = array.reshape(-1).view(np.uint8)
                            link.copy(np.empty_like(source), source)

    lanes = LaneThreads()
    experts: dict[Tier, TierExperts] = {Tier.HOST: on_host, Tier.RESIDENT: resident}
    if not (size := slot_experts(placed, model.spec)):
        return Device(model, lanes, experts, no_link, lanes.close, move=move)
    weights = {layer: dict(enumerate(experts_of(model.expert_weights(layer)))) for layer in model.spec.moe_layers}
    # What passes through a slot is never packed.
    as_stored = Bf16(accelerator_threads) if isinstance(accelerator, Bf16) else accelerator
    ring = Ring(placed.ring_slots, size, weights, as_stored, link, num_experts=model.spec.num_experts, poison=poison)
    return Device(model, lanes, {**experts, Tier.STREAMED: ring.experts}, ring.load, lanes.close, move=move)


class _HostExperts:
    """The host's cores on the checkpoint's own weights; a layer is bound when it is first asked for."""

    def __init__(self, model: Model, numerics: Numerics) -> None:
        self._model, self._numerics = model, numerics
        self._layers: dict[int, ExpertsFn] = {}

    def __call__(self, op: Op, routed: Routed) -> torch.Tensor:
        if (experts := self._layers.get(op.layer)) is None:
            experts = self._layers[op.layer] = self._numerics.experts(*self._model.expert_weights(op.layer))
        return experts(routed.x_TH, routed.only(op.experts, self._model.spec.num_experts), routed.weights)


def no_link(op: Op) -> None:
    """`Device.load` where nothing is streamed."""
    raise PlanError(f"op {op.id} loads experts, but the placement streams none")
