"""Experts that move while requests are served: tokens stay those of the oracles, and room is never exceeded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from hybridlab.batch import Entry, StepBatch
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.cuda_device import CUDA, cuda_device
from hybridlab.engine.devices import emulated_device
from hybridlab.engine.executor import Executor
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.link import CopyLink
from hybridlab.errors import PlanError
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.model.numerics import Exact
from hybridlab.plans import ExpertPath, Move, PlacementPlan, Program, StepPlan, Tier
from hybridlab.request import Sampling
from hybridlab.spec import ModelSpec
from hybridlab.strategies import registry
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.strategies.placement.lru_cache import LruCache

RESIDENT, STREAMED, HOST = Tier.RESIDENT, Tier.STREAMED, Tier.HOST
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param(CUDA, marks=[NO_GPU, pytest.mark.gpu]))


@dataclass(frozen=True)
class Restless(AllHost):
    """Starts with two resident experts a layer, the others streamed; each update gives every expert another tier.

    At most two are resident, and at most as many as at first are streamed: those that a prompt streams, decode does
    not.
    """

    update_every_steps: int = 1
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    spec: list[ModelSpec] = field(default_factory=list)

    def place(self, model, hardware, routing):
        self.spec.append(model)
        two = {(layer, e): RESIDENT for layer in model.moe_layers for e in (0, 2)}
        return PlacementPlan(STREAMED, two, ring_slots=2, parts_per_layer=2)

    def expert_path(self, num_tokens, placed, hardware):
        return ExpertPath() if num_tokens > 4 else ExpertPath(prefetch=())

    def update(self, routing):
        return self.moves(self.spec[0])

    def moves(self, spec: ModelSpec) -> tuple[Move, ...]:
        found = []
        for layer in spec.moe_layers:
            for i, e in enumerate(self.rng.sample(range(spec.num_experts), spec.num_experts)):
                found.append(Move(layer, e, RESIDENT if i < 2 else self.rng.choice((STREAMED, HOST))))
        return tuple(found)


def gb(spec: ModelSpec, share: float) -> float:
    """1e9 bytes of so large a share of the experts."""
    return share * len(spec.moe_layers) * spec.num_experts * spec.expert_bytes / 1e9


def resident(placed: PlacementPlan, spec: ModelSpec) -> dict[int, set[int]]:
    return {n: {e for e in range(spec.num_experts) if placed.tier(n, e) is RESIDENT} for n in spec.moe_layers}


MOVING = {
    "lru_cache": lambda spec: LruCache(gb(spec, 0.4), update_every_steps=2, moves_per_update=6),
    "lru_cache, often": lambda spec: LruCache(gb(spec, 0.7), update_every_steps=1),
    "restless": lambda spec: Restless(),
}


@pytest.mark.parametrize(("name", "overlap"), list(product(MOVING, registry.names("overlap"))))
def test_tokens_are_the_oracles_while_experts_move(oracle, name, overlap):
    placement = MOVING[name](oracle.spec)
    with oracle.load(device="emulated", placement=placement, overlap=overlap, precision="exact", threads=2) as engine:
        planned = resident(engine.planner.placed, oracle.spec)
        plans, update = [], engine.planner.update

        def updated(backend, num_steps):
            update(backend, num_steps)
            plans.append(resident(engine.planner.placed, oracle.spec))

        engine.planner.update = updated
        for _ in range(2):
            oracle.check_logits(engine)
            served = engine.serve(oracle.requests(), "fcfs")
            assert [record.output for record in served.records] == oracle.greedy
    assert len({str(plan) for plan in plans}) > 1  # they did move
    for plan in plans:
        assert all(len(plan[layer]) <= len(planned[layer]) for layer in planned)


def test_a_cache_comes_to_hold_what_is_used(oracle):
    """Two experts of each layer get all routes; the cache began with others."""
    spec = oracle.spec
    hot = (spec.num_experts - 1, spec.num_experts - 3)

    def same_two(layer, entries, ids):
        return np.broadcast_to(np.array(hot, np.int32), ids.shape).copy()

    assert spec.top_k == 2
    cache = LruCache(gb(spec, 2 / spec.num_experts), update_every_steps=4)
    with oracle.load(device="emulated", placement=cache, precision="exact", threads=2) as engine:
        assert resident(engine.planner.placed, spec) == {layer: {0, 1} for layer in spec.moe_layers}
        engine.serve(oracle.requests(), "fcfs", on_route=same_two)
        assert resident(engine.planner.placed, spec) == {layer: set(hot) for layer in spec.moe_layers}


class CountingLink(CopyLink):
    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def copy(self, target, source):
        self.num_bytes += len(source)
        super().copy(target, source)


def test_an_expert_that_moves_in_takes_its_bytes_on_the_emulated_link(oracle):
    link, spec = CountingLink(), oracle.spec
    layer = spec.moe_layers[0]
    device = emulated_device(open_checkpoint(oracle.folder), Exact(), Exact(), PlacementPlan(), 1, link)
    device.move((Move(layer, 2, HOST), Move(layer, 0, STREAMED)))
    assert link.num_bytes == 0
    device.move((Move(layer, 2, RESIDENT),))
    arrays = [array for group in device.model.expert_weights(layer) for array in (group[2].weight, group[2].scale)]
    assert link.num_bytes == sum(array.nbytes for array in arrays if array is not None) > 0
    device.close()


class Bound:
    """A model on `cuda_device`, and what its programs come from."""

    def __init__(self, oracle: Any, where: str, placement: Any) -> None:
        checkpoint = open_checkpoint(oracle.folder)
        hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**33)
        placed = replace(placement.place(checkpoint.spec, hardware, None), movable=True)
        self.device = cuda_device(checkpoint, placed, 2, where=where)
        cache = KVCache(checkpoint.spec, 16, 16, torch.bfloat16, self.device.torch_device)
        self.executor = Executor(self.device, cache)
        overlap = registry.resolve("overlap", "prefetch")
        self.planner = Planner(checkpoint.spec, hardware, placement, overlap, placed)

    def program(self, num_tokens: int) -> Program:
        return self.planner.program(self.planner.shape("main", StepPlan("prefill", {"r": num_tokens})))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        entry = Entry("r", tuple(ids), 0, tuple(range(16)), Sampling(), wants_token=True)
        return self.executor.logits(self.program(len(ids)), entry).numpy()


@pytest.fixture(params=WHERE)
def bound(request, oracle) -> Iterator[Bound]:
    bound = Bound(oracle, request.param, Restless())
    yield bound
    bound.device.close()


def test_a_device_computes_alike_after_any_moves(oracle, bound):
    """Each arrangement sums other groups, in BF16: the same within a tolerance far below a wrong expert's."""
    ids = max((request["prompt"] for request in oracle.prompts), key=len)
    before = bound.logits(ids)
    bound.planner.update(bound.executor, 0)
    found = [resident(bound.planner.placed, oracle.spec)]
    for _ in range(6):
        bound.planner.update(bound.executor, 1)
        found.append(resident(bound.planner.placed, oracle.spec))
        after = bound.logits(ids)
        assert np.median(np.abs(after - before)) <= oracle.expected["tol_bf16_median"] / 2
        assert (after.argmax(-1) == before.argmax(-1)).mean() > 0.9
    assert len({str(plan) for plan in found}) > 2


