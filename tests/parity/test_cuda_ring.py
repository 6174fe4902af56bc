"""A CUDA device's ring of slots: right when slots are poisoned before each load, and a late reader is seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybridlab.batch import Entry
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.cuda_ring import CudaRing
from hybridlab.engine.devices import Device
from hybridlab.engine.executor import Executor
from hybridlab.engine.host_store import HostStore
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.ring import NAN_CODE
from hybridlab.engine.shared_blocks import experts_by_layer
from hybridlab.errors import PlanError
from hybridlab.lowering import Planner
from hybridlab.model.base import Routed
from hybridlab.model.expert_block import ExpertBlock
from hybridlab.model.fp8_experts import expert_format
from hybridlab.plans import PlacementPlan, Program, SlotUse, StepPlan, Tier
from hybridlab.request import Sampling
from hybridlab.spec import HardwareSpec
from hybridlab.strategies.overlap.prefetch import Prefetch
from hybridlab.strategies.placement.all_host import AllHost

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param(CUDA, marks=[NO_GPU, pytest.mark.gpu]))
MACHINE = HardwareSpec("toy", "cuda", num_cores=2, host_memory_bytes=2**34, gpu_memory_bytes=2**34)
PROMPT = tuple(range(5, 45))


@pytest.fixture
def checkpoint(oracle):
    return open_checkpoint(oracle.folder)


def streamed(slots: int, parts: int) -> PlacementPlan:
    return PlacementPlan(Tier.STREAMED, ring_slots=slots, parts_per_layer=parts)


def program_of(checkpoint: Any, placed: PlacementPlan) -> Program:
    planner = Planner(checkpoint.spec, MACHINE, AllHost(), Prefetch(), placed)
    return planner.program(planner.shape("main", StepPlan("prefill", {"a": len(PROMPT)})))


def ring_of(device: Device) -> CudaRing:
    ring = device.load.__self__  # type: ignore[attr-defined]
    assert isinstance(ring, CudaRing)
    return ring


def logits(device: Device, program: Program, times: int = 1) -> np.ndarray:
    """Of the last of so many runs: a ring goes on from one to the next."""
    cache = KVCache(device.model.spec, 4, 16, torch.bfloat16, device.torch_device)
    entry = Entry("a", PROMPT, 0, (0, 1, 2), Sampling(), wants_token=True)
    executor = Executor(device, cache)
    try:
        return [executor.logits(program, entry).numpy() for _ in range(times)][-1]
    finally:
        device.close()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("slots", "parts"), [(1, 1), (1, 3), (2, 3), (5, 2)])
def test_poisoned_slots_change_nothing(checkpoint, slots, parts, where):
    placed = streamed(slots, parts)
    program = program_of(checkpoint, placed)
    plain, poisoned = (
        logits(cuda_device(checkpoint, placed, 2, where=where, poison=poison), program, times=3)
        for poison in (False, True)
    )
    assert np.isfinite(plain).all()
    np.testing.assert_array_equal(poisoned, plain)


@pytest.mark.parametrize("where", WHERE)
def test_a_slot_is_poison_until_its_load_arrives(checkpoint, where, monkeypatch):
    placed = streamed(2, 2)
    device = cuda_device(checkpoint, placed, 2, where=where, poison=True)
    ring = ring_of(device)
    load = next(op for op in program_of(checkpoint, placed).ops if op.kind == "load")
    assert load.slot is not None
    slot = ring._slots[load.slot.slot]
    store, copy = ring._store, ring._store.copy
    monkeypatch.setattr(store, "copy", lambda layer, experts, target: None)
    ring.load(load)
    assert (slot == NAN_CODE).all()
    monkeypatch.setattr(store, "copy", copy)
    ring.load(load)
    for row, expert in enumerate(load.experts):
        assert torch.equal(slot[row].cpu(), store.bytes_of(load.layer, expert))
    assert (slot[len(load.experts) :] == NAN_CODE).all()
    device.close()


class LateStore:
    """A store whose copies arrive when `arrive` is called, while it is `held`."""

    def __init__(self, store: HostStore) -> None:
        self._store, self.held = store, False
        self._late: list[tuple] = []

    def copy(self, layer: int, experts: Sequence[int], target: torch.Tensor) -> None:
        if self.held:
            self._late.append((layer, experts, target))
        else:
            self._store.copy(layer, experts, target)

    def arrive(self) -> None:
        self.held = False
        for copy in self._late:
            self._store.copy(*copy)
        self._late.clear()


class LoadsInTheMiddle:
    """Lanes at their worst: while an op computes on a slot, every load begins that its lane and needs allow."""

    def __init__(self, ring: CudaRing) -> None:
        self._store = LateStore(ring._store)
        late: Any = self._store
        at_worst: Any = [self._interrupted(compute) for compute in ring._experts]
        ring._store, ring._experts = late, at_worst
        self.early = 0

    def run(self, program, execute, clock_start_s):
        self._execute, self._done = execute, set()
        self._loads = deque(op for op in program.ops if op.kind == "load")
        for op in program.order:
            if op.kind == "load":
                while op.id not in self._done:
                    self._load()
            else:
                execute(op)
                self._done.add(op.id)
        return ()

    def close(self) -> None:
        pass

    def _load(self) -> None:
        op = self._loads.popleft()
        assert set(op.needs) <= self._done
        self._execute(op)
        self._done.add(op.id)

    def _interrupted(self, compute):
        def call(*arguments):
            self._store.held = True
            while self._loads and set(self._loads[0].needs) <= self._done:
                self._load()
                self.early += 1
            result = compute(*arguments)
            self._store.arrive()
            return result

        return call


def at_worst(checkpoint: Any, program: Program, *, poison: bool) -> tuple[np.ndarray, int]:
    """The logits under `LoadsInTheMiddle`, and how many loads began in the middle of an op."""
    device = cuda_device(checkpoint, program.shape.placement, 2, where="cpu", poison=poison)
    lanes = LoadsInTheMiddle(ring_of(device))
    return logits(replace(device, lanes=lanes), program), lanes.early


def release_edges(program: Program) -> list[tuple[int, int]]:
    """(load, reader) of every need that keeps a load from overwriting a slot."""
    kinds = {op.id: op.kind for op in program.ops}
    return [(op.id, need) for op in program.ops if op.kind == "load" for need in op.needs if kinds[need] == "experts"]


def without(program: Program, edges: Sequence[tuple[int, int]]) -> Program:
    """The same order of execution, but for these edges."""
    gone = set(edges)
    kept = {
        op.id: replace(op, needs=tuple(need for need in op.needs if (op.id, need) not in gone)) for op in program.ops
    }
    return Program(program.shape, tuple(kept[op.id] for op in program.ops), tuple(kept[op.id] for op in program.order))


def test_every_release_edge_is_needed(checkpoint):
    placed = streamed(2, 3)
    program = program_of(checkpoint, placed)
    expected = logits(cuda_device(checkpoint, placed, 2, where="cpu"), program)
    found, early = at_worst(checkpoint, program, poison=True)
    np.testing.assert_array_equal(found, expected)
    assert early > 0
    edges = release_edges(program)
    assert edges
    for edge in edges:
        found, _ = at_worst(checkpoint, without(program, [edge]), poison=True)
        assert np.isnan(found).any()


@NO_GPU
@pytest.mark.gpu
def test_a_load_that_overtakes_its_readers_is_seen_on_streams(checkpoint):
    """Readers are slow, copies slower: without release edges, a slot is poison when it is read."""
    placed = streamed(1, 3)
    program = program_of(checkpoint, placed)
    expected = logits(cuda_device(checkpoint, placed, 2, where=CUDA), program)
    for planted in (program, without(program, release_edges(program))):
        device = cuda_device(checkpoint, placed, 2, where=CUDA, poison=True)
        ring = ring_of(device)
        store = ring._store

        def late_copy(layer: int, experts: Sequence[int], target: torch.Tensor, store: HostStore = store) -> None:
            torch.cuda._sleep(20_000_000)  # some 10 ms, on the stream of the load, behind the poison
            store.copy(layer, experts, target)

        def slow(compute: Any) -> Any:
            def call(*arguments: Any) -> Any:
                torch.cuda._sleep(4_000_000)
                return compute(*arguments)

            return call

        late: Any = SimpleNamespace(copy=late_copy)
        ring._store, ring._experts = late, [slow(compute) for compute in ring._experts]
        found = logits(device, planted)
        if planted is program:
            np.testing.assert_array_equal(found, expected)
        else:
            assert np.isnan(found).any()


@pytest.mark.parametrize(
    "change", [{"part": 1}, {"slot": SlotUse(0, 1)}, {"slot": SlotUse(1, 0)}, {"layer": 2}], ids=str
)
def test_a_slot_that_holds_something_else_is_refused(checkpoint, change):
    layers = experts_by_layer(checkpoint)
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    kept = {layer: range(len(experts)) for layer, experts in layers.items()}
    store = HostStore.filled(layers, block, kept, pin=False, threads=1)
    spec, device = checkpoint.spec, torch.device("cpu")
    make_group = expert_format("bf16", block, spec.num_experts, device)
    ring = CudaRing(2, spec.num_experts, store, make_group, spec.num_experts, device)
    load = next(op for op in program_of(checkpoint, streamed(2, 4)).ops if op.kind == "load")
    routed = Routed(
        torch.ones(2, spec.hidden), torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), torch.full((2, 2), 0.5)
    )
    with pytest.raises(PlanError, match="does not hold"):
        ring.experts(load, routed)  # not loaded yet
    ring.load(load)
    assert ring.experts(load, routed).isfinite().all()
    with pytest.raises(PlanError, match=r"op \d+: ring slot \d does not hold part \d of layer \d"):
        ring.experts(replace(load, **change), routed)
    store.copy = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        ring.load(load)  # breaks off
    with pytest.raises(PlanError, match="does not hold"):
        ring.experts(load, routed)
