"""Experts on a CUDA device: those that live there, and the ring of slots that the others pass through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hybridlab.engine.host_store import HostStore
from hybridlab.engine.local_ids import LocalIds, table_of
from hybridlab.engine.ring import NAN_CODE
from hybridlab.errors import PlanError
from hybridlab.model.base import Routed
from hybridlab.model.cuda_experts import ExpertGroup, MakeGroup
from hybridlab.plans import Move, Op, Tier

Pool = Callable[[int, Sequence[int]], torch.Tensor]
"""(a layer, experts of it) -> uint8 [experts, block bytes] on the device, which holds them once the stream is done."""


class CudaRing:
    """`load` fills a slot from the host store, `experts` computes on it. As `ring.Ring`, on a device.

    With `poison`, a slot is filled with NaN on the stream of its load, before that, so that a late reader is seen.
    """

    def __init__(
        self, num_slots: int, experts_per_slot: int, store: HostStore, make_group: MakeGroup, num_experts: int,
        device: torch.device, *, poison: bool = False,
    ) -> None:  # fmt: skip
        self._store, self._poison = store, poison
        size = store.block.num_bytes
        self._slots = [torch.empty(experts_per_slot, size, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self._experts = [make_group(slot) for slot in self._slots]
        self._holds: list[tuple | None] = [None] * num_slots
        self._local = LocalIds(num_experts, device)

    def load(self, op: Op) -> None:
        """Enqueue the copies of a "load" op on the current stream; neighbouring experts travel as one."""
        assert op.slot is not None
        slot = self._slots[op.slot.slot]
        self._holds[op.slot.slot] = None
        if self._poison:
            slot.fill_(NAN_CODE)
        self._store.copy(op.layer, op.experts, slot)
        self._holds[op.slot.slot] = (op.layer, op.part, op.slot.generation, op.experts)

    def experts(self, op: Op, routed: Routed) -> torch.Tensor:
        assert op.slot is not None
        if self._holds[op.slot.slot] != (op.layer, op.part, op.slot.generation, op.experts):
            raise PlanError(f"op {op.id}: ring slot {op.slot.slot} does not hold part {op.part} of layer {op.layer}")
        ids = self._local(routed.expert_ids, op.experts)
        return self._experts[op.slot.slot](routed.x_TH, ids, routed.weights, len(op.experts))

    def close(self) -> None:
        """Give the slots' memory up; idempotent."""
        for held in (self._slots, self._experts, self._holds):
            held.clear()


class ResidentExperts:
    """Experts that live on the device, in a pool per layer: as many places as there are experts of it in `resident`.

    Those there are lie in the first places, in any order; `move` takes one in or gives one up. Pools and the tables of
    places stay where they are, so that what was captured of a step reads what there is now. `pool_of` gives
    them with the first ones, `store` those that move.
    """

    def __init__(
        self, resident: Mapping[int, Sequence[int]], pool_of: Pool, store: HostStore, make_group: MakeGroup,
        num_experts: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._store, self._num_experts = store, num_experts
        self._pools: dict[int, torch.Tensor] = {}
        self._places: dict[int, list[int]] = {}
        """Layer -> which expert is in each place."""
        self._tables: dict[int, torch.Tensor] = {}
        """Layer -> the place of each expert."""
        self._experts: dict[int, ExpertGroup] = {}
        for layer, experts in resident.items():
            pool = pool_of(layer, experts)
            self._pools[layer], self._places[layer] = pool, list(experts)
            self._tables[layer] = table_of(experts, num_experts).to(device)
            self._experts[layer] = make_group(pool)

    def __call__(self, op: Op, routed: Routed) -> torch.Tensor:
        places = self._places[op.layer]
        if len(places) != len(op.experts) or set(places) != set(op.experts):
            raise PlanError(
                f"op {op.id}: experts {op.experts} of layer {op.layer} are not those that live on the device"
            )
        ids = self._tables[op.layer][routed.expert_ids.long()]
        return self._experts[op.layer](routed.x_TH, ids, routed.weights, len(places))

    def move(self, moves: Sequence[Move]) -> None:
        """Between steps: enqueue the copies on the current stream; what leaves makes room for what comes."""
        for move in sorted(moves, key=lambda move: move.tier is Tier.RESIDENT):
            pool, places = self._pools.get(move.layer), self._places.get(move.layer, [])
            if move.tier is Tier.RESIDENT and move.expert not in places:
                if pool is None or len(places) == len(pool):
                    raise PlanError(f"expert {move.expert} of layer {move.layer} finds no room on the device")
                self._store.copy(move.layer, (move.expert,), pool[len(places) :])
                places.append(move.expert)
            elif move.tier is not Tier.RESIDENT and move.expert in places:
                assert pool is not None
                last = places.pop()
                if last != move.expert:  # the last one closes the gap
                    place = places.index(move.expert)
                    pool[place].copy_(pool[len(places)], non_blocking=True)
                    places[place] = last
        for layer in self._tables.keys() & {move.layer for move in moves}:
            self._tables[layer].copy_(table_of(self._places[layer], self._num_experts))

    def close(self) -> None:
        """Give the pools' memory up; idempotent."""
        for held in (self._pools, self._places, self._tables, self._experts):
            held.clear()
