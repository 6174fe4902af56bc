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
def test_every_op_may_fail(oracle, device, monkeypatch, caplog):
    with oracle.load(precision="exact", worker="thread", **DEVICES[device]) as engine:
        served = engine.serve(oracle.requests(), keep_span_steps=10**6)
        first, second = (len([s for s in served.spans if s.op.id == i]) for i in (0, 0))
        num_ops = len({span.op.id for span in served.spans})
        assert first == second == served.num_steps
        failed = []
        for times in range(2 * num_ops):
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
