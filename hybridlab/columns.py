"""What the columns of the tables of results are: what ran, where a number comes from, metrics, and their units."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

Evidence = Literal["measured", "emulated", "simulated", "extrapolated", "published"]
EVIDENCE: tuple[Evidence, ...] = get_args(Evidence)
"""Where a number comes from; the most direct kind first."""

LABELS = ("model", "workload", "scheduler", "placement", "overlap", "precision", "device")
# Swept keys have a dot, but for those of the top level.
UNDOTTED = ("engine", "warmup_requests")
# What the summary knows of a run, for tables that know its run_id only.
OF_THE_RUN = ("repeat", "evidence", "machine", "code", "slo", "slo_ttft_s", "slo_tpot_s")

Percentile = Literal["median", "p90", "p99"]
PERCENTILES: tuple[Percentile, ...] = get_args(Percentile)
Latency = Literal["ttft_s", "tpot_s", "e2el_s", "itl_s", "queue_s"]
LATENCIES: tuple[Latency, ...] = get_args(Latency)
OF_A_SUMMARY = (
    *("num_requests", "completed", "failed", "rejected", "cancelled", "duration_s", "offered_req_s"),
    *("total_input_tokens", "total_output_tokens", "cached_prompt_tokens", "prefix_hit_rate"),
    *("request_throughput_req_s", "output_tokens_per_s", "total_tokens_per_s", "request_goodput_req_s"),
    *(f"{kind}_{latency}" for latency in LATENCIES for kind in ("mean", *PERCENTILES)),
    "num_steps",
)
"""Numbers that a row of a summary has."""

UNITS: Mapping[str, str] = MappingProxyType(
    {
        "_tokens_per_s": "tokens/s",
        "_req_s": "req/s",
        "_gb_s": "GB/s",
        "_s": "s",
        "_tokens": "tokens",
        "_gib": "GiB",
        "_bytes": "bytes",
    }
)
"""What the end of a column's name says about its unit; the first that fits holds."""
ACRONYMS: Mapping[str, str] = MappingProxyType({"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"})


def is_axis(column: str) -> bool:
    """True for a column that says what ran, not what came out."""
    return column in LABELS or column in UNDOTTED or "." in column
