"""What one long prompt costs those who decode: whole or in chunks on one worker, or on a worker of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab.bench.devices import RowLog, origin
from hybridlab.device_lock import alone
from hybridlab.engine.options import check_threads
from hybridlab.errors import ConfigError, HybridlabError
from hybridlab.hardware import detect
from hybridlab.loading import load
from hybridlab.request import Request
from hybridlab.serving import Served
from hybridlab.session import Engine
from hybridlab.step_log import StepLog, timeline_rows

if TYPE_CHECKING:
    import pandas as pd

LONG = "long"
WHOLE, CHUNKS, SPLIT = "one worker, whole prompts", "one worker, chunks", "a worker for each"
SYSTEMS = (WHOLE, CHUNKS, SPLIT)
SHORT_PROMPT, LONG_OUTPUT = 32, 2
ROWS_FILE = "mixed.jsonl"
LATENCIES = ("tpot_s", "itl_s", "window_itl_s")
PERCENTILES = (50, 90, 99)
COLUMNS = (
    "system", "num_decodes", "mode", "repeat", "preset", "threads", "prompt_tokens", "output_tokens", "chunk_tokens",
    "duration_s", "long_ttft_s", "output_tokens_per_s", "total_tokens_per_s", "window_tokens_per_s",
    *(f"p{p}_{name}" for name in LATENCIES for p in PERCENTILES), *(f"num_{name}" for name in LATENCIES),
    "evidence", "machine", "code",
)  # fmt: skip


@dataclass(frozen=True)
class Interference:
    """`rows`: one per run, latencies in seconds. `timelines`: of the last mixed run of each system with most decodes.

    `timelines` has the columns of `step_log.timeline_rows`, and `system`; `hl.figures.worker_timeline` draws it.
    """

    rows: pd.DataFrame
    timelines: pd.DataFrame


def interference(
    checkpoint: str | Path,
    *,
    prompt_tokens: int = 2048,
    output_tokens: int = 256,
    chunk_tokens: int = 128,
    decodes: Sequence[int] = (0, 1, 2, 4, 6),
    threads: int | None = None,
    repeats: int = 3,
    device: str = "cpu",
    out: str | Path | None = None,
    progress: bool = True,
) -> Interference:
    """Three systems on the same `threads`, each with so many `decodes` alone, and beside one long prompt.

    The long prompt arrives once all the others decode; with 0 decodes it is alone. In rows of `mode` "mixed",
    `window_itl_s` are the gaps between tokens that were waited for while the prompt was computed: all gaps that overlap
    the time from its arrival to its first token. With `out`, rows are appended to `out`/mixed.jsonl as they are made.
    Raises `ConfigError` for a mistake, `HybridlabError` if a request failed.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    if not decodes or not all(isinstance(count, int) and count >= 0 for count in decodes):
        raise ConfigError(f"decodes is {decodes!r:.60}, expected ints >= 0")
    evidence = "emulated" if device == "emulated" else "measured"
    threads = check_threads(threads, detect())
    sizes = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "chunk_tokens": chunk_tokens}
    labels = {"preset": Path(checkpoint).name, "threads": threads, **sizes, "evidence": evidence, **origin(device)}
    log = RowLog(None if out is None else Path(out) / ROWS_FILE, COLUMNS, labels)
    room = {"token_budget": prompt_tokens, "kv_tokens": 2 * prompt_tokens + 8 * (SHORT_PROMPT + output_tokens)}
    runs_each = repeats * sum(1 if count == 0 else 2 for count in decodes)
    timelines = []
    with alone("cpu"), tqdm(total=len(SYSTEMS) * runs_each, desc="interference", disable=not progress) as bar:
        for name, (options, scheduler) in systems(threads, prompt_tokens, chunk_tokens).items():
            bar.set_postfix_str(name)
            with load(checkpoint, device=device, prefix_cache=False, quiet=True, **room, **options) as engine:
                load_requests = _Load(prompt_tokens, output_tokens, engine.spec.vocab)
                engine.serve(load_requests.of(1, at_s=0.0), scheduler)  # the weights' pages are mapped then
                for row, timeline in _runs(engine, scheduler, load_requests, decodes, repeats):
                    log.add({"system": name, **row})
                    if timeline is not None:
                        timelines.append(timeline.assign(system=name, evidence=evidence))
                    bar.update()
    return Interference(pd.DataFrame(log.records), pd.concat(timelines) if timelines else pd.DataFrame())


