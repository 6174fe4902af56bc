"""Predicts every published row on the profile of the paper's machine: published, predicted, error. No GPU, seconds.

python experiments/paper/predict.py [OUT.csv]
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

from hybridlab.lowering import bind_slots, lower
from hybridlab.plans import COLLECTIVE_KINDS, ExpertPath, LaneKind, PlacementPlan, Program, Shape, Span, Tier
from hybridlab.simulator.clock import Dram, EventClock, Run, run_program
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.machine import Machine, load_profile
from hybridlab.simulator.programs import tabulate
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape, public_models
from hybridlab.spec import ModelSpec
from hybridlab.strategies.registry import resolve
from hybridlab.validation import validate

PUBLISHED = Path(__file__).with_name("published.csv")
MACHINE = load_profile("osdi26_rtx5090_2x_epyc9355").machine
R1, R1_SHAPE = public_models()["deepseek-ai/DeepSeek-V3"]
K2, K2_SHAPE = public_models()["moonshotai/Kimi-K2-Instruct"]
M2, M2_SHAPE = public_models()["MiniMaxAI/MiniMax-M2.1"]
Q4 = R1_SHAPE.with_bits(4.816)
K = 1024


def program(
    spec: ModelSpec, placed: PlacementPlan, overlap: str, num_micros: int, role: str, worker: str = "main"
) -> Program:
    """Of one step; every rank that the placement names computes."""
    ranks = tuple(sorted({0, *placed.rank_of.values()}))
    what = Shape(role, worker, LaneKind.GPU, ExpertPath(), num_micros, ranks, placed)
    ops = bind_slots(tuple(resolve("overlap", overlap).arrange(lower(what, spec))), placed.ring_slots)
    return Program(what, ops, validate(ops, ring_slots=placed.ring_slots, ranks=ranks))


def step_s(
    spec: ModelSpec,
    shape: ModelShape,
    placed: PlacementPlan,
    overlap: str,
    micros: list[Micro],
    machine: Machine = MACHINE,
) -> float:
    """Seconds of one step."""
    spans = step_spans(spec, shape, placed, overlap, micros, machine)
    return max(span.end_s for span in spans)


def step_spans(
    spec: ModelSpec, shape: ModelShape, placed: PlacementPlan, overlap: str, micros: list[Micro], machine: Machine
) -> tuple[Span, ...]:
    role = "decode" if micros[0].tokens <= 64 else "prefill"
    step = program(spec, placed, overlap, len(micros), role)
    cost = cost_model(machine, shape, micros)
    return run_program(step, Routes(spec), cost, handoffs_s(machine), Dram(*dram_bytes_s(machine)))


def streamed(spec: ModelSpec, ranks: int = 1, exchange: str = "small_ep") -> PlacementPlan:
    """A ring of two layers, as the paper's, on each of `ranks`, which have every second expert."""
    rank_of = {(layer, e): e % ranks for layer in spec.moe_layers for e in range(spec.num_experts)}
    return PlacementPlan(Tier.STREAMED, {}, rank_of, ring_slots=2, exchange=exchange)


def prefill(spec: ModelSpec, shape: ModelShape, tokens: int, ranks: int = 1, exchange: str = "small_ep") -> float:
    """Tokens per second of one whole prompt."""
    return tokens / step_s(spec, shape, streamed(spec, ranks, exchange), "prefetch", [Micro.prefill(float(tokens))])


def decode(spec: ModelSpec, shape: ModelShape, context: int, batch: int = 1, dual: bool = False) -> float:
    """Tokens per second of all requests together."""
    parts = [batch / 2, batch / 2] if dual else [batch]
    micros = [Micro.decode(float(part), float(context)) for part in parts]
    return batch / step_s(spec, shape, PlacementPlan(), "dual_batch" if dual else "prefetch", micros)


