"""Seconds of a step over its tokens on each path of the experts, and from where which path is the fastest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.calibration.files import write_calibration
from hybridlab.calibration.results import CPU, DUAL, MIXED, PLAIN, STREAMED, Crossovers, Point, path_name
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_choice, check_target
from hybridlab.figures.files import file_path
from hybridlab.figures.marks import evidence_handle, evidence_mark, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.save import save_figure
from hybridlab.figures.style import GREY, TWO_COLUMNS_IN, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Series, Where, chosen, rows_of
from hybridlab.spec import NEVER

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.calibration.results import Calibration

COLUMNS = tuple(Point.__dataclass_fields__)
PATHS = {"prefill": (CPU, STREAMED, MIXED), "decode": (PLAIN, DUAL)}
"""In the order of colours."""


def crossover(
    data: Calibration | pd.DataFrame,
    ax: Axes | None = None,
    *,
    kind: str = "prefill",
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = TWO_COLUMNS_IN,
) -> Axes:
    """Seconds of all layers over the tokens of a step (or, of kind "decode", its requests), both log: a line per path.

    Of a calibration (`hl.calibrate`) or its `rows`. Whiskers span the repeats. Of the mixed paths the one is drawn that
    the thresholds take. Dotted lines and words at the top say from where which path is the fastest; the circle is where
    streaming all experts passes the CPU. `where` picks rows by column, `evidence` asks for kinds to be compared.
    Raises ConfigError naming a missing column, kinds mixed unasked, or rows of several models or machines.
    """
    what = "crossover"
    check_target(ax, width_in, what)
    check_choice(kind, tuple(PATHS), f"{what}: kind")
    rows = _rows(data, kind, where, evidence, what)
    kinds = list(dict.fromkeys(rows["evidence"]))
    found = {one: Crossovers.of(_points(rows[rows["evidence"] == one])) for one in kinds}
    series = [one for each in kinds for one in _series(rows[rows["evidence"] == each], each, kind, found[each])]
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.4) if ax is None else ax
        for one in series:
            _draw(ax, one)
        ax.set_xlabel("tokens of the step" if kind == "prefill" else "decoding requests")
        ax.set_ylabel("all layers (s)")
        ax.set(xscale="log", yscale="log")
        sizes = sorted({int(size) for size in rows["tokens"]})
        ax.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** (0.12 * len(kinds)))  # room for the words
        for row, (each, thresholds) in enumerate(found.items()):
            _mark(ax, each, kind, thresholds, [one for one in series if one.kind == each], row)
        handles: list[Any] = [evidence_handle(each) for each in kinds]
        if (rows["layer_s_max"] > rows["layer_s_min"]).any():
            handles.append(Line2D([], [], color=GREY, linewidth=0.7, marker="|", label="range of repeats"))
        put_legend(ax, series_handles(series), handles, below=own)
        _label_sizes(ax, sizes)
        log_axis(ax, "y")
    note_origin(ax, [one.rows for one in series])
    return ax


def save_calibration(calibration: Calibration, folder: str | Path, command: str) -> list[Path]:
    """Write calibration.json (`read_calibration`) and a figure for prompts and for decoding, where both were measured.

    Returns the files. Raises ConfigError for one that cannot be written.
    """
    import matplotlib.pyplot as plt

    folder = file_path(folder, "save_calibration")
    written = [write_calibration(calibration, folder / "calibration.json")]
    for kind in PATHS:
        if any(point.kind == kind for point in calibration.points):
            ax = crossover(calibration, kind=kind)
            try:
                written += save_figure(ax, folder / f"crossover_{kind}", command=command).values()
            finally:
                plt.close(ax.figure)  # type: ignore[arg-type]
    return written


def _rows(data: Any, kind: str, where: Where | None, evidence: Kinds | None, what: str) -> Any:
    frame: Any = rows_of(data, "rows", (*COLUMNS, "model", "device", "machine"), what)
    frame = frame[(frame["kind"] == kind) & (frame["step_s"] > 0)]
    if not len(frame):
        raise ConfigError(f"{what}: no rows to draw; none is of kind {kind!r}")
    frame = chosen(frame, where, evidence, what)
    for column in ("model", "machine", "device"):
        values = list(dict.fromkeys(frame[column]))
        if len(values) > 1 and not (column != "model" and frame["evidence"].nunique() > 1):
            raise ConfigError(
                f"{what}: rows differ in {column!r} ({', '.join(map(repr, values[:4]))}); choose with "
                f"where={{{column!r}: {values[0]!r}}}"
            )
    return frame


def _points(rows: Any) -> list[Point]:
    return [Point(**point) for point in rows[list(COLUMNS)].to_dict("records")]


def _series(rows: Any, evidence: str, kind: str, found: Crossovers) -> list[Series]:
    series = []
    for number, path in enumerate(PATHS[kind]):
        own = rows[rows["path"] == path]
        if path == MIXED and len(own):
            share = found.mixed_share or own["share"].iloc[0]
            least = found.min_expert_tokens or own["min_tokens"].iloc[0]
            own = own[np.isclose(own["share"], share) & (own["min_tokens"] == least)]
        if len(own):
            own = own.sort_values("tokens")
            series.append(Series(number, path_name(own.iloc[0].to_dict()), evidence, own))
    return series


def _draw(ax: Axes, one: Series) -> None:
    look: dict[str, Any] = line_of(one.number, one.kind)
    look |= {"markersize": 3.5}
    x, y = one.rows["tokens"].to_numpy(np.float64), one.rows["step_s"].to_numpy(np.float64)
    per_layer = y / one.rows["layer_s"].to_numpy(np.float64)
    ends = np.vstack([y - per_layer * one.rows["layer_s_min"], per_layer * one.rows["layer_s_max"] - y]).clip(min=0)
    ax.errorbar(x, y, yerr=ends, fmt="none", ecolor=look["color"], elinewidth=0.7, capsize=2, zorder=2.5)
    ax.plot(x, y, **look, zorder=3)


def _mark(ax: Axes, evidence: str, kind: str, found: Crossovers, series: list[Series], row: int) -> None:
    """Lines between the paths that are the fastest, names in a row above, and where streamed passes the CPU."""
    line = evidence_mark(evidence).linestyle
    look: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "linestyle": ":" if line == "-" else line}
    for threshold, name in _changes(kind, found):
        ax.axvline(threshold, **look, zorder=1.5, label="_threshold")
        near: dict[str, Any] = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
        ax.annotate(f"{name}\nfrom {threshold:,}", (threshold, 1), (2, -1 - 17 * row), fontsize=6, color=GREY, **near)
    streamed = next((one for one in series if one.name == "streamed"), None)
    passes = found.stream_from_tokens or NEVER
    if kind == "prefill" and streamed is not None and passes < NEVER:
        x, y = streamed.rows["tokens"].to_numpy(np.float64), streamed.rows["step_s"].to_numpy(np.float64)
        at_s = float(np.exp(np.interp(np.log(passes), np.log(x), np.log(y))))
        ax.plot(passes, at_s, "o", markersize=8, fillstyle="none", color=GREY, markeredgewidth=0.8, label="_passes")
        ax.annotate(f"{passes:,}", (passes, at_s), (-5, 5), textcoords="offset points", fontsize=6, ha="right")


def _changes(kind: str, found: Crossovers) -> list[tuple[int, str]]:
    if kind == "decode":
        at = [(found.dual_batch_from_requests, "dual batch"), (found.dual_batch_to_requests, "plain")]
    elif (found.mixed_from_tokens or NEVER) < NEVER:
        at = [(found.mixed_from_tokens, "mixed"), (found.mixed_to_tokens, "streamed")]
    else:
        at = [(found.stream_from_tokens, "streamed")]
    return [(threshold, name) for threshold, name in at if threshold is not None and threshold < NEVER]


def _label_sizes(ax: Axes, sizes: list[int]) -> None:
    """The measured sizes, as many as have room."""
    figure: Any = ax.figure
    figure.draw_without_rendering()
    width_pt = ax.bbox.width * 72 / figure.dpi
    left, right = np.log(ax.get_xlim())
    shown: list[int] = []
    for size in sizes:
        if not shown or np.log(size / shown[-1]) / (right - left) * width_pt >= 20:
            shown.append(size)
    ax.set_xticks(shown, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in shown])
    ax.minorticks_off()
