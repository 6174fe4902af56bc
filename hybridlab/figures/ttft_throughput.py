"""TTFT against output throughput: one line per scheduler, joined over the load, the Pareto front and the SLO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.columns import PERCENTILES
from hybridlab.figures.arguments import check_choice, check_numbers, check_target, names_of
from hybridlab.figures.limits import DASHED, Level, level_of, name_level
from hybridlab.figures.marks import (
    band_handle,
    evidence_handle,
    evidence_mark,
    line_of,
    put_legend,
    saturated_handle,
    saturated_mark,
    series_handles,
)
from hybridlab.figures.origin import note_origin
from hybridlab.figures.pareto import front_of
from hybridlab.figures.repeats import Curve, curve_of, told_apart
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, axis_label, cycle_color, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Where, chosen, rows_of, series_of
from hybridlab.metrics import SLO

if TYPE_CHECKING:
    from hybridlab.figures.tables import Data

FADED, SHRUNK = 0.4, 0.75
FRONT: Mapping[str, Any] = MappingProxyType({"color": "black", "linewidth": 0.7})


def ttft_throughput(
    df: Data,
    ax: Axes | None = None,
    *,
    by: str | Sequence[str] | None = None,
    load: str = "offered_req_s",
    ttft: str = "median",
    front: bool = True,
    slo: Level | None = None,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """TTFT (s, log scale) over output tokens/s, from a result or rows of its `summary`.

    One line per value of `by` (default: the scheduler, and what else differs between runs beside their load),
    joined in the order of `load`; repeats are averaged and their range is a band. `ttft` is "median" (with a
    whisker to p90), "p90" or "p99". `front` draws the Pareto front over all points (of one kind of evidence).
    Below the SLO's TTFT the background is shaded. Points that miss the SLO are pale and small; a ring says that it
    is TPOT that they miss, at the percentile of `ttft`: throughput without TPOT means little. Saturated runs
    (metrics.DEFINITIONS) are crossed: their TTFT grows with the length of the run, so none is on the front. Runs in
    which no request finished are left out.

    `slo` replaces the one in the table, `where` picks rows by column, `evidence` asks for kinds to be compared.
    Raises ConfigError naming a missing column, an unknown value, or kinds mixed unasked.
    """
    what = "ttft_throughput"
    check_target(ax, width_in, what)
    check_choice(ttft, PERCENTILES, f"{what}: ttft")
    y, tpot = f"{ttft}_ttft_s", f"{ttft}_tpot_s"
    frame = rows_of(df, "summary", ("output_tokens_per_s", y, "p90_ttft_s", tpot, load), what)
    check_numbers(frame, load, f"{what}: load")
    by = told_apart(chosen(frame, where, evidence, what), load) if by is None else names_of(by, f"{what}: by", "column")
    series = series_of(frame, by, what, needs=y, where=where, evidence=evidence)
    curves = [curve_of(one, load, what, by) for one in series]
    level = level_of(series, slo, what)
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.3 if width_in < 5 else 3.0) if ax is None else ax
        missed = [_draw(ax, curve, ttft, level) for curve in curves]
        handles: list[Any] = [evidence_handle(kind) for kind in dict.fromkeys(s.kind for s in series)]
        if front and _draw_front(ax, curves, y):
            handles.append(Line2D([], [], **FRONT, label="Pareto front"))
        if any(curve.repeated for curve in curves):
            handles.append(band_handle())
        if any(pale for pale, _ in missed):
            grey: Any = line_of(0, "measured") | {"color": GREY, "linestyle": "none"}
            handles.append(Line2D([], [], **grey | _faded(grey), label="misses SLO"))
        if any(ringed for _, ringed in missed):
            handles.append(_ring([], [], label=f"{ttft} TPOT misses"))
        if any(curve.saturated.any() for curve in curves):
            handles.append(saturated_handle())
        ax.set_xlim(0, 1.06 * max(curve.mean("output_tokens_per_s").max() for curve in curves))
        ax.set_xlabel(axis_label("output_tokens_per_s"))
        ax.set_ylabel("TTFT (s), median and p90" if ttft == "median" else axis_label(y))
        ax.set_yscale("log")
        if level is not None:
            _draw_level(ax, level)
        log_axis(ax, "y")
        put_legend(ax, series_handles(series), handles, below=own)
    note_origin(ax, [one.rows for one in series])
    return ax


def _draw(ax: Axes, curve: Curve, ttft: str, level: SLO | None) -> tuple[bool, bool]:
    """Draw one line; whether a point misses the SLO, and whether one misses its TPOT."""
    look: dict[str, Any] = line_of(curve.series.number, curve.series.kind)
    color = look["color"]
    x, y = curve.mean("output_tokens_per_s"), curve.mean(f"{ttft}_ttft_s")
    if curve.repeated:
        low, high = curve.range(f"{ttft}_ttft_s")
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        ax.vlines(x, low, high, color=color, alpha=0.18, linewidth=3)  # a band of one point has no area
    if ttft == "median":
        whisker = np.vstack([np.zeros_like(y), np.maximum(curve.mean("p90_ttft_s") - y, 0)])
        ax.errorbar(x, y, yerr=whisker, fmt="none", ecolor=color, elinewidth=0.7, capsize=2, alpha=0.7)
    ax.plot(x, y, **{**look, "marker": "none"}, zorder=3)
    tpot = np.zeros(len(x), bool) if level is None else curve.mean(f"{ttft}_tpot_s") > level.tpot_s
    missed = tpot if level is None else tpot | (y > level.ttft_s)
    for part, faded in ((~missed, {"alpha": 1.0}), (missed, _faded(look))):
        if part.any():
            ax.plot(x[part], y[part], **{**look, **faded, "linestyle": "none"}, zorder=4)
    if tpot.any():
        ax.add_line(_ring(x[tpot], y[tpot]))
    if (crossed := curve.saturated).any():
        ax.add_line(saturated_mark(x[crossed], y[crossed]))
    return bool(missed.any()), bool(tpot.any())


def _faded(look: dict[str, Any]) -> dict[str, Any]:
    """What a point that misses the SLO looks like: paler and, for grey prints, smaller."""
    return {"alpha": FADED, "markersize": SHRUNK * look["markersize"]}


def _draw_front(ax: Axes, curves: Sequence[Curve], column: str) -> bool:
    """The front of each kind of evidence: the least TTFT at which at least this throughput was reached.

    A front of one point is no line; returns whether there is one.
    """
    drawn = False
    for kind in dict.fromkeys(curve.series.kind for curve in curves):
        of_kind = [curve for curve in curves if curve.series.kind == kind]
        x = np.concatenate([curve.mean("output_tokens_per_s") for curve in of_kind])
        y = np.concatenate([np.where(curve.saturated, np.nan, curve.mean(column)) for curve in of_kind])
        kept = np.flatnonzero(front_of(x, y))
        kept = kept[np.argsort(x[kept])]
        line = evidence_mark(kind).linestyle
        line = (0, (1, 4)) if line == "none" else line
        if len(kept) > 1:
            ax.plot(x[kept], y[kept], **FRONT, drawstyle="steps-pre", zorder=2, linestyle=line, label="_front")
            drawn = True
    return drawn


def _ring(x: Any, y: Any, label: str = "") -> Line2D:
    look = {"linestyle": "none", "marker": "o", "markersize": 9, "fillstyle": "none", "markeredgewidth": 0.7}
    return Line2D(x, y, color=GREY, label=label, **look)


def _draw_level(ax: Axes, level: SLO) -> None:
    """Shade what meets the TTFT limit; the title names the SLO."""
    bottom, top = ax.get_ylim()
    if top < level.ttft_s < 4 * top:
        top = 1.3 * level.ttft_s  # near enough to be worth showing
    ax.set_ylim(bottom, top)
    meets = min(max(level.ttft_s, bottom), top)
    ax.axhspan(bottom, meets, color=cycle_color(0), alpha=0.07, linewidth=0, zorder=0)
    if bottom < level.ttft_s < top:
        ax.axhline(level.ttft_s, color=GREY, linewidth=0.7, linestyle=DASHED)
    shaded = " (shaded)" if meets > bottom else ""
    name_level(ax, level, f"TTFT ≤ {level.ttft_s:g} s{shaded}, TPOT ≤ {level.tpot_s * 1000:g} ms")
