"""One prompt's step and its loads alone, timed; for the scripts beside this file."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np

import hybridlab as hl
from hybridlab.batch import Entry, StepBatch
from hybridlab.engine.worker import WORKER
from hybridlab.plans import Program, StepPlan
from hybridlab.request import Sampling
from hybridlab.session import Engine


def prompt_step(engine: Engine, tokens: int) -> dict[str, float]:
    """Seconds of one step that computes a whole prompt, and of its loads and other ops by their spans."""
    runtime, spec = engine.runtime, engine.spec
    ids = tuple(int(token) for token in np.random.default_rng(0).integers(0, spec.vocab, tokens))
    step = StepPlan("prefill", {"prompt": tokens})
    program = engine.planner.program(engine.planner.shape(WORKER, step))
    blocks = -(-tokens // runtime.kv_block_tokens)
    entry = Entry("prompt", ids, 0, tuple(range(blocks)), Sampling(), wants_token=True)
    backend = runtime.backend()
    start_s = time.perf_counter()
    backend.submit(WORKER, program, StepBatch(WORKER, step, (entry,)))
    (result,) = backend.wait(None)
    step_s = time.perf_counter() - start_s
    if result.error:
        raise hl.HybridlabError(f"the step failed: {result.error}")
    loads = [span for span in result.spans if span.op.kind == "load"]
    others = [span for span in result.spans if span.op.kind != "load"]
    return {
        "step_s": step_s,
        "load_bytes": sum(len(span.op.experts) for span in loads) * spec.expert_bytes,
        "link_busy_s": sum(span.end_s - span.start_s for span in loads),
        "compute_busy_s": sum(span.end_s - span.start_s for span in others),
        "first_fill_s": loads[0].end_s - loads[0].start_s if loads else 0.0,
    }


def link_alone(engine: Engine, tokens: int) -> dict[str, float]:
    """The loads of a prompt's program and nothing else, one after another; the median of three."""
    runtime = engine.runtime
    step = StepPlan("prefill", {"prompt": tokens})
    program = engine.planner.program(engine.planner.shape(WORKER, step))
    loads = tuple(replace(op, needs=()) for op in program.ops if op.kind == "load")
    alone = Program(program.shape, loads, loads)
    entry = Entry("prompt", (0,), 0, (0,), Sampling(), wants_token=False)
    seconds = []
    for _ in range(3):
        start_s = time.perf_counter()
        runtime.step(alone, StepBatch(WORKER, step, (entry,)))
        seconds.append(time.perf_counter() - start_s)
    size = sum(len(op.experts) for op in loads) * engine.spec.expert_bytes
    median_s = statistics.median(seconds)
    return {"seconds": median_s, "load_bytes": size, "gb_s": size / median_s / 1e9}
