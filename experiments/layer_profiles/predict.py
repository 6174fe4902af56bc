"""Kernel times of a layer on an RTX PRO 6000, predicted from its datasheet, held against what was measured there.

python experiments/layer_profiles/predict.py [OUT.csv]      # a table by kind of row; OUT: every row
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapreplace
from pathlib import Path

import numpy as np

from hybridlab.simulator.cost_model import Chosen, Micro, OpClass, cost_model
from hybridlab.simulator.machine import Machine, load_profile
from hybridlab.simulator.shapes import public_models

DATA = Path(__file__).parents[1] / "data" / "rtx_pro6000_layers"
ASSUMED = {each.name: each.default for each in fields(Machine) if each.name.endswith(("_efficiency", "_op_us"))}
MACHINE = replace(load_profile("rtx_pro6000_epyc9355").machine, **ASSUMED)  # datasheet, and what is assumed of any GPU
SPEC, SHAPE = public_models()["Qwen/Qwen3-30B-A3B"]
SHAPE = SHAPE.with_bits(16.0)
NUM_SM, L2_BYTES = 188, 128e6  # RTX PRO 6000 Blackwell Server Edition datasheet
TILE_ROWS = 64  # FlashAttention's kernels for paged KV take 64 query rows of one head a thread block
GPU_BYTES_S = MACHINE.gpu_read_gb_s * MACHINE.gpu_read_efficiency * 1e9


@dataclass(frozen=True)
class Timed:
    """A measured row: its kind, what was asked, and microseconds."""

    kind: str
    what: str
    measured_us: float
    predicted_us: float

    @property
    def error(self) -> float:
        return self.predicted_us / self.measured_us - 1


def op_us(kind: str, micro: Micro, chosen: Chosen | None = None, **shape: float) -> float:
    """Microseconds of one op of the simulator."""
    cost = cost_model(MACHINE, replace(SHAPE, **shape), [micro])
    return float(cost(OpClass(kind, False, 0, chosen=chosen)).alone_s * 1e6)


def experts_us(tokens: int, activated: int) -> float:
    """`tokens` that choose top-k experts each, of `activated` which are all read."""
    chosen = Chosen(np.array([SPEC.top_k / activated]), np.array([float(activated)]), np.zeros(1), False)
    counted = replace(chosen, _known={float(tokens): (float(activated), float(SPEC.top_k * tokens))})  # not expected
    return op_us("experts", Micro.decode(float(tokens), 0.0), counted)


def attention_us(chunk: int, before: int, num_decodes: int, context: int) -> float:
    """Scores and values of a prompt's `chunk` tokens behind `before`, beside tokens behind `context` each.

    Without a chunk the kernel splits the KV cache over all SMs: the simulator's op. With one it does not.
    """
    counts = [(chunk, before, True)] * (chunk > 0) + [(1, context, True)] * num_decodes
    micro = Micro.of(counts)
    if not chunk:
        return op_us("attention", micro, attention_weights=0.0)
    looked_at = [before + min(chunk, first + TILE_ROWS) for first in range(0, chunk, TILE_ROWS)]
    looked_at += [context + 1] * num_decodes
    return MACHINE.gpu_op_us + 1e6 * max(tiles_s(looked_at), repeated_reads_s(micro.context * SHAPE.kv_bytes))


def tiles_s(looked_at: Sequence[int]) -> float:
    """Thread blocks of 64 rows for each head, in the order of the grid, each on the SM that is free first.

    A token that decodes takes a block as a whole prompt's 64 do.
    """
    sm_flop_s = MACHINE.gpu_tflops * MACHINE.gpu_attention_efficiency * 1e12 / NUM_SM
    block_s = [TILE_ROWS * keys * 4 * SPEC.head_dim / sm_flop_s for keys in looked_at]
    free = [0.0] * NUM_SM
    for _ in range(SPEC.num_heads):
        for seconds in block_s:
            heapreplace(free, free[0] + seconds)
    return max(free)


def repeated_reads_s(kv_bytes: float) -> float:
    """Heads that share keys and values pass over them one after another: what L2 has not kept is read again."""
    passed = kv_bytes / SPEC.num_kv_heads
    missed = max(0.0, 1 - L2_BYTES / passed)
    again = (SPEC.num_heads / SPEC.num_kv_heads - 1) * missed
    return kv_bytes * (1 + again) / GPU_BYTES_S


def linear_us(layer: str, tokens: int) -> float:
    heads, groups = SPEC.num_heads * SPEC.head_dim, SPEC.num_kv_heads * SPEC.head_dim
    weights = SPEC.hidden * {"qkv_proj": heads + 2 * groups, "o_proj": heads}[layer]
    return op_us("mlp", Micro.decode(float(tokens), 0.0), mlp_weights=float(weights))


def rows(every: int = 1) -> Iterator[Timed]:
    """All measured rows, of attention's mixed batches each `every`th."""
    for row in _read("moe.csv"):
        tokens, activated = int(row["tokens"]), int(row["activated_experts"])
        yield Timed("moe", f"{tokens} x {activated}", float(row["time_us"]), experts_us(tokens, activated))
    for row in _read("dense.csv"):
        if row["layer"] in ("qkv_proj", "o_proj"):
            predicted = linear_us(row["layer"], int(row["tokens"]))
            yield Timed("projections", f"{row['layer']} {row['tokens']}", float(row["time_us"]), predicted)
    for i, row in enumerate(_read("attention.csv.gz")):
        asked = [int(row[key]) for key in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")]
        kind = "attention: " + {(True, False): "prefill", (False, True): "decode"}.get(
            (asked[0] > 0, asked[2] > 0), "mixed"
        )
        if kind != "attention: mixed" or i % every == 0:
            yield Timed(kind, " ".join(map(str, asked)), float(row["time_us"]), attention_us(*asked))


def _read(name: str) -> list[dict[str, str]]:
    opened: Callable = gzip.open if name.endswith(".gz") else open
    with opened(DATA / name, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summary(found: Sequence[Timed]) -> list[tuple[str, int, float, float, float]]:
    """(kind, rows, median absolute error, median error, 90th percentile of the absolute one); "attention" has all."""
    kinds = [*dict.fromkeys(each.kind for each in found), "attention"]
    table = []
    for kind in kinds:
        errors = np.array([each.error for each in found if each.kind.startswith(kind)])
        p90 = float(np.quantile(abs(errors), 0.9))
        table.append((kind, len(errors), float(np.median(abs(errors))), float(np.median(errors)), p90))
    return table


def main() -> None:
    found = list(rows())
    print(f"{'':<20} {'rows':>6} {'median |error|':>15} {'median':>8} {'p90':>6}")
    for kind, count, absolute, signed, p90 in summary(found):
        print(f"{kind:<20} {count:>6} {absolute:>15.1%} {signed:>+8.1%} {p90:>6.0%}")
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["kind", "what", "measured_us", "predicted_us", "error"])
            table.writerows([e.kind, e.what, e.measured_us, e.predicted_us, e.error] for e in found)


if __name__ == "__main__":
    main()
