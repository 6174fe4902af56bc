"""Engine and simulator side by side: the same requests under the same strategies, predicted and measured.

A measurement lies between two reads of memory by a plain loop. If these differ by more than `DRIFT`, the machine was
not the same before and after, and it is repeated; after `ATTEMPTS` it is dropped, which is told and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab.bench.steps import Step, decode_steps, timed
from hybridlab.kernels import read_bandwidth_bytes
from hybridlab.kv_blocks import BlockPool
from hybridlab.loading import load as load_engine
from hybridlab.metrics import SLO, summarise
from hybridlab.prefix_cache import NoPrefixes
from hybridlab.request import Request
from hybridlab.request_queue import RequestQueue
from hybridlab.serving import Served, serve
from hybridlab.simulator.backend import SimulatorBackend
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape
from hybridlab.strategies.registry import label, resolve

if TYPE_CHECKING:
    from hybridlab.session import Engine

DRIFT = 0.10
ATTEMPTS = 4
PROBE_BYTES = 256 << 20
STEPS = 5
"""Decode steps whose median is the step time."""
METRICS = ("step_s", "ttft_s", "tpot_s")


@dataclass(frozen=True)
class Load:
    """What is asked of an engine: `requests` at once, each of `prompt` random tokens, with answers of `answer`."""

    requests: int
    prompt: int
    answer: int = 12

    def made(self, vocab: int) -> list[Request]:
        rng = np.random.default_rng(self.requests * 10007 + self.prompt)
        return [
            Request(f"r{i}", tuple(rng.integers(0, vocab, self.prompt).tolist()), self.answer)
            for i in range(self.requests)
        ]


class Twin:
    """The simulator of an engine: its planner, sizes and model, on `machine`. `link_gb_s` caps the machine's link."""

    def __init__(self, engine: Engine, machine: Machine, link_gb_s: float | None = None) -> None:
        if link_gb_s is not None:
            machine = replace(machine, link_gb_s=min(machine.link_gb_s, link_gb_s))
        self._engine, self._machine = engine, machine
        self._shape, self._routes = ModelShape.of(engine.spec), Routes(engine.spec)

    def step_s(self, step: Step) -> float:
        backend = self._backend()
        backend.submit("main", step.program, step.batch)
        (result,) = backend.wait(None)
        return result.end_s - result.start_s

    def serve(self, requests: Sequence[Request], scheduler: str) -> Served:
        engine = self._engine
        runtime = engine.lone_runtime
        pool = BlockPool(runtime.num_kv_blocks, runtime.kv_block_tokens)
        queue = RequestQueue(requests, pool, engine.spec, engine.token_budget, NoPrefixes())
        return serve(self._backend(), queue, resolve("scheduler", scheduler), engine.planner, keep_span_steps=0)

    def _backend(self) -> SimulatorBackend:
        return SimulatorBackend(self._machine, self._engine.spec, self._shape, self._routes)


def latencies(served: Served) -> dict[str, float]:
    """Means over requests: `ttft_s`, and `tpot_s` of answers of two tokens or more."""
    times = [record.token_times_s for record in served.records]
    first = [each[0] - (record.arrival_s or 0.0) for each, record in zip(times, served.records, strict=True)]
    later = [(each[-1] - each[0]) / (len(each) - 1) for each in times if len(each) > 1]
    return {"ttft_s": mean(first), "tpot_s": mean(later)}


def predicted(twin: Twin, engine: Engine, load: Load, scheduler: str = "fcfs") -> dict[str, float]:
    """`METRICS` of a load on the simulator."""
    step = next(decode_steps(engine, engine.planner, load.requests, load.prompt))
    return {"step_s": twin.step_s(step), **latencies(twin.serve(load.made(engine.spec.vocab), scheduler))}


def measured(engine: Engine, load: Load, scheduler: str = "fcfs") -> dict[str, float]:
    """`METRICS` of a load on the engine, which has served it once before."""
    requests = load.made(engine.spec.vocab)
    steps = islice(decode_steps(engine, engine.planner, load.requests, load.prompt), STEPS + 2)
    step_s = median([timed(engine, step).step_s for step in steps][2:])
    served = engine.serve(requests, scheduler, keep_span_steps=0)
    short = [record.request.id for record in served.records if len(record.output) < load.answer]
    if short:  # it ended at a token that ends answers; the simulator draws none
        raise ValueError(f"request {short[0]} ended early")
    return {"step_s": step_s, **latencies(served)}


