"""The share of requests that were at least this fast: a CDF per scheduler, with p50, p90 and p99 marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from hybridlab.columns import LATENCIES
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_target
from hybridlab.figures.limits import Level, draw_limit, level_of, name_level
from hybridlab.figures.marks import band_handle, evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import ONE_COLUMN_IN, axis_label, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Series, Where, require_one_setting, rows_of, series_of
from hybridlab.metrics import is_saturated
from hybridlab.sections import did_you_mean

if TYPE_CHECKING:
    from hybridlab.figures.tables import Data

MARKED = (50, 90, 99)
# A band with more steps than this is drawn a little too wide instead.
MOST_LEVELS = 400


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
    curve per value of `by`, its p50, p90 and p99 marked and written into the legend: the least latency that this
    share does not exceed, where the summary's interpolate. Zeros count, and lie left of the axis. Repeats are pooled;
    the band spans the curves of the single runs. The dashed line is the SLO's limit, for TTFT and TPOT.

    `slo` replaces the one in the table, `where` picks rows by column, `evidence` asks for kinds to be
    compared. Raises ConfigError naming an unknown metric or value, a missing column, kinds mixed unasked, or a
    column in which the runs of one series differ.
    """
    what = "latency_cdf"
    check_target(ax, width_in, what)
    if metric not in LATENCIES:
        raise ConfigError(f"{what}: metric: unknown {metric!r}{did_you_mean(str(metric), LATENCIES)}")
    column = "token_times_s" if metric == "itl_s" else metric
    frame = rows_of(df, "requests", (column,), what)
    if metric == "itl_s":
        frame = frame.assign(itl_s=[np.diff(np.asarray(times, np.float64)) for times in frame["token_times_s"]])
        frame = frame.explode("itl_s").astype({"itl_s": np.float64})
    series = series_of(frame, by, what, needs=metric, zeros=True, where=where, evidence=evidence)
    require_one_setting(series, by, what)
    positive = [value for one in series for value in _extremes(one.rows[metric].to_numpy(np.float64))]
    if not positive:
        raise ConfigError(f"{what}: every {metric} is zero, which a log axis cannot show")
    least, most = min(positive), max(positive)
    level = level_of(series, slo, what)
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.2 if width_in < 5 else 2.8) if ax is None else ax
        banded = [_draw(ax, one, metric, least, most) for one in series]
        ax.set_xscale("log")
        if any((one.rows[metric] == 0).any() for one in series):
            margin = max(most / least, 2.0) ** 0.05
            ax.set_xlim(least / margin, most * margin)
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


def _extremes(values: np.ndarray) -> list[float]:
    """The least and the greatest positive value, if there are any."""
    positive = values[values > 0]
    return [float(positive.min()), float(positive.max())] if len(positive) else []


def _draw(ax: Axes, one: Series, metric: str, least: float, most: float) -> bool:
    """One curve with its marks; whether there are repeats, and so a band. Zeros are drawn below `least`."""
    values = np.sort(one.rows[metric].to_numpy(np.float64))
    look: dict[str, Any] = line_of(one.number, one.kind)
    line = "-" if look["linestyle"] == "none" else look["linestyle"]
    runs = [rows[metric].to_numpy(np.float64) for _, rows in one.rows.groupby("run_id")] if "run_id" in one.rows else []

    def shown(latency: np.ndarray) -> np.ndarray:
        return np.where(latency > 0, latency, least / 10)

    if len(runs) > 1:
        levels, low, high = band([np.sort(run) for run in runs])
        ax.fill_betweenx(levels, shown(low), shown(high), step="pre", color=look["color"], alpha=0.2, linewidth=0)
    x, y = np.concatenate([values[:1], values]), np.arange(len(values) + 1) / len(values)
    if values[-1] == 0:  # at one all the way
        x, y = np.append(x, most), np.append(y, 1.0)
    ax.plot(shown(x), y, drawstyle="steps-post", color=look["color"], linestyle=line, zorder=3)
    marked = quantiles(values, np.array(MARKED) / 100)
    if (there := marked > 0).any():  # an empty line that is not clipped has an extent that spoils the layout
        at = np.array(MARKED)[there] / 100
        ax.plot(marked[there], at, **{**look, "linestyle": "none"}, zorder=4, clip_on=False)
    return len(runs) > 1


def quantiles(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """float64 [shares]: of sorted `values` the least that at least this share does not exceed, where the curve is."""
    index = np.ceil(shares * len(values) - 1e-9).astype(np.int64) - 1
    return values[np.clip(index, 0, len(values) - 1)]


def band(runs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels, and the least and greatest quantile of any of the sorted `runs` between each level and the one before.

    The curve of the pooled runs lies between the two.
    """
    levels = np.unique(np.concatenate([np.arange(len(run) + 1) / len(run) for run in runs]))
    if len(levels) > MOST_LEVELS:
        levels = np.linspace(0, 1, MOST_LEVELS)
    before = np.concatenate([levels[:1], levels[:-1]])
    # Just above the level before, and at this one: quantiles are steps.
    low = np.min([quantiles(run, before + 1e-6 / len(run)) for run in runs], axis=0)
    high = np.max([quantiles(run, levels) for run in runs], axis=0)
    return levels, low, high


def _percentiles(one: Series, metric: str, *, tell: bool) -> str:
    """ "p50 0.43, p90 0.76, p99 1.6 s", which no line break parts; `tell` puts the kind of evidence in front."""
    values = quantiles(np.sort(one.rows[metric].to_numpy(np.float64)), np.array(MARKED) / 100)
    text = ", ".join(f"p{percent} {value:.3g}" for percent, value in zip(MARKED, values, strict=True)) + " s"
    text = text.replace(" ", "\N{NO-BREAK SPACE}") + (" (saturated: grows with the run)" if _saturated(one) else "")
    return (f"{one.kind} " if tell else "") + text


def _saturated(one: Series) -> bool:
    """Whether requests of one of the runs arrived faster than they finished."""
    if not {"run_id", "request_id", "arrival_s", "finished_s"} <= set(one.rows.columns):
        return False
    runs = [rows.drop_duplicates("request_id") for _, rows in one.rows.groupby("run_id")]
    return any(is_saturated(run["arrival_s"].to_numpy(float), run["finished_s"].to_numpy(float)) for run in runs)
