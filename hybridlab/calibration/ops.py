"""How long single ops take in steps of the real engine, and what lies between them: the points of the fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING

from hybridlab.bench.steps import Step, decode_steps, loads_alone, prompt_step, timed
from hybridlab.plans import LaneKind, Span
from hybridlab.request import Request
from hybridlab.simulator.cost_model import Micro
from hybridlab.simulator.fit import Observed
from hybridlab.simulator.programs import tabulate
from hybridlab.simulator.routes import Routes

if TYPE_CHECKING:
    from hybridlab.lowering import Planner
    from hybridlab.session import Engine

DECODE = ((1, 64), (1, 1024), (2, 256), (4, 64), (4, 1024), (8, 64), (8, 1024), (12, 256), (24, 64), (24, 1024))
"""(requests, tokens in each one's cache) of the decode steps."""
PROMPTS = (2, 4, 8, 16, 32, 64, 128, 256, 1024)
SERVED = (1, 4, 12)
"""Requests served together, for what a step takes beside its ops."""
REPEATS = 5
WARMUP = 2
KV_TOKENS = 24 * 1088 + 64


def compute_points(
    engine: Engine, planner: Planner, routes: Routes, only: LaneKind | None = None
) -> Iterator[Observed]:
    """Points of every op but loads and embedding; `only` those of experts on that lane, and none of the other ops."""
    for requests, depth in DECODE:
        yield from _points(
            list(islice(decode_steps(engine, planner, requests, depth), WARMUP + REPEATS)), engine, routes, only
        )
    for tokens in PROMPTS:
        step = prompt_step(engine, tokens, planner=planner)
        yield from _points([step] * (WARMUP + (REPEATS if tokens < 512 else 2)), engine, routes, only)


def load_points(engine: Engine, planner: Planner, routes: Routes) -> Iterator[Observed]:
    """Copies over the link with nothing beside them."""
    step = prompt_step(engine, 16, planner=planner)
    table = tabulate(step.program, routes)
    cls = {op.id: table.classes[number] for op, number in zip(table.ops, table.cls, strict=True)}
    alone = loads_alone(step)
    took: dict[int, list[float]] = defaultdict(list)
    for number in range(1 + REPEATS):
        for span in timed(engine, alone).spans if number else ():
            took[cls[span.op.id].num_experts].append(span.end_s - span.start_s)
    for count, seconds in took.items():
        one = next(each for each in cls.values() if each.kind == "load" and each.num_experts == count)
        yield Observed(one, Micro(0.0, 0.0, 0.0, 0.0), median(seconds))


def _points(steps: Sequence[Step], engine: Engine, routes: Routes, only: LaneKind | None) -> Iterator[Observed]:
    """One point for each class of ops: the median over layers and repeats."""
    table = tabulate(steps[0].program, routes)
    cls = {op.id: number for op, number in zip(table.ops, table.cls, strict=True)}
    took: dict[int, list[float]] = defaultdict(list)
    for number, step in enumerate(steps):
        spans = timed(engine, step).spans
        for span in spans if number >= WARMUP else ():
            wanted = span.op.kind not in ("load", "embed") if only is None else _is_experts(span, only)
            if wanted:
                took[cls[span.op.id]].append(span.end_s - span.start_s)
    entries = steps[WARMUP].batch.entries
    micro = Micro.of([(len(entry.token_ids), entry.start, entry.wants_token) for entry in entries])
    total_s = sum(map(sum, took.values()))
    for number, seconds in took.items():
        yield Observed(table.classes[number], micro, median(seconds), sum(seconds) / total_s)


def _is_experts(span: Span, lane: LaneKind) -> bool:
    return span.op.kind == "experts" and span.op.lane.kind is lane


def handoffs(spans: Iterable[Span]) -> dict[str, list[float]]:
    """By parameter of the machine, seconds from the end of a need on another lane to the start of what it held up."""
    found: dict[str, list[float]] = defaultdict(list)
    done: dict[int, Span] = {}
    free: dict[LaneKind, float] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        needs = [done[need] for need in span.op.needs if need in done]
        lane = span.op.lane.kind
        if needs:
            last = max(needs, key=lambda need: need.end_s)
            if last.op.lane.kind is not lane and last.end_s >= free.get(lane, 0.0):
                found[_handoff(last.op.lane.kind, lane)].append(max(0.0, span.start_s - last.end_s))
        done[span.op.id] = span
        free[lane] = max(free.get(lane, 0.0), span.end_s)
    return found


def _handoff(source: LaneKind, to: LaneKind) -> str:
    if to is LaneKind.CPU:
        return "handoff_gpu_to_cpu_us"
    return "handoff_cpu_to_gpu_us" if source is LaneKind.CPU else "handoff_stream_us"


def between_steps(engine: Engine, requests: int, answer: int = 24) -> list[float]:
    """Seconds between the last op of a decode step and the first op after the embedding of the next one, served."""
    prompts = [
        Request(f"r{i}", tuple((7 * i + j) % engine.spec.vocab for j in range(32)), answer) for i in range(requests)
    ]
    served = engine.serve(prompts, "fcfs", keep_span_steps=10**6)
    found: list[float] = []
    last_s, decodes = 0.0, 0
    began: float | None = None
    for span in sorted(served.spans, key=lambda span: span.start_s):
        if span.op.kind == "embed":
            began = last_s
            decodes += 1
        elif began is not None:
            found.append(span.start_s - began)
            began = None
        last_s = max(last_s, span.end_s)
    return found[2:]  # the first ones: prompts, and what is set up once
