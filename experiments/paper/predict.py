"""Predicts every published row on the profile of the paper's machine: published, predicted, error. No GPU, seconds.

python experiments/paper/predict.py [OUT.csv]
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from hybridlab.lowering import bind_slots, lower
from hybridlab.plans import ExpertPath, LaneKind, PlacementPlan, Program, Shape, Tier
from hybridlab.simulator.clock import Dram, run_program
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.machine import Machine, load_profile
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape, public_models
from hybridlab.spec import ModelSpec
from hybridlab.strategies.registry import resolve
from hybridlab.validation import validate

PUBLISHED = Path(__file__).with_name("published.csv")
MACHINE = load_profile("rtx5090_2x_epyc9355").machine
R1, R1_SHAPE = public_models()["deepseek-ai/DeepSeek-V3"]
K2, K2_SHAPE = public_models()["moonshotai/Kimi-K2-Instruct"]
M2, M2_SHAPE = public_models()["MiniMaxAI/MiniMax-M2.1"]
Q4 = R1_SHAPE.with_bits(4.816)
K = 1024


def step_s(
    spec: ModelSpec,
    shape: ModelShape,
    placed: PlacementPlan,
    overlap: str,
    micros: list[Micro],
    machine: Machine = MACHINE,
) -> float:
    """Seconds of one step; every rank that the placement names computes."""
    role = "decode" if micros[0].tokens <= 64 else "prefill"
    ranks = tuple(sorted({0, *placed.rank_of.values()}))
    what = Shape(role, "main", LaneKind.GPU, ExpertPath(), len(micros), ranks, placed)
    ops = bind_slots(tuple(resolve("overlap", overlap).arrange(lower(what, spec))), placed.ring_slots)
    program = Program(what, ops, validate(ops, ring_slots=placed.ring_slots, ranks=ranks))
    cost = cost_model(machine, shape, micros)
    spans = run_program(program, Routes(spec), cost, handoffs_s(machine), Dram(*dram_bytes_s(machine)))
    return max(span.end_s for span in spans)


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
    "kt_2k": lambda: prefill(M2, M2_SHAPE, 2 * K),
    "kt_8k": lambda: prefill(M2, M2_SHAPE, 8 * K),
    "kt_32k": lambda: prefill(M2, M2_SHAPE, 32 * K),
    "kt_32k_2": lambda: prefill(M2, M2_SHAPE, 32 * K, 2),
}


def rows() -> list[dict[str, str | float]]:
    """One per published row, with what is predicted; `error` is relative, 0 where a bound is kept."""
    found: list[dict[str, str | float]] = []
    with PUBLISHED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            published, predicted = float(row["published"]), PREDICTED[row["row"]]()
            error = predicted / published - 1
            kept = row["side"] == "above" and error > 0
            found.append({**row, "predicted": predicted, "error": 0.0 if kept else error, "evidence": "simulated"})
    return found


def main() -> None:
    found = rows()
    for row in found:
        print(f"{row['what']:<60} {row['published']:>7} {row['predicted']:>9.4g} {row['unit']:<9} {row['error']:+.0%}")
    errors = [abs(float(row["error"])) for row in found if row["counted"] == "yes"]
    print(f"{len(errors)} rows: median {median(errors):.0%}, {sum(error <= 0.15 for error in errors)} within 15%")
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(found[0]))
            table.writeheader()
            table.writerows(found)


if __name__ == "__main__":
    main()
