"""Experts on a CUDA device: those that live there, and the ring of slots that the others pass through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from hybridlab.engine.host_store import HostStore
from hybridlab.engine.local_ids import LocalIds, table_of
from hybridlab.errors import PlanError
from hybridlab.model.base import Routed
from hybridlab.model.cuda_experts import ExpertGroup, MakeGroup
from hybridlab.plans import Move, Op, Tier


class CudaRing:
    """`load` fills a slot from the host store, `experts` computes on it. As `ring.Ring`, on a device."""

    def __init__(
        self, num_slots: int, experts_per_slot: int, store: HostStore, make_group: MakeGroup, num_experts: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._store = store
        size = store.block.num_bytes
        self._slots = [torch.empty(experts_per_slot, size, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self._experts = [make_group(slot) for slot in self._slots]
        self._holds: list[tuple | None] = [None] * num_slots
        self._local = LocalIds(num_experts, device)

    def load(self, op: Op) -> None:
        """Enqueue the copies of a "load" op on the current stream; neighbouring experts travel as one."""
        assert op.slot is not None
        slot, blocks = self._slots[op.slot.slot], self._store.blocks(op.layer)
        place = 0
        for first, end in _runs(op.experts):
            slot[place : place + end - first].copy_(blocks[first:end], non_blocking=True)
            place += end - first
        self._holds[op.slot.slot] = (op.layer, op.part, op.slot.generation, op.experts)

    def experts(self, op: Op, routed: Routed) -> torch.Tensor:
        assert op.slot is not None
        if self._holds[op.slot.slot] != (op.layer, op.part, op.slot.generation, op.experts):
            raise PlanError(f"op {op.id}: ring slot {op.slot.slot} does not hold part {op.part} of layer {op.layer}")
        ids = self._local(routed.expert_ids, op.experts)
        return self._experts[op.slot.slot](routed.x_TH, ids, routed.weights, len(op.experts))


class ResidentExperts:
    """Experts that live on the device, in a pool per layer: as many places as there are experts of it in `resident`.

    Those there are lie in the first places, in any order; `move` takes one in or gives one up. Pools and the tables of
    places stay where they are, so that what was captured of a step reads what there is now.
    """

    def __init__(
        self, resident: Mapping[int, Sequence[int]], store: HostStore, make_group: MakeGroup, num_experts: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._store, self._num_experts = store, num_experts
        self._pools: dict[int, torch.Tensor] = {}
        self._places: dict[int, list[int]] = {}
        """Layer -> which expert is in each place."""
        self._tables: dict[int, torch.Tensor] = {}
        """Layer -> the place of each expert."""
        self._experts: dict[int, ExpertGroup] = {}
        for layer, experts in resident.items():
            pool = torch.empty(len(experts), store.block.num_bytes, dtype=torch.uint8, device=device)
            place = 0
            for first, end in _runs(experts):
                pool[place : place + end - first].copy_(store.blocks(layer)[first:end])
                place += end - first
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
                pool[len(places)].copy_(self._store.blocks(move.layer)[move.expert], non_blocking=True)
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


def _runs(experts: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending ids as (first, end) of neighbours."""
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(experts)) if b != a + 1), len(experts)]
    return [(experts[a], experts[b - 1] + 1) for a, b in pairwise(cuts)]
