"""Rules on rows of a summary: another service level, means over repeats, old code, and what lines tell apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab.figures.repeats import told_apart
from hybridlab.figures.tables import settings
from hybridlab.metrics import SLO
from hybridlab.request import Status

if TYPE_CHECKING:
    import pandas as pd

LOAD = "offered_req_s"


def at_slo(summary: pd.DataFrame, requests: Any, slo: SLO) -> tuple[pd.DataFrame, list[str]]:
    """`summary` at another service level, and a remark if its goodput cannot be computed anew.

    Goodput needs the requests of each run; without them it becomes NaN, for the stored one is of another SLO.
    """
    limits = {"slo": slo.name, "slo_ttft_s": slo.ttft_s, "slo_tpot_s": slo.tpot_s}
    if not {"request_goodput_req_s", "run_id", "duration_s", "slo_ttft_s", "slo_tpot_s"} <= set(summary.columns):
        return summary.assign(**limits), []
    same: Any = (summary["slo_ttft_s"] == slo.ttft_s) & (summary["slo_tpot_s"] == slo.tpot_s)
    good: dict[str, int] = {}
    if requests is not None:
        met: Any = (requests["status"] == str(Status.FINISHED)) & (requests["ttft_s"] <= slo.ttft_s)
        met &= ~(requests["tpot_s"] > slo.tpot_s)
        good = met.groupby(requests["run_id"]).sum().to_dict()
    columns = ("run_id", "duration_s", "request_goodput_req_s")
    rows = list(zip(*(summary[name].tolist() for name in columns), same.tolist(), strict=True))
    goodput = [
        stored if kept else good[run_id] / duration_s if run_id in good and duration_s > 0 else math.nan
        for run_id, duration_s, stored, kept in rows
    ]
    lost = any(math.isnan(new) and not math.isnan(row[2]) for new, row in zip(goodput, rows, strict=True))
    remark = "goodput at another SLO needs the requests: explore a result, or an experiment by its name"
    return summary.assign(request_goodput_req_s=goodput, **limits), [remark] if lost else []


def without_repeats(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per point: means of numbers over the repeats, the first of everything else."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    def how(column: Any) -> str:
        return "mean" if is_numeric_dtype(summary[column]) and not is_bool_dtype(summary[column]) else "first"

    rules: Any = {column: how(column) for column in summary.columns}
    return summary.groupby(_keys(summary), sort=False).agg(rules)


def label(value: Any) -> str:
    """A value of an axis as text; "none" where the axis does not apply."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def older_code(summary: pd.DataFrame) -> np.ndarray:
    """bool [rows]: True where a later row is the same repeat of the same point, by other code."""
    old = np.zeros(len(summary), dtype=bool)
    if not {"code", "repeat"} <= set(summary.columns):
        return old
    keys = list(zip(_keys(summary), summary["repeat"].tolist(), strict=True))
    code = summary["code"].tolist()
    newest = dict(zip(keys, code, strict=True))  # the last one stays
    return np.array([newest[key] != its for key, its in zip(keys, code, strict=True)], dtype=bool)


def apart(part: pd.DataFrame, by: str, per_request: bool) -> list[str]:
    """`by`, and what must be told apart as well: columns in which rows of one line differ, its load apart."""
    load = None if per_request or LOAD not in part.columns else LOAD
    return told_apart(part, load, [by])


def _keys(summary: pd.DataFrame) -> list[str]:
    """Per row, what it shares with its repeats; a table without axes tells points apart by their load."""
    told = [*settings(summary), "evidence"]
    told = [c for c in told if c in summary.columns]
    load = [LOAD] if LOAD in summary.columns and not any("." in c for c in told) else []
    return [repr(tuple(map(label, row))) for row in summary[[*told, *load]].itertuples(index=False, name=None)]
