"""The ring of slots on the accelerator, through which streamed experts pass; allocated once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hybridlab.engine.link import CopyLink
from hybridlab.engine.local_ids import LocalIds
from hybridlab.errors import PlanError
from hybridlab.kernels.layouts import aligned
from hybridlab.lowering import parts_of
from hybridlab.model.base import Routed
from hybridlab.model.expert_block import ALIGNMENT, Expert, ExpertBlock
from hybridlab.model.numerics import ExpertsFn, Numerics
from hybridlab.plans import Op, PlacementPlan, Tier
from hybridlab.spec import ModelSpec

NAN_CODE = 0xFF
"""In every byte: NaN as FP8, as BF16 and as float32."""


def slot_experts(placed: PlacementPlan, model: ModelSpec) -> int:
    """Experts of the largest part that `placed` streams: what a slot must hold."""
    parts = (part for layer in model.moe_layers for part in parts_of(placed, model, layer, 0, Tier.STREAMED))
    return max(map(len, parts), default=0)


def block_bytes(model: ModelSpec) -> int:
    """Most bytes of one expert in a slot: each of its arrays begins at a multiple of `ALIGNMENT`."""
    return model.expert_bytes + 6 * ALIGNMENT


def slots_bytes(placed: PlacementPlan, model: ModelSpec) -> int:
    """Bytes of the slots that `placed` asks for, before any of them is allocated."""
    return placed.ring_slots * slot_experts(placed, model) * block_bytes(model)


class Ring:
    """`load` fills a slot with a part's experts, `experts` computes on them.

    Slots are named by the program's ops; a slot that does not hold what an op expects ends the step with `PlanError`.
    With `poison`, a slot is filled with NaN before it is loaded anew, so that a late reader is seen in the output.
    `weights` are all experts that may be loaded, by layer and number; raises `PlanError` unless they are alike.
    `numerics` reads them as stored.
    """

    def __init__(
        self,
        num_slots: int,
        experts_per_slot: int,
        weights: Mapping[int, Mapping[int, Expert]],
        numerics: Numerics,
        link: CopyLink,
        *,
        num_experts: int,
        poison: bool = False,
    ) -> None:
        self._link, self._poison = link, poison
        self._local = LocalIds(num_experts, "cpu")
        self._block = block = ExpertBlock.of(next(e for experts in weights.values() for e in experts.values()))
        self._pieces = {
            layer: {number: block.pieces(expert) for number, expert in experts.items()}
            for layer, experts in weights.items()
        }
        self._slots = [aligned(experts_per_slot * block.num_bytes) for _ in range(num_slots)]
        for slot in self._slots:
            slot.fill(0)  # kernels are bound to it before it is loaded, and refuse scales that are not finite
        self._holds: list[tuple | None] = [None] * num_slots
        # A slot stays where it is: one set of kernels each serves all that pass through it.
        self._experts = [self._bind(numerics, slot, experts_per_slot) for slot in self._slots]

    @property
    def num_bytes(self) -> int:
        return sum(len(slot) for slot in self._slots)

    def load(self, op: Op) -> None:
        """Copy the experts of a "load" op over the link into its slot."""
        assert op.slot is not None
        slot, size = self._slots[op.slot.slot], self._block.num_bytes
        self._holds[op.slot.slot] = None
        if self._poison:
            slot.fill(NAN_CODE)
        pieces = self._pieces[op.layer]
        for place, expert in enumerate(op.experts):
            for offset, source in pieces[expert]:
                at = place * size + offset
                self._link.copy(slot[at : at + len(source)], source)
        self._holds[op.slot.slot] = (op.layer, op.part, op.slot.generation, op.experts)

    def experts(self, op: Op, routed: Routed) -> torch.Tensor:
        """The part that the experts of an "experts" op have in its tokens' results, [T, H]."""
        assert op.slot is not None
        expected = (op.layer, op.part, op.slot.generation, op.experts)
        if self._holds[op.slot.slot] != expected:
            raise PlanError(
                f"op {op.id}: slot {op.slot.slot} of the ring does not hold part {op.part} of layer {op.layer}"
            )
        ids = self._local(routed.expert_ids, op.experts).int()
        return self._experts[op.slot.slot](routed.x_TH, ids, routed.weights)

    def _bind(self, numerics: Numerics, slot: np.ndarray, experts_per_slot: int) -> ExpertsFn:
        size = self._block.num_bytes
        experts = [self._block.views(slot[e * size : (e + 1) * size]) for e in range(experts_per_slot)]
        return numerics.experts(*zip(*experts, strict=True))
