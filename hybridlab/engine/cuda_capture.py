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
    """A CUDA graph, in which the device and the host wait for each other's words.

    All graphs share a pool of memory, of which `room_bytes` are planned; one of so many tokens is expected to add
    `token_bytes` for each. Raises `MemoryError` for one too many; what it has taken already is left to others.
    """

    lanes: CudaLanes
    host: HostExchange
    room_bytes: int
    token_bytes: int

    def __call__(self, program: Program, tokens: Sequence[int], execute: Execute, upload: Callable[[], None]) -> Replay:
        self._require_room(sum(tokens) * self.token_bytes)
        step = self.host.step(program, tokens)
        with self.host.holding(step):
            graph = self.lanes.capture(program, execute, upload)
        self._require_room(0)

        def replay(clock_start_s: float) -> tuple[Span, ...]:
            with self.host.running(step):
                return graph(clock_start_s)

        return replay

    def _require_room(self, more_bytes: int) -> None:
        taken = self.lanes.captured_bytes
        if taken + more_bytes > self.room_bytes:
            taken_mib, more_mib, room_mib = (size / 2**20 for size in (taken, more_bytes, self.room_bytes))
            more = f" and this one would take {more_mib:.0f} more" if more_bytes else ""
            raise MemoryError(f"captured steps take {taken_mib:.0f} MiB{more}, {room_mib:.0f} are planned for them")


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
