"""TTFT against output throughput: one line per scheduler, joined over the load, with the SLO's limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from hybridlab.figures.style import (
    GREY,
    ONE_COLUMN_IN,
    cycle_color,
    evidence_handle,
    evidence_mark,
    new_axes,
    require,
    style,
)

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.experiment import ExperimentResult

METRICS = ("output_tokens_per_s", "median_ttft_s", "p90_ttft_s", "median_tpot_s", "slo_ttft_s", "slo_tpot_s")
BELOW_LABEL_PT = 29
Row = dict[str, Any]


def ttft_throughput(
    df: pd.DataFrame | ExperimentResult,
    ax: Axes | None = None,
    *,
    by: str = "scheduler",
    load: str = "offered_req_s",
) -> Axes:
    """Median TTFT (s, log scale; whisker to p90) over output tokens/s, from a result or rows of its `summary`.

    One line per value of `by` and kind of evidence, joined in the order of `load`; repeats are averaged and
    their range is a band. Points whose median TPOT misses the SLO are ringed: throughput without TPOT means
    little. Rows in which no request finished are left out. Raises ConfigError naming a missing column.
    """
    frame = require(df, "summary", (*METRICS, "slo", "evidence", by, load), "ttft_throughput")
    rows: list[Row] = [row for row in frame.to_dict("records") if row["median_ttft_s"] > 0]
    names = list(dict.fromkeys(row[by] for row in rows))
    kinds = list(dict.fromkeys(row["evidence"] for row in rows))
    with style():
        own = ax is None
        ax = new_axes(ONE_COLUMN_IN, 3.2) if ax is None else ax
        handles: list[Any] = [
            Line2D([], [], color=cycle_color(number), linewidth=2.5, label=str(name))
            for number, name in enumerate(names)
        ]
        missed = False
        for number, name in enumerate(names):
            for kind in kinds:
                part = [row for row in rows if row[by] == name and row["evidence"] == kind]
                missed |= bool(part) and _draw(ax, _points(part, load), cycle_color(number), kind)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(left=0)
        ax.set_xlabel("output throughput (tokens/s)")
        ax.set_ylabel("TTFT (s), median and p90")
        _draw_slo(ax, rows)
        bottom, top = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top > 10 * bottom else (1, 1.5, 2, 3, 5, 7)))
        handles += [evidence_handle(kind) for kind in kinds]
        if missed:
            handles.append(_ring([], [], label="median TPOT misses SLO"))
        if own:
            columns = 2 if max(len(handle.get_label()) for handle in handles) < 24 else 1
            # At a fixed distance, so that the gap stays the same where a backend crops the figure.
            below = ax.transAxes + ScaledTranslation(0, -BELOW_LABEL_PT / 72, ax.figure.dpi_scale_trans)
            ax.legend(
                handles=handles, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below,
                borderaxespad=0,
            )  # fmt: skip
        else:
            ax.legend(handles=handles, loc="best", fontsize=6)
    return ax


def _points(rows: Sequence[Row], load: str) -> list[list[Row]]:
    """The rows grouped by load, lowest first; a group holds repeats. Undefined loads are one group."""
    groups: dict[float, list[Row]] = {}
    for row in rows:
        groups.setdefault(math.inf if math.isnan(row[load]) else row[load], []).append(row)
    return [groups[key] for key in sorted(groups)]


def _draw(ax: Axes, points: Sequence[Sequence[Row]], color: str, kind: str) -> bool:
    """Draw one line; True if a point misses the TPOT of its SLO."""
    mark = evidence_mark(kind)
    mean = {name: np.array([np.mean([row[name] for row in rows]) for rows in points]) for name in METRICS}
    x, y = mean["output_tokens_per_s"], mean["median_ttft_s"]
    if any(len(rows) > 1 for rows in points):
        low = [min(row["median_ttft_s"] for row in rows) for rows in points]
        high = [max(row["median_ttft_s"] for row in rows) for rows in points]
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    whisker = np.vstack([np.zeros_like(y), np.maximum(mean["p90_ttft_s"] - y, 0)])
    ax.errorbar(x, y, yerr=whisker, fmt="none", ecolor=color, elinewidth=0.7, capsize=2, alpha=0.7)
    ax.plot(
        x,
        y,
        color=color,
        linestyle=mark.linestyle,
        marker=mark.marker,
        fillstyle=mark.fillstyle,
        markerfacecoloralt="white",
        zorder=3,
    )
    misses = mean["median_tpot_s"] > mean["slo_tpot_s"]
    ax.add_line(_ring(x[misses], y[misses]))
    return bool(misses.any())


def _ring(x: Any, y: Any, label: str = "") -> Line2D:
    return Line2D(
        x,
        y,
        linestyle="none",
        marker="o",
        markersize=9,
        fillstyle="none",
        markeredgewidth=0.7,
        color=GREY,
        label=label,
    )


def _draw_slo(ax: Axes, rows: Sequence[Row]) -> None:
    """Shade what meets the TTFT limit; the title names the SLO. Several SLOs have no common region."""
    named = {(row["slo"], row["slo_ttft_s"], row["slo_tpot_s"]) for row in rows}
    if len(named) != 1:
        return
    name, ttft_s, tpot_s = named.pop()
    bottom, top = ax.get_ylim()
    if top < ttft_s < 4 * top:
        top = 1.3 * ttft_s  # near enough to be worth showing
    ax.set_ylim(bottom, top)
    ax.axhspan(bottom, min(max(ttft_s, bottom), top), color=cycle_color(0), alpha=0.07, linewidth=0, zorder=0)
    if bottom < ttft_s < top:
        ax.axhline(ttft_s, color=GREY, linewidth=0.7, linestyle=(0, (4, 2)))
    limits = f"TTFT ≤ {ttft_s:g} s, TPOT ≤ {tpot_s * 1000:g} ms"
    ax.set_title(f"SLO {name} (TTFT part shaded):\n{limits}", loc="left", fontsize=7)