class Bracket:
    """Repeats what is measured until the machine reads its memory as fast after it as before. Counts what it drops."""

    def __init__(self, threads: int) -> None:
        self._threads, self._buffer = threads, np.ones(PROBE_BYTES, np.uint8)
        self.repeated = self.dropped = 0

    def __call__(self, measure: Callable[[], Any]) -> Any | None:
        """What `measure` returned; None if the machine never stood still."""
        for attempt in range(ATTEMPTS):
            before = self._gb_s()
            found = measure()
            after = self._gb_s()
            if abs(after / before - 1) <= DRIFT:
                self.repeated += attempt
                return found
        self.repeated += ATTEMPTS - 1
        self.dropped += 1
        return None

    def _gb_s(self) -> float:
        rates = []
        for _ in range(5):
            start_s = perf_counter()
            read_bandwidth_bytes(self._buffer, self._threads)
            rates.append(PROBE_BYTES / (perf_counter() - start_s) / 1e9)
        return median(rates)


def compared(
    engine: Engine, twin: Twin, loads: Sequence[Load], bracket: Bracket, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each load that could be measured: `about`, the load, and both sides of each metric."""
    for load in loads:
        expected = predicted(twin, engine, load)
        found = bracket(lambda load=load: measured(engine, load))
        if found is not None:
            both = {f"predicted_{name}": expected[name] for name in METRICS}
            both |= {f"measured_{name}": found[name] for name in METRICS}
            yield {**about, "requests": load.requests, "prompt_tokens": load.prompt, **both}


def agreement_rows(
    checkpoint: str | Path, machine: Machine, loads: Sequence[Load], *, device: str = "cpu",
    placement: Any = "all_host", overlap: Any = "sequential", threads: int | None = None,
    link_gb_s: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """`compared` on an engine of its own, of which `machine` is the measured profile (`hl.measure_profile`)."""
    most = max(load.requests * (load.prompt + load.answer + 48) for load in loads)
    with load_engine(
        checkpoint, device=device, placement=placement, overlap=overlap, threads=threads, link_gb_s=link_gb_s,
        token_budget=2048, kv_tokens=most, prefix_cache=False, quiet=True,
    ) as engine:  # fmt: skip
        engine.lone_runtime.wait_mapped()
        engine.lone_runtime.randomise_cache(0)
        engine.serve(Load(1, 64, 2).made(engine.spec.vocab), keep_span_steps=0)  # what is set up once
        about = {"device": device, "strategy": f"{label(engine.planner.placement)}, {label(engine.planner.overlap)}"}
        about |= {"evidence": "emulated" if device == "emulated" else "measured"}
        return list(compared(engine, Twin(engine, machine, link_gb_s), loads, Bracket(engine.threads), about))


def trace(vocab: int, count: int, rate: float, prompt: int, answer: int, seed: int = 0) -> list[Request]:
    """`count` requests, arriving at `rate` a second on average (Poisson); lengths 0.5 to 1.5 times those."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, count)) if np.isfinite(rate) else np.zeros(count)
    prompts, answers = (rng.integers(n // 2, n + n // 2 + 1, count) for n in (prompt, answer))
    return [
        Request(f"r{i}", tuple(rng.integers(0, vocab, int(p)).tolist()), int(a), float(at))
        for i, (p, a, at) in enumerate(zip(prompts, answers, arrivals, strict=True))
    ]


def compared_trace(
    engine: Engine, twin: Twin, bracket: Bracket, about: Mapping[str, Any], *, share: float, count: int, scheduler: str,
    prompt: int = 96, answer: int = 12,
) -> dict[str, Any] | None:  # fmt: skip
    """p99 TTFT and goodput of a trace at `share` of the capacity that the simulator finds, or None if dropped.

    The SLO is three times the TTFT and twice the TPOT that the simulator has for one request alone.
    """
    vocab = engine.spec.vocab
    full = twin.serve(trace(vocab, count, np.inf, prompt, answer), scheduler)
    alone = latencies(twin.serve(trace(vocab, 1, np.inf, prompt, answer), scheduler))
    slo = SLO(name="three and two times alone", ttft_s=3 * alone["ttft_s"], tpot_s=2 * alone["tpot_s"])
    requests = trace(vocab, count, share * count / full.duration_s, prompt, answer)
    found = bracket(lambda: engine.serve(requests, scheduler, keep_span_steps=0))
    if found is None:
        return None
    row: dict[str, Any] = {**about, "share_of_capacity": share, "scheduler": scheduler, "requests": count}
    for side, served in (("predicted", twin.serve(requests, scheduler)), ("measured", found)):
        summary = summarise(served.records, served.duration_s, slo)
        row[f"{side}_p99_ttft_s"] = summary["p99_ttft_s"]
        row[f"{side}_goodput_req_s"] = summary["request_goodput_req_s"]
    return row