def layer_s(tokens: int, ranks: int, exchange: str) -> float:
    """One MoE layer, by the difference of 8 and 4 of them, computing alone: experts are there already."""
    found = []
    for layers in (4, 8):
        spec = replace(R1, num_layers=layers, dense_layers=frozenset())
        rank_of = {(layer, e): e % ranks for layer in spec.moe_layers for e in range(spec.num_experts)}
        placed = PlacementPlan(Tier.RESIDENT, {}, rank_of, exchange=exchange)
        found.append(step_s(spec, R1_SHAPE, placed, "prefetch", [Micro.prefill(float(tokens))]))
    return (found[1] - found[0]) / 4


def exchange_share(tokens: int) -> float:
    """Share of a layer that EP of two with dispatch spends in its exchanges."""
    spec = replace(R1, num_layers=4, dense_layers=frozenset())
    placed = replace(streamed(spec, 2, "dispatch_per_route"), default_tier=Tier.RESIDENT, ring_slots=0)
    spans = step_spans(spec, R1_SHAPE, placed, "prefetch", [Micro.prefill(float(tokens))], MACHINE)
    moved = sum(s.end_s - s.start_s for s in spans if s.op.kind in COLLECTIVE_KINDS and s.op.rank == 0)
    return moved / max(s.end_s for s in spans)


def layerwise(tokens: int, ranks: int = 1) -> float:
    """Tokens per second of KTransformers' layerwise prefill: a layer's experts are loaded, then it is computed."""
    placed = replace(streamed(M2, ranks), ring_slots=1)
    return tokens / step_s(M2, M2_SHAPE, placed, "sequential", [Micro.prefill(float(tokens))])


def second_buffer(tokens: int) -> float:
    """Speed with one buffer of a layer over that with two, Qwen3-30B-A3B in BF16 (FreeToken: a model of its size)."""
    spec, shape = public_models()["Qwen/Qwen3-30B-A3B"]
    shape, machine = shape.with_bits(16.0), replace(MACHINE, link_gb_s=52.7)
    two, one = (
        step_s(
            spec, shape, replace(streamed(spec), ring_slots=slots), "prefetch", [Micro.prefill(float(tokens))], machine
        )
        for slots in (2, 1)
    )
    return two / one


@cache
def mixed() -> tuple[float, float]:
    """One prompt of 20K on a GPU beside two requests that decode on another: (TTFT over the prompt alone, time per
    token over one request alone). They share DRAM, and nothing else.

    Of a third of the model, its head included: the ratios are the same.
    """
    spec = replace(R1, num_layers=20, dense_layers=frozenset({0}))
    shape = replace(R1_SHAPE, vocab=R1_SHAPE.vocab / 3)
    whole, one = Micro.prefill(20_000.0), [Micro.decode(1.0, 512.0)]
    clock = EventClock(handoffs_s(MACHINE), Dram(*dram_bytes_s(MACHINE)))

    def submit(placed: PlacementPlan, overlap: str, micros: list[Micro], role: str) -> Run:
        table = tabulate(program(spec, placed, overlap, len(micros), role, role), Routes(spec))
        cost = cost_model(MACHINE, shape, micros)
        costs = [cost(each) for each in table.classes]
        return clock.submit(table, [c.alone_s for c in costs], [c.dram_bytes for c in costs])

    prompt, steps = submit(streamed(spec), "prefetch", [whole], "prefill"), 0
    submit(PlacementPlan(), "dual_batch", one * 2, "decode")
    while prompt not in clock.advance():
        steps += 1
        submit(PlacementPlan(), "dual_batch", one * 2, "decode")
    alone = step_s(spec, shape, streamed(spec), "prefetch", [whole])
    return prompt.end_s / alone, prompt.end_s / steps / step_s(spec, shape, PlacementPlan(), "prefetch", one)


def cpu_prefill(tokens: int) -> float:
    return tokens / step_s(R1, R1_SHAPE, PlacementPlan(), "prefetch", [Micro.prefill(float(tokens))])


