"""What more load brings and costs: output tokens/s above, TPOT below, over the offered load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.columns import PERCENTILES
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_choice, check_numbers, check_pair, check_width, names_of
from hybridlab.figures.limits import Level, draw_limit, level_of, name_level
from hybridlab.figures.marks import (
    band_handle,
    evidence_handle,
    line_of,
    put_legend,
    saturated_handle,
    saturated_mark,
    series_handles,
)
from hybridlab.figures.origin import note_origin
from hybridlab.figures.repeats import Curve, curve_of, told_apart
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, axis_label, style
from hybridlab.figures.tables import Kinds, Where, chosen, rows_of, series_of

if TYPE_CHECKING:
    from hybridlab.figures.tables import Data


def load_curves(
    df: Data,
    ax: tuple[Axes, Axes] | None = None,
    *,
    by: str | Sequence[str] | None = None,
    load: str = "offered_req_s",
    tpot: str = "median",
    slo: Level | None = None,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> tuple[Axes, Axes]:
    """Output tokens/s and TPOT (s) over the offered load, from a result or rows of its `summary`.

    Two panels, one above the other, so the one figure that takes a pair of Axes and returns the pair. The grey
    line in the upper panel is what the load asks for (requests/s times tokens per finished request): a curve
    that leaves it is saturated. Runs that are saturated by their arrivals and ends (metrics.DEFINITIONS) are crossed.
    `tpot` is "median", "p90" or "p99"; the dashed line below is the SLO's.

    One curve per value of `by` (default: the scheduler, and what else differs between runs beside their load);
    repeats are averaged and their range is a band.

    `slo` replaces the one in the table, `where` picks rows by column, `evidence` asks for kinds to be
    compared. Raises ConfigError naming a missing column, an unknown value, kinds mixed unasked, or loads that
    are undefined (everything offline).
    """
    what = "load_curves"
    check_width(width_in, what)
    pair = None if ax is None else check_pair(ax, what)
    check_choice(tpot, PERCENTILES, f"{what}: tpot")
    column = f"{tpot}_tpot_s"
    frame = rows_of(df, "summary", ("output_tokens_per_s", column, load), what)
    check_numbers(frame, load, f"{what}: load")
    by = told_apart(chosen(frame, where, evidence, what), load) if by is None else names_of(by, f"{what}: by", "column")
    series = series_of(frame, by, what, needs="output_tokens_per_s", where=where, evidence=evidence)
    curves = [curve_of(one, load, what, by) for one in series]
    if any(np.isnan(curve.load).any() for curve in curves):
        raise ConfigError(f"{what}: {load} is undefined in some rows; pass load= a column that says the load")
    level = level_of(series, slo, what)
    with style():
        own = pair is None
        upper, lower = _new_panels(width_in) if pair is None else pair
        for curve in curves:
            _draw(upper, curve, "output_tokens_per_s")
            _draw(lower, curve, column)
        marks: list[Any] = [evidence_handle(kind) for kind in dict.fromkeys(one.kind for one in series)]
        if load == "offered_req_s" and {"total_output_tokens", "completed"} <= set(frame.columns):
            marks.append(_draw_offered(upper, curves))
        if any(curve.repeated for curve in curves):
            marks.append(band_handle())
        if any(curve.saturated.any() for curve in curves):
            marks.append(saturated_handle())
        right = max(curve.load.max() for curve in curves)
        for panel in (upper, lower):
            panel.set_xlim(0, 1.05 * right)
            panel.set_ylim(bottom=0)
        upper.set_ylabel("output tokens/s")
        lower.set_ylabel(axis_label(column))
        lower.set_xlabel(axis_label(load))
        if level is not None:
            drawn = draw_limit(lower, "y", level.tpot_s)
            lower.set_ylim(bottom=0)
            name_level(lower, level, f"TPOT ≤ {level.tpot_s * 1000:g} ms{drawn}")
        put_legend(lower if own else upper, series_handles(series), marks, below=own)
    for panel in (upper, lower):
        note_origin(panel, [one.rows for one in series])
    return upper, lower


def _new_panels(width_in: float) -> tuple[Axes, Axes]:
    _, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(width_in, 3.2 if width_in < 5 else 3.8))
    return upper, lower


def _draw(ax: Axes, curve: Curve, column: str) -> None:
    look = line_of(curve.series.number, curve.series.kind)
    if curve.repeated:
        low, high = curve.range(column)
        ax.fill_between(curve.load, low, high, color=look["color"], alpha=0.2, linewidth=0)
        ax.vlines(curve.load, low, high, color=look["color"], alpha=0.2, linewidth=3)
    ax.plot(curve.load, curve.mean(column), **look, zorder=3)
    if (crossed := curve.saturated).any():
        ax.add_line(saturated_mark(curve.load[crossed], curve.mean(column)[crossed]))


def _draw_offered(ax: Axes, curves: Sequence[Curve]) -> Line2D:
    """The tokens/s that the load asks for, which a system without limits would deliver."""
    look = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (1, 1))}
    load = np.concatenate([curve.load for curve in curves])
    tokens = np.concatenate([curve.mean("total_output_tokens") / curve.mean("completed") for curve in curves])
    order = np.argsort(load, kind="stable")
    x, y = np.concatenate([[0], load[order]]), np.concatenate([[0], (load * tokens)[order]])
    top = 1.15 * max(curve.range("output_tokens_per_s")[1].max() for curve in curves)
    ax.plot(x, y, **look, zorder=2, label="_offered")
    ax.set_ylim(0, top)  # far beyond saturation the line may leave
    return Line2D([], [], **look, label="offered tokens/s")
