"""Host memory beside a CUDA device: it keeps what is streamed, computed by the host or may move, and nothing else."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import shared_blocks
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.host_needs import PINNED, host_needs_beside_gpu, kept_experts
from hybridlab.engine.host_store import HostStore
from hybridlab.engine.pinned import Pins
from hybridlab.engine.ring import block_bytes
from hybridlab.engine.shared_blocks import blocks_index, experts_by_layer, fill_blocks, host_store, pinned_ranges
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.weight_index import HUGE_PAGE
from hybridlab.errors import PlanError
from hybridlab.hardware import detect
from hybridlab.model.expert_block import ExpertBlock
from hybridlab.plans import Move, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import resolve

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param(CUDA, marks=[NO_GPU, pytest.mark.gpu]))
MEMFD = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux'")


def placed_by(name: str, checkpoint: Any) -> tuple[PlacementPlan, int]:
    """What `name` makes of a GPU with room for some 40% of the experts, and how many experts it keeps on the host."""
    spec = checkpoint.spec
    layers, total = len(spec.moe_layers), len(spec.moe_layers) * spec.num_experts
    some = int(0.4 * total)
    gpu_gb = (some + 0.5) * spec.expert_bytes / 1e9
    options, kept = {
        "all_host": ({}, total),
        "all_resident": ({}, 0),
        "streamed": ({"stream_from_tokens": 1}, total),
        "hot_resident": ({"gpu_gb": gpu_gb, "ring_slots": 2}, total - some),
        "lru_cache": ({"gpu_gb": gpu_gb}, total),
        "layer_split": ({"gpu_gb": gpu_gb}, (layers - some // spec.num_experts) * spec.num_experts),
    }[name]
    placement = resolve("placement", {"name": name, **options})
    hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
    placed = placement.place(spec, hardware, RoutingStats())
    return replace(placed, movable=bool(getattr(placement, "update_every_steps", 0))), kept


PLACEMENTS = ("all_host", "all_resident", "streamed", "hot_resident", "lru_cache", "layer_split")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_keeps_what_it_needs(oracle, name, where, monkeypatch):
    checkpoint = open_checkpoint(oracle.folder)
    placed, expected = placed_by(name, checkpoint)
    pinned: list[int] = []
    pin = Pins.pin
    monkeypatch.setattr(Pins, "pin", lambda self, room, **how: (pinned.append(room.nbytes), pin(self, room, **how)))
    device = cuda_device(checkpoint, placed, 2, where=where)
    try:
        store: Any = device.experts[Tier.HOST]._store  # type: ignore[attr-defined]
        size = store.block.num_bytes
        assert store.num_bytes == expected * size
        if where == "cpu":
            assert pinned == []
        else:  # and, for experts that live on the GPU for good, a buffer that is given back
            kept = kept_experts(placed, checkpoint.spec)
            layers = [len(kept[layer]) * size for layer in kept if kept[layer]]
            assert pinned[: len(layers)] == layers and len(pinned) <= len(layers) + 1
        plan = host_needs_beside_gpu(checkpoint.spec, placed, budget_bytes=2**40, kv_token_bytes=0)
        assert plan.fixed[PINNED] == expected * block_bytes(checkpoint.spec)
    finally:
        device.close()
    assert store.num_bytes == 0


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("is_shared", [False, pytest.param(True, marks=MEMFD)], ids=["private", "shared"])
def test_experts_on_the_gpu_for_good_are_the_checkpoints_to_the_byte(oracle, where, is_shared, monkeypatch):
    checkpoint = open_checkpoint(oracle.folder)
    placed, _ = placed_by("hot_resident", checkpoint)
    copied: list[int] = []
    monkeypatch.setattr(HostStore, "copy", lambda self, layer, experts, target: copied.append(layer))
    index = blocks_index(checkpoint, experts_by_layer(checkpoint))
    with SharedWeights.create(index) if is_shared else nullcontext() as shared:
        device = cuda_device(checkpoint, placed, 2, where=where, shared=shared)
    assert copied == []  # shared memory may be pinned up to the middle of one, and CUDA copies no such thing
    try:
        layers = experts_by_layer(checkpoint)
        on_device: Any = device.experts[Tier.RESIDENT]
        block = ExpertBlock.of(next(iter(layers.values()))[0])
        compared = 0
        for layer, places in on_device._places.items():
            for place, expert in enumerate(places):
                found = on_device._pools[layer][place].cpu().numpy()
                for offset, source in block.pieces(layers[layer][expert]):
                    assert np.array_equal(found[offset : offset + len(source)], source)
                    compared += 1
        assert compared
        if is_shared:
            return
        some = next(layer for layer, places in on_device._places.items() if places)
        gone = on_device._places[some][0]
        device.move((Move(some, gone, Tier.HOST),))
        monkeypatch.undo()
        with pytest.raises(PlanError, match=f"expert {gone} of layer {some} is not in host memory"):
            device.move((Move(some, gone, Tier.RESIDENT),))
    finally:
        device.close()


def test_neighbours_in_the_store_are_one_copy(oracle):
    """Whatever their numbers."""
    layers = experts_by_layer(open_checkpoint(oracle.folder))
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    layer = next(iter(layers))
    copies: list[int] = []

    class Target:
        def __getitem__(self, rows: slice):
            copies.append(rows.stop - rows.start)
            return torch.empty(rows.stop - rows.start, block.num_bytes, dtype=torch.uint8)

    target: Any = Target()
    for kept, expected in (((0, 2), [2]), ((0, 1, 2), [1, 1])):
        store = HostStore.filled(layers, block, {layer: kept}, pin=False, threads=2)
        store.copy(layer, (0, 2), target)
        assert copies == expected
        assert store.has(layer, (2, 0)) and store.has(layer, (2, 1)) == (1 in kept) and not store.has(layer + 1, (2,))
        copies.clear()
        store.close()


@MEMFD
def test_of_shared_blocks_the_kept_ones_are_pinned(oracle, monkeypatch):
    checkpoint = open_checkpoint(oracle.folder)
    layers = experts_by_layer(checkpoint)
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    pinned: list[int] = []
    monkeypatch.setattr(Pins, "pin", lambda self, room, *, read_only: pinned.append(room.nbytes))
    monkeypatch.setattr(shared_blocks, "HUGE_PAGE", 4096)
    index = blocks_index(checkpoint, layers)
    with SharedWeights.create(index) as shared:
        fill_blocks(checkpoint, shared, threads=2)
        first, last = min(layers), max(layers)
        for kept in ({layer: [] for layer in layers}, {first: [0], last: [1, 2]}):
            pinned.clear()
            store = host_store(checkpoint, layers, block, shared, kept, pin=True, threads=2)
            wanted = sum(map(len, kept.values())) * block.num_bytes
            assert wanted <= sum(pinned) <= wanted + 2 * 4096 * sum(map(len, kept.values()))
            assert store.has(first, range(len(layers[first])))  # the others can be read as well
            store.close()


@pytest.mark.parametrize("size", [1000, HUGE_PAGE - 64, HUGE_PAGE, 3 * HUGE_PAGE + 64])
def test_pinned_ranges_cover_each_expert_whole_and_nothing_twice(oracle, size):
    layers = {1: [None] * 16, 4: [None] * 16}
    index = blocks_index(open_checkpoint(oracle.folder), experts_by_layer(open_checkpoint(oracle.folder)))
    index = replace(index, sizes={f"layer.{layer}": len(experts) * size for layer, experts in layers.items()})
    kept = {1: [0, 1, 7, 15], 4: [0, 9]}
    ranges = pinned_ranges(index, size, kept)
    for (_, end), (first, _) in pairwise(ranges):
        assert end < first
    assert all(first % HUGE_PAGE == end % HUGE_PAGE == 0 for first, end in ranges)
    assert ranges[-1][1] <= index.num_bytes
    for layer, experts in kept.items():
        for expert in experts:
            at = index.places[f"layer.{layer}"][0] + expert * size
            assert sum(first <= at and at + size <= end for first, end in ranges) == 1
