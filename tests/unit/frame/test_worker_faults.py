"""A worker process that is killed or fails, at every point of its protocol: its step's requests fail, and no others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import remote_worker
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.errors import ConfigError, MemoryBudgetError, StrategyError, WorkerLost
from hybridlab.plans import QueueView, StepPlan
from hybridlab.request import Status

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_fp8_128"
EXPECTED = json.loads((ORACLE / "expected.json").read_text())["requests"]
GREEDY = [request["greedy"] for request in EXPECTED]
PATIENCE_S = 60.0
STREAMED = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 2, "parts_per_layer": 2}


@dataclass
class OneByOne:
    """A step computes one request, and each in turn: while it does, all others have something in the KV cache."""

    last: str = ""
    seen: list[str] = field(default_factory=list)

    def schedule(self, queue: QueueView) -> StepPlan | None:
        left = {request.id: 1 for request in queue.running}
        left |= {request.id: min(request.remaining_prompt, queue.token_budget) for request in queue.waiting}
        self.last = min((rid for rid in left if rid > self.last), default=min(left))
        self.seen.append(self.last)
        return StepPlan("mixed", {self.last: left[self.last]})


def requests() -> list[hl.Request]:
    return [hl.Request(str(i), tuple(r["prompt"]), 24) for i, r in enumerate(EXPECTED)]


def load(device: str = "cpu", **options: Any) -> hl.Engine:
    own: dict[str, Any] = {"placement": STREAMED, "overlap": "prefetch", "threads": 2} if device == "emulated" else {}
    given = {"precision": "exact", "quiet": True, "kv_tokens": 1024, "worker": "process", **own, **options}
    return hl.load(ORACLE, device=device, **given)


def pid_of(engine: hl.Engine) -> Any:
    runtime = engine.runtime
    assert isinstance(runtime, WorkerProcess)
    return runtime.pid


def is_dead(pid: int) -> bool:
    """Ended; whether anybody has asked for its status does not matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


@dataclass
class Faults:
    """Makes workers fail; `pids` are those of all that were started."""

    file: Path
    monkeypatch: pytest.MonkeyPatch

    def at(self, first: str, later: str = "none") -> None:
        script = Path(__file__).with_name("faulty_worker.py")
        command = (sys.executable, "-P", str(script), str(self.file), first, later)
        self.monkeypatch.setattr(remote_worker, "COMMAND", command)

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in self.file.read_text().split()]


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """Afterwards no process that was started is left."""
    found = Faults(tmp_path / "pids", monkeypatch)
    yield found
    assert [pid for pid in found.pids if not is_dead(pid)] == []


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


def check_one_failed(served, words: str) -> None:
    """One request failed, saying why; all others have the oracle's tokens."""
    failed = [record for record in served.records if record.status is Status.FAILED]
    assert len(failed) == 1 and words in failed[0].error, [record.error for record in served.records]
    for record, greedy in zip(served.records, GREEDY, strict=True):
        if record is failed[0]:
            assert record.output == greedy[: len(record.output)] != greedy
        else:
            assert (record.status, record.output) == (Status.FINISHED, greedy)


