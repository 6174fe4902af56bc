"""Stream-loading prefill and hybrid decode on one GPU, each measurement written to `OUT`/slp.jsonl as it is made.

`python experiments/slp/gpu.py OUT [--preset qwen3-30b-a3b] [--tokens 16384,32768] [--repeats 3]` makes a random
checkpoint in a temporary folder, pins its experts in host memory and computes whole prompts with them streamed in
several ways, beside the link alone, the same prompt with all experts resident, and with the CPU's experts. `--decode`
times decode steps, plain and as dual batch, with all experts on the CPU. On a machine without a GPU,
`--device emulated` runs the same script with cores in the GPU's place (`--preset tiny --tokens 512`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import link_alone, prompt_step

import hybridlab as hl
from hybridlab.batch import Entry, StepBatch
from hybridlab.bench_prefill import step_flop
from hybridlab.checkpoint.writer import make_checkpoint
from hybridlab.engine.worker import WORKER
from hybridlab.lowering import Planner
from hybridlab.plans import Span, StepPlan
from hybridlab.request import Sampling
from hybridlab.strategies.overlap.dual_batch import DualBatch
from hybridlab.strategies.overlap.prefetch import Prefetch

RING = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "all resident": {"placement": "all_resident", "overlap": "prefetch"},
    "ring of 2 layers": {"placement": RING, "overlap": "prefetch"},
    "ring of 2 x half a layer": {"placement": {**RING, "parts_per_layer": 2}, "overlap": "prefetch"},
    "one buffer": {"placement": {**RING, "ring_slots": 1}, "overlap": "prefetch"},
    "sequential": {"placement": RING, "overlap": "sequential"},
    "CPU experts": {"placement": "all_host", "overlap": "prefetch"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="16384,32768")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vram-gb", type=float)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--decode", help="numbers of requests, with commas: 1,2,4,6", default="")
    parser.add_argument("--depth", type=int, default=1024)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    lengths = [int(n) for n in given.tokens.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.checkpoint or Path(scratch) / given.preset
        if not folder.exists():
            make_checkpoint(folder, given.preset, progress=True)
        for name in filter(None, given.variants.split(",")):
            try:
                _measure(given, folder, name, lengths)
            except hl.HybridlabError as error:
                _write(given.out, {"variant": name, "vram_gb": given.vram_gb, "error": str(error)})
        if given.decode:
            _decode(given, folder, [int(n) for n in given.decode.split(",")])


def _measure(given: argparse.Namespace, folder: Path, name: str, lengths: list[int]) -> None:
    most = max(lengths)
    start_s = time.perf_counter()
    engine = hl.load(
        folder, device=given.device, token_budget=most, kv_tokens=most + 16, vram_gb=given.vram_gb, **VARIANTS[name]
    )
    load_s = time.perf_counter() - start_s
    with engine:
        row: dict[str, Any] = {}
        for tokens in lengths:
            steps = [prompt_step(engine, tokens) for _ in range(given.repeats + 1)][1:]
            seconds = [step["step_s"] for step in steps]
            flop = step_flop(engine.spec, tokens)
            row = {
                "variant": name,
                "model": engine.spec.family,
                "preset": given.preset,
                "device": given.device,
                "vram_gb": given.vram_gb,
                "tokens": tokens,
                "ttft_s": statistics.median(seconds),
                "ttft_s_min": min(seconds),
                "ttft_s_max": max(seconds),
                "tokens_per_s": tokens / statistics.median(seconds),
                "tflop_s": flop / statistics.median(seconds) / 1e12,
                "load_bytes": steps[0]["load_bytes"],
                "link_busy_s": statistics.median(step["link_busy_s"] for step in steps),
                "compute_busy_s": statistics.median(step["compute_busy_s"] for step in steps),
                "first_fill_s": statistics.median(step["first_fill_s"] for step in steps),
                "load_s": load_s,
                "gpu_bytes_most": torch.cuda.max_memory_reserved() if given.device == "cuda" else None,
                "evidence": "emulated" if given.device == "emulated" else "measured",
            }
            _write(given.out, row)
        if "ring" in name or name == "one buffer":
            labels = {"variant": "link alone", "of": name, "preset": given.preset, "vram_gb": given.vram_gb}
            _write(given.out, {**labels, **link_alone(engine, most), "evidence": row["evidence"]})


def _decode(given: argparse.Namespace, folder: Path, batches: list[int]) -> None:
    """Decode steps of so many requests at `--depth`: attention on the GPU, experts on the CPU."""
    depth, most = given.depth, max(batches)
    with hl.load(folder, device=given.device, token_budget=256, kv_tokens=most * (depth + 64)) as engine:
        runtime, spec = engine.runtime, engine.spec
        runtime.randomise_cache(0)
        blocks = -(-(depth + 32) // runtime.kv_block_tokens)
        rng = np.random.default_rng(0)
        for batch in batches:
            step = StepPlan("decode", {f"r{i}": 1 for i in range(batch)})
            for name, overlap in (("plain", Prefetch()), ("dual batch", DualBatch())):
                planner = Planner(
                    spec, engine.planner.hardware, engine.planner.placement, overlap, engine.planner.placed
                )
                program = planner.program(planner.shape(WORKER, step))
                seconds, waits, spans = [], [], ()
                for number in range(24):
                    entries = tuple(
                        Entry(f"r{i}", (int(rng.integers(spec.vocab)),), depth + number,
                              tuple(range(i * blocks, (i + 1) * blocks)), Sampling(), wants_token=True)
                        for i in range(batch)
                    )  # fmt: skip
                    backend = runtime.backend()
                    start_s = time.perf_counter()
                    backend.submit(WORKER, program, StepBatch(WORKER, step, entries))
                    (result,) = backend.wait(None)
                    seconds.append(time.perf_counter() - start_s)
                    spans = result.spans
                    waits.append(_hand_offs(spans))
                step_s = statistics.median(seconds[4:])
                _write(given.out, {
                    "variant": f"decode, {name}", "preset": given.preset, "device": given.device, "batch": batch,
                    "depth": depth, "step_s": step_s, "tokens_per_s": batch / step_s,
                    "attention_s": sum(s.end_s - s.start_s for s in spans if s.op.lane.kind != "cpu"),
                    "experts_s": sum(s.end_s - s.start_s for s in spans if s.op.lane.kind == "cpu"),
                    "to_host_s": statistics.median(down for down, _ in waits),
                    "to_gpu_s": statistics.median(up for _, up in waits),
                    "threads": engine.threads, "evidence": "emulated" if given.device == "emulated" else "measured",
                })  # fmt: skip


def _hand_offs(spans: tuple[Span, ...]) -> tuple[float, float]:
    """Medians: from a router's end to the host's start, and from the host's end to the sum's start."""
    by_id = {span.op.id: span for span in spans}
    host = [span for span in spans if span.op.lane.kind == "cpu"]
    down = [span.start_s - max(by_id[need].end_s for need in span.op.needs) for span in host]
    combines = [span for span in spans if span.op.kind == "combine"]
    up = [span.start_s - max(by_id[need].end_s for need in span.op.needs) for span in combines]
    return statistics.median(down or [0.0]), statistics.median(up or [0.0])


def _write(out: Path, row: dict[str, Any]) -> None:
    with (out / "slp.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