def test_an_expert_on_the_device_is_the_hosts_to_the_byte(oracle, bound):
    on_device: Any = bound.device.experts[RESIDENT]
    for _ in range(5):
        bound.planner.update(bound.executor, 1)
        for layer, experts in resident(bound.planner.placed, oracle.spec).items():
            places = on_device._places[layer]
            assert set(places) == experts
            for place, expert in enumerate(places):
                assert torch.equal(on_device._pools[layer][place].cpu(), on_device._store.bytes_of(layer, expert))
                assert on_device._tables[layer][expert] == place


def test_an_old_program_and_a_full_pool_are_refused(oracle, bound):
    layer = oracle.spec.moe_layers[0]
    old = bound.program(8)
    bound.executor.move((Move(layer, 2, HOST), Move(layer, 1, RESIDENT)))
    entry = Entry("r", tuple(range(5, 13)), 0, tuple(range(16)), Sampling(), wants_token=True)
    with pytest.raises(PlanError, match=f"of layer {layer} are not those that live on the device"):
        bound.executor.logits(old, entry)
    with pytest.raises(PlanError, match=f"expert 3 of layer {layer} finds no room on the device"):
        bound.executor.move((Move(layer, 3, RESIDENT),))


def test_routes_are_counted_where_they_are_made(oracle, bound):
    ids = oracle.prompts[-1]["prompt"]
    spec = oracle.spec
    seen: dict[int, np.ndarray] = {}

    def on_route(layer: int, entries: Sequence[Entry], chosen: np.ndarray) -> None:
        seen[layer] = np.bincount(chosen.ravel(), minlength=spec.num_experts)

    def run() -> None:
        entry = Entry("r", tuple(ids), 0, tuple(range(16)), Sampling(), wants_token=True)
        batch = StepBatch("main", StepPlan("prefill", {"r": len(ids)}), (entry,))
        bound.executor.run(bound.program(len(ids)), batch, 0.0, on_route)

    run()  # nobody asked yet
    assert not bound.executor.take_routes().any()
    run()
    found = bound.executor.take_routes()
    assert found.dtype == np.int64 and found.sum() == len(ids) * spec.top_k * len(spec.moe_layers)
    np.testing.assert_array_equal(found, np.stack([seen[layer] for layer in spec.moe_layers]))
    assert not bound.executor.take_routes().any()
