"""Any metric against any other: a point per setting, a line per value of an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from hybridlab.figures.arguments import names_of
from hybridlab.figures.marks import band_handle, evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.repeats import curve_of
from hybridlab.figures.style import axis_label, new_axes, style
from hybridlab.figures.tables import rows_of, series_of

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.figures.repeats import Curve

THERE = "both values"


def metrics_xy(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    x: str,
    y: str,
    by: str | Sequence[str] = "scheduler",
    load: str = "offered_req_s",
    where: Mapping[str, Any] | None = None,
    evidence: Sequence[str] | None = None,
) -> Axes:
    """Means of column `y` over means of column `x` of a summary; ranges over repeats are pale strokes.

    Lines join the points of one value of `by` in the order of `load`. Rows where `x` or `y` is NaN are left out.
    Raises ConfigError naming a missing column, or if no row has both.
    """
    frame = rows_of(df, "summary", (x, y, load), "metrics_xy")
    there = frame[x].notna() & frame[y].notna()
    what = f"{axis_label(y)} over {axis_label(x)}"
    series = series_of(frame.assign(**{THERE: there * 1}), by, what, needs=THERE, where=where, evidence=evidence)
    curves = [curve_of(one, load, what, names_of(by, "metrics_xy: by", "column")) for one in series]
    with style():
        own = ax is None
        ax = new_axes() if ax is None else ax
        for curve in curves:
            _draw(ax, curve, x, y)
        ax.set_xlabel(axis_label(x))
        ax.set_ylabel(axis_label(y))
        marks: list[Any] = [evidence_handle(kind) for kind in dict.fromkeys(one.kind for one in series)]
        marks += [band_handle()] if any(curve.repeated for curve in curves) else []
        put_legend(ax, series_handles(series), marks, below=own)
    note_origin(ax, [one.rows for one in series])
    return ax


def _draw(ax: Axes, curve: Curve, x: str, y: str) -> None:
    look = line_of(curve.series.number, curve.series.kind)
    if curve.repeated:
        stroke = {"color": look["color"], "alpha": 0.2, "linewidth": 4}
        ax.vlines(curve.mean(x), *curve.range(y), **stroke)
        ax.hlines(curve.mean(y), *curve.range(x), **stroke)
    ax.plot(curve.mean(x), curve.mean(y), **look, zorder=3)
