"""A closed engine has given everything up at once: its threads, its device's memory and the host's, pinned or not."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import hybridlab as hl
from hybridlab.batch import Entry, StepBatch
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import captured_steps, cuda_device, runtime
from hybridlab.engine.host_store import HostStore
from hybridlab.engine.runtime import Runtime
from hybridlab.errors import HybridlabError
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.plans import StepPlan, Tier
from hybridlab.request import Sampling
from hybridlab.routing import RoutingStats
from hybridlab.strategies.registry import resolve

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
PLACEMENTS: tuple[Any, ...] = (
    "all_host",
    "all_resident",
    {"name": "streamed", "stream_from_tokens": 4},
    {"name": "hot_resident", "gpu_gb": 1e-4, "ring_slots": 2, "stream_from_tokens": 4},
)
KV_TOKENS = 1024


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed meanwhile is freed by its last reference."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def cuda_on_cpu(monkeypatch) -> None:
    build = cuda_device.cuda_device
    monkeypatch.setattr(
        cuda_device, "cuda_device", lambda *given, **options: build(*given, **{**options, "where": "cpu"})
    )
    monkeypatch.setattr(runtime, "free_memory_bytes", lambda *index: 2**34)


def started(oracle, placement: Any, *, kv_offloaded: bool = False) -> tuple[Runtime, Planner]:
    """On device "cuda", after a prompt and enough decode steps for one to be captured."""
    checkpoint = open_checkpoint(oracle.folder)
    hardware = replace(detect(), device="cuda", gpu_memory_bytes=2**34)
    chosen = resolve("placement", placement)
    placed = chosen.place(checkpoint.spec, hardware, RoutingStats())
    made = Runtime(
        checkpoint, hardware, placed, precision="bf16", weight_layout="rows", threads=2, accelerator_threads=0,
        token_budget=64, kv_tokens=KV_TOKENS, kv_block_tokens=16, memory_gb=None, free_bytes=None, quiet=True,
    )  # fmt: skip
    planner = Planner(checkpoint.spec, hardware, chosen, resolve("overlap", "prefetch"), placed)
    ids = tuple(oracle.prompts[0]["prompt"])
    run(made, planner, "prefill", Entry("r", ids, 0, tuple(range(8)), Sampling(), wants_token=True))
    for step in range(captured_steps.CAPTURE_FROM + 2):
        entry = Entry("r", (5,), len(ids) + step, tuple(range(8)), Sampling(), wants_token=True)
        run(made, planner, "decode", entry)
    return made, planner


def run(made: Runtime, planner: Planner, role: Any, entry: Entry) -> None:
    step = StepPlan(role, {"r": len(entry.token_ids)})
    made.step(planner.program(planner.shape("main", step)), StepBatch("main", step, (entry,)))


def storages(*roots: Any) -> list[StorageWeakRef]:
    """Of all tensors that are reached from `roots` by what hybridlab's objects and functions hold."""
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    todo = list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list | tuple | set):
            todo += one
        elif isinstance(one, FunctionType):
            todo += [cell.cell_contents for cell in one.__closure__ or ()]
        elif isinstance(one, MethodType):
            todo.append(one.__self__)
        elif type(one).__module__.startswith("hybridlab") and hasattr(one, "__dict__"):
            todo.append(vars(one))
    return [StorageWeakRef(storage) for storage in found.values()]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_nothing_of_a_device_waits_for_the_collector(oracle, placement, cuda_on_cpu, no_collector):
    made, _ = started(oracle, placement)
    device: Any = made._device
    backend = made.backend()  # as an open stream holds it
    store = device.experts[Tier.HOST]._store
    assert made._executor._captured._captured
    parts = (made._executor, made._cache, device.experts[Tier.HOST], store, device.lanes, device.model)
    objects = [weakref.ref(part) for part in parts]
    tensors = storages(device, made._cache, made._executor)
    assert len(tensors) > 20 and not any(tensor.expired() for tensor in tensors)
    del device, store, parts
    made.close()
    assert [ref() for ref in objects] == [None] * len(objects)
    assert all(tensor.expired() for tensor in tensors)
    made.close()  # once more changes nothing
    with pytest.raises(HybridlabError, match="the engine was closed"):
        backend.take_routes()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_engine_without_a_gpu_keeps_nothing_either(oracle, device, no_collector):
    with oracle.load(device=device, threads=2, placement={"name": "streamed", "stream_from_tokens": 4}
                     if device == "emulated" else "all_host") as engine:  # fmt: skip
        engine.generate(oracle.prompts[0]["prompt"], max_tokens=4)
        made: Any = engine.runtime
        refs = [weakref.ref(part) for part in (made._executor, made._cache, made._device.model, made._device.lanes)]
        tensors = storages(made._cache)
    assert [ref() for ref in refs] == [None] * len(refs)
    assert all(tensor.expired() for tensor in tensors)


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_closed_engine_has_given_its_gpu_back(oracle, placement, no_collector):
    def allocated() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def loaded() -> hl.Engine:
        engine = oracle.load(device="cuda", worker="thread", placement=placement)
        engine.generate(oracle.prompts[0]["prompt"], max_tokens=captured_steps.CAPTURE_FROM + 4)
        return engine

    loaded().close()  # what is made once in a process: kernels, handles
    gc.collect()  # what other tests have left
    before = allocated()
    engine = loaded()
    made: Any = engine.runtime
    store = made._device.experts[Tier.HOST]._store
    rooms = list(store._rooms.values())
    assert allocated() > before and all(room.is_pinned() for room in rooms)
    del made, store
    engine.close()
    assert allocated() <= before
    assert not any(room.is_pinned() for room in rooms)
    assert torch.cuda.memory_reserved() == 0 or before > 0


@pytest.mark.parametrize("part", ["CudaRing", "KVCache"])
def test_what_was_made_before_a_part_fails_is_given_back(oracle, cuda_on_cpu, monkeypatch, part):
    closed = []
    close = HostStore.close
    monkeypatch.setattr(HostStore, "close", lambda store: (closed.append(store), close(store))[1])

    def fails(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(cuda_device if part == "CudaRing" else runtime, part, fails)
    threads = {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"}
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        started(oracle, {"name": "streamed", "stream_from_tokens": 4})
    assert len(closed) == 1
    assert {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"} == threads
