"""A streamed prompt on one GPU (SLP) and on several, each with its experts and its link (DSLP): what is measured is
written into `OUT`/dslp_gpu.jsonl as it is made.

`python experiments/small_ep/gpu.py OUT [--checkpoint PATH] [--preset qwen3-30b-a3b] [--tokens 8192,16384,32768]
[--ranks 2] [--steps 3] [--exchanges small_ep]`: a random checkpoint is made where PATH has none (by default in a
temporary folder). One rank computes every prompt in one step, in turns with its loads alone; then so many ranks do.
Without a GPU, `--device emulated --preset tiny --tokens 256` runs the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import hybridlab as hl
from hybridlab.bench.devices import RowLog, origin
from hybridlab.bench.exchange import busy_s, with_exchange
from hybridlab.bench.steps import Step, TimedStep, loads_alone, prompt_step, take_turns, timed
from hybridlab.checkpoint.writer import make_checkpoint
from hybridlab.device_lock import alone
from hybridlab.engine import ep_traffic
from hybridlab.engine.collectives import Traffic
from hybridlab.engine.ep_exchange import Wire
from hybridlab.engine.ranks import Ranks
from hybridlab.engine.ranks_share import rows_of
from hybridlab.hardware.gpu import detect_gpus
from hybridlab.plans import EXCHANGES

STREAMED = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 2}
KV_BYTES = 2
"""BF16."""
COLUMNS = (
    "system", "preset", "device", "ranks", "exchange", "transport", "tokens", "steps", "ttft_s", "ttft_s_min",
    "ttft_s_max", "tokens_per_s", "over_one_rank", "same_token", "load_s", "load_bytes_per_rank", "link_gb_s_per_rank",
    "exchange_s_per_rank", "experts_sent_bytes", "experts_formula_bytes", "kv_sent_bytes", "kv_formula_bytes",
    "start_s", "evidence", "machine", "code",
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="8192,16384,32768")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--exchanges", default="small_ep", help=f"with commas, some of {', '.join(EXCHANGES)}")
    parser.add_argument("--vram-gb", type=float, help="of each rank")
    given = parser.parse_args(words)
    lengths, exchanges = [int(number) for number in given.tokens.split(",")], given.exchanges.split(",")
    log = RowLog(given.out / "dslp_gpu.jsonl", COLUMNS, origin(given.device))
    options: dict[str, Any] = {
        "device": given.device,
        "vram_gb": given.vram_gb,
        "placement": STREAMED,
        "overlap": "prefetch",
    }
    room: dict[str, Any] = {"token_budget": max(lengths), "kv_tokens": max(lengths) + 16}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.checkpoint or Path(scratch) / given.preset
        if not folder.exists():
            make_checkpoint(folder, given.preset, progress=True)
        with alone("cpu"):
            first: dict[int, Mapping[str, Any]] = {}
            for ranks in (1, given.ranks):
                start_s = perf_counter()
                with hl.load(folder, ranks=ranks, **options, **room) as engine:
                    labels = {
                        "system": "SLP" if ranks == 1 else "DSLP",
                        "preset": folder.name,
                        "device": given.device,
                        "ranks": ranks,
                        "transport": transport(given.device, ranks),
                        "start_s": perf_counter() - start_s,
                        "evidence": "emulated" if given.device == "emulated" else "measured",
                    }
                    for tokens in lengths:
                        for row in measured(engine, tokens, exchanges, given.steps, first):
                            log.add({**labels, **row})
                            print(
                                {name: value for name, value in log.records[-1].items() if value is not None},
                                flush=True,
                            )


def transport(device: str, ranks: int) -> str:
    """What ranks exchange goes through."""
    if ranks == 1:
        return ""
    if device == "cuda" and len(detect_gpus()) >= ranks:
        return "NCCL, a GPU each"
    return "sockets by way of the host, sharing GPUs" if device == "cuda" else "sockets"


def measured(
    engine: hl.Engine, tokens: int, exchanges: Sequence[str], repeats: int, first: dict[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each exchange, or the one of a single rank, which is entered in `first`."""
    ranks = len(engine.planner.ranks)
    steps = {
        name: prompt_step(engine, tokens, planner=with_exchange(engine, name))
        for name in (exchanges if ranks > 1 else exchanges[:1])
    }
    calls = {name: partial(timed, engine, step) for name, step in steps.items()}
    calls["loads"] = partial(timed, engine, loads_alone(next(iter(steps.values()))))
    found: dict[str, list[TimedStep]] = {name: [] for name in calls}
    for name, step in take_turns(calls, repeats):
        found[name].append(step)
    load_s = median(step.step_s for step in found.pop("loads"))
    rows = []
    for name, taken in found.items():
        seconds, load_bytes = [step.step_s for step in taken], bytes_per_rank(engine, steps[name])
        moved, drawn = moved_by(engine, steps[name])
        row: dict[str, Any] = {
            "exchange": name if ranks > 1 else "",
            "tokens": tokens,
            "steps": len(taken),
            "ttft_s": median(seconds),
            "ttft_s_min": min(seconds),
            "ttft_s_max": max(seconds),
            "tokens_per_s": tokens / median(seconds),
            "load_s": load_s,
            "load_bytes_per_rank": load_bytes,
            "link_gb_s_per_rank": max(load_bytes) / load_s / 1e9,
        }
        if ranks == 1:
            first[tokens] = {"ttft_s": row["ttft_s"], "drawn": drawn}
        else:
            row |= {
                "over_one_rank": first[tokens]["ttft_s"] / row["ttft_s"],
                "same_token": drawn == first[tokens]["drawn"],
                "exchange_s_per_rank": busy_s(taken, "all_gather", "dispatch", "reduce") / ranks,
                **bytes_moved(engine, steps[name], name, moved),
            }
        rows.append(row)
    return rows