PREDICTED: dict[str, Callable[[], float]] = {
    "slp_20k": lambda: prefill(R1, R1_SHAPE, 20_000),
    "slp_32k": lambda: prefill(R1, R1_SHAPE, 32 * K),
    "dslp_32k": lambda: prefill(R1, R1_SHAPE, 32 * K, 2),
    "dslp_45k": lambda: prefill(R1, R1_SHAPE, 45_000, 2),
    "dslp_over_slp_20k": lambda: prefill(R1, R1_SHAPE, 20_000, 2) / prefill(R1, R1_SHAPE, 20_000),
    "ep_over_one_20k": lambda: layer_s(20_000, 1, "small_ep") / layer_s(20_000, 2, "dispatch_per_route"),
    "small_ep_over_ep_20k": lambda: layer_s(20_000, 2, "dispatch_per_route") / layer_s(20_000, 2, "small_ep"),
    "ep_share_20k": lambda: exchange_share(20_000),
    "slp_over_cpu_4k": lambda: prefill(R1, R1_SHAPE, 4 * K) / cpu_prefill(4 * K),
    "decode_r1": lambda: decode(R1, R1_SHAPE, 512),
    "decode_r1_32k": lambda: decode(R1, R1_SHAPE, 32 * K),
    "decode_k2": lambda: decode(K2, K2_SHAPE, 512),
    "decode_q4": lambda: decode(R1, Q4, 2 * K),
    "decode_q4_128k": lambda: decode(R1, Q4, 128 * K),
    "dual_2": lambda: decode(R1, R1_SHAPE, 512, 2, True) / decode(R1, R1_SHAPE, 512),
    "dual_4": lambda: decode(R1, R1_SHAPE, 512, 4, True) / decode(R1, R1_SHAPE, 512),
    "dual_6": lambda: decode(R1, R1_SHAPE, 512, 6, True) / decode(R1, R1_SHAPE, 512),
    "dual_2_tokens": lambda: decode(R1, R1_SHAPE, 512, 2, True),
    "dual_2_tokens_32k": lambda: decode(R1, R1_SHAPE, 32 * K, 2, True),
    "mixed_ttft": lambda: mixed()[0],
    "mixed_tpot": lambda: mixed()[1],
    "mixed_total": lambda: max(mixed()),
    "kt_2k": lambda: layerwise(2 * K),
    "kt_8k": lambda: layerwise(8 * K),
    "kt_32k": lambda: layerwise(32 * K),
    "kt_32k_2": lambda: layerwise(32 * K, 2),
    "kt_2k_2": lambda: layerwise(2 * K, 2),
    "kt_8k_2": lambda: layerwise(8 * K, 2),
    "buffer_4k": lambda: second_buffer(4 * K),
    "buffer_8k": lambda: second_buffer(8 * K),
    "buffer_16k": lambda: second_buffer(16 * K),
}


def rows() -> list[dict[str, str | float]]:
    """One per published row, with what is predicted; `error` is relative, 0 where a bound is kept."""
    found: list[dict[str, str | float]] = []
    with PUBLISHED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            published, predicted = float(row["published"]), PREDICTED[row["row"]]()
            error = predicted / published - 1
            kept = (row["side"] == "above" and error > 0) or (row["side"] == "below" and error < 0)
            found.append({**row, "predicted": predicted, "error": 0.0 if kept else error, "evidence": "simulated"})
    return found


def main() -> None:
    found = rows()
    for row in found:
        print(f"{row['what']:<60} {row['published']:>7} {row['predicted']:>9.4g} {row['unit']:<9} {row['error']:+.0%}")
    counted = [row for row in found if row["counted"] == "yes"]
    errors = [abs(float(row["error"])) for row in counted]
    both = [abs(float(row["error"])) for row in counted if row["side"] == "both"]
    print(f"{len(errors)} rows: median {median(errors):.1%}, {sum(error <= 0.15 for error in errors)} within 15%")
    print(f"{len(both)} of them without bounds: median {median(both):.1%}")
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(found[0]))
            table.writeheader()
            table.writerows(found)


if __name__ == "__main__":
    main()