@pytest.mark.parametrize(
    ("device", "fault", "words"),
    [
        ("cpu", "step:37", "was ended by SIGKILL"),
        ("cpu", "op:95", "was ended by SIGKILL"),
        ("cpu", "half:12", "was ended by SIGKILL"),
        ("cpu", "lost:95", "injected"),
        ("emulated", "op:155", "was ended by SIGKILL"),
        pytest.param("cpu", "step:0", "was ended by SIGKILL", marks=pytest.mark.slow),
        pytest.param("cpu", "done:12", "was ended by SIGKILL", marks=pytest.mark.slow),
        pytest.param("cpu", "garbage:12", "sent what it may not: a result of 3 bytes", marks=pytest.mark.slow),
        pytest.param("emulated", "lost:155", "injected", marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_costs_the_request_that_it_computed(faults, device, fault, words):
    faults.at(fault)
    with load(device) as engine:
        check_one_failed(engine.serve(requests(), OneByOne()), words)
        assert len(faults.pids) == 2 and is_dead(faults.pids[0])
        again = engine.serve(requests(), OneByOne())
        assert [record.output for record in again.records] == GREEDY
        assert len(faults.pids) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_a_failed_assertion_on_a_gpu_costs_one_request_and_the_process(faults):
    faults.at("assert:20")  # among the prompts: decode steps are soon replayed, without an op in Python
    with load("cuda", precision="bf16", worker="auto") as engine:
        records = engine.serve(requests(), OneByOne()).records
        failed = [record for record in records if record.status is Status.FAILED]
        assert len(failed) == 1 and "cuda:0 can compute no more in this process" in failed[0].error
        assert [record.status for record in records].count(Status.FINISHED) == len(records) - 1
        assert len(faults.pids) == 2 and is_dead(faults.pids[0])
        assert {record.status for record in engine.serve(requests()).records} == {Status.FINISHED}


@pytest.mark.parametrize(("device", "fault"), [("cpu", "raise:95"), ("emulated", "raise:155")])
def test_an_error_in_a_step_is_told_and_costs_no_worker(faults, caplog, device, fault):
    faults.at(fault)
    with load(device) as engine:
        check_one_failed(engine.serve(requests(), OneByOne()), "RuntimeError: injected")
        assert "faulty_op" in caplog.text  # where it was raised, there
        assert [record.output for record in engine.serve(requests()).records] == GREEDY
    assert len(faults.pids) == 1


def test_a_mistake_in_what_was_asked_ends_the_run_as_in_a_thread(faults):
    faults.at("input:95")
    with load() as engine:
        with pytest.raises(StrategyError, match="injected"):
            engine.serve(requests())
        assert [record.output for record in engine.serve(requests()).records] == GREEDY
    assert len(faults.pids) == 1


@pytest.mark.parametrize("fault", ["start", "loaded"])
def test_a_worker_that_ends_before_it_is_ready_is_one_error(faults, fault):
    faults.at(fault)
    with pytest.raises(WorkerLost, match=r"worker process \d+ was ended by SIGKILL"):
        load()
    assert len(faults.pids) == 1


def test_a_worker_that_cannot_be_started_again_ends_the_run(faults):
    faults.at("step:2", later="start")
    with load() as engine:
        with pytest.raises(WorkerLost, match="SIGKILL; started again 3 times without a step between them"):
            engine.serve(requests(), OneByOne())
        with pytest.raises(WorkerLost, match="started again 3 times"):
            engine.generate([1, 2], 2)
    assert len(faults.pids) == 4


def test_closing_ends_a_worker_that_is_being_started(faults):
    faults.at("none", later="none")
    engine = load()
    os.kill(pid_of(engine), signal.SIGKILL)
    wait_until(lambda: len(faults.pids) == 2)
    engine.close()
    assert is_dead(faults.pids[1])


def test_an_idle_worker_is_started_again_at_once(engine):
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid_of(engine) not in (pid, None))  # nobody asks it anything
    assert [record.output for record in engine.serve(requests()).records] == GREEDY


def test_a_worker_killed_between_arrivals_costs_nothing(engine):
    """The first request has ended, the second has not arrived; it would find the first one's blocks in the cache."""
    pid, prompt = pid_of(engine), tuple(EXPECTED[0]["prompt"])
    late = hl.Request("late", prompt, 24, after="early", arrival_s=0.3)

    def kill(record, token):
        if record.is_final and record.request.id == "early":
            os.kill(pid, signal.SIGKILL)

    served = engine.serve([hl.Request("early", prompt, 24), late], on_event=kill)
    assert [(r.status, r.output) for r in served.records] == [(Status.FINISHED, GREEDY[0])] * 2
    assert pid_of(engine) != pid


def test_waiting_requests_keep_their_time_limits_while_a_worker_starts(engine):
    late = hl.Request("late", tuple(EXPECTED[0]["prompt"]), 24, arrival_s=0.2, timeout_s=0.001)
    timer = hl.Request("after", tuple(EXPECTED[1]["prompt"]), 24, arrival_s=0.2)
    os.kill(pid_of(engine), signal.SIGKILL)
    records = engine.serve([late, timer]).records
    assert (records[0].status, records[0].finish_reason) == (Status.CANCELLED, "timeout")
    assert records[1].output == GREEDY[1]


def test_the_interrupt_of_a_terminal_does_not_reach_the_worker(engine):
    pid = pid_of(engine)
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    assert [record.output for record in engine.serve(requests()).records] == GREEDY
    assert pid_of(engine) == pid
    assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()


def test_an_engine_that_nobody_holds_takes_its_process_along():
    engine = load()
    pid = pid_of(engine)
    del engine
    wait_until(lambda: is_dead(pid))


PARENT = f"""
import sys, time
import hybridlab as hl
engine = hl.load({str(ORACLE)!r}, quiet=True, kv_tokens=512, worker="process")
print(engine.runtime.pid, flush=True)
if sys.argv[1] == "stay":
    time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["kill", "terminate", "return"])
def test_the_end_of_the_parent_is_the_end_of_the_worker(end):
    command = [sys.executable, "-c", PARENT, "stay" if end else "return"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if end:
            assert not is_dead(pid)
            parent.send_signal(end)
        parent.wait(PATIENCE_S)
        wait_until(lambda: is_dead(pid))
        assert parent.returncode == (-end if end else 0)


def test_what_cannot_be_loaded_is_the_same_error_as_in_a_thread():
    for worker in ("thread", "process"):
        with pytest.raises(MemoryBudgetError, match="of memory needed"):
            load(worker=worker, memory_gb=0.01)
    with pytest.raises(ConfigError, match="worker is 'rank', expected 'auto', 'thread' or 'process'"):
        load(worker="rank")
    with pytest.raises(ConfigError, match="needs the folder of a checkpoint"):
        hl.load(open_checkpoint(ORACLE), worker="process", quiet=True)
