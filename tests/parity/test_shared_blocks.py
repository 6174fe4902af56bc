"""Experts of a CUDA device in shared weights: the bytes of a private copy, once for several processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybridlab import weights_held
from hybridlab.batch import Entry
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import shared_blocks
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.host_store import HostStore
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.pinned import Pins
from hybridlab.engine.shared_blocks import blocks_index, experts_by_layer, fill_blocks, host_store
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.model.expert_block import ExpertBlock
from hybridlab.plans import StepPlan
from hybridlab.request import Sampling
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import resolve
from hybridlab.weights_sharing import hold, sharing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux'")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param(CUDA, marks=[NO_GPU, pytest.mark.gpu]))


@pytest.fixture
def checkpoint(oracle):
    return open_checkpoint(oracle.folder)


@pytest.fixture
def shared(checkpoint) -> Iterator[SharedWeights]:
    with SharedWeights.create(blocks_index(checkpoint, experts_by_layer(checkpoint))) as made:
        yield made


def logits(oracle, checkpoint, where: str, shared: SharedWeights | None) -> list[np.ndarray]:
    """Of every prompt, experts streamed to the device."""
    placement, overlap = (
        resolve("placement", {"name": "streamed", "stream_from_tokens": 1}),
        resolve("overlap", "prefetch"),
    )
    hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
    placed = placement.place(checkpoint.spec, hardware, RoutingStats())
    device = cuda_device(checkpoint, placed, 2, where=where, shared=shared)
    try:
        cache = KVCache(checkpoint.spec, 16, 16, torch.bfloat16, device.torch_device)
        executor, planner = (
            Executor(device, cache),
            Planner(checkpoint.spec, hardware, placement, overlap, placed),
        )
        found = []
        for request in oracle.prompts:
            ids = tuple(request["prompt"])
            entry = Entry("r", ids, 0, tuple(range(16)), Sampling(), False)
            program = planner.program(planner.shape("main", StepPlan("prefill", {"r": len(ids)})))
            found.append(executor.logits(program, entry).numpy().copy())
        return found
    finally:
        device.close()


@pytest.mark.parametrize("where", WHERE)
def test_two_devices_on_shared_experts_compute_what_one_with_its_own_does(oracle, checkpoint, shared, where):
    expected = logits(oracle, checkpoint, where, None)
    for _ in range(2):
        for mine, theirs in zip(logits(oracle, checkpoint, where, shared), expected, strict=True):
            assert np.array_equal(mine, theirs)


def test_shared_blocks_are_the_bytes_of_a_private_copy_and_filled_once(checkpoint, shared, monkeypatch):
    layers = experts_by_layer(checkpoint)
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    kept = {layer: range(len(experts)) for layer, experts in layers.items()}
    private = HostStore.filled(layers, block, kept, pin=False, threads=2)
    fill_blocks(checkpoint, shared, threads=2)
    assert shared.resident_bytes == blocks_index(checkpoint, layers).num_bytes

    def refuse(*_, **__):
        raise AssertionError("filled twice")

    monkeypatch.setattr(ExpertBlock, "pieces", refuse)
    store = host_store(checkpoint, layers, block, shared, kept, pin=False, threads=2)
    for layer, experts in kept.items():
        covered = np.zeros(block.num_bytes, bool)  # what lies between the arrays of a block is nobody's
        for offset, shape, dtype in (*block.weights, *block.scales):
            covered[offset : offset + int(np.prod(shape)) * dtype.itemsize] = True
        for expert in experts:
            mine, theirs = (one.bytes_of(layer, expert).numpy() for one in (store, private))
            assert np.array_equal(mine[covered], theirs[covered])
    store.close()


def test_a_driver_that_does_not_pin_what_is_read_only_gets_a_private_copy(checkpoint, shared, monkeypatch, capsys):
    pinned = []

    def pin(self, room, *, read_only=False):
        if read_only:
            raise RuntimeError("cudaHostRegister: error 801")
        pinned.append(room.nbytes)

    monkeypatch.setattr(Pins, "pin", pin)
    layers = experts_by_layer(checkpoint)
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    kept = {layer: [1, 2] for layer in layers}
    host_store(checkpoint, layers, block, shared, kept, pin=True, threads=2)
    assert sum(pinned) == 2 * len(layers) * block.num_bytes
    told = capsys.readouterr().err
    assert "shared experts are not used (cudaHostRegister: error 801); this worker copies its own" in told


def test_held_blocks_are_found_by_their_layout(oracle, checkpoint):
    weights_held.release(oracle.folder)
    held = hold(oracle.folder, idle_s=600.0, layout=shared_blocks.LAYOUT, threads=2, progress=False)
    try:
        assert held.layout == "blocks" and weights_held.find(oracle.folder, "tiles") is None
        with sharing(checkpoint, "blocks", create=False, quiet=True) as found:
            assert found is not None and found.resident_bytes == held.num_bytes
        with sharing(checkpoint, "tiles", create=False, quiet=True) as found:
            assert found is None
        with sharing(checkpoint, "rows", create=True, quiet=True) as found:
            assert found is None
    finally:
        weights_held.release(oracle.folder)


@NO_GPU
@pytest.mark.gpu
def test_cuda_pins_read_only_memory_or_says_that_it_does_not(checkpoint, shared, capsys):
    layers = experts_by_layer(checkpoint)
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    kept = {layer: [1, 2] for layer in layers}
    store = host_store(checkpoint, layers, block, shared, kept, pin=True, threads=2)
    try:
        for layer in layers:
            there = torch.empty(2, block.num_bytes, dtype=torch.uint8, device="cuda")
            store.copy(layer, (1, 2), there)
            for row, expert in enumerate((1, 2)):
                assert store.bytes_of(layer, expert).is_pinned()
                assert torch.equal(there[row].cpu(), store.bytes_of(layer, expert))
        told = capsys.readouterr().err
        assert told == "" or "shared experts are not used" in told
    finally:
        store.close()
