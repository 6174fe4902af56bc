"""Lanes of a CUDA device: a stream each for computing and copying, and a thread for the host's experts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from hybridlab.engine.worker_thread import WorkerThread
from hybridlab.plans import LaneKind, Op, Program, Span


@dataclass
class _Mark:
    """When an op ran: two CUDA events on its stream, or seconds of the host's clock."""

    start: Any
    end: Any


class CudaLanes:
    """The calling thread enqueues the program in its execution order; needs across streams become event waits.

    An op of the CPU lane runs on a thread of its own once the events that it needs have come; what needs it is
    enqueued after it. The step ends with one synchronisation, and holds none but the CPU lane's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {kind: torch.cuda.Stream(device) for kind in (LaneKind.GPU, LaneKind.H2D, LaneKind.D2H)}
        self._host = WorkerThread("hybridlab-host-experts")

    def run(self, program: Program, execute: Callable[[Op], None], clock_start_s: float) -> tuple[Span, ...]:
        torch.cuda.synchronize(self._device)
        begin = torch.cuda.Event(enable_timing=True)
        begin.record(self._streams[LaneKind.GPU])
        begin.synchronize()
        begin_s = perf_counter() - clock_start_s
        done: dict[int, Any] = {}
        marks: dict[int, _Mark] = {}
        on_host: dict[int, Future[None]] = {}
        lane_of = {op.id: op.lane.kind for op in program.ops}
        for op in program.order:
            for need in op.needs:
                if need in on_host:
                    on_host[need].result()  # its events exist now
            if op.lane.kind is LaneKind.CPU:
                on_host[op.id] = self._host.call(lambda op=op: self._on_host(op, execute, done, marks, clock_start_s))
                continue
            stream = self._streams[op.lane.kind]
            with torch.cuda.stream(stream):
                for need in op.needs:
                    if lane_of[need] is not op.lane.kind:
                        stream.wait_event(done[need])
                start = _event()
                start.record(stream)
                execute(op)
                end = _event()
                end.record(stream)
            done[op.id], marks[op.id] = end, _Mark(start, end)
        for future in on_host.values():
            future.result()
        torch.cuda.synchronize(self._device)

        def seconds(mark: Any) -> float:
            return mark if isinstance(mark, float) else begin_s + begin.elapsed_time(mark) / 1e3

        spans = [Span(op, seconds(marks[op.id].start), seconds(marks[op.id].end)) for op in program.order]
        return tuple(sorted(spans, key=lambda span: span.start_s))

    def _on_host(
        self, op: Op, execute: Callable[[Op], None], done: dict[int, Any], marks: dict[int, _Mark],
        clock_start_s: float,
    ) -> None:  # fmt: skip
        stream = self._streams[LaneKind.D2H]
        with torch.inference_mode(), torch.cuda.stream(stream):
            for need in op.needs:
                if need in done:
                    done[need].synchronize()
            start_s = perf_counter() - clock_start_s
            execute(op)
            end = torch.cuda.Event()
            end.record(stream)
        done[op.id], marks[op.id] = end, _Mark(start_s, perf_counter() - clock_start_s)

    def bring(self, out: torch.Tensor) -> torch.Tensor:
        """What the host computed, on its way to the device on the current stream, for the computing one to use."""
        there = out.pin_memory().to(self._device, non_blocking=True)
        there.record_stream(self._streams[LaneKind.GPU])
        return there

    def close(self) -> None:
        self._host.close()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)
