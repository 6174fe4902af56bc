"""Workers on device "cuda": one copy of the experts, KV from one GPU cache to another, the tokens of one process.

On the GPU where there is one (`-m gpu`: both workers share it), and the same processes on torch's CPU tensors.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab.checkpoint.writer import make_checkpoint
from hybridlab.engine import gpu_copy, remote_worker
from hybridlab.engine.device_memory import NAME as DEVICE
from hybridlab.engine.shared_weights import NAME
from hybridlab.engine.workers import Workers
from hybridlab.hardware.gpu import Gpu
from hybridlab.request import Status

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param("cuda", marks=[NO_GPU, pytest.mark.gpu]))
STREAMED = {"name": "streamed", "stream_from_tokens": 6, "ring_slots": 3, "parts_per_layer": 2}
OPTIONS: dict[str, Any] = {"device": "cuda", "placement": STREAMED, "overlap": "prefetch", "vram_gb": 8.0}
RESIDENT = {**OPTIONS, "placement": "all_resident"}
BOTH: dict[str, dict[str, Any]] = {"prefill": {"threads": 2}, "decode": {"threads": 2}}
PAPER = {"name": "paper", "short_tokens": 7, "chunk_tokens": 4}
ONE_ORACLE = pytest.mark.parametrize(
    "oracle", ["qwen3_bf16", pytest.param("qwen3_fp8_128", marks=pytest.mark.slow)], indirect=True
)
"""For what hangs on processes and memory, not on weights."""


@pytest.fixture(scope="module", params=WHERE)
def where(request) -> Iterator[str]:
    """With "cpu", children take it for a GPU, and this process believes that there is one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            script = Path(__file__).with_name("cuda_on_cpu_worker.py")
            patch.setattr(remote_worker, "COMMAND", (sys.executable, "-P", str(script)))
            patch.setattr(gpu_copy, "can_share", lambda index: True)
            gpus = tuple(Gpu(index, "made up", 2**34, (9, 0)) for index in range(2))
            for module in ("engine.options", "loading", "hardware.detect"):
                patch.setattr(import_module(f"hybridlab.{module}"), "detect_gpus", lambda: gpus)
        yield request.param


@pytest.fixture(scope="module")
def alone(where, oracle) -> list[list[int]]:
    """What one process draws, one request after another."""
    with oracle.load(**OPTIONS) as engine:
        return one_by_one(oracle, engine)


@pytest.fixture(scope="module")
def engine(where, oracle) -> Iterator[hl.Engine]:
    with oracle.load(**OPTIONS, workers=BOTH) as engine:
        yield engine


@pytest.fixture(scope="module")
def resident(where, oracle) -> Iterator[hl.Engine]:
    """Two workers with all experts on the GPU for good."""
    with oracle.load(**RESIDENT, workers=BOTH) as engine:
        yield engine


@pytest.fixture(scope="module")
def resident_alone(where, oracle) -> list[list[int]]:
    with oracle.load(**RESIDENT) as engine:
        return one_by_one(oracle, engine)


def one_by_one(oracle, engine: hl.Engine) -> list[list[int]]:
    """Every step is a whole prompt or one token, so whoever computes it multiplies the same matrices."""
    found = []
    for request in oracle.requests():
        (record,) = engine.serve([request], "fcfs").records
        assert (record.status, record.error) == (Status.FINISHED, "")
        found.append(record.output)
    return found


def runtime_of(engine: hl.Engine) -> Workers:
    assert isinstance(engine.runtime, Workers)
    return engine.runtime


def wait_until_all_are_there(workers: Workers) -> None:
    until_s = monotonic() + 120
    while None in workers.pids.values():
        assert monotonic() < until_s, "a worker is not back after 120 s"
        sleep(0.05)


def test_tokens_are_those_of_one_process(oracle, engine, alone):
    assert one_by_one(oracle, engine) == alone


def test_each_worker_may_have_a_gpu_of_its_own(where, oracle, alone):
    if where == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("torch finds one CUDA device, not two")
    each = {name: {**own, "gpu": gpu} for gpu, (name, own) in enumerate(BOTH.items())}
    with oracle.load(**OPTIONS, workers=each) as engine:
        assert one_by_one(oracle, engine) == alone


def test_experts_that_live_on_the_gpu_are_not_in_host_memory_as_well(oracle, resident, resident_alone):
    assert one_by_one(oracle, resident) == resident_alone
    assert not [name for name in resident.memory.parts if name.startswith("experts")]
    assert [shared_kb(pid)["Size"] for pid in runtime_of(resident).pids.values() if pid is not None] == [0, 0]


@ONE_ORACLE
@pytest.mark.parametrize("scheduler", ["fcfs", PAPER], ids=["fcfs", "paper"])
def test_both_workers_compute_and_every_request_ends(oracle, engine, scheduler):
    served = engine.serve(oracle.requests(), scheduler, keep_span_steps=10**6)
    assert {(record.status, len(record.output)) for record in served.records} == {(Status.FINISHED, 24)}
    assert {span.op.lane.worker for span in served.spans} == {"prefill", "decode"}
    assert any(span.op.kind == "load" for span in served.spans if span.op.lane.worker == "prefill")


