"""Gantt chart of lanes: what ran where and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch

from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_target, check_time
from hybridlab.figures.marks import evidence_mark
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, TWO_COLUMNS_IN, cycle_color, new_axes, style
from hybridlab.figures.tables import Where, chosen, rows_of
from hybridlab.plans import OP_KINDS

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.figures.tables import Data

COLUMNS = ("lane", "kind", "microbatch", "start_s", "end_s")
WINDOW_S = 0.050
MAX_SPANS = 20_000
VISIBLE_PT = 0.5
OUTLINED_PT = 2.0
"""Narrower bars have no outline: it would cover them."""
LEGEND_ENTRY_IN, LEGEND_LETTER_IN = 0.28, 0.051


def timeline(
    spans: Data,
    ax: Axes | None = None,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    where: Where | None = None,
    width_in: float = TWO_COLUMNS_IN,
) -> Axes:
    """One bar per op on the row of its lane, coloured by kind; later microbatches are hatched. x is in ms.

    Kinds whose bars are all too thin to see are not in the legend. Bars that were not measured are pale, with
    an outline in the line style of their evidence.

    `spans` is a result or rows of its `spans`, of one run; `where` picks it by column. `start_s` and `end_s`
    cut out a window (default: the last 50 ms, or all that is there). Raises ConfigError for a missing column,
    several runs, an empty or a crowded window.
    """
    check_target(ax, width_in, "timeline")
    check_time(start_s, "timeline: start_s")
    check_time(end_s, "timeline: end_s")
    frame = one_run(spans, COLUMNS, where, "timeline")
    begin, finish = frame["start_s"].to_numpy(np.float64), frame["end_s"].to_numpy(np.float64)
    end_s = float(finish.max()) if end_s is None else end_s
    start_s = max(float(begin.min()), end_s - WINDOW_S) if start_s is None else start_s
    shown = np.flatnonzero((finish > start_s) & (begin < end_s))
    if not 0 < len(shown) <= MAX_SPANS:
        found = f"between {start_s:g} and {end_s:g} s"
        raise ConfigError(f"timeline: {len(shown):,} ops {found}; expected 1 to {MAX_SPANS:,}")
    left_ms = 1000 * (np.maximum(begin[shown], start_s) - start_s)
    width_ms = 1000 * (np.minimum(finish[shown], end_s) - start_s) - left_ms
    lane, kind = frame["lane"].to_numpy(object)[shown], frame["kind"].to_numpy(object)[shown]
    later = frame["microbatch"].to_numpy(np.int64)[shown] > 0
    lanes = sorted(set(lane))
    row = np.array([lanes.index(name) for name in lane])
    evidence = str(frame["evidence"].iloc[0])
    handles = []
    with style():
        ax = new_axes(width_in, 1.0 + 0.35 * len(lanes)) if ax is None else ax
        point_ms = ax.figure.dpi / 72 / ax.bbox.width * (end_s - start_s) * 1000
        visible_ms, narrow_ms = VISIBLE_PT * point_ms, OUTLINED_PT * point_ms
        for name in sorted(set(kind), key=_order):
            look = _look(cycle_color(_order(name)), evidence)
            if width_ms[kind == name].max() >= min(visible_ms, width_ms.max()):
                handles.append(Patch(**look, label=name))
            for hatch, batch in (("", ~later), ("////", later)):
                part = (kind == name) & batch
                # "linewidth" of bars takes one number per bar.
                outlines: dict[str, Any] = look | {
                    "linewidth": np.where(width_ms[part] > narrow_ms, look["linewidth"], 0.0)
                }
                ax.barh(row[part], width_ms[part], left=left_ms[part], height=0.7, **outlines, hatch=hatch)
        if later.any():
            handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="later microbatch"))
        handles.append(Patch(**_look(GREY, evidence), label=evidence))
        ax.set_yticks(range(len(lanes)), lanes)
        ax.set_ylim(len(lanes) - 0.4, -0.6)
        ax.set_xlim(0, (end_s - start_s) * 1000)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(f"time after {start_s:.3f} s (ms)")
        ax.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=_columns([str(handle.get_label()) for handle in handles], ax.bbox.width / ax.figure.dpi),
            handlelength=1.2,
            handletextpad=0.4,
            columnspacing=1.2,
        )
    note_origin(ax, [frame])
    return ax


def one_run(data: Any, columns: tuple[str, ...], where: Where | None, what: str) -> pd.DataFrame:
    """The spans of the one run that `data` holds or `where` picks. Raises ConfigError if there are several."""
    frame = chosen(rows_of(data, "spans", columns, what), where, None, what)
    runs = list(dict.fromkeys(frame["run_id"].tolist())) if "run_id" in frame.columns else []
    if len(runs) > 1:
        names = ", ".join(map(str, runs[:3]))
        raise ConfigError(f"{what}: spans of {len(runs)} runs ({names}, ...); pass those of one, or pick with where=")
    return frame


def _columns(labels: list[str], room_in: float) -> int:
    """The most columns of a legend (filled column by column) that fit."""
    widths = [LEGEND_ENTRY_IN + LEGEND_LETTER_IN * len(label) for label in labels]
    for columns in range(len(labels), 1, -1):
        rows = -(-len(labels) // columns)
        if sum(max(widths[first : first + rows]) for first in range(0, len(widths), rows)) <= room_in:
            return -(-len(labels) // rows)  # no more than these rows need
    return 1


def _look(color: str, evidence: str) -> dict[str, Any]:
    """Keywords of a bar."""
    line = evidence_mark(evidence).linestyle
    if evidence == "measured":
        return {"facecolor": color, "edgecolor": "white", "linewidth": 0.3}
    outline = {"edgecolor": color, "linewidth": 0.6, "linestyle": "-" if line == "none" else line}
    return {"facecolor": to_rgba(color, 0.4), **outline}


def _order(kind: str) -> int:
    """Fixed by the kind, so that all timelines share their colours."""
    return OP_KINDS.index(kind) if kind in OP_KINDS else len(OP_KINDS)
