"""The emulated device's ring of slots: right under any timing, and planted mistakes are seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlab.batch import Entry
from hybridlab.checkpoint import open_checkpoint
from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.engine import link as link_module
from hybridlab.engine.devices import cpu_device, emulated_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.link import CopyLink
from hybridlab.engine.ring import NAN_CODE, Ring, slots_bytes
from hybridlab.errors import PlanError
from hybridlab.lowering import Planner, bind_slots
from hybridlab.model.base import Routed
from hybridlab.model.expert_block import ExpertBlock, experts_of
from hybridlab.model.numerics import Bf16, Exact, Numerics
from hybridlab.plans import PlacementPlan, Program, SlotUse, StepPlan, Tier
from hybridlab.request import Sampling
from hybridlab.spec import HardwareSpec
from hybridlab.strategies.overlap.prefetch import Prefetch
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.validation import execution_order, validate

ORACLES = Path(__file__).parents[2] / "data" / "oracles"
EMULATED = HardwareSpec("toy", "emulated", num_cores=2, host_memory_bytes=2**34, gpu_memory_bytes=2**34)
PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module", params=["qwen3_bf16", "qwen3_fp8_128"])
def checkpoint(request):
    return open_checkpoint(ORACLES / request.param)


def streamed(slots=2, parts=3) -> PlacementPlan:
    return PlacementPlan(Tier.STREAMED, ring_slots=slots, parts_per_layer=parts)


def program_of(spec, placed) -> Program:
    planner = Planner(spec, EMULATED, AllHost(), Prefetch(), placed)
    return planner.program(planner.shape("main", StepPlan("prefill", {"a": len(PROMPT)})))


def open_device(checkpoint, placed, *, poison=False, link=None, numerics: Callable[[], Numerics] = Exact):
    return emulated_device(checkpoint, numerics(), numerics(), placed, 1, link or CopyLink(), poison=poison)


def ring_of(device) -> Ring:
    ring = device.load.__self__
    assert isinstance(ring, Ring)
    return ring


def logits(device, program: Program, dtype=torch.float32) -> np.ndarray:
    cache = KVCache(device.model.spec, 4, 16, dtype)
    entry = Entry("a", PROMPT, 0, (0, 1, 2), Sampling(), wants_token=True)
    try:
        return Executor(device, cache).logits(program, entry).numpy()
    finally:
        device.close()


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_poisoned_slots_change_nothing(checkpoint, slots, precision):
    numerics, dtype = (Exact, torch.float32) if precision == "exact" else (lambda: Bf16(1), torch.bfloat16)
    placed = streamed(slots)
    program = program_of(checkpoint.spec, placed)
    plain = logits(open_device(checkpoint, placed, numerics=numerics), program, dtype)
    poisoned = logits(open_device(checkpoint, placed, numerics=numerics, poison=True), program, dtype)
    np.testing.assert_array_equal(poisoned, plain)
    cpu = replace(program.shape, placement=PlacementPlan())
    planner = Planner(checkpoint.spec, EMULATED, AllHost(), Prefetch(), PlacementPlan())
    expected = logits(cpu_device(checkpoint, numerics(), 1), planner.program(cpu), dtype)
    np.testing.assert_allclose(plain, expected, atol=1e-4 if precision == "exact" else 0.5)


def test_poison_is_nan_in_every_format():
    codes = np.full(4, NAN_CODE, np.uint8)
    assert np.isnan(codes.view(np.float32)).all()
    assert torch.from_numpy(codes).view(torch.bfloat16).isnan().all()
    assert torch.from_numpy(codes).view(torch.float8_e4m3fn).float().isnan().all()


class HeldLink(CopyLink):
    """While `held`, copies are on their way: they arrive at `arrive`."""

    def __init__(self):
        super().__init__()
        self.held, self._late = False, []

    def copy(self, target, source):
        if self.held:
            self._late.append((target, source))
        else:
            super().copy(target, source)

    def arrive(self):
        self.held = False
        for target, source in self._late:
            super().copy(target, source)
        self._late.clear()


class LoadsInTheMiddle:
    """Lanes at their worst: while an op computes on a slot, every load begins that its lane and needs allow."""

    def __init__(self, ring: Ring, link: HeldLink) -> None:
        self._link = link
        ring._experts = [self._interrupted(compute) for compute in ring._experts]
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

    def _load(self):
        op = self._loads.popleft()
        assert set(op.needs) <= self._done
        self._execute(op)
        self._done.add(op.id)

    def _interrupted(self, compute):
        def call(*arguments):
            self._link.held = True
            while self._loads and set(self._loads[0].needs) <= self._done:
                self._load()
                self.early += 1
            result = compute(*arguments)
            self._link.arrive()
            return result

        return call


def at_worst(checkpoint, program, *, poison) -> tuple[np.ndarray, int]:
    """The logits under `LoadsInTheMiddle`, and how many loads began in the middle of an op."""
    link = HeldLink()
    device = open_device(checkpoint, program.shape.placement, poison=poison, link=link)
    lanes = LoadsInTheMiddle(ring_of(device), link)
    return logits(replace(device, lanes=lanes), program), lanes.early


def release_edges(program: Program) -> list[tuple[int, int]]:
    """(load, reader) of every need that keeps a load from overwriting a slot."""
    kinds = {op.id: op.kind for op in program.ops}
    return [(op.id, need) for op in program.ops if op.kind == "load" for need in op.needs if kinds[need] == "experts"]


def without(program: Program, edges) -> Program:
    gone = set(edges)
    ops = tuple(replace(op, needs=tuple(need for need in op.needs if (op.id, need) not in gone)) for op in program.ops)
    return Program(program.shape, ops, execution_order(ops))


def test_every_release_edge_is_needed(checkpoint):
    placed = streamed(2, 3)
    program = program_of(checkpoint.spec, placed)
    expected = logits(open_device(checkpoint, placed), program)
    found, early = at_worst(checkpoint, program, poison=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # torch has more threads here
    assert early > 0
    edges = release_edges(program)
    assert edges
    for edge in edges:
        planted = without(program, [edge])
        with pytest.raises(PlanError, match="may overwrite slot"):
            validate(planted.ops, ring_slots=2, ranks=(0,))
        found, _ = at_worst(checkpoint, planted, poison=True)
        assert np.isnan(found).any()
        # Poison is what shows it: what is not yet overwritten is still right.
        np.testing.assert_allclose(at_worst(checkpoint, planted, poison=False)[0], expected, atol=1e-5)


def test_a_ring_without_release_edges_is_seen_on_lanes_as_they_are(checkpoint):
    """Loads run to the end before the first reader starts: a slot holds something else by then."""
    placed = streamed(1, 3)
    program = program_of(checkpoint.spec, placed)
    planted = without(program, release_edges(program))
    device = open_device(checkpoint, placed)
    last = [op for op in planted.ops if op.kind == "load"][-1]
    readers = tuple(
        replace(op, needs=(*op.needs, last.id)) if op.kind == "router" and op.layer == first_moe(device) else op
        for op in planted.ops
    )
    with pytest.raises(PlanError, match="slot 0 of the ring does not hold part 0 of layer"):
        logits(device, Program(program.shape, readers, execution_order(readers)))


def first_moe(device) -> int:
    return device.model.spec.moe_layers[0]


@pytest.mark.parametrize(
    "change",
    [
        {"part": 1},
        {"slot": SlotUse(0, 1)},
        {"slot": SlotUse(1, 0)},
        {"experts": (1, 0)},
        {"layer": 2},
    ],
    ids=str,
)
def test_a_slot_that_holds_something_else_is_refused(change):
    device = open_device(open_checkpoint(ORACLES / "qwen3_bf16"), streamed(2, 4))
    load = next(op for op in program_of(device.model.spec, streamed(2, 4)).ops if op.kind == "load")
    x, ids, weights = torch.ones(2, 64), torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), torch.full((2, 2), 0.5)
    ring, routed = ring_of(device), Routed(x, ids, weights)
    with pytest.raises(PlanError, match="does not hold"):
        ring.experts(load, routed)  # not loaded yet
    ring.load(load)
    out = ring.experts(load, routed)
    expected = device.model.experts(load.layer, routed, load.experts)
    np.testing.assert_array_equal(out.numpy(), expected.numpy())
    with pytest.raises(PlanError, match=r"op \d+: slot \d of the ring does not hold part \d of layer \d"):
        ring.experts(replace(load, **change), routed)


def test_a_load_that_breaks_off_leaves_an_empty_slot(monkeypatch):
    device = open_device(open_checkpoint(ORACLES / "qwen3_bf16"), streamed(2, 4))
    ring = ring_of(device)
    load = next(op for op in program_of(device.model.spec, streamed(2, 4)).ops if op.kind == "load")
    ring.load(load)

    def breaks(*_):
        raise OSError("planted")

    monkeypatch.setattr(ring._link, "copy", breaks)
    with pytest.raises(OSError, match="planted"):
        ring.load(load)
    with pytest.raises(PlanError, match="does not hold"):
        ring.experts(load, Routed(torch.ones(1, 64), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2)))


def test_the_plan_counts_at_least_what_the_ring_takes(checkpoint):
    for slots, parts in ((1, 1), (2, 3), (5, 8)):
        placed = streamed(slots, parts)
        taken = ring_of(open_device(checkpoint, placed)).num_bytes
        assert taken <= slots_bytes(placed, checkpoint.spec) <= taken + slots * checkpoint.spec.num_experts * 6 * 64
    assert (
        slots_bytes(PlacementPlan(), checkpoint.spec) == slots_bytes(PlacementPlan(ring_slots=3), checkpoint.spec) == 0
    )


def test_an_expert_passes_through_a_slot_unchanged(checkpoint):
    model = cpu_device(checkpoint, Exact(), 1).model
    expert = experts_of(model.expert_weights(checkpoint.spec.moe_layers[0]))[1]
    block = ExpertBlock.of(expert)
    slot = np.zeros(block.num_bytes, np.uint8)
    for offset, source in block.pieces(expert):
        assert offset % 64 == 0
        slot[offset : offset + len(source)] = source
    for got, linear in zip(block.views(slot), expert, strict=True):
        np.testing.assert_array_equal(got.weight, linear.weight)
        assert (got.scale is None) == (linear.scale is None)
        if linear.scale is not None:
            np.testing.assert_array_equal(got.scale, linear.scale)


def test_experts_that_are_unlike_are_refused_before_they_are_loaded():
    model = cpu_device(open_checkpoint(ORACLES / "qwen3_bf16"), Exact(), 1).model
    experts = dict(enumerate(experts_of(model.expert_weights(0))))
    gate, up, down = experts[3]
    experts[3] = (LinearWeights(gate.name, gate.weight[:-1], gate.scale), up, down)
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.experts\.3\.\w+: uint16 \[23, 64\], the ring's slots hold"):
        Ring(1, 8, {0: experts}, Exact(), CopyLink(), num_experts=8)


def test_a_capped_link_takes_the_time_of_its_bytes(monkeypatch):
    """On a clock of its own: copies take no time there, only the waiting does."""
    now_s = [100.0]
    monkeypatch.setattr(link_module, "perf_counter", lambda: now_s[0])
    monkeypatch.setattr(link_module, "sleep", lambda s: now_s.__setitem__(0, now_s[0] + s))
    link, source = CopyLink(2.0), np.random.default_rng(0).integers(0, 255, 3_000_000, np.uint8)
    for _ in range(5):
        target = np.zeros_like(source)
        link.copy(target, source)
        np.testing.assert_array_equal(target, source)
        now_s[0] += 0.0005  # late: the next copy makes up for it
    assert now_s[0] == pytest.approx(100.0005 + 5 * 3e6 / 2e9, rel=1e-7)
    now_s[0] += 50  # idle: no credit for it
    link.copy(target, source)
    assert now_s[0] == pytest.approx(150.0005 + 6 * 3e6 / 2e9, rel=1e-7)
    CopyLink().copy(target, source[::-1].copy())
    np.testing.assert_array_equal(target, source[::-1])


def test_release_edges_are_what_bind_slots_adds(checkpoint):
    """The plants above take away all that keeps a slot: nothing but these edges does."""
    program = program_of(checkpoint.spec, streamed(2, 3))
    bare = [replace(op, slot=None) for op in without(program, release_edges(program)).ops]
    assert tuple(bind_slots(bare, 2)) == program.ops


def test_slots_are_bound_whatever_their_memory_held_before(monkeypatch):
    def used(size: int) -> np.ndarray:
        return np.full(size, NAN_CODE, np.uint8)

    monkeypatch.setattr("hybridlab.engine.ring.aligned", used)
    device = open_device(open_checkpoint(ORACLES / "qwen3_fp8_128"), streamed(2, 1), numerics=lambda: Bf16(1))
    device.close()
