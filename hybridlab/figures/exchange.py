"""Bytes between ranks of expert parallelism, counted and by the formulas, and what two links make of one prompt.

The rows are those of `hybridlab.bench.exchange`, `hybridlab.bench.dslp` and `experiments/small_ep/emulated.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.config import PAPER, project_dir
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_choice, check_target
from hybridlab.figures.files import file_path, read_lines
from hybridlab.figures.marks import evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, cycle_color, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Where, chosen, rows_of, series_of

if TYPE_CHECKING:
    import pandas as pd

BYTES_COLUMNS = (
    "exchange", "ranks", "tokens", "moe_layers", "top_k", "sent_bytes", "formula_bytes", "uniform_bytes",
)  # fmt: skip
DSLP_COLUMNS = ("system", "ranks", "step_s", "step_s_min", "step_s_max", "load_s", "over_one_rank")
FILES = {"bytes": BYTES_COLUMNS, "dslp": DSLP_COLUMNS}
SMALL_EP = "small_ep"
RANDOM: dict[str, Any] = {"color": GREY, "alpha": 0.25, "linewidth": 5.0, "label": "random routes"}


def read_exchange(table: str = "bytes", folder: str | Path | None = None) -> pd.DataFrame:
    """The rows of `folder`/bytes.jsonl or, for `table` "dslp", dslp.jsonl; by default of results/paper/small_ep.

    Raises ConfigError if they are missing or damaged.
    """

    check_choice(table, tuple(FILES), "read_exchange: table")
    folder = project_dir() / "results" / PAPER / "small_ep" if folder is None else Path(folder)
    path = file_path(folder, "read_exchange") / f"{table}.jsonl"
    return read_lines(path, (*FILES[table], "evidence", "machine", "code"))


def exchange_table(df: pd.DataFrame) -> pd.DataFrame:
    """A row per number of ranks and exchange: MB (1e6 bytes) sent in all, counted and by the formula.

    `equal` says whether both are the same to the byte, `over_small_ep` is the counted share of SmallEP's, and
    `router_work` how many times each token is routed, where that is known.
    """
    import pandas as pd

    frame: Any = rows_of(df, "rows", BYTES_COLUMNS, "exchange_table")
    small: dict[int, int] = frame[frame["exchange"] == SMALL_EP].set_index("ranks")["sent_bytes"].to_dict()
    found = {
        "ranks": frame["ranks"],
        "exchange": frame["exchange"],
        "counted_mb": frame["sent_bytes"] / 1e6,
        "formula_mb": frame["formula_bytes"] / 1e6,
        "equal": frame["sent_bytes"] == frame["formula_bytes"],
        "over_small_ep": frame["sent_bytes"] / frame["ranks"].map(small),
    }
    if "router_tokens" in frame.columns:
        found["router_work"] = frame["router_tokens"] / frame["tokens"]
    return pd.DataFrame(found).reset_index(drop=True)


def exchange_bytes(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """KB that a token's hidden states and results cost in a MoE layer over the number of ranks, both log.

    Markers are counted, lines the formulas for the routes of the run; the broad grey ones are what random routes would
    cost, without ids, weights and counts. The dotted line is where there are as many ranks as experts per token. Raises
    ConfigError for a missing column, kinds mixed unasked, or rows of several models or lengths.
    """
    what = "exchange_bytes"
    check_target(ax, width_in, what)
    frame: Any = rows_of(df, "rows", BYTES_COLUMNS, what)
    found = series_of(frame, "exchange", what, needs="sent_bytes", where=where, evidence=evidence)
    series = [replace(one, name=str(one.rows["exchange"].iloc[0])) for one in found]
    for column in ("preset", "tokens", "top_k"):
        values = list(dict.fromkeys(value for one in series for value in one.rows.get(column, ())))
        if len(values) > 1:
            raise ConfigError(f"{what}: rows differ in {column!r}; choose with where={{{column!r}: {values[0]!r}}}")
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.3) if ax is None else ax
        for one in series:
            rows = one.rows.sort_values("ranks")
            per = 1e3 * rows["tokens"] * rows["moe_layers"]
            look = line_of(one.number, one.kind)
            ax.plot(rows["ranks"], rows["uniform_bytes"] / per, **RANDOM, zorder=1)
            ax.plot(rows["ranks"], rows["formula_bytes"] / per, **{**look, "marker": ""}, zorder=2, label="_formula")
            ax.plot(rows["ranks"], rows["sent_bytes"] / per, **{**look, "linestyle": ""}, zorder=3, label=one.name)
        ranks = sorted({int(size) for one in series for size in one.rows["ranks"]})
        top_k = int(series[0].rows["top_k"].iloc[0])
        ax.set(xscale="log", xlabel="ranks", ylabel="KB per token and layer")
        ax.set_xlim(ranks[0] / 1.15, ranks[-1] * 1.15)
        if ax.get_xlim()[0] < top_k < ax.get_xlim()[1]:
            ax.axvline(top_k, color=GREY, linewidth=0.7, linestyle=":", zorder=0, label="_top_k")
            near: dict[str, Any] = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points"}
            ax.annotate(f"top-{top_k}", (top_k, 0), (3, 3), fontsize=6, color=GREY, **near)
        ax.set_xticks(ranks, [str(size) for size in ranks])
        ax.minorticks_off()
        marks: list[Any] = [
            Line2D([], [], color=GREY, linestyle="", marker="o", label="counted"),
            Line2D([], [], color=GREY, linewidth=1.2, label="formula"),
            Line2D([], [], **RANDOM),
        ]
        kinds = [evidence_handle(kind) for kind in dict.fromkeys(one.kind for one in series)]
        put_legend(ax, series_handles(series), [*marks, *kinds], below=own)
        log_axis(ax, "y")
    note_origin(ax, [one.rows for one in series])
    return ax


def dslp(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """A bar per system: seconds of a prompt whose experts are streamed by one rank and by two, with their gains.

    The black tick is the loads alone, which no order of things beats; whiskers span the repeats; the dotted line is
    half of what one rank takes. A column `tokens` with several lengths makes a group of bars of each. Raises
    ConfigError for a missing column or kinds mixed unasked.
    """
    what = "dslp"
    check_target(ax, width_in, what)
    rows: Any = chosen(rows_of(df, "rows", DSLP_COLUMNS, what), where, evidence, what)
    rows = rows.assign(tokens=rows["tokens"] if "tokens" in rows.columns else 0)
    if len(twice := rows[rows.duplicated(["system", "evidence", "tokens"])]):
        raise ConfigError(f"{what}: {twice['system'].iloc[0]!r} is there twice; choose with where=")
    rows = rows.sort_values("tokens", kind="stable")
    kinds, sizes = list(dict.fromkeys(rows["evidence"])), list(dict.fromkeys(rows["tokens"]))
    at = np.arange(len(rows)) + 0.6 * rows["tokens"].map(sizes.index).to_numpy()
    with style():
        own = ax is None
        ax = new_axes(width_in, 0.6 + 0.22 * (at[-1] + 1)) if ax is None else ax
        for y, row in zip(at, rows.to_dict("records"), strict=True):
            ends = np.clip([[row["step_s"] - row["step_s_min"]], [row["step_s_max"] - row["step_s"]]], 0, None)
            alpha = 0.9 if row["evidence"] == "measured" else 0.55
            color = cycle_color(0 if row["ranks"] == 1 else 1)
            ax.barh(y, row["step_s"], height=0.62, color=color, alpha=alpha, xerr=ends,
                    error_kw={"elinewidth": 0.7, "capsize": 2})  # fmt: skip
            ax.plot([row["load_s"]] * 2, [y - 0.36, y + 0.36], color="black", linewidth=1.6, label="_loads")
            if row["ranks"] > 1:
                beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 6}
                ax.annotate(f"{row['over_one_rank']:.2f}x", (row["step_s_max"], y), (4, 0), **beside)
        for size in sizes:
            ends = at[rows["tokens"] == size][[0, -1]] + [-0.5, 0.5]
            for half_s in rows[(rows["tokens"] == size) & (rows["ranks"] == 1)]["step_s"] / 2:
                ax.plot([half_s] * 2, ends, color=GREY, linewidth=0.7, linestyle=":", label="_half")
        names = [f"{size:,} tokens: {name}" for size, name in zip(rows["tokens"], rows["system"], strict=True)]
        ax.set_yticks(at, names if len(sizes) > 1 else rows["system"])
        ax.set_ylim(at[-1] + 0.5, -0.5)
        ax.set_xlim(0, 1.15 * rows["step_s_max"].max())  # room for the gains
        ax.set_xlabel("TTFT of the prompt (s)")
        ax.grid(visible=False, axis="y")
        marks: list[Any] = [
            Line2D(
                [], [], color="black", linestyle="", marker="|", markersize=8, markeredgewidth=1.6, label="loads alone"
            ),
            Line2D([], [], color=GREY, linewidth=0.7, linestyle=":", label="half of one rank"),
        ]
        put_legend(ax, [], [*marks, *(evidence_handle(kind) for kind in kinds)], below=own)
    note_origin(ax, [rows])
    return ax
