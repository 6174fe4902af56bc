"""TTFT over prompt length: every request a point, with the median and p90 of bins of equal count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.figures.arguments import check_choice, check_target
from hybridlab.figures.limits import Level, draw_limit, level_of, name_level
from hybridlab.figures.marks import band_handle, evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, axis_label, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Series, Where, require_one_setting, rows_of, series_of

if TYPE_CHECKING:
    from hybridlab.figures.tables import Data

Length = Literal["prompt_tokens", "computed_tokens"]
MOST_BINS = 8
LEAST_PER_BIN = 10
# More points than this are one picture inside a PDF or SVG: as shapes they would take megabytes.
MANY_POINTS = 2000


def ttft_prompt_length(
    df: Data,
    ax: Axes | None = None,
    *,
    by: str | Sequence[str] = "scheduler",
    length: Length = "prompt_tokens",
    slo: Level | None = None,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """TTFT (s) over prompt length (tokens), both log, from a result or rows of its `requests`.

    A pale point per finished request. Over it, per value of `by`, the median (thick) and p90 (thin) of bins
    that hold equally many requests: at most 8, at least 10 requests each (one bin if there are fewer), drawn
    at the median length of the bin. Repeats are pooled; the band spans the medians of the single runs. The
    dashed line is the SLO's TTFT. With `length` "computed_tokens" the prompt counts without what was found in the
    prefix cache: what TTFT should follow if reuse saves the time that it promises.

    `slo` replaces the one in the table, `where` picks rows by column, `evidence` asks for kinds to be
    compared. Raises ConfigError naming a missing column, an unknown value, kinds mixed unasked, or a column
    in which the runs of one series differ.
    """
    what = "ttft_prompt_length"
    check_target(ax, width_in, what)
    check_choice(length, get_args(Length), f"{what}: length")
    found = ("cached_tokens",) if length == "computed_tokens" else ()
    frame = rows_of(df, "requests", ("prompt_tokens", "ttft_s", *found), what)
    if found:
        frame = frame.assign(computed_tokens=frame["prompt_tokens"] - frame["cached_tokens"])
    series = series_of(frame, by, what, needs="ttft_s", where=where, evidence=evidence)
    require_one_setting(series, by, what)
    level = level_of(series, slo, what)
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.3 if width_in < 5 else 3.0) if ax is None else ax
        for one in series:
            _draw_requests(ax, one, length)
        banded = [_draw_bins(ax, one, length) for one in series]
        log_axis(ax, "x")
        ax.set_yscale("log")
        ax.set_xlabel(axis_label(length))
        ax.set_ylabel(axis_label("ttft_s"))
        if level is not None:
            drawn = draw_limit(ax, "y", level.ttft_s)
            name_level(ax, level, f"TTFT ≤ {level.ttft_s:g} s{drawn}")
        log_axis(ax, "y")
        handles: list[Any] = [evidence_handle(kind) for kind in dict.fromkeys(one.kind for one in series)]
        handles += [
            Line2D([], [], color=GREY, linewidth=2.0, label="median of bin"),
            Line2D([], [], color=GREY, linewidth=0.9, label="p90 of bin"),
            *([band_handle()] if any(banded) else []),
        ]
        put_legend(ax, series_handles(series), handles, below=own)
    note_origin(ax, [one.rows for one in series])
    return ax


def _draw_requests(ax: Axes, one: Series, length: Length) -> None:
    look = line_of(one.number, one.kind) | {"linestyle": "none", "markersize": 2.5, "markeredgewidth": 0.4}
    many = len(one.rows) > MANY_POINTS
    x, y = one.rows[length].to_numpy(), one.rows["ttft_s"].to_numpy()
    ax.plot(x, y, **look, alpha=0.3, zorder=1, rasterized=many)


def _draw_bins(ax: Axes, one: Series, length: Length) -> bool:
    """The binned median and p90; whether there are repeats, and so a band."""
    x, y = one.rows[length].to_numpy(np.float64), one.rows["ttft_s"].to_numpy(np.float64)
    bin_of, count = bins(x)
    at = np.array([np.median(x[bin_of == b]) for b in range(count)])
    median, p90 = np.array([np.percentile(y[bin_of == b], (50, 90)) for b in range(count)]).T
    look = line_of(one.number, one.kind)
    # Published requests are points without lines; their bins still need a line to be seen as such.
    linestyle = "-" if look["linestyle"] == "none" else look["linestyle"]
    runs = one.rows["run_id"].to_numpy() if "run_id" in one.rows else np.zeros(len(x))
    each = [run for run in dict.fromkeys(runs.tolist())]
    if len(each) > 1:
        medians = np.full((len(each), count), np.nan)
        for i, run in enumerate(each):
            for b in range(count):
                mine = y[(runs == run) & (bin_of == b)]
                medians[i, b] = np.median(mine) if len(mine) else np.nan
        low, high = np.nanmin(medians, axis=0), np.nanmax(medians, axis=0)
        ax.fill_between(at, low, high, color=look["color"], alpha=0.25, linewidth=0, zorder=2)
    ax.plot(at, p90, color=look["color"], linestyle=linestyle, linewidth=0.9, zorder=3)
    ax.plot(at, median, **look | {"linestyle": linestyle, "linewidth": 2.0}, zorder=4)
    return len(each) > 1


def bins(lengths: np.ndarray) -> tuple[np.ndarray, int]:
    """int64 [requests]: the bin of each length, and the number of bins; equal lengths share a bin."""
    wanted = int(np.clip(len(lengths) // LEAST_PER_BIN, 1, MOST_BINS))
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, wanted + 1)[1:-1]))
    found = np.searchsorted(edges, lengths, side="left")
    kept, bin_of = np.unique(found, return_inverse=True)
    return bin_of, len(kept)
