"""What the run loop drives the simulator through: steps take the time that the cost model says, and draw no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import overload
from weakref import WeakKeyDictionary

import numpy as np

from hybridlab.batch import Entry, StepBatch, StepResult, split
from hybridlab.plans import LaneKind, Move, Program, Span, Tier
from hybridlab.simulator.clock import Dram, spans_of
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.lone_clock import LoneClock, LoneRun
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.programs import Table, tabulate
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape
from hybridlab.simulator.shared_clock import SharedClock, SharedStep
from hybridlab.spec import ModelSpec

PLACEHOLDER = -1
"""Every token drawn: none of the vocabulary, so that no request ends before its `max_tokens`."""


class SimulatorBackend:
    """`hybridlab.serving.Backend` on a simulated clock; make one per run.

    `workers` compute side by side, each one step at a time, on one machine: its DRAM is shared by all of them. By name,
    they may each have a part of the machine. KV that goes from one to another lengthens the head of a step by its
    copy: over the link, or read and written in the host's memory.
    """

    def __init__(
        self,
        machine: Machine,
        model: ModelSpec,
        shape: ModelShape,
        routes: Routes,
        workers: Sequence[str] | Mapping[str, Machine] = ("main",),
        kv_block_tokens: int = 16,
    ) -> None:
        self._kv_block_tokens = kv_block_tokens
        self._parts = workers if isinstance(workers, Mapping) else dict.fromkeys(workers, machine)
        self._layer_kv_bytes = model.num_layers * shape.kv_bytes
        self._machine, self._shape, self._routes = machine, shape, routes
        self._workers = tuple(workers)
        clock = LoneClock if len(self._workers) == 1 else SharedClock
        self._clock: LoneClock | SharedClock = clock(handoffs_s(machine), Dram(*dram_bytes_s(machine)))
        self._in_flight: dict[str, tuple[StepBatch, SharedStep | LoneRun]] = {}
        self._tables: WeakKeyDictionary[Program, Table] = WeakKeyDictionary()
        self._num_layers = len(model.moe_layers)
        self._routed_LE: np.ndarray | None = None
        """Routes since they were last taken, as expected; None until somebody asks."""

    @property
    def now_s(self) -> float:
        return self._clock.now_s

    @property
    def num_events(self) -> int:
        """Times at which anything on the clock changed, as far as they were looked at; 0 for one worker."""
        return self._clock.num_events if isinstance(self._clock, SharedClock) else 0

    @property
    def workers(self) -> tuple[str, ...]:
        return self._workers

    def idle(self) -> tuple[str, ...]:
        return tuple(worker for worker in self._workers if worker not in self._in_flight)

    def lost_caches(self) -> tuple[str, ...]:
        return ()

    def submit(self, worker: str, program: Program, batch: StepBatch) -> None:
        """Raises `PlanError` for a program that cannot run or has an op of unknown kind."""
        table = self._tables.get(program)
        if table is None:
            table = tabulate(program, self._routes)
            if self._machine.gpu_dram_bytes:  # the GPU is cores of the host
                table = replace(table, shares=True)
            self._tables[program] = table
        micros = [_micro(entries) for entries in split(batch.entries, program.shape.num_microbatches)]
        cost = cost_model(self._parts[worker], self._shape, micros)
        costs = [cost(one) for one in table.classes]
        alone_s = [c.alone_s for c in costs]
        if moved := self._kv_block_tokens * hand_off_blocks(batch):
            head = next(cls for cls in reversed(table.cls) if table.classes[cls].kind == "head")
            alone_s[head] += self._copied_s(moved, gpu=program.shape.compute_lane is LaneKind.GPU)
        run = self._clock.submit(table, alone_s, [c.dram_bytes for c in costs])
        self._in_flight[worker] = batch, run
        if self._routed_LE is not None:
            self._routed_LE += self._routes.share_LE * sum(micro.tokens for micro in micros)

    def _copied_s(self, num_tokens: int, *, gpu: bool) -> float:
        machine, size = self._machine, num_tokens * self._layer_kv_bytes
        if gpu:
            return machine.link_latency_us * 1e-6 + size / (machine.link_gb_s * 1e9)
        return 2 * size / dram_bytes_s(machine)[0]  # read, and written

    def wait(self, until_s: float | None) -> Sequence[StepResult]:
        ended = self._clock.advance(inf if until_s is None else max(until_s, self._clock.now_s))
        results = []
        for worker, (batch, run) in list(self._in_flight.items()):
            if run in ended:
                del self._in_flight[worker]
                tokens = {entry.id: PLACEHOLDER for entry in batch.entries if entry.wants_token}
                results.append(StepResult(batch, run.start_s, run.end_s, tokens, StepSpans(run)))
        return results

    def drain(self) -> None:
        while self._in_flight:
            self.wait(None)

    def take_routes(self) -> np.ndarray:
        """int64 [MoE layers, experts]; the parts of a route that rounding leaves count next time."""
        if self._routed_LE is None:
            self._routed_LE = np.zeros_like(self._routes.share_LE)
        whole = np.floor(self._routed_LE + 0.5)
        self._routed_LE -= whole
        return whole.astype(np.int64)

    def move(self, moves: Sequence[Move]) -> None:
        """Experts that come to the GPU for good cross the link, between steps."""
        machine, size = self._machine, self._shape.expert_weights * self._shape.expert_bits / 8
        copies = sum(move.tier is Tier.RESIDENT for move in moves)
        if copies:
            seconds = copies * (machine.link_latency_us * 1e-6 + size / (machine.link_gb_s * 1e9))
            self._clock.advance(self._clock.now_s + seconds)


def hand_off_blocks(batch: StepBatch) -> int:
    """KV blocks that a step takes from another worker or leaves for one."""
    ends = (each for entry in (*batch.entries, *batch.brings) for each in (entry.fetch, entry.leave))
    return sum(len(each.blocks) for each in ends if each is not None)


class StepSpans(Sequence[Span]):
    """The spans of a step, made when somebody looks: most steps' are never looked at."""

    def __init__(self, run: SharedStep | LoneRun) -> None:
        self._run = run

    def __len__(self) -> int:
        return len(self._run.table.ops)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | Sequence[Span]:
        return spans_of(self._run.table, self._run.spans)[index]

    def __iter__(self):
        return iter(spans_of(self._run.table, self._run.spans))


def _micro(entries: Sequence[Entry]) -> Micro:
    return Micro.of([(len(entry.token_ids), entry.start, entry.wants_token) for entry in entries])
