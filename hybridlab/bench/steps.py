"""Single steps outside any queue, timed by turns: a whole prompt, its loads alone, one token of several requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle
from statistics import median
from time import perf_counter

import numpy as np

from hybridlab.batch import Entry, StepBatch, StepResult
from hybridlab.engine.worker import WORKER
from hybridlab.errors import HybridlabError
from hybridlab.lowering import Planner
from hybridlab.plans import LaneKind, Op, Program, Span, StepPlan
from hybridlab.request import Sampling
from hybridlab.session import Engine
from hybridlab.strategies.base import Overlap


@dataclass(frozen=True)
class Step:
    """What is computed: a program and the tokens bound to it."""

    program: Program
    batch: StepBatch

    @property
    def load_ops(self) -> tuple[Op, ...]:
        return tuple(op for op in self.program.ops if op.kind == "load")


@dataclass(frozen=True)
class TimedStep:
    """One step: seconds from its submission to its result, and when each op ran."""

    step_s: float
    spans: Sequence[Span]

    def busy_s(self, wanted: Callable[[Op], bool]) -> float:
        """Summed seconds of the ops that are `wanted`, as `own_s` counts them."""
        took = own_s(self.spans)
        return sum(took[span.op.id] for span in self.spans if wanted(span.op))


def with_overlap(planner: Planner, overlap: Overlap) -> Planner:
    """The same placement on the same engine under another overlap, with programs of its own."""
    kept = planner.placement, overlap, planner.placed, planner.ranks
    return Planner(planner.model, planner.hardware, *kept)


def prompt_step(engine: Engine, tokens: int, *, planner: Planner | None = None, seed: int = 0) -> Step:
    """The step that computes a whole random prompt of `tokens` tokens; `planner` defaults to the engine's."""
    runtime, planner = engine.runtime, planner or engine.planner
    ids = tuple(np.random.default_rng(seed).integers(0, engine.spec.vocab, tokens).tolist())
    plan = StepPlan("prefill", {"prompt": tokens})
    blocks = tuple(range(-(-tokens // runtime.kv_block_tokens)))
    entry = Entry("prompt", ids, 0, blocks, Sampling(), wants_token=True)
    return Step(planner.program(planner.shape(WORKER, plan)), StepBatch(WORKER, plan, (entry,)))


def loads_alone(step: Step) -> Step:
    """The loads of `step` and nothing else, one after another."""
    loads = tuple(replace(op, needs=()) for op in step.load_ops)
    entry = Entry("prompt", (0,), 0, (0,), Sampling(), wants_token=False)
    batch = replace(step.batch, entries=(entry,))
    return Step(Program(step.program.shape, loads, loads), batch)


def decode_steps(engine: Engine, planner: Planner, num_requests: int, depth: int, *, seed: int = 0) -> Iterator[Step]:
    """Endless steps that decode one random token of each request, `depth` tokens and then one more deep.

    The same `seed` gives the same requests. Each has blocks of its own, as many as the cache has for so many requests;
    the steps end when they are full.
    """
    runtime, rng = engine.runtime, np.random.default_rng(seed)
    per_request = runtime.num_kv_blocks // num_requests
    tables = [tuple(range(i * per_request, (i + 1) * per_request)) for i in range(num_requests)]
    plan = StepPlan("decode", {f"r{i}": 1 for i in range(num_requests)})
    program = planner.program(planner.shape(WORKER, plan))
    for context in range(depth, per_request * runtime.kv_block_tokens):
        ids = rng.integers(0, engine.spec.vocab, num_requests).tolist()
        entries = tuple(
            Entry(f"r{i}", (ids[i],), context, tables[i], Sampling(), wants_token=True) for i in range(num_requests)
        )
        yield Step(program, StepBatch(WORKER, plan, entries))


def timed(engine: Engine, step: Step) -> TimedStep:
    """Compute `step`; raises `HybridlabError` if it failed."""
    backend = engine.runtime.backend()
    start_s = perf_counter()
    backend.submit(WORKER, step.program, step.batch)
    results: Sequence[StepResult] = ()
    while not results:
        results = backend.wait(None)
    step_s = perf_counter() - start_s
    if results[0].error:
        raise HybridlabError(f"the step failed: {results[0].error}")
    return TimedStep(step_s, results[0].spans)


def take_turns(
    calls: Mapping[str, Callable[[], TimedStep]], rounds: int, *, warmup: int = 1
) -> Iterator[tuple[str, TimedStep]]:
    """All calls once a round, every other round backwards, so that slow drift of the machine cancels.

    Yields what was measured, as it is; the `warmup` rounds before are not.
    """
    orders = cycle((tuple(calls), tuple(calls)[::-1]))
    for number, order in zip(range(warmup + rounds), orders, strict=False):
        for name in order:
            found = calls[name]()
            if number >= warmup:
                yield name, found


def own_s(spans: Sequence[Span]) -> dict[int, float]:
    """Op id -> seconds that it takes by itself.

    A stream does not tell when it began to wait for the host: an op behind the host's may have that wait in its span.
    Such ops (sums) do the same work in each layer, so the shortest of a microbatch stands for all of them.
    """
    took = {span.op.id: span.end_s - span.start_s for span in spans}
    kind_of = {span.op.id: span.op.lane.kind for span in spans}
    alike: dict[tuple[str, int], list[int]] = {}
    for span in spans:
        op = span.op
        if op.lane.kind is not LaneKind.CPU and any(kind_of.get(need) is LaneKind.CPU for need in op.needs):
            alike.setdefault((op.kind, op.microbatch), []).append(op.id)
    for ids in alike.values():
        took.update(dict.fromkeys(ids, min(took[i] for i in ids)))
    return took


def bound_s(spans: Sequence[Span]) -> float:
    """Seconds that no order of these ops can beat, each taking `own_s` of this very step; hand-offs cost nothing.

    The larger of the longest chain of needs, and for each lane: what must come before its first op, the sum of its
    ops, and what must come after its last one. Of a decode step with experts on the host those are the first attention
    and the last combine with the head: what can never overlap.
    """
    took = own_s(spans)
    ops = {span.op.id: span.op for span in spans}
    before: dict[int, float] = {}
    after = dict.fromkeys(ops, 0.0)
    order = _by_needs(ops)
    for i in order:
        before[i] = max((before[n] + took[n] for n in ops[i].needs if n in ops), default=0.0)
    for i in reversed(order):
        for need in ops[i].needs:
            if need in ops:
                after[need] = max(after[need], took[i] + after[i])
    chain_s = max((before[i] + took[i] for i in order), default=0.0)
    lanes = {op.lane for op in ops.values()}
    on_lane = [[i for i in order if ops[i].lane == lane] for lane in lanes]
    return max([
        chain_s,
        *(min(before[i] for i in lane) + sum(took[i] for i in lane) + min(after[i] for i in lane) for lane in on_lane),
    ])  # fmt: skip


def _by_needs(ops: Mapping[int, Op]) -> list[int]:
    """Ids, each behind what it needs. A loop, not a recursion: chains are thousands of ops long."""
    order: list[int] = []
    placed: set[int] = set()
    for first in ops:
        stack = [first]
        while stack:
            missing = [n for n in ops[stack[-1]].needs if n in ops and n not in placed]
            if missing:
                stack += missing
                continue
            if (done := stack.pop()) not in placed:
                placed.add(done)
                order.append(done)
    return order


@dataclass(frozen=True)
class HandOffs:
    """Of one step: median seconds from the end of an op to the start of one on the other lane that waits for it.

    Only those that nothing hides: the lane that waits has nothing else to do. 0 where there are none. What an op takes
    beyond `own_s` is part of it. `total_s` is the sum of them all.
    """

    to_host_s: float
    to_gpu_s: float
    total_s: float


def hand_offs(spans: Sequence[Span]) -> HandOffs:
    """Gaps between the accelerator's lane and the host's, by the spans of a step."""
    end_of, took = {span.op.id: span for span in spans}, own_s(spans)
    free_s: dict[LaneKind, float] = {}
    gaps: dict[LaneKind, list[float]] = {LaneKind.CPU: [], LaneKind.GPU: []}
    for span in sorted(spans, key=lambda one: one.start_s):
        kind = span.op.lane.kind
        others = [end_of[n].end_s for n in span.op.needs if n in end_of and end_of[n].op.lane.kind is not kind]
        if kind in gaps and others and max(others) > free_s.get(kind, 0.0):
            gaps[kind].append(span.end_s - took[span.op.id] - max(others))
        free_s[kind] = span.end_s
    down, up = gaps[LaneKind.CPU], gaps[LaneKind.GPU]
    return HandOffs(median(down or [0.0]), median(up or [0.0]), sum(chain(down, up)))
