"""Lanes of a CUDA device: a stream each to compute, to copy and to exchange; the host's lane is `HostExchange`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any, ClassVar
from weakref import WeakSet

import torch

from hybridlab.engine.host_exchange import HostExchange
from hybridlab.plans import Lane, LaneKind, Op, Program, Span


class CudaLanes:
    """The calling thread enqueues a program in its execution order; needs across streams become event waits.

    Nothing waits for the device before the end of the step: what the host computes is waited for on the device.
    An op's span begins when its lane is free and its needs are done, and ends with the event behind it.
    """

    alive: ClassVar[WeakSet[CudaLanes]] = WeakSet()

    def __init__(self, device: torch.device, host: HostExchange) -> None:
        assert host.up is not None and host.down is not None
        self._device, self._host = device, host
        self.alive.add(self)
        self._pool = torch.cuda.graph_pool_handle()  # for all graphs: they run one after another
        self._streams = {kind: torch.cuda.Stream(device) for kind in (LaneKind.GPU, LaneKind.H2D, LaneKind.NET)}
        self._streams[LaneKind.CPU] = host.up
        # What an op of the host needs is sent on a stream of its own: not behind the results that come up.
        self._sending = {**self._streams, LaneKind.CPU: host.down}

    def run(self, program: Program, execute: Callable[[Op], None], clock_start_s: float) -> tuple[Span, ...]:
        begin, begin_s = self._begin(clock_start_s)
        ends = self._enqueue(program, execute)
        for stream in self._streams.values():
            _sleep_until_done(stream)
        return self._spans(program, begin, begin_s, ends, clock_start_s)

    def capture(
        self, program: Program, execute: Callable[[Op], None], upload: Callable[[], None]
    ) -> Callable[[float], tuple[Span, ...]]:
        """`upload` and the program as one CUDA graph; every tensor that it reads or writes stays where it is."""
        graph, compute = torch.cuda.CUDAGraph(), self._streams[LaneKind.GPU]
        # Other threads of a notebook may allocate meanwhile.
        with torch.cuda.graph(graph, self._pool, compute, capture_error_mode="thread_local"):
            upload()
            ends = self._enqueue(program, execute, captured=True)

        def replay(clock_start_s: float) -> tuple[Span, ...]:
            begin, begin_s = self._begin(clock_start_s)
            with torch.cuda.stream(compute):
                graph.replay()
            _sleep_until_done(compute)
            return self._spans(program, begin, begin_s, ends, clock_start_s)

        return replay

    @property
    def captured_bytes(self) -> int:
        """What the graphs have taken of the device."""
        segments: Any = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) == tuple(self._pool))

    def close(self) -> None:
        """Wait for what is still enqueued, so that its memory may go. Streams end with the object."""
        with suppress(RuntimeError):
            torch.cuda.synchronize(self._device)

    def _begin(self, clock_start_s: float) -> tuple[Any, float]:
        torch.cuda.synchronize(self._device)
        begin = torch.cuda.Event(enable_timing=True)
        begin.record(self._streams[LaneKind.GPU])
        begin.synchronize()
        return begin, perf_counter() - clock_start_s

    def _enqueue(self, program: Program, execute: Callable[[Op], None], *, captured: bool = False) -> dict[int, Any]:
        """The timing events at the ends of the ops, by id."""
        lane_of = {op.id: op.lane.kind for op in program.ops}
        done: dict[int, Any] = {}
        ends: dict[int, Any] = {}
        for op in program.order:
            stream = self._streams[op.lane.kind]
            for need in op.needs:
                if lane_of[need] is not op.lane.kind:
                    self._sending[op.lane.kind].wait_event(done[need])
            with torch.cuda.stream(stream):
                execute(op)
                if captured:  # an event that others of the graph wait for cannot be read outside
                    ends[op.id] = _recorded(stream, enable_timing=True, external=True)
                    done[op.id] = _recorded(stream)
                else:
                    done[op.id] = ends[op.id] = _recorded(stream, enable_timing=True)
        return ends

    def _spans(
        self, program: Program, begin: Any, begin_s: float, ends: Mapping[int, Any], clock_start_s: float
    ) -> tuple[Span, ...]:
        there_s = {number: begin_s + begin.elapsed_time(end) / 1e3 for number, end in ends.items()}
        free_s: dict[Lane, float] = {}
        spans = []
        for op in program.order:
            # What the host computed is there for others once its results have come up.
            start_s = max([free_s.get(op.lane, begin_s), *(there_s[need] for need in op.needs)])
            end_s = free_s[op.lane] = there_s[op.id]
            if op.lane.kind is LaneKind.CPU:
                assert self._host.current is not None
                start_s, end_s = (seconds - clock_start_s for seconds in self._host.current.times_of(op))
            spans.append(Span(op, min(start_s, end_s), end_s))
        return tuple(sorted(spans, key=lambda span: span.start_s))


def _sleep_until_done(stream: torch.cuda.Stream) -> None:
    """Not `synchronize`, which spins: the host's experts need every core (55 of 89 GB/s were left to them)."""
    end = torch.cuda.Event(blocking=True)
    end.record(stream)
    end.synchronize()


def _recorded(stream: torch.cuda.Stream, **kind: bool) -> Any:
    event = torch.cuda.Event(**kind)
    event.record(stream)
    return event
