"""`Device.capture` on CUDA and, for tests, without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridlab.engine.cuda_lanes import CudaLanes
from hybridlab.engine.devices import Execute, Replay
from hybridlab.engine.host_exchange import HostExchange
from hybridlab.engine.lanes import Lanes
from hybridlab.plans import Program, Span


@dataclass(frozen=True)
class GraphCapture:
    """A CUDA graph, in which the device and the host wait for each other's words."""

    lanes: CudaLanes
    host: HostExchange

    def __call__(self, program: Program, tokens: Sequence[int], execute: Execute, upload: Callable[[], None]) -> Replay:
        step = self.host.step(program, tokens)
        with self.host.holding(step):
            graph = self.lanes.capture(program, execute, upload)

        def replay(clock_start_s: float) -> tuple[Span, ...]:
            with self.host.running(step):
                return graph(clock_start_s)

        return replay


@dataclass(frozen=True)
class PlainCapture:
    """The same steps on the same tensors, enqueued anew each time."""

    lanes: Lanes
    host: HostExchange

    def __call__(self, program: Program, tokens: Sequence[int], execute: Execute, upload: Callable[[], None]) -> Replay:
        step = self.host.step(program, tokens)

        def replay(clock_start_s: float) -> tuple[Span, ...]:
            with self.host.running(step):
                upload()
                return self.lanes.run(program, execute, clock_start_s)

        return replay
