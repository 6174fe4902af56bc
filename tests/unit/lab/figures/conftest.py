"""Synthetic tables, made by formula so that what is drawn can be checked; no number here was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from hybridlab.figures import Tables

BASES = {"fcfs": 0.3, "chunked": 0.2}
LENGTHS = (10, 20, 40, 80, 160, 320)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def summary() -> Callable[..., pd.DataFrame]:
    """`summary(loads=, repeats=, schedulers=, **columns)`: rows of a summary; columns replace or add."""
    return make_summary


@pytest.fixture
def tables() -> Callable[..., Tables]:
    """`tables(...)`: the same summary, with 6 requests per run (10 to 320 prompt tokens) and 2 spans per run."""
    return make_tables


@pytest.fixture
def legend_texts() -> Callable[[Any], list[str]]:
    return texts_of


def texts_of(ax: Any) -> list[str]:
    legends = [*([ax.get_legend()] if ax.get_legend() else []), *ax.figure.legends]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def make_summary(
    loads: Sequence[float] = (2, 1, 4), repeats: int = 2, schedulers: Sequence[str] = tuple(BASES), **columns: Any
) -> pd.DataFrame:
    rows = []
    for scheduler in schedulers:
        for load in loads:
            for repeat in range(repeats):
                median_s = BASES.get(scheduler, 0.5) * load
                rows.append(
                    {
                        "experiment": "question",
                        "scheduler": scheduler,
                        "workload.rate_scale": float(load),
                        "repeat": repeat,
                        "num_requests": len(LENGTHS),
                        "completed": len(LENGTHS),
                        "offered_req_s": float(load),
                        "total_output_tokens": 60 * len(LENGTHS),
                        "output_tokens_per_s": 50.0 * load + repeat,
                        "median_ttft_s": median_s + 0.01 * repeat,
                        "p90_ttft_s": 2 * median_s,
                        "p99_ttft_s": 3 * median_s,
                        "median_tpot_s": 0.03 * load,
                        "p90_tpot_s": 0.04 * load,
                        "p99_tpot_s": 0.05 * load,
                        "slo": "mine",
                        "slo_ttft_s": 1.0,
                        "slo_tpot_s": 0.08,
                        "evidence": "measured",
                        "machine": "test CPU, 2 cores",
                        "code": "c0ffee",
                        "run_id": f"{scheduler}-{load}-{repeat}",
                        **columns,
                    }
                )
    return pd.DataFrame(rows)


def make_tables(
    loads: Sequence[float] = (2, 1, 4), repeats: int = 2, schedulers: Sequence[str] = tuple(BASES), **columns: Any
) -> Tables:
    summary = make_summary(loads, repeats, schedulers, **columns)
    requests, spans = [], []
    for run in summary.to_dict("records"):
        known = {name: run[name] for name in ("scheduler", "workload.rate_scale", "evidence", "run_id")}
        scale = BASES.get(run["scheduler"], 0.5) * run["workload.rate_scale"]
        for length in LENGTHS:
            ttft_s, tpot_s = 0.01 * length * scale + 0.01 * run["repeat"], 0.001 * length
            times = [ttft_s + tpot_s * i for i in range(4)]
            latency = {"ttft_s": ttft_s, "tpot_s": tpot_s, "e2el_s": times[-1], "queue_s": ttft_s / 2}
            requests.append(
                {
                    "request_id": f"r{length}",
                    "prompt_tokens": length,
                    "cached_tokens": length // 2,
                    **latency,
                    "token_times_s": times,
                }
            )
            requests[-1] |= known
        for number, kind in enumerate(("attention", "experts")):
            op = {"lane": "main/cpu", "kind": kind, "layer": 3, "part": 0, "microbatch": 0, "rank": 0}
            times = {"tier": "host", "start_s": 0.001 * number, "end_s": 0.001 * (number + 1)}
            spans.append(op | times | known)
    return Tables(summary, pd.DataFrame(requests), pd.DataFrame(spans))
