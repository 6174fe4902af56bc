"""What a larger decode batch brings and costs: tokens/s of all users over TPOT, under each overlap.

The rows are those of `hybridlab bench decode --device ... --out FOLDER`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.config import PAPER, project_dir
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_target
from hybridlab.figures.files import file_path, read_lines
from hybridlab.figures.marks import evidence_handle, line_of, put_legend, series_handles
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, axis_label, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Series, Where, rows_of, series_of

if TYPE_CHECKING:
    import pandas as pd

FILES = "decode*.jsonl"
COLUMNS = ("variant", "batch", "tpot_s", "tpot_s_q1", "tpot_s_q3", "tokens_per_s")
RUN = ["file", "preset", "machine", "code", "depth"]
PLAIN, DUAL, CPU = "plain batch", "dual batch", "device cpu"
SETTING = ("preset", "depth", "threads", "accelerator_threads", "machine", "code")
"""What must be the same in all rows of a figure: else a line says less about the overlap than about these."""
MARGIN = 1.18
"""Room around the points, as a factor."""
LABEL = 1.5
"""More to the right of them: the name of the last batch lies there."""


def read_decode(folder: str | Path | None = None) -> pd.DataFrame:
    """The rows of all decode*.jsonl in `folder` and below, by default of the project's results/paper/dual_batch.

    The column `file` says which one, relative to `folder`; where nothing was measured yet there are no rows. Raises
    ConfigError if a file is damaged.
    """
    import pandas as pd

    folder = project_dir() / "results" / PAPER / "dual_batch" if folder is None else file_path(folder, "read_decode")
    tables = []
    for path in sorted(folder.rglob(FILES)):
        table = read_lines(path, (*COLUMNS, "evidence"))
        tables.append(table.assign(file=str(path.relative_to(folder))))
    if not tables:
        return pd.DataFrame(columns=[*RUN, "device", *COLUMNS, "evidence"])
    return pd.concat(tables, ignore_index=True)


def decode_table(df: pd.DataFrame) -> pd.DataFrame:
    """One row per dual batch of `bench decode`'s rows, beside the plain batch of as many requests on the same machine.

    plain_s, dual_s, alone_s and cpu_s are TPOTs: of the plain and the dual batch, of one request alone, and with device
    "cpu" (NaN where not measured). attention_s and experts_s are the sums of the dual batch's ops on each lane while
    the other one works, bound_s what no order of these ops can beat, `fraction` the median over the steps of bound /
    step. `gain` is the median of plain / dual, round by round. Raises ConfigError for a missing column.
    """
    import pandas as pd

    keys = [*RUN, "batch"]
    names = {
        "tpot_s": "dual_s",
        "attention_busy_s": "attention_s",
        "experts_busy_s": "experts_s",
        "times_plain": "gain",
    }
    measured = ["attention_s", "experts_s", "bound_s", "fraction", "hand_offs_s", "dual_s", "gain"]
    columns = [*keys, *measured, "plain_s", "alone_s", "cpu_s"]
    if not len(df):
        return pd.DataFrame(columns=columns)
    frame: Any = df if "file" in df.columns else df.assign(file="")
    frame = rows_of(frame, "table", [*keys, "variant", *names, "bound_s", "fraction", "hand_offs_s"], "decode_table")
    times: dict[Any, float] = frame.set_index([*keys, "variant"])["tpot_s"].to_dict()
    dual = frame[frame["variant"] == DUAL].rename(columns=names)
    of = list(dual[keys].itertuples(index=False, name=None))
    dual = dual.assign(
        plain_s=[times.get((*key, PLAIN), np.nan) for key in of],
        alone_s=[times.get((*run, 1, PLAIN), np.nan) for *run, _ in of],
        cpu_s=[times.get((*key, CPU), np.nan) for key in of],
    )
    return dual[columns].reset_index(drop=True)


def decode_tradeoff(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = ONE_COLUMN_IN,
) -> Axes:
    """Tokens/s of all users over TPOT (s), both log, of rows as `read_decode` has them: a line per variant.

    A point is a number of requests that decode together. All points of one number lie on a grey line (tokens/s =
    requests / TPOT), which carries it: of two variants, the one further up on it is better for every user. The pale bar
    on it spans the quartiles of the steps. `where` picks rows by column, `evidence` asks for kinds to be compared.
    Raises ConfigError naming a missing column, kinds mixed unasked, rows of several settings (`SETTING`), or a point
    that is there twice.
    """
    what = "decode_tradeoff"
    check_target(ax, width_in, what)
    frame: Any = rows_of(df, "table", COLUMNS, what)
    found = series_of(frame, "variant", what, needs="tpot_s", where=where, evidence=evidence)
    series = [replace(one, name=str(one.rows["variant"].iloc[0])) for one in found]
    _check_one_setting(series, what)
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.5 if width_in < 5 else 3.2) if ax is None else ax
        ax.set(xscale="log", yscale="log", **_limits(series))
        _draw_batches(ax, series)
        for one in series:
            _draw(ax, one)
        ax.set_xlabel(axis_label("tpot_s"))
        ax.set_ylabel("tokens/s of all users")
        quartiles = Line2D([], [], color=GREY, alpha=0.3, linewidth=4.0, label="quartiles of the steps")
        kinds = [evidence_handle(kind) for kind in dict.fromkeys(one.kind for one in series)]
        put_legend(ax, series_handles(series), [*kinds, quartiles], below=own)
        if own:
            figure: Any = ax.figure
            figure.draw_without_rendering()  # the legend has taken its room
        log_axis(ax, "x")
        log_axis(ax, "y")
    note_origin(ax, [one.rows for one in series])
    return ax


def _check_one_setting(series: Sequence[Series], what: str) -> None:
    for column in SETTING:
        found = [one.rows[column].dropna() for one in series if column in one.rows.columns]
        values = list(dict.fromkeys(value for part in found for value in part.tolist()))
        if len(values) > 1:
            shown = ", ".join(map(repr, values[:4]))
            raise ConfigError(
                f"{what}: rows differ in {column!r} ({shown}); choose with where={{{column!r}: {values[0]!r}}}"
            )
    for one in series:
        twice = one.rows[one.rows["batch"].duplicated()]
        if len(twice):
            raise ConfigError(f"{what}: {one.name!r} ({one.kind}) is there twice at batch {twice['batch'].iloc[0]}")


def _limits(series: Sequence[Series]) -> dict[str, tuple[float, float]]:
    x, y = (np.concatenate([one.rows[name] for one in series]) for name in ("tpot_s", "tokens_per_s"))
    return {"xlim": (x.min() / MARGIN, x.max() * LABEL), "ylim": (y.min() / MARGIN, y.max() * MARGIN)}


def _draw_batches(ax: Axes, series: Sequence[Series]) -> None:
    """The line of each number of requests, named beside its point of the longest TPOT."""
    slowest_s: dict[int, float] = {}
    for one in series:
        for batch, tpot_s in one.rows[["batch", "tpot_s"]].itertuples(index=False):
            slowest_s[int(batch)] = max(tpot_s, slowest_s.get(int(batch), 0.0))
    ends = np.array(ax.get_xlim())
    look: dict[str, Any] = {"fontsize": 6, "color": GREY, "ha": "left", "va": "top", "zorder": 4}
    for batch, tpot_s in slowest_s.items():
        ax.plot(ends, batch / ends, color=GREY, linewidth=0.5, linestyle=(0, (1, 2)), zorder=1, label="_batch")
        ax.annotate(f"batch {batch}", (tpot_s, batch / tpot_s), (3, -2), textcoords="offset points", **look)


def _draw(ax: Axes, one: Series) -> None:
    rows, look = one.rows.sort_values("batch"), line_of(one.number, one.kind)
    for batch, low, high in rows[["batch", "tpot_s_q1", "tpot_s_q3"]].itertuples(index=False):
        x = np.array([low, high])
        ax.plot(x, batch / x, color=look["color"], alpha=0.3, linewidth=4.0, solid_capstyle="butt", label="_quartiles")
    ax.plot(rows["tpot_s"], rows["tokens_per_s"], **look, zorder=3, label=one.name)
