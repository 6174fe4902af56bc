"""Who waits for whom: the steps of all workers and the tokens of all requests, on one clock."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_target, check_time
from hybridlab.figures.marks import evidence_handle
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import TWO_COLUMNS_IN, cycle_color, new_axes, style
from hybridlab.figures.tables import Where, chosen, rows_of
from hybridlab.step_log import BOTH, COLUMNS, DECODES, FIRST_TOKEN, KILLED, LOST, PROMPT, TOKEN

STEPS: dict[str, dict[str, Any]] = {
    PROMPT: {"facecolor": cycle_color(0), "edgecolor": "white"},
    BOTH: {"facecolor": cycle_color(2), "edgecolor": "white"},
    DECODES: {"facecolor": cycle_color(1), "edgecolor": "white"},
    LOST: {"facecolor": "white", "edgecolor": "black", "hatch": "////"},
}
WAITING: dict[str, Any] = {"facecolor": "#d0d0d0", "edgecolor": "none"}
DEATH: dict[str, Any] = {
    "color": "black", "linestyle": "", "marker": "X", "markersize": 7, "markeredgecolor": "white", "label": KILLED,
}  # fmt: skip
WORKER_HEIGHT, REQUEST_HEIGHT = 0.75, 0.5
OUTLINED_PT = 2.0
"""Narrower bars have no outline: it would cover them."""


def worker_timeline(
    df: Any,
    ax: Axes | None = None,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    where: Where | None = None,
    width_in: float = TWO_COLUMNS_IN,
) -> Axes:
    """A row per worker with a bar per step, coloured by what it computes; below, a row per request with its tokens.

    A cross is where a worker was killed. Ticks are when a token was known; the grey bar reaches from a request's
    arrival to its first one. x is in ms. `df` has the columns of `step_log.timeline_rows` and `evidence`, of one
    system: `where` picks it. `start_s` and `end_s` cut out a window. Raises ConfigError for a missing column, several
    systems or an empty window.
    """
    what = "worker_timeline"
    check_target(ax, width_in, what)
    check_time(start_s, f"{what}: start_s")
    check_time(end_s, f"{what}: end_s")
    frame: Any = chosen(rows_of(df, "timelines", COLUMNS, what), where, None, what)
    systems = list(dict.fromkeys(frame["system"])) if "system" in frame.columns else []
    if len(systems) > 1:
        raise ConfigError(f"{what}: rows of {len(systems)} systems; choose with where={{'system': {systems[0]!r}}}")
    end_s = float(frame["end_s"].max()) if end_s is None else end_s
    shown = frame[(frame["end_s"] >= start_s) & (frame["start_s"] <= end_s)]
    if not len(shown) or end_s <= start_s:
        raise ConfigError(f"{what}: nothing between {start_s:g} and {end_s:g} s")
    workers = sorted(set(frame.loc[frame["of"] == "worker", "row"]), key=_prompts_first)
    requests = list(dict.fromkeys(frame.loc[frame["of"] == "request", "row"]))
    names = [*workers, *requests]
    with style():
        ax = new_axes(width_in, 0.75 + 0.3 * len(workers) + 0.17 * len(requests)) if ax is None else ax
        at = {
            name: 1.0 * i if name in workers else len(workers) + 0.62 * (i - len(workers))
            for i, name in enumerate(names)
        }
        ax.set_xlim(0, 1e3 * (end_s - start_s))
        ax.set_ylim(max(at.values()) + 0.5, -0.55)
        for kind, look in STEPS.items():
            _bars(ax, shown[shown["kind"] == kind], at, WORKER_HEIGHT, start_s, look)
        _bars(ax, shown[shown["kind"] == FIRST_TOKEN], at, REQUEST_HEIGHT, start_s, WAITING)
        tokens = shown[shown["kind"] == TOKEN]
        x, y = 1e3 * (tokens["end_s"].to_numpy(np.float64) - start_s), np.array([at[name] for name in tokens["row"]])
        ax.vlines(x, y - REQUEST_HEIGHT / 2, y + REQUEST_HEIGHT / 2, color="black", linewidth=0.5, label="_tokens")
        for row, at_s in shown.loc[shown["kind"] == KILLED, ["row", "end_s"]].itertuples(index=False):
            ax.plot(1e3 * (at_s - start_s), at[row], **DEATH)
        ax.set_yticks(list(at.values()), names)
        ax.set_xlabel(f"time after {start_s:g} s (ms)" if start_s else "time (ms)")
        ax.grid(visible=False, axis="y")
        kinds = set(shown["kind"])
        handles: list[Any] = [Patch(**look, linewidth=0.3, label=kind) for kind, look in STEPS.items() if kind in kinds]
        handles += [Patch(**WAITING, label=FIRST_TOKEN)] if FIRST_TOKEN in kinds else []
        handles.append(Line2D([], [], color="black", linestyle="", marker="|", markersize=6, label="a token"))
        handles += [Line2D([], [], **DEATH)] if KILLED in kinds else []
        handles += [evidence_handle(kind) for kind in dict.fromkeys(shown["evidence"])]
        ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3 if width_in < 5 else 8,
                  handlelength=1.2, handletextpad=0.4, columnspacing=1.2)  # fmt: skip
    note_origin(ax, [shown])
    return ax


def _prompts_first(worker: str) -> tuple[bool, str]:
    return not worker.startswith("prefill"), worker


def _bars(ax: Axes, rows: Any, at: dict[str, float], height: float, start_s: float, look: dict[str, Any]) -> None:
    if not len(rows):
        return
    left, width = 1e3 * (rows["start_s"] - start_s), 1e3 * (rows["end_s"] - rows["start_s"])
    point_ms = ax.figure.dpi / 72 / ax.bbox.width * (ax.get_xlim()[1] - ax.get_xlim()[0])
    outline = np.where(width.to_numpy() > OUTLINED_PT * point_ms, 0.3, 0.0)
    ax.barh([at[name] for name in rows["row"]], width, left=left, height=height, **look, linewidth=outline)
