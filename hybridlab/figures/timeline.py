"""Gantt chart of lanes: what ran where and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from hybridlab.errors import ConfigError
from hybridlab.figures.style import TWO_COLUMNS_IN, new_axes, require, style
from hybridlab.plan import OP_KINDS

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("lane", "kind", "microbatch", "start_s", "end_s")
WINDOW_S = 0.050
MAX_SPANS = 20_000


def timeline(
    spans: pd.DataFrame, ax: Axes | None = None, *, start_s: float | None = None, end_s: float | None = None
) -> Axes:
    """One bar per op on the row of its lane, coloured by kind; later microbatches are hatched. x is in ms.

    `spans` is `result.spans` of one run. `start_s` and `end_s` cut out a window (default: the last 50 ms, or
    all that is there). Raises ConfigError for a missing column, several runs, an empty or a crowded window.
    """
    require(spans, COLUMNS, "timeline")
    runs = list(dict.fromkeys(spans["run_id"].tolist())) if "run_id" in spans.columns else []
    if len(runs) > 1:
        raise ConfigError(f"timeline: spans of {len(runs)} runs ({', '.join(runs[:3])}, ...); pass those of one")
    begin, finish = spans["start_s"].to_numpy(np.float64), spans["end_s"].to_numpy(np.float64)
    end_s = float(finish.max()) if end_s is None else end_s
    start_s = max(float(begin.min()), end_s - WINDOW_S) if start_s is None else start_s
    shown = np.flatnonzero((finish > start_s) & (begin < end_s))
    if not 0 < len(shown) <= MAX_SPANS:
        where = f"between {start_s:g} and {end_s:g} s"
        raise ConfigError(f"timeline: {len(shown):,} ops {where}; expected 1 to {MAX_SPANS:,}")
    left_ms = 1000 * (np.maximum(begin[shown], start_s) - start_s)
    width_ms = 1000 * (np.minimum(finish[shown], end_s) - start_s) - left_ms
    lane, kind = spans["lane"].to_numpy(object)[shown], spans["kind"].to_numpy(object)[shown]
    later = spans["microbatch"].to_numpy(np.int64)[shown] > 0
    lanes = sorted(set(lane))
    row = np.array([lanes.index(name) for name in lane])
    handles = []
    with style():
        ax = new_axes(TWO_COLUMNS_IN, 1.0 + 0.35 * len(lanes)) if ax is None else ax
        for name in sorted(set(kind), key=_order):
            color = f"C{_order(name) % 10}"
            handles.append(Patch(color=color, label=name))
            for hatch, batch in (("", ~later), ("////", later)):
                part = (kind == name) & batch
                ax.barh(
                    row[part],
                    width_ms[part],
                    left=left_ms[part],
                    height=0.7,
                    color=color,
                    edgecolor="white",
                    linewidth=0.3,
                    hatch=hatch,
                )
        if later.any():
            handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="later microbatch"))
        ax.set_yticks(range(len(lanes)), lanes)
        ax.set_ylim(len(lanes) - 0.4, -0.6)
        ax.set_xlim(0, (end_s - start_s) * 1000)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(f"time after {start_s:.3f} s (ms)")
        columns = max(1, min(len(handles), int(ax.bbox.width / ax.figure.dpi / 0.85)))
        ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
    return ax


def _order(kind: str) -> int:
    """Fixed by the kind, so that all timelines share their colours."""
    return OP_KINDS.index(kind) if kind in OP_KINDS else len(OP_KINDS)