def test_there_is_one_copy_of_the_experts(oracle, engine):
    maps = {name: shared_kb(pid) for name, pid in runtime_of(engine).pids.items() if pid is not None}
    assert len(maps) == 2 and all(found["Rss"] > 0 for found in maps.values()), maps
    size = next(found["Size"] for found in maps.values())
    assert sum(found["Pss"] for found in maps.values()) <= 1.05 * size, maps
    parts = engine.memory.parts
    assert sum("experts" in name for name in parts) == 1 and parts["between workers"] > 0
    gpu = engine.memory.gpu
    assert gpu is not None and {name.partition(":")[0] for name in gpu.parts} == {"prefill", "decode"}
    assert gpu.total_bytes <= gpu.budget_bytes <= OPTIONS["vram_gb"] * 1e9


@pytest.mark.parametrize(("placed", "num_parts"), [("engine", 1), ("resident", 2)], ids=["streamed", "resident"])
def test_what_a_gpu_keeps_for_both_is_there_once(where, oracle, request, placed, num_parts):
    """Stands before the tests that kill workers of these engines."""
    engine = request.getfixturevalue(placed)
    workers = runtime_of(engine)
    assert sorted(workers.on_gpu.values()) == ["attached", "made"]
    assert engine.memory.gpu is not None
    parts = [name for name in engine.memory.gpu.parts if name.endswith(", of all workers")]
    assert {name.partition(":")[0] for name in parts} == {"prefill"} and len(parts) == num_parts
    if where == "cpu":
        maps = [shared_kb(pid, DEVICE) for pid in workers.pids.values() if pid is not None]
        assert all(found["Rss"] > 0 for found in maps), maps
        assert sum(found["Pss"] for found in maps) <= 1.05 * maps[0]["Size"], maps


@NO_GPU
@pytest.mark.gpu
def test_two_workers_take_the_weights_of_one_on_a_gpu(tmp_path, monkeypatch):
    """By what is free of its memory, with and without: 1.2 GB of resident experts and 1.3 of projections."""
    make_checkpoint(tmp_path / "two layers", "qwen3-30b-a3b", layers=2, progress=False)
    sizes: dict[str, Any] = {"token_budget": 64, "kv_tokens": 512, "vram_gb": 24.0}
    how = {"device": "cuda", "placement": "all_resident", "quiet": True, "workers": BOTH, **sizes}
    request = hl.Request("a", (1, 2, 3, 4, 5, 6, 7, 8), 8)
    taken, outputs, shared_bytes = [], [], 0
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(gpu_copy, "can_share", lambda index: False)
        before, _ = torch.cuda.mem_get_info(0)
        with hl.load(tmp_path / "two layers", **how) as engine:
            outputs.append(engine.serve([request], PAPER).records[0].output)
            taken.append(before - torch.cuda.mem_get_info(0)[0])
            assert sorted(runtime_of(engine).on_gpu.values()) == (["attached", "made"] if shares else [])
            assert engine.memory.gpu is not None
            parts = engine.memory.gpu.parts
            shared_bytes += sum(size for name, size in parts.items() if name.endswith(", of all workers"))
    assert outputs[0] == outputs[1] and len(outputs[0]) == 8
    assert shared_bytes > 2e9
    assert abs(taken[1] - taken[0] - shared_bytes) < 0.05 * shared_bytes


@ONE_ORACLE
def test_the_end_of_who_made_it_takes_nothing(oracle, resident, resident_alone):
    workers = runtime_of(resident)
    maker = next(name for name, state in workers.on_gpu.items() if state == "made")
    pid, told = workers.pids[maker], []
    assert pid is not None

    def kill(record, token):
        told.append(token)
        if len(told) == 5:
            os.kill(pid, signal.SIGKILL)

    (record,) = resident.serve(oracle.requests()[:1], PAPER, on_event=kill).records
    assert (record.status, record.error, len(record.output)) == (Status.FINISHED, "", 24)
    until_s = monotonic() + 120
    while set(workers.on_gpu.values()) != {"attached"}:  # the new one says so when it is ready
        assert monotonic() < until_s, f"not attached after 120 s: {workers.on_gpu}"
        sleep(0.05)
    assert one_by_one(oracle, resident) == resident_alone


def shared_kb(pid: int, name: str = NAME) -> dict[str, int]:
    """/proc/PID/smaps of the shared weights, kB."""
    found: dict[str, int] = {"Size": 0, "Rss": 0, "Pss": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = f"/memfd:{name}" in line
        elif inside and (field := re.match(r"(\w+): +(\d+) kB", line)) and field[1] in found:
            found[field[1]] += int(field[2])
    return found


@ONE_ORACLE
@pytest.mark.parametrize("worker", ["prefill", "decode"])
def test_a_killed_worker_costs_no_token(oracle, engine, alone, worker):
    workers, told = runtime_of(engine), []
    wait_until_all_are_there(workers)
    pid = workers.pids[worker]
    assert pid is not None

    def kill(record, token):
        told.append(token)
        if len(told) == (1 if worker == "prefill" else 9):
            os.kill(pid, signal.SIGKILL)

    records = engine.serve(oracle.requests(), PAPER, on_event=kill).records
    assert [(record.status, record.error, len(record.output)) for record in records] == [
        (Status.FINISHED, "", 24) for _ in records
    ]
    assert sum(len(record.output) for record in records) == len(told)
    wait_until_all_are_there(workers)
    assert workers.pids[worker] != pid
    assert one_by_one(oracle, engine) == alone
