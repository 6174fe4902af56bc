"""How fast the simulator is on this machine: step maps, the event clock, and the steps of schedulers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from hybridlab import provenance
from hybridlab.bench.study import study
from hybridlab.kv_blocks import BlockPool
from hybridlab.lowering import Planner
from hybridlab.plans import Program, QueueView, StepPlan
from hybridlab.prefix_cache import NoPrefixes
from hybridlab.request import Request
from hybridlab.request_queue import RequestQueue
from hybridlab.routing import RoutingStats
from hybridlab.serving import serve
from hybridlab.simulator.backend import SimulatorBackend
from hybridlab.simulator.clock import Dram, EventClock
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.machine import Machine, load_profile
from hybridlab.simulator.programs import tabulate
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape, public_models
from hybridlab.simulator.step_maps import StepMap
from hybridlab.spec import ModelSpec
from hybridlab.strategies.registry import resolve

MODEL, MACHINE = "deepseek-ai/DeepSeek-V3", "rtx5090_2x_epyc9355"
MOST_RUNNING, MOST_WAITING = 32, 1000
RING = {"name": "streamed", "ring_slots": 8, "parts_per_layer": 8}
MIXED = {**RING, "stream_from_tokens": 1 << 30, "mixed_from_tokens": 1}
TOPOLOGIES: dict[str, tuple[Any, str, StepPlan]] = {
    "decode, experts on the host": ("all_host", "prefetch", StepPlan("decode", {"a": 1})),
    "decode, dual batch": ("all_host", "dual_batch", StepPlan("decode", {"a": 1, "b": 1})),
    "prefill, all experts streamed": ({**RING, "stream_from_tokens": 1}, "prefetch", StepPlan("prefill", {"a": 4096})),
    "prefill, half of the experts streamed": (MIXED, "prefetch", StepPlan("prefill", {"a": 1024})),
}


@dataclass(frozen=True)
class Row:
    """`per_s` things of `what` a second, the median over `repeats`, without `compile_s`; `about` says on what."""

    what: str
    unit: str
    per_s: float
    slowest_per_s: float
    fastest_per_s: float
    compile_s: float
    num_ops: int
    about: str


@dataclass(frozen=True)
class SimulatorSpeed:
    """What `bench simulator` found."""

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    code: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {"rows": [asdict(row) for row in self.rows], "machine": self.machine, "code": self.code}

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            spread = f"{_count(row.slowest_per_s)} to {_count(row.fastest_per_s)}"
            compiled = f", compiled in {row.compile_s:.1f} s" if row.compile_s else ""
            lines.append(f"{row.what}: {_count(row.per_s)} {row.unit}/s ({spread}{compiled}; {row.about})")
        return "\n".join(lines)


@dataclass(frozen=True)
class AtMost:
    """Prompts first while fewer than `running` requests decode, then one token for each of these."""

    running: int = MOST_RUNNING

    def schedule(self, queue: QueueView) -> StepPlan | None:
        room, left, tokens = self.running - len(queue.running), queue.token_budget, {}
        for request in queue.waiting[: max(0, room)]:
            if request.remaining_prompt > left:
                break
            tokens[request.id] = request.remaining_prompt
            left -= request.remaining_prompt
        if tokens:
            return StepPlan("prefill", tokens)
        return StepPlan("decode", {r.id: 1 for r in queue.running}) if queue.running else None


def measure(
    *, configurations: int = 100_000, requests: int = MOST_WAITING, repeats: int = 3, runs: int = 200
) -> SimulatorSpeed:
    """DeepSeek-V3 on the paper's machine: every topology over `configurations` machines, a trace of `requests`, and
    once a study of `runs` runs of as many requests, by as many processes as there are cores."""
    machine = load_profile(MACHINE).machine
    spec, shape = public_models()[MODEL]
    rows = [*_maps(machine, spec, shape, configurations, repeats), *_clocks(machine, spec, shape, repeats)]
    rows.append(_scheduler_steps(machine, spec, shape, requests, repeats))
    rows.append(_study(runs, requests))
    return SimulatorSpeed(tuple(rows), provenance.machine(), provenance.code_version())


def _maps(machine: Machine, spec: ModelSpec, shape: ModelShape, count: int, repeats: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    given = replace(
        machine,
        host_peak_gb_s=rng.uniform(50.0, 1300.0, count),
        host_shared_ratio=rng.uniform(1.0, 1.3, count),
        link_gb_s=rng.uniform(12.0, 110.0, count),
        gpu_read_gb_s=rng.uniform(300.0, 5000.0, count),
        gpu_tflops=rng.uniform(50.0, 1000.0, count),
    )
    for name, program, step in _programs(machine, spec):
        tokens = rng.uniform(1.0, 32768.0, count)
        sizes = [Micro.prefill(tokens)] if step.role == "prefill" else [Micro.decode(1.0, tokens)] * len(step.tokens)
        steps = StepMap(program, spec)

        def once(steps: StepMap = steps, sizes: list[Micro] = sizes) -> int:
            return len(steps(given, shape, sizes))

        compile_s = _seconds(once) - _seconds(once)
        about = f"{len(program.ops)} ops, {'DRAM shared, event by event' if steps.table.shares else 'scanned'}"
        yield _row(f"step map, {name}", "configurations", once, repeats, compile_s, len(program.ops), about)


def _clocks(machine: Machine, spec: ModelSpec, shape: ModelShape, repeats: int) -> Iterator[Row]:
    hand, dram = handoffs_s(machine), Dram(*dram_bytes_s(machine))
    for name, program, step in _programs(machine, spec):
        table = tabulate(program, Routes(spec))
        cost = cost_model(machine, shape, [Micro.decode(1.0, 512.0)] * len(step.tokens))
        costs = [cost(one) for one in table.classes]
        alone_s, dram_bytes = [float(c.alone_s) for c in costs], [float(c.dram_bytes) for c in costs]

        def once(table: Any = table, alone_s: Any = alone_s, dram_bytes: Any = dram_bytes) -> int:
            for _ in range(20):
                clock = EventClock(hand, dram)
                clock.submit(table, alone_s, dram_bytes)
                clock.advance()
            return 20 * len(table.ops)

        yield _row(f"event clock, {name}", "ops", once, repeats, 0.0, len(table.ops), f"{len(table.ops)} ops a step")


def _scheduler_steps(machine: Machine, spec: ModelSpec, shape: ModelShape, count: int, repeats: int) -> Row:
    placement, overlap = resolve("placement", "all_host"), resolve("overlap", "prefetch")
    hardware = machine.hardware(MACHINE, gpu=True)
    planner = Planner(spec, hardware, placement, overlap, placement.place(spec, hardware, RoutingStats()))
    routes = Routes(spec)
    requests = [Request(f"r{i}", (1,) * 64, 100 + i % 57) for i in range(count)]

    def once() -> int:
        queue = RequestQueue(requests, BlockPool(4096, 16), spec, 2048, NoPrefixes())
        backend = SimulatorBackend(machine, spec, shape, routes)
        return serve(backend, queue, AtMost(), planner, keep_span_steps=0).num_steps

    about = f"{count} requests waiting at first, at most {MOST_RUNNING} running, no spans, no prefix cache"
    return _row("serving", "scheduler steps", once, repeats, 0.0, 0, about)


def _study(runs: int, requests: int) -> Row:
    found = study(MODEL, MACHINE, runs=runs, requests=requests, processes=len(os.sched_getaffinity(0)))
    about = (
        f"{runs} runs of {requests} requests in {found.seconds:.1f} s by {found.processes} processes, the store "
        f"included; {found.steps:,} steps, {found.saturated} runs saturated"
    )
    per_s = runs / found.seconds
    return Row("study", "runs", per_s, per_s, per_s, 0.0, 0, about)


def _programs(machine: Machine, spec: ModelSpec) -> Iterator[tuple[str, Program, StepPlan]]:
    hardware = machine.hardware(MACHINE, gpu=True)
    for name, (placement, overlap, step) in TOPOLOGIES.items():
        chosen = resolve("placement", placement)
        placed = chosen.place(spec, hardware, RoutingStats())
        planner = Planner(spec, hardware, chosen, resolve("overlap", overlap), placed)
        yield name, planner.program(planner.shape("main", step)), step


def _row(
    what: str, unit: str, once: Callable[[], int], repeats: int, compile_s: float, num_ops: int, about: str
) -> Row:
    speeds = []
    for _ in range(repeats):
        start_s = perf_counter()
        speeds.append(once() / (perf_counter() - start_s))
    return Row(what, unit, median(speeds), min(speeds), max(speeds), max(0.0, compile_s), num_ops, about)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _seconds(once: Callable[[], int]) -> float:
    start_s = perf_counter()
    once()
    return perf_counter() - start_s