def bytes_per_rank(engine: hl.Engine, step: Step) -> list[int]:
    """What crosses the link of each rank in a step."""
    count = dict.fromkeys(engine.planner.ranks, 0)
    for op in step.load_ops:
        count[op.rank] += len(op.experts)
    return [experts * engine.spec.expert_bytes for experts in count.values()]


def moved_by(engine: hl.Engine, step: Step) -> tuple[list[dict[str, Traffic]], dict[str, int]]:
    """What each rank sent and received in one more such step, and the token that was drawn."""
    runtime = engine.lone_runtime
    if not isinstance(runtime, Ranks):
        return [], runtime.step(step.program, step.batch)
    before = runtime.traffic()
    drawn = runtime.step(step.program, step.batch)
    after = runtime.traffic()
    return [{name: now[name] - was[name] for name in now} for now, was in zip(after, before, strict=True)], drawn


def bytes_moved(
    engine: hl.Engine, step: Step, exchange: str, moved: Sequence[Mapping[str, Traffic]]
) -> dict[str, list[int] | None]:
    """Sent by each rank: counted, and by the formulas; a dispatch's depends on the routes, which are not told here."""
    spec, ranks = engine.spec, len(moved)
    sizes = [len(rows_of(step.batch.entries[0], rank, ranks)) for rank in range(ranks)]
    formula = [ep_traffic.small_ep(sizes, rank, spec.hidden, Wire()).sent_bytes for rank in range(ranks)]
    return {
        "experts_sent_bytes": [each["experts"].sent_bytes for each in moved],
        "experts_formula_bytes": [len(spec.moe_layers) * size for size in formula] if exchange == "small_ep" else None,
        "kv_sent_bytes": [each["attention"].sent_bytes for each in moved],
        "kv_formula_bytes": [(ranks - 1) * size * spec.kv_elements_per_token * KV_BYTES for size in sizes],
    }


if __name__ == "__main__":
    main()
