"""Two ranks with a link each against one, and what the exchanges of experts move: without a GPU.

`python experiments/small_ep/emulated.py OUT [--preset qwen3-7b-a1b] [--layers 4] [--tokens 256] [--ratio 8]`: one
prompt, streamed by one rank and by two. The link is capped so that loading takes `--ratio` times as long as computing
on one rank, since the ranks share the cores of this machine. Rows go to `OUT`/dslp.jsonl and `OUT`/bytes.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import hybridlab as hl
from hybridlab.batch import Entry
from hybridlab.bench_steps import TimedStep, loads_alone, prompt_step, take_turns, timed
from hybridlab.checkpoint.writer import make_checkpoint
from hybridlab.engine import ep_traffic
from hybridlab.engine.collectives import Traffic
from hybridlab.engine.ep_exchange import Wire
from hybridlab.engine.ranks import Ranks
from hybridlab.engine.ranks_share import rows_of
from hybridlab.lowering import Planner
from hybridlab.plans import EXCHANGES
from hybridlab.spec import ModelSpec

STREAMED = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 2}
FORMULAS = {"dispatch_per_route": ep_traffic.dispatch_per_route, "dispatch_per_rank": ep_traffic.dispatch_per_rank}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-7b-a1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", default="2,4,8", help="ranks whose bytes are counted, on the preset tiny")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / given.preset
        make_checkpoint(folder, given.preset, layers=given.layers, progress=True)
        for row in dslp_rows(folder, given.tokens, given.ratio, given.repeats):
            _write(given.out / "dslp.jsonl", {"preset": given.preset, "layers": given.layers, **row})
        tiny = Path(scratch) / "tiny"
        make_checkpoint(tiny, "tiny")
        for size in map(int, given.sizes.split(",")):
            for row in bytes_rows(tiny, min(given.tokens, 512), size):
                _write(given.out / "bytes.jsonl", {"preset": "tiny", **row})


def dslp_rows(folder: Path, tokens: int, ratio: float, repeats: int) -> list[dict[str, Any]]:
    """One row for one rank and one for each exchange on two: medians, all in turns."""
    room: dict[str, Any] = {"token_budget": tokens, "kv_tokens": tokens + 16, "threads": 2, "quiet": True}
    with hl.load(folder, device="emulated", placement="all_resident", overlap="prefetch", **room) as engine:
        step = prompt_step(engine, tokens)
        compute_s = statistics.median(
            found.step_s for _, found in take_turns({"step": partial(timed, engine, step)}, repeats)
        )
        spec = engine.spec
    size = len(spec.moe_layers) * spec.num_experts * spec.expert_bytes
    how: dict[str, Any] = {
        "device": "emulated",
        "placement": STREAMED,
        "overlap": "prefetch",
        "link_gb_s": size / (ratio * compute_s) / 1e9,
        **room,
    }
    with hl.load(folder, **how) as one, hl.load(folder, ranks=2, **how) as two:
        alone = prompt_step(one, tokens)
        calls = {"1": partial(timed, one, alone), "1 loads": partial(timed, one, loads_alone(alone))}
        for exchange in EXCHANGES:
            step = prompt_step(two, tokens, planner=_with_exchange(two, exchange))
            calls[exchange] = partial(timed, two, step)
        calls["2 loads"] = partial(timed, two, loads_alone(prompt_step(two, tokens)))
        found: dict[str, list[TimedStep]] = {name: [] for name in calls}
        for name, step in take_turns(calls, repeats):
            found[name].append(step)
    one_s = _median_s(found["1"])
    rows = []
    for name in ("1", *EXCHANGES):
        ranks, step_s = 1 if name == "1" else 2, _median_s(found[name])
        rows.append({
            "ranks": ranks,
            "exchange": "" if ranks == 1 else name,
            "tokens": tokens,
            "link_gb_s": how["link_gb_s"],
            "compute_s": compute_s,
            "load_s": _median_s(found[f"{ranks} loads"]),
            "step_s": step_s,
            "step_s_min": min(step.step_s for step in found[name]),
            "step_s_max": max(step.step_s for step in found[name]),
            "over_one_rank": one_s / step_s,
            "exchange_s": _busy_s(found[name], "all_gather", "dispatch", "reduce") / ranks,
            "router_s": _busy_s(found[name], "router") / ranks,
            "evidence": "emulated",
        })  # fmt: skip
    return rows


def bytes_rows(folder: Path, tokens: int, size: int) -> list[dict[str, Any]]:
    """What a prompt's MoE layers move between `size` ranks with each exchange, counted and by the formulas.

    In `exact`, so that the routes that one process takes are those of the ranks.
    """
    room: dict[str, Any] = {"precision": "exact", "token_budget": tokens, "kv_tokens": tokens + 16, "quiet": True}
    ids = tuple(np.random.default_rng(0).integers(0, 64, tokens).tolist())
    routes: dict[int, np.ndarray] = {}
    with hl.load(folder, device="cpu", **room) as engine:
        spec = engine.spec
        engine.serve([hl.Request("prompt", ids, 1)], on_route=lambda layer, entries, own: routes.update({layer: own}))
    entry = Entry("prompt", ids, 0, (), hl.Sampling(), wants_token=True)
    rows = [rows_of(entry, rank, size) for rank in range(size)]
    found = []
    with hl.load(folder, device="cpu", ranks=size, threads=1, **room) as engine:
        assert isinstance(engine.runtime, Ranks)
        placed = engine.planner.placed
        owner = {layer: np.array([placed.rank_of[layer, e] for e in range(spec.num_experts)]) for layer in routes}
        for exchange in EXCHANGES:
            step = prompt_step(engine, tokens, planner=_with_exchange(engine, exchange))
            entries = (replace(step.batch.entries[0], token_ids=ids),)
            before = _experts(engine.runtime)
            engine.runtime.step(step.program, replace(step.batch, entries=entries))
            moved = [after - was for after, was in zip(_experts(engine.runtime), before, strict=True)]
            formula = [
                _formula(exchange, [routes[layer][own] for own in rows], owner[layer], rank, spec)
                for rank in range(size)
                for layer in routes
            ]
            layer = next(iter(routes))
            uniform = _uniform_bytes(exchange, [len(own) for own in rows], owner[layer], spec) * len(routes)
            found.append({
                "ranks": size,
                "exchange": exchange,
                "tokens": tokens,
                "top_k": spec.top_k,
                "hidden": spec.hidden,
                "hidden_dtype": str(Wire().hidden),
                "partial_dtype": str(Wire().partial),
                "sent_bytes": sum(each.sent_bytes for each in moved),
                "formula_bytes": sum(each.sent_bytes for each in formula),
                "uniform_bytes": uniform,
                "evidence": "measured",
            })  # fmt: skip
    return found


def _with_exchange(engine: hl.Engine, exchange: str) -> Planner:
    planner = engine.planner
    placed = replace(planner.placed, exchange=exchange)
    return Planner(planner.model, planner.hardware, planner.placement, planner.overlap, placed, planner.ranks)


def _formula(exchange: str, routes: Sequence[np.ndarray], owner_E: np.ndarray, rank: int, spec: ModelSpec) -> Traffic:
    if exchange == "small_ep":
        return ep_traffic.small_ep([len(chosen) for chosen in routes], rank, spec.hidden, Wire())
    return FORMULAS[exchange](routes, owner_E, rank, spec.hidden, Wire())


def _uniform_bytes(exchange: str, tokens: Sequence[int], owner_E: np.ndarray, spec: ModelSpec) -> float:
    """Hidden states and results of one layer over all ranks, if routes were random; without ids, weights and counts."""
    experts = np.bincount(owner_E, minlength=len(tokens)).tolist()
    place, row_bytes = EXCHANGES.index(exchange), spec.hidden * (Wire().hidden.itemsize + Wire().partial.itemsize)
    expected = (ep_traffic.expected_rows_per_token(experts, rank, spec.top_k) for rank in range(len(tokens)))
    return sum(count * each[place] for count, each in zip(tokens, expected, strict=True)) * row_bytes


def _experts(runtime: Ranks) -> list[Traffic]:
    return [moved["experts"] for moved in runtime.traffic()]


def _median_s(steps: Sequence[TimedStep]) -> float:
    return statistics.median(step.step_s for step in steps)


def _busy_s(steps: Sequence[TimedStep], *kinds: str) -> float:
    """Over all ranks; the exchanges' include waiting for the others."""
    sums = [sum(span.end_s - span.start_s for span in step.spans if span.op.kind in kinds) for step in steps]
    return statistics.median(sums)


def _write(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


if __name__ == "__main__":
    main()
