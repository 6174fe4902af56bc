"""Lanes that work at the same time: the caller's thread for the first one, a thread for each other kind of hardware."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from time import perf_counter

import torch

from hybridlab.engine.worker_thread import WorkerThread
from hybridlab.plans import LaneKind, Op, Program, Span


class LaneThreads:
    """device="emulated": a lane's ops run on its thread in the order of the program, each once its needs are done.

    The lane of the first op runs on the thread that calls `run`: a step neither begins nor ends with a hand-off.
    """

    def __init__(self) -> None:
        self._threads: dict[LaneKind, WorkerThread] = {}

    def run(self, program: Program, execute: Callable[[Op], None], clock_start_s: float) -> tuple[Span, ...]:
        lanes: dict[LaneKind, list[Op]] = defaultdict(list)
        for op in program.ops:
            lanes[op.lane.kind].append(op)
        own = next(iter(lanes), None)
        threads = {kind: self._thread(kind) for kind in lanes if kind is not own}
        step = _Step(program, execute, clock_start_s)
        futures = {kind: thread.call(lambda ops=lanes[kind]: step.run(ops)) for kind, thread in threads.items()}
        for kind, future in futures.items():
            if future.done() and (error := future.exception()) is not None:  # closed: this lane never starts
                step.fail(error, lanes[kind])
        spans = [] if own is None else step.run(lanes[own])
        wait(futures.values())
        if step.errors:
            raise step.errors[0]
        spans += [span for future in futures.values() for span in future.result()]
        return tuple(sorted(spans, key=lambda span: span.start_s))

    def close(self) -> None:
        for thread in self._threads.values():
            thread.close()

    def _thread(self, kind: LaneKind) -> WorkerThread:
        if kind not in self._threads:
            self._threads[kind] = WorkerThread(f"hybridlab-{kind}")
        return self._threads[kind]


@dataclass
class _Step:
    """One step of a program; `gates` are closed locks of the ops that another lane waits for."""

    program: Program
    execute: Callable[[Op], None]
    clock_start_s: float
    gates: dict[int, threading.Lock] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        lane_of = {op.id: op.lane for op in self.program.ops}
        for op in self.program.ops:
            for need in op.needs:
                if lane_of[need] != op.lane and need not in self.gates:
                    self.gates[need] = gate = threading.Lock()
                    gate.acquire()

    def run(self, ops: Sequence[Op]) -> list[Span]:
        """All ops of one lane; the first error on any lane ends all of them."""
        spans = []
        try:
            with torch.inference_mode():
                for op in ops:
                    for need in op.needs:
                        if (gate := self.gates.get(need)) is not None:
                            with gate:
                                pass
                    if self.errors:
                        break
                    start_s = perf_counter() - self.clock_start_s
                    self.execute(op)
                    spans.append(Span(op, start_s, perf_counter() - self.clock_start_s))
                    self._open(op)
        except BaseException as error:  # raised by run() on the thread that waits for the step
            self.errors.append(error)
        for op in ops[len(spans) :]:
            self._open(op)
        return spans

    def fail(self, error: BaseException, ops: Sequence[Op]) -> None:
        """`ops` will not run: those that wait for them see the error instead."""
        self.errors.append(error)
        for op in ops:
            self._open(op)

    def _open(self, op: Op) -> None:
        if (gate := self.gates.get(op.id)) is not None:
            gate.release()
