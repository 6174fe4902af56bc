"""The share of requests that were at least this fast: a CDF per scheduler, with p50, p90 and p99 marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from hybridlab.errors import ConfigError
from hybridlab.figures.limits import Level, draw_limit, level_of, name_level
from hybridlab.figures.marks import band_handle, evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import ONE_COLUMN_IN, axis_label, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Series, Where, require_one_setting, rows_of, series_of
from hybridlab.sections import did_you_mean

if TYPE_CHECKING:
    from hybridlab.figures.tables import Data

METRICS = ("ttft_s", "tpot_s", "e2el_s", "itl_s", "queue_s")
MARKED = (50, 90, 99)
BAND_LEVELS = 201


def latency_cdf(
    df: Data,
    ax: Axes | None = None,
    *,
    metric: str = "ttft_s",
    by: str | Sequence[str] = "scheduler",
    slo: Level | None = None,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """The fraction of finished requests (of token gaps for "itl_s") with at most this latency (s, log).

    From a result or rows of its `requests`; `metric` is one of ttft_s, tpot_s, e2el_s, itl_s, queue_s. One
    curve per value of `by`, its p50, p90 and p99 marked and written into the legend. Repeats are pooled; the
    band spans the curves of the single runs. The dashed line is the SLO's limit, for TTFT and TPOT.

    `slo` replaces the one in the table, `where` picks rows by column, `evidence` asks for kinds to be
    compared. Raises ConfigError naming an unknown metric or value, a missing column, kinds mixed unasked, or a
    column in which the runs of one series differ.
    """
    what = "latency_cdf"
    if metric not in METRICS:
        raise ConfigError(f"{what}: metric: unknown {metric!r}{did_you_mean(str(metric), METRICS)}")
    column = "token_times_s" if metric == "itl_s" else metric
    frame = rows_of(df, "requests", (column,), what)
    if metric == "itl_s":
        frame = frame.assign(itl_s=[np.diff(np.asarray(times, np.float64)) for times in frame["token_times_s"]])
        frame = frame.explode("itl_s").astype({"itl_s": np.float64})
    series = series_of(frame, by, what, needs=metric, where=where, evidence=evidence)
    require_one_setting(series, by, what)
    level = level_of(series, slo, what)
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.2 if width_in < 5 else 2.8) if ax is None else ax
        banded = [_draw(ax, one, metric) for one in series]
        ax.set_xscale("log")
        ax.set_ylim(0, 1.01)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99], ["0", "0.25", "0.5", "0.75", "0.9", "0.99"])
        ax.set_xlabel(axis_label(metric))
        ax.set_ylabel("fraction of token gaps" if metric == "itl_s" else "fraction of requests")
        limit = None if level is None else {"ttft_s": level.ttft_s, "tpot_s": level.tpot_s}.get(metric)
        if level is not None and limit is not None:
            drawn = draw_limit(ax, "x", limit)
            name_level(ax, level, f"{axis_label(metric).split()[0]} ≤ {limit:g} s{drawn}")
        log_axis(ax, "x")
        named = series_handles(series)
        for handle in named:
            own_kinds = [one for one in series if one.name == handle.get_label()]
            values = "; ".join(_percentiles(one, metric, tell=len(own_kinds) > 1) for one in own_kinds)
            handle.set_label(f"{handle.get_label()}: {values}")
        marks: list[Any] = [evidence_handle(kind) for kind in dict.fromkeys(one.kind for one in series)]
        put_legend(ax, named, [*marks, *([band_handle()] if any(banded) else [])], below=own)
    note_origin(ax, [one.rows for one in series])
    return ax


def _draw(ax: Axes, one: Series, metric: str) -> bool:
    """One curve with its marks; whether there are repeats, and so a band."""
    values = np.sort(one.rows[metric].to_numpy(np.float64))
    look: dict[str, Any] = line_of(one.number, one.kind)
    line = "-" if look["linestyle"] == "none" else look["linestyle"]
    share = np.arange(1, len(values) + 1) / len(values)
    runs = [rows[metric].to_numpy(np.float64) for _, rows in one.rows.groupby("run_id")] if "run_id" in one.rows else []
    if len(runs) > 1:
        levels = np.linspace(0, 1, BAND_LEVELS)
        curves = np.array([np.quantile(run, levels) for run in runs])
        low, high = curves.min(axis=0), curves.max(axis=0)
        ax.fill_betweenx(levels, low, high, color=look["color"], alpha=0.2, linewidth=0)
    x, y = np.concatenate([values[:1], values]), np.concatenate([[0.0], share])
    ax.plot(x, y, drawstyle="steps-post", color=look["color"], linestyle=line, zorder=3)
    marked = np.percentile(values, MARKED)
    ax.plot(marked, np.array(MARKED) / 100, **{**look, "linestyle": "none"}, zorder=4, clip_on=False)
    return len(runs) > 1


def _percentiles(one: Series, metric: str, *, tell: bool) -> str:
    """ "p50 0.43, p90 0.76, p99 1.6 s", which no line break parts; `tell` puts the kind of evidence in front."""
    found = zip(MARKED, np.percentile(one.rows[metric].to_numpy(np.float64), MARKED), strict=True)
    text = ", ".join(f"p{percent} {value:.3g}" for percent, value in found) + " s"
    return (f"{one.kind} " if tell else "") + text.replace(" ", "\N{NO-BREAK SPACE}")
