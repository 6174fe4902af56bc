"""Which columns of a summary (one row per run) say what ran, and which one looks at first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

TABLE_METRICS = ("median_ttft_s", "p99_ttft_s", "median_tpot_s", "output_tokens_per_s", "request_goodput_req_s")


def short_table(summary: pd.DataFrame) -> pd.DataFrame:
    """What differs between runs, and `TABLE_METRICS`.

    `saturated` is there if some runs are (their p99 latencies are infinite then), `completed` and `evidence` if some
    requests did not complete or some runs were not measured, `machine` and `code` if they differ, `status` and `error`
    if the table holds failed runs.
    """
    summary = without_bounds(summary)
    there = set(summary.columns)
    whole = "completed" in there and summary["completed"].tolist() == summary["num_requests"].tolist()
    measured = set(summary["evidence"].tolist()) <= {"measured"}
    extra = [*(["saturated"] if any_saturated(summary) else []), *([] if whole else ["completed"])]
    extra += [] if measured else ["evidence"]
    extra += [name for name in ("machine", "code") if name in there and len(set(summary[name].tolist())) > 1]
    extra += ["status", "error"]
    return summary.loc[:, [*axes_of(summary), *(name for name in (*TABLE_METRICS, *extra) if name in there)]]


def any_saturated(summary: pd.DataFrame) -> bool:
    """Whether the table has a run in which more was offered than completed (`metrics.is_saturated`)."""
    return "saturated" in summary.columns and any(value is True for value in summary["saturated"].tolist())


def without_bounds(summary: pd.DataFrame) -> pd.DataFrame:
    """The table with infinite p99 latencies where a run is saturated: what was seen tells how long the run was."""
    if not any_saturated(summary):
        return summary
    shown = summary.copy()
    late = [name for name in ("p99_ttft_s", "p99_e2el_s", "p99_queue_s") if name in shown.columns]
    shown.loc[[value is True for value in shown["saturated"].tolist()], late] = float("inf")
    return shown


def axes_of(summary: pd.DataFrame) -> list[str]:
    """The columns of `summary` that say what ran: the scheduler, and what differs between runs."""
    columns = summary.columns.tolist()
    # Runs that failed have no metrics between what ran and where.
    end = next(columns.index(name) for name in ("num_requests", "backend") if name in columns)
    named = [name for name in columns[:end] if name != "experiment"]
    distinct = {name: len(set(summary[name].tolist())) for name in named}
    # The label of the workload repeats what its swept keys say.
    told = {"workload"} if any(name.startswith("workload.") for name in named) else set()
    return [name for name in named if name == "scheduler" or (distinct[name] > 1 and name not in told)]
