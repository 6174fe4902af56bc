"""A GPU's memory: captured steps keep to their share, and all together to the plan."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab.checkpoint.writer import make_checkpoint
from hybridlab.engine import captured_steps, cuda_device
from hybridlab.engine.channel import Kind, unpack_json
from hybridlab.engine.cuda_capture import GraphCapture
from hybridlab.engine.cuda_memory import CONTEXT_BYTES, CUBLAS_BYTES, captured_bytes
from hybridlab.engine.memory import GIB, Peak
from hybridlab.engine.runtime import Runtime
from hybridlab.engine.worker_main import Loop

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


class Pool:
    """Lanes whose graphs take `each` bytes."""

    def __init__(self, each: int) -> None:
        self.each, self.captured_bytes, self.captured = each, 0, 0

    def capture(self, program, execute, upload):
        self.captured += 1
        self.captured_bytes += self.each
        return lambda clock_start_s: ()


class Host:
    def step(self, program, tokens):
        return SimpleNamespace(tokens=tokens)

    @contextmanager
    def holding(self, step) -> Iterator[None]:
        yield

    running = holding


def capture_of(pool: Any, room_bytes: int, token_bytes: int) -> Any:
    host: Any = Host()
    capture: Any = GraphCapture(pool, host, room_bytes, token_bytes)
    return lambda *tokens: capture(None, tokens, None, None)


def test_a_step_that_would_take_more_than_is_planned_is_not_captured():
    pool = Pool(300 << 20)
    capture = capture_of(pool, 1000 << 20, 100 << 20)
    assert capture(3)(0.0) == ()
    capture(2, 2)
    with pytest.raises(MemoryError, match="take 600 MiB and this one would take 500 more, 1000 are planned for them"):
        capture(5)
    assert pool.captured == 2
    capture(4)  # as many as there is room for
    assert pool.captured_bytes == 900 << 20


def test_a_step_that_took_more_than_expected_is_the_last_one():
    pool = Pool(600 << 20)
    capture = capture_of(pool, 1000 << 20, 1)
    capture(1)
    with pytest.raises(MemoryError, match="captured steps take 1200 MiB, 1000 are planned for them"):
        capture(1)
    with pytest.raises(MemoryError):
        capture(1)
    assert pool.captured == 2


def test_an_engine_shows_its_peak(oracle, monkeypatch):
    peak = Peak(3 * GIB // 2, 2 * GIB)
    with oracle.load(threads=2) as engine:
        assert engine.peak() is None and "at its peak" not in engine._repr_html_()
        monkeypatch.setattr(Runtime, "peak", lambda self: peak)
        assert engine.peak() == peak
        assert "GPU memory at its peak (GiB): 1.50 in tensors, 2.00 taken" in engine._repr_html_()
    assert engine.peak() is None


def test_a_worker_process_tells_its_peak(oracle, monkeypatch):
    with oracle.load(threads=2, worker="process") as engine:
        assert engine.peak() is None
    told: Any = None
    runtime = Runtime.__new__(Runtime)
    loop = Loop(told, runtime, oracle.spec)
    monkeypatch.setattr(Runtime, "peak", lambda self: Peak(5, 7))
    answer = loop._answer(Kind.PEAK, memoryview(b""))
    assert Peak(**unpack_json(memoryview(answer))) == Peak(5, 7)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> Path:
    """Of qwen3-30b-a3b, in FP8: 2.4 GB."""
    folder = tmp_path_factory.mktemp("checkpoints") / "two_layers"
    make_checkpoint(folder, "qwen3-30b-a3b", layers=2, progress=False)
    return folder


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["all_resident", {"name": "streamed", "stream_from_tokens": 64}], ids=str)
def test_no_more_is_taken_than_is_planned(two_layers, placement):
    """Neither by a long prompt nor by captured decode steps: the GPU is as large as the plan, and no larger."""
    gc.collect()  # what other tests have left
    sizes: dict[str, Any] = {"token_budget": 16384, "kv_tokens": 32768, "prefix_cache": False}
    how = {"device": "cuda", "worker": "thread", "quiet": True, "placement": placement, **sizes}
    with hl.load(two_layers, **how) as engine:
        planned = engine.memory.gpu
    assert planned is not None
    with hl.load(two_layers, **how, vram_gb=planned.total_bytes / 1e9 + 1e-6) as engine:
        assert engine.memory.gpu is not None and engine.memory.gpu.parts == planned.parts
        torch.cuda.reset_peak_memory_stats()
        prompts = [16384, *(16 + number for number in range(7))]
        requests = [hl.Request(str(n), tuple(range(100, 100 + n)), 24) for n in prompts]
        served = engine.serve(requests, "fcfs")
        assert [len(record.output) for record in served.records] == [24] * len(prompts)
        made: Any = engine.runtime
        assert made._executor._captured._captured
        assert 0 < made._device.lanes.captured_bytes <= captured_bytes(engine.spec)
        peak = engine.peak()
    assert peak is not None
    assert peak.allocated_bytes <= peak.reserved_bytes <= planned.total_bytes - CONTEXT_BYTES + CUBLAS_BYTES
    assert peak.allocated_bytes >= 0.5 * (planned.total_bytes - CONTEXT_BYTES)


@NO_GPU
@pytest.mark.gpu
def test_without_room_for_graphs_steps_are_enqueued_anew(oracle, monkeypatch, caplog):
    outputs = []
    for has_room in (True, False):
        if not has_room:
            monkeypatch.setattr(cuda_device, "captured_bytes", lambda model: 0)
        with oracle.load(device="cuda", worker="thread") as engine:
            served = engine.serve(oracle.requests(), "fcfs")
            outputs.append([record.output for record in served.records])
            made: Any = engine.runtime
            assert bool(made._executor._captured._captured) == has_room
            assert (made._device.lanes.captured_bytes > 0) == has_room
    agree = [a == b for one, two in zip(*outputs, strict=True) for a, b in zip(one, two, strict=True)]
    assert sum(agree) >= 0.7 * len(agree)
    assert len(outputs[0][0]) > captured_steps.CAPTURE_FROM and "0 are planned for them" in caplog.text


@NO_GPU
@pytest.mark.gpu
def test_a_worker_process_on_a_gpu_tells_its_peak(oracle):
    with oracle.load(device="cuda") as engine:
        engine.generate(oracle.prompts[0]["prompt"], max_tokens=4)
        peak = engine.peak()
        assert peak is not None and 0 < peak.allocated_bytes <= peak.reserved_bytes
        assert "GPU memory at its peak" in engine._repr_html_()
