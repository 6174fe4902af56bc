"""Of a simulated machine: TTFT over prompt length in each way, and what each upgrade saves.

The rows are those of `hybridlab.simulator.sensitivity`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_target, is_number
from hybridlab.figures.marks import evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, axis_label, cycle_color, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Where, chosen, rows_of, series_of

if TYPE_CHECKING:
    import pandas as pd

SAVED = {"tpot_saved": "TPOT", "ttft_saved": "TTFT"}
BAR = 0.38
"""How thick a bar is, where upgrades lie 1 apart."""


def prefill_ways(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    goal_s: float | None = None,
    by: str = "way",
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """TTFT (s) over prompt length, both log, of `prefill_rows`: a line per value of `by`; grey: `goal_s`.

    Raises ConfigError naming a missing column, or kinds of evidence mixed unasked.
    """
    what = "prefill_ways"
    check_target(ax, width_in, what)
    frame = rows_of(df, "table", ("prompt_tokens", "ttft_s", by), what)
    found = series_of(frame, by, what, needs="ttft_s", where=where, evidence=evidence)
    series = [replace(one, name=str(one.rows[by].iloc[0])) for one in found]
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.4) if ax is None else ax
        for one in series:
            rows: Any = one.rows.sort_values("prompt_tokens")
            ax.plot(rows["prompt_tokens"], rows["ttft_s"], **line_of(one.number, one.kind), label=one.name)
        if goal_s is not None:
            ax.axhline(goal_s, color=GREY, linewidth=0.8)
            ax.annotate(
                f"{goal_s:g} s", (0, goal_s), (2, 2), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                color=GREY, fontsize=7,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel=axis_label("prompt_tokens"), ylabel=axis_label("ttft_s"))
        put_legend(
            ax, series_handles(series), [evidence_handle(k) for k in dict.fromkeys(s.kind for s in series)], below=own
        )
        log_axis(ax, "x")
        log_axis(ax, "y")
    note_origin(ax, [one.rows for one in series])
    return ax


def upgrades(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """Share of TPOT and of TTFT that each upgrade saves, in percent, of `upgrade_rows`: two bars per upgrade.

    Raises ConfigError naming a missing column, for what is no finite number, or kinds of evidence mixed unasked.
    """
    what = "upgrades"
    check_target(ax, width_in, what)
    frame: Any = chosen(rows_of(df, "table", ("change", *SAVED), what), where, evidence, what)
    frame = frame[frame["change"] != "as it is"].iloc[::-1]
    if not frame[list(SAVED)].map(is_number).all(axis=None):
        raise ConfigError(f"{what}: expected finite numbers in {' and '.join(SAVED)}")
    with style():
        own = ax is None
        ax = new_axes(width_in, 0.8 + 0.28 * len(frame)) if ax is None else ax
        handles = []
        for number, (column, name) in enumerate(SAVED.items()):
            places = [i + (0.5 - number) * BAR for i in range(len(frame))]
            look: Any = {"facecolor": "white", "edgecolor": cycle_color(number), "hatch": "///" if number else ""}
            percent = 100 * frame[column]
            ax.barh(places, percent, BAR, linewidth=1.0, **look)
            for place, value in zip(places, percent, strict=True):
                ax.annotate(
                    f"{value:.0f}", (max(value, 0), place), (2, 0), textcoords="offset points", va="center", fontsize=6
                )
            handles.append(Patch(linewidth=1.0, **look, label=name))
        ax.set_yticks(range(len(frame)), list(frame["change"]))
        ax.grid(visible=False, axis="y")
        ax.set_xlim(right=max(10.0, 1.12 * 100 * float(frame[list(SAVED)].max().max())))
        ax.set_xlabel("time saved (%)")
        kinds = [Patch(facecolor="white", edgecolor=GREY, label=kind) for kind in dict.fromkeys(frame["evidence"])]
        put_legend(ax, handles, kinds, below=own)
    note_origin(ax, [frame])
    return ax
