"""What one long prompt does to requests that decode: one worker, unchunked and chunked, against a worker for each.

`python experiments/disaggregation/mixed.py OUT [--preset qwen3-7b-a1b] [--layers 6] [--prompt 2048]`: all systems on
`--threads` threads. For each system and number of decodes: the long prompt alone, the decodes alone, and both, in
turns. The long prompt arrives once all requests decode; of the mixed runs, `window_` gaps are those while it is
computed. One row per run goes to `OUT`/mixed.jsonl; `analysis.py OUT` makes the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hybridlab as hl
from hybridlab.checkpoint.writer import make_checkpoint
from hybridlab.provenance import machine

LONG = "long"
SHORT_PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-7b-a1b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--output", type=int, default=256, help="tokens that each decoding request draws")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--decodes", default="0,1,2,4,6")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / given.preset
        make_checkpoint(folder, given.preset, layers=given.layers, progress=True)
        for name, (options, scheduler) in systems(given).items():
            sizes = {"token_budget": given.prompt, "kv_tokens": 2 * given.prompt + 8 * (SHORT_PROMPT + given.output)}
            with hl.load(folder, prefix_cache=False, quiet=True, **sizes, **options) as engine:
                engine.serve(requests(given, 1, at_s=0.0), scheduler)  # the weights' pages are mapped then
                for row in rows(engine, scheduler, given):
                    chosen = {key: value for key, value in vars(given).items() if key != "out"}
                    what = {"system": name, "scheduler": scheduler, **options, **chosen, "machine": machine()}
                    write(given.out / "mixed.jsonl", {**what, "evidence": "measured", **row})


def systems(given: argparse.Namespace) -> dict[str, tuple[dict[str, Any], Any]]:
    """Name -> (options of `hl.load`, scheduler); the threads are the same in all."""
    one = {"threads": given.threads}
    decode = max(1, given.threads // 2)
    split = {"prefill": {"threads": max(1, given.threads - decode)}, "decode": {"threads": decode}}
    paper = {"name": "paper", "short_tokens": given.prompt, "chunk_tokens": given.chunk}
    return {
        "one worker, whole prompts": (one, "fcfs"),
        "one worker, chunks": (one, {"name": "chunked_prefill", "chunk_tokens": given.chunk}),
        "a worker for each": ({"workers": split}, paper),
    }


def requests(given: argparse.Namespace, num_decodes: int, at_s: float | None) -> list[hl.Request]:
    """`num_decodes` short requests at 0, and the long one at `at_s`, if given."""
    short = [hl.Request(f"d{i}", tuple(range(i, i + SHORT_PROMPT)), given.output) for i in range(num_decodes)]
    long = tuple(i % 997 for i in range(given.prompt))
    return short if at_s is None else [*short, hl.Request(LONG, long, 2, arrival_s=at_s)]


def rows(engine: hl.Engine, scheduler: Any, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both alone and mixed, again and again, so that what drifts does so for all of them."""
    for repeat in range(given.repeats):
        for num_decodes in map(int, given.decodes.split(",")):
            at_s = None
            for mode in ("alone", "mixed"):
                if mode == "mixed" and num_decodes == 0:
                    continue
                wanted = requests(given, num_decodes, 0.0 if num_decodes == 0 else at_s)
                served = engine.serve(wanted, scheduler)
                bad = [record.error for record in served.records if record.error]
                if bad:
                    raise SystemExit(f"a request failed: {bad[0]}")
                if num_decodes:  # in the mixed run, all decode by then
                    at_s = 1.2 * max(record.token_times_s[1] for record in served.records)
                yield {"repeat": repeat, "num_decodes": num_decodes, "mode": mode, **measured(served)}


def measured(served: Any) -> dict[str, Any]:
    """Latencies in seconds, of the long prompt and of those that decode; names as in `hybridlab.metrics`."""
    row: dict[str, Any] = {"duration_s": served.duration_s}
    start_s, end_s = 0.0, np.inf
    decoding = [record for record in served.records if record.request.id != LONG]
    for record in served.records:
        if record.request.id == LONG:
            start_s, end_s = record.arrival_s or 0.0, record.token_times_s[0]
            row["long_ttft_s"] = end_s - start_s
    row["output_tokens_per_s"] = sum(len(record.output) for record in served.records) / served.duration_s
    if not decoding:
        return row
    tpots_s = [(r.token_times_s[-1] - r.token_times_s[0]) / (len(r.output) - 1) for r in decoding]
    row |= quantiles("tpot_s", [np.asarray(tpots_s)])
    gaps, inside = [], []
    for record in decoding:
        times_s = np.asarray(record.token_times_s)
        own = np.diff(times_s)
        gaps.append(own)
        inside.append(own[(times_s[1:] > start_s) & (times_s[:-1] < end_s)])
    row |= quantiles("itl_s", gaps)
    if "long_ttft_s" in row:
        row |= quantiles("window_itl_s", inside)
        row["window_tokens_per_s"] = sum(map(len, inside)) / row["long_ttft_s"]
    return row


def quantiles(name: str, parts: Sequence[np.ndarray]) -> dict[str, float | int]:
    values = np.concatenate(parts)
    found = np.quantile(values, [0.5, 0.9, 0.99]) if len(values) else [np.nan] * 3
    return {"num_" + name: len(values)} | {f"p{p}_{name}": float(q) for p, q in zip((50, 90, 99), found, strict=True)}


def write(path: Path, row: dict[str, Any]) -> None:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")
    shown = {key: plain[key] for key in ("system", "num_decodes", "mode") if key in plain}
    print(*shown.values(), *(f"{k} {v:.4g}" for k, v in plain.items() if isinstance(v, float)), sep=", ")


if __name__ == "__main__":
    main()
