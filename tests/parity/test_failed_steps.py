"""A step that fails at any of its ops: its requests fail, and the next step computes as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab.engine import faults, worker
from hybridlab.errors import WorkerLost
from hybridlab.plans import Op
from hybridlab.request import Status

STREAMED = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 3, "parts_per_layer": 2}
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "emulated": {"device": "emulated", "threads": 2, "placement": STREAMED, "overlap": "dual_batch"},
}


class Breaks:
    """Lanes whose `times`-th op raises, once."""

    def __init__(self, lanes: Any, times: int, error: Exception) -> None:
        self.run_whole, self.left, self.error = lanes.run, times, error
        self.failed: list[Op] = []

    def run(self, program, execute, clock_start_s):
        def execute_some(op: Op) -> None:
            self.left -= 1
            if self.left == -1:
                self.failed.append(op)
                raise self.error
            execute(op)

        return self.run_whole(program, execute_some, clock_start_s)


def break_at(engine: hl.Engine, monkeypatch: pytest.MonkeyPatch, times: int, error: Exception) -> Breaks:
    runtime: Any = engine.runtime
    lanes = runtime._device.lanes
    found = Breaks(lanes, times, error)
    monkeypatch.setattr(lanes, "run", found.run, raising=True)
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_every_op_may_fail(oracle, device, monkeypatch):
    with oracle.load(precision="exact", worker="thread", **DEVICES[device]) as engine:
        served = engine.serve(oracle.requests(), keep_span_steps=10**6)
        num_ops = len({span.op.id for span in served.spans})
        failed = []
        every = next(k for k in (3, 2, 5, 7) if num_ops % k)  # so that each op's turn comes once, in one of the steps
        for times in range(0, every * num_ops, every):
            with monkeypatch.context() as patched:
                broken = break_at(engine, patched, times, RuntimeError(f"op {times}"))
                records = engine.serve(oracle.requests()).records
                failed += broken.failed
            assert len(broken.failed) == 1
            assert {record.status for record in records} <= {Status.FAILED, Status.FINISHED}
            lost = [record for record in records if record.status is Status.FAILED]
            assert lost and all(record.error == f"RuntimeError: op {times}" for record in lost)
            assert [record.output for record in engine.serve(oracle.requests()).records] == oracle.greedy
    assert {op.kind for op in failed} >= {"embed", "attention", "router", "experts", "combine", "head"}
    assert ("load" in {op.kind for op in failed}) == (device == "emulated")


def test_a_device_that_gives_up_ends_the_run_and_stays_lost(oracle, monkeypatch):
    """In a thread: a CUDA context lives as long as its process."""

    def give_up(where):
        raise WorkerLost(f"{where} can compute no more in this process")

    with oracle.load(precision="exact", worker="thread") as engine:
        break_at(engine, monkeypatch, 0, RuntimeError("an illegal memory access was encountered"))
        monkeypatch.setattr(worker, "require_usable", give_up)
        records = engine.serve(oracle.requests()[:1]).records
        assert records[0].status is Status.FAILED
        assert records[0].error == "WorkerLost: cpu can compute no more in this process"
        with pytest.raises(WorkerLost, match="cpu can compute no more"):
            engine.serve(oracle.requests())
        with pytest.raises(WorkerLost, match="cpu can compute no more"):
            engine.logits([1, 2, 3])


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ..."), True),
        (AssertionError("Torch not compiled with CUDA enabled"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (None, False),
    ],
)
def test_a_device_is_lost_if_it_answers_with_an_error_other_than_a_full_memory(monkeypatch, error, lost):
    real, asked = torch.zeros, []

    def zeros(*shape, device):
        asked.append(device.type)
        if error is not None:
            raise error
        return real(*shape)

    monkeypatch.setattr(faults.torch, "zeros", zeros)
    monkeypatch.setattr(faults.torch.cuda, "synchronize", lambda device: None)
    if lost:
        with pytest.raises(WorkerLost, match=r"^cuda:0 can compute no more in this process: (CUDA error|Torch).*\w$"):
            faults.require_usable("cuda:0")
    else:
        faults.require_usable("cuda:0")
    faults.require_usable("cpu")
    assert asked == ["cuda"]