def systems(threads: int, prompt_tokens: int, chunk_tokens: int) -> dict[str, tuple[dict[str, Any], Any]]:
    """Name -> (options of `hl.load`, scheduler); the threads are the same in all."""
    decode = max(1, threads // 2)
    split = {"prefill": {"threads": max(1, threads - decode)}, "decode": {"threads": decode}}
    return {
        WHOLE: ({"threads": threads}, "fcfs"),
        CHUNKS: ({"threads": threads}, {"name": "chunked_prefill", "chunk_tokens": chunk_tokens}),
        SPLIT: ({"workers": split}, {"name": "paper", "short_tokens": prompt_tokens, "chunk_tokens": chunk_tokens}),
    }


@dataclass(frozen=True)
class _Load:
    prompt_tokens: int
    output_tokens: int
    vocab: int

    def of(self, num_decodes: int, at_s: float | None) -> list[Request]:
        """`num_decodes` short requests at 0, and the long one at `at_s`, if given."""
        short = [
            Request(f"user {i}", tuple((i + j) % self.vocab for j in range(SHORT_PROMPT)), self.output_tokens)
            for i in range(num_decodes)
        ]
        if at_s is None:
            return short
        ids = tuple(i % min(997, self.vocab) for i in range(self.prompt_tokens))
        return [*short, Request(LONG, ids, LONG_OUTPUT, arrival_s=at_s)]


def _runs(
    engine: Engine, scheduler: Any, load_requests: _Load, decodes: Sequence[int], repeats: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Rows alone and mixed, again and again, so that what drifts does so for all of them; and the last timeline."""
    for repeat in range(repeats):
        for count in decodes:
            at_s = None if count else 0.0
            for mode in ("alone", "mixed") if count else ("alone",):
                log = StepLog(scheduler)
                keep = repeat == repeats - 1 and count == max(decodes) and (mode == "mixed" or not count)
                served = engine.serve(load_requests.of(count, at_s), log, keep_span_steps=log.every if keep else 0)
                if bad := [record.error for record in served.records if record.error]:
                    raise HybridlabError(f"a request failed: {bad[0]}")
                if count:  # in the mixed run, all decode by then
                    at_s = 1.2 * max(record.token_times_s[1] for record in served.records)
                row = {"repeat": repeat, "num_decodes": count, "mode": mode, **latencies(served)}
                yield row, timeline_rows(served, log) if keep else None


def latencies(served: Served) -> dict[str, Any]:
    """Of one run, in seconds: TTFT of the long prompt, TPOT and gaps of those that decode, and tokens per second."""
    start_s, end_s = 0.0, np.inf
    row: dict[str, Any] = {"duration_s": served.duration_s}
    decoding = [record for record in served.records if record.request.id != LONG]
    for record in served.records:
        if record.request.id == LONG:
            start_s, end_s = record.arrival_s or 0.0, record.token_times_s[0]
            row["long_ttft_s"] = end_s - start_s
    output = sum(len(record.output) for record in served.records)
    row["output_tokens_per_s"] = output / served.duration_s
    row["total_tokens_per_s"] = (output + sum(len(r.request.prompt) for r in served.records)) / served.duration_s
    if not decoding:
        return row
    tpots_s = [(r.token_times_s[-1] - r.token_times_s[0]) / (len(r.output) - 1) for r in decoding]
    times = [np.asarray(record.token_times_s) for record in decoding]
    row |= _percentiles("tpot_s", [tpots_s]) | _percentiles("itl_s", [np.diff(own) for own in times])
    if "long_ttft_s" in row:
        inside = [np.diff(own)[(own[1:] > start_s) & (own[:-1] < end_s)] for own in times]
        row |= _percentiles("window_itl_s", inside)
        row["window_tokens_per_s"] = sum(map(len, inside)) / row["long_ttft_s"]
    return row


def _percentiles(name: str, parts: Iterable[Any]) -> dict[str, Any]:
    values = np.concatenate([np.asarray(part, np.float64) for part in parts])
    found = np.percentile(values, PERCENTILES).tolist() if len(values) else [None] * len(PERCENTILES)
    return {"num_" + name: len(values)} | {f"p{p}_{name}": v for p, v in zip(PERCENTILES, found, strict=True)}
