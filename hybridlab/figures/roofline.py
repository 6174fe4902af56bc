"""Our CPU kernels under the roof of this machine, and how fast weights go by as more tokens share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.bench.targets import PREFERRED
from hybridlab.figures.arguments import check_target
from hybridlab.figures.limits import DASHED
from hybridlab.figures.marks import evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Series, Where, chosen, rows_of

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.bench.kernels import KernelBench

COLUMNS = (
    *("work", "model", "matrix", "contender", "weights", "layout", "place", "threads", "rows", "slow_tier"),
    *("flop_per_byte", "gflop_s", "weights_gb_s", "read_gb_s", "multiply_gflop_s"),
)
OURS = "hybridlab"
LABELLED_ROWS = (1, 4, 16, 64, 1024)


def roofline(
    df: KernelBench | pd.DataFrame,
    ax: Axes | None = None,
    *,
    model: str | None = None,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """GFLOP/s over FLOP per byte of weights, of matrices read from memory, from a `KernelBench` or its table.

    A roof per thread count: the median of the measured read loops to the left, of the multiply loops to the right.
    Points are one M each (the numbers along a line), on the most threads: ours are joined, peers are not. `model` picks
    the shape (default: the largest), `where` rows by column, `evidence` kinds to be compared.
    Raises ConfigError naming a missing column or an unknown value.
    """
    what = "roofline"
    check_target(ax, width_in, what)
    frame = _of_model(df, what, model, where, evidence)
    series = _series(frame)
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.7) if ax is None else ax
        left, right = frame["flop_per_byte"].min() / 1.6, frame["flop_per_byte"].max() * 1.6
        counts = sorted(set(frame["threads"]))
        roofs = [_draw_roof(ax, frame[frame["threads"] == n], left, right, below=n < counts[-1]) for n in counts]
        for one in series:
            _draw(ax, one, "flop_per_byte", "gflop_s")
        _label_rows(ax, series[0], "flop_per_byte", "gflop_s")
        ax.set_xlim(left, right)
        ax.set_ylim(frame["gflop_s"].min() / 2, 1.8 * max(roofs))
        ax.set_xlabel("operational intensity (FLOP per byte of weights)")
        ax.set_ylabel("GFLOP/s")
        _finish(ax, frame, series, own)
    note_origin(ax, [one.rows for one in series])
    return ax


def weights_rate(
    df: KernelBench | pd.DataFrame,
    ax: Axes | None = None,
    *,
    model: str | None = None,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """GB/s of weights over M, the tokens multiplied at once, on the most threads; arguments as for `roofline`.

    The grey line is the least of the two ceilings for FP8: what memory delivers, then what arithmetic takes; the
    dashed line marks the M where they meet.
    """
    what = "weights_rate"
    check_target(ax, width_in, what)
    frame = _of_model(df, what, model, where, evidence)
    series = _series(frame)
    read, peak = (_most_threads(frame)[name].median() for name in ("read_gb_s", "multiply_gflop_s"))
    crossover = peak / (2 * read)  # an FP8 weight is a byte and takes part in 2 FLOP a token
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.5) if ax is None else ax
        low, high = frame["rows"].min() / 1.3, frame["rows"].max() * 1.3
        rows = np.geomspace(low, high, 200)
        ax.plot(rows, np.minimum(read, peak / (2 * rows)), color=GREY, linewidth=0.8, zorder=1.5)
        for one in series:
            _draw(ax, one, "rows", "weights_gb_s")
        ax.set_xlim(low, high)
        ax.set_ylim(frame["weights_gb_s"].min() / 1.5, 1.9 * read)
        if low < crossover < high:
            ax.axvline(crossover, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=1.4)
            text = f"memory | arithmetic\nM = {crossover:.1f}"
            ax.annotate(text, (crossover, 1.8 * read), (3, 0), textcoords="offset points", va="top", fontsize=6)
        ax.set_xlabel("tokens multiplied at once, M")
        ax.set_ylabel("weights (GB/s)")
        _finish(ax, frame, series, own)
    note_origin(ax, [one.rows for one in series])
    return ax


def _of_model(df: Any, what: str, model: str | None, where: Where | None, evidence: Kinds | None) -> Any:
    """The rows of gate and up matrices of one model, read from memory, without slower tiers."""
    frame: Any = rows_of(df, "table", COLUMNS, what)
    known = list(dict.fromkeys(frame["model"]))
    model = next((name for name in PREFERRED if name in known), known[0]) if model is None else model
    drawn = {"model": model, "work": "matrix", "matrix": "gate_up", "place": "memory", "slow_tier": False}
    return chosen(frame, {**drawn, **(where or {})}, evidence, what)


def _most_threads(frame: Any) -> Any:
    return frame[frame["threads"] == frame["threads"].max()]


def _series(frame: Any) -> list[Series]:
    """Ours first; each is one way to multiply, sorted by M."""
    frame = _most_threads(frame)
    names = [_name(*row) for row in frame[["contender", "weights", "layout"]].itertuples(index=False)]
    frame = frame.assign(_series=names)
    ours = frame["contender"] == OURS
    order = dict.fromkeys([*frame["_series"][ours], *frame["_series"][~ours]])
    groups = dict(iter(frame.groupby(["_series", "evidence"], sort=False)))
    return [
        Series(number, name, kind, groups[name, kind].sort_values("rows"))
        for number, name in enumerate(order)
        for kind in dict.fromkeys(frame["evidence"])
        if (name, kind) in groups
    ]


def _name(contender: str, weights: str, layout: str) -> str:
    if contender == OURS:
        return f"{weights.upper()}, {layout}"
    library = contender.partition("_")[0]
    return f"{library} {weights.upper()}"


def _is_ours(one: Series) -> bool:
    return one.rows["contender"].iloc[0] == OURS


def _draw(ax: Axes, one: Series, x: str, y: str) -> None:
    look = line_of(one.number, one.kind)
    if not _is_ours(one):
        look |= {"linestyle": "none", "markersize": 3.5, "alpha": 0.85}
    ax.plot(one.rows[x], one.rows[y], **look, zorder=3)


def _draw_roof(ax: Axes, rows: Any, left: float, right: float, *, below: bool) -> float:
    """The ceilings measured on one number of threads; returns the flat part, GFLOP/s."""
    read, peak = rows["read_gb_s"].median(), rows["multiply_gflop_s"].median()
    x = np.array([left, peak / read, right])
    ax.plot(x, np.minimum(read * x, peak), color=GREY, linewidth=0.8, zorder=1.5)
    threads = int(rows["threads"].iloc[0])
    text = f"{threads} thread{'s' if threads > 1 else ''}: {read:.0f} GB/s, {peak:.0f} GFLOP/s"
    place: Any = {"xytext": (0, -2 if below else 1.5), "va": "top" if below else "bottom", "ha": "right"}
    ax.annotate(text, (right, peak), textcoords="offset points", fontsize=6, color=GREY, **place)
    return peak


def _label_rows(ax: Axes, one: Series, x: str, y: str) -> None:
    for row in one.rows.to_dict("records"):
        if row["rows"] in LABELLED_ROWS:
            label = f"M = {row['rows']}" if row["rows"] == one.rows["rows"].min() else str(row["rows"])
            ax.annotate(label, (row[x], row[y]), (3, -3), textcoords="offset points", va="top", fontsize=6)


def _finish(ax: Axes, frame: Any, series: Sequence[Series], own: bool) -> None:
    one = frame.iloc[0]
    ax.set_title(f"{one['model']}: W[{one['n']}, {one['k']}]", loc="left", fontsize=7)
    log_axis(ax, "x")
    log_axis(ax, "y")
    marks: list[Any] = [evidence_handle(kind) for kind in dict.fromkeys(one.kind for one in series)]
    marks.append(Line2D([], [], color=GREY, linewidth=0.8, label="measured ceilings"))
    handles = series_handles(series)
    for handle, one in zip(handles, {one.number: one for one in series}.values(), strict=True):
        if not _is_ours(one):
            handle.set_linestyle("none")
    put_legend(ax, handles, marks, below=own)
