"""Which columns of a summary (one row per run) say what ran, and which one looks at first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

TABLE_METRICS = ("median_ttft_s", "p99_ttft_s", "median_tpot_s", "output_tokens_per_s", "request_goodput_req_s")


def short_table(summary: pd.DataFrame) -> pd.DataFrame:
    """What differs between runs, and `TABLE_METRICS`.

    `completed` and `evidence` are there if some requests did not complete or some runs were not measured.
    """
    whole = summary["completed"].tolist() == summary["num_requests"].tolist()
    measured = set(summary["evidence"].tolist()) <= {"measured"}
    extra = [*([] if whole else ["completed"]), *([] if measured else ["evidence"])]
    return summary.loc[:, [*axes_of(summary), *TABLE_METRICS, *extra]]


def axes_of(summary: pd.DataFrame) -> list[str]:
    """The columns of `summary` that say what ran: the scheduler, and what differs between runs."""
    named = [c for c in summary.columns[: summary.columns.get_loc("num_requests")] if c != "experiment"]
    distinct = {name: len(set(summary[name].tolist())) for name in named}
    # The label of the workload repeats what its swept keys say.
    told = {"workload"} if any(name.startswith("workload.") for name in named) else set()
    return [name for name in named if name == "scheduler" or (distinct[name] > 1 and name not in told)]
