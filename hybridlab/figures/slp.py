"""Stream-loading prefill: TTFT over prompt length, beside the floor that no overlap can pass.

The rows are those of `hybridlab bench prefill --device ... --out` and `experiments/slp/gpu.py`, one measurement a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.config import PAPER, project_dir
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_target
from hybridlab.figures.files import file_path, read_lines
from hybridlab.figures.marks import evidence_handle, line_of, put_legend
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, TWO_COLUMNS_IN, axis_label, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Series, Where, chosen, rows_of

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("variant", "vram_gb", "tokens", "ttft_s", "ttft_s_min", "ttft_s_max", "load_bytes", "seconds")
RESIDENT, LINK = "all resident", "link alone"
LABEL_PT = 7.5
"""Least distance of two labels at the ends of lines."""


def read_slp(folder: str | Path | None = None) -> pd.DataFrame:
    """The rows of `folder`/slp.jsonl, by default of the project's results/paper/slp.

    Raises ConfigError if they are missing or damaged.
    """

    folder = project_dir() / "results" / PAPER / "slp" if folder is None else file_path(folder, "read_slp")
    path = folder / "slp.jsonl"
    return read_lines(path, (*COLUMNS, "evidence", "machine", "code"))


def slp_table(df: pd.DataFrame, *, where: Where | None = None, evidence: Kinds | None = None) -> pd.DataFrame:
    """One row per streamed variant and prompt length: ttft_s, link_s, resident_s, floor_s and `fraction` of the floor.

    The floor is max(link_s, resident_s): the loads of the same prompt with nothing else (median of the runs), and the
    same prompt with all experts resident. Fractions near 1 say that the shorter of both is hidden; above 1 is noise.
    NaN where one of the two is not in the table. Raises ConfigError as `slp` does.
    """
    import pandas as pd

    columns = ["variant", "vram_gb", "tokens", "ttft_s", "link_s", "resident_s", "floor_s", "fraction", "evidence"]
    parts = []
    steps, links = _parts(df, "slp_table", where, evidence)
    for kind in dict.fromkeys(steps["evidence"]):
        rows = steps[steps["evidence"] == kind]
        resident = _resident(rows)
        rows = rows[rows["variant"] != RESIDENT]
        rows = rows.assign(link_s=_link_s(links, kind), resident_s=rows["tokens"].map(resident))
        floor = np.maximum(rows["link_s"], rows["resident_s"])
        parts.append(rows.assign(floor_s=floor, fraction=floor / rows["ttft_s"])[columns])
    return pd.concat(parts, ignore_index=True).astype({"tokens": int})


def slp(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = TWO_COLUMNS_IN,
) -> Axes:
    """TTFT (s) over prompt length (tokens), both log, of the rows of `read_slp`: a line per variant, named at its end.

    Whiskers span the repeats. The broad grey line is the floor, max(link alone, all resident), where both are known.
    `where` picks rows by column, `evidence` asks for kinds to be compared. Raises ConfigError naming a missing
    column, kinds mixed unasked, or rows of several models.
    """
    what = "slp"
    check_target(ax, width_in, what)
    steps, links = _parts(df, what, where, evidence)
    series = _series(steps)
    kinds = list(dict.fromkeys(one.kind for one in series))
    with style():
        own = ax is None
        ax = new_axes(width_in, 2.5 if width_in < 5 else 3.0) if ax is None else ax
        floors = [_draw_floor(ax, steps[steps["evidence"] == kind], links, kind) for kind in kinds]
        for one in series:
            _draw(ax, one)
        ax.set_xlabel(axis_label("prompt_tokens"))
        ax.set_ylabel(axis_label("ttft_s"))
        ax.set_yscale("log")
        _label_lengths(ax, steps["tokens"])
        handles: list[Any] = [evidence_handle(kind) for kind in kinds]
        if any(floors):
            handles.append(Line2D([], [], **_FLOOR, label="floor: max(link alone, all resident)"))
        if (steps["ttft_s_max"] > steps["ttft_s_min"]).any():
            handles.append(Line2D([], [], color=GREY, linewidth=0.7, marker="|", label="range of repeats"))
        put_legend(ax, [], handles, below=own)
        log_axis(ax, "y")
        _label_ends(ax, series)
    note_origin(ax, [one.rows for one in series])
    return ax


_FLOOR: dict[str, Any] = {"color": GREY, "alpha": 0.3, "linewidth": 6.0, "solid_capstyle": "butt"}


def _parts(df: Any, what: str, where: Where | None, evidence: Kinds | None) -> tuple[Any, Any]:
    """(whole prompts, loads alone of as many bytes), one model's."""
    frame: Any = rows_of(df, "table", COLUMNS, what)
    links = frame[(frame["variant"] == LINK) & (frame["seconds"] > 0)]
    steps = frame[frame["ttft_s"] > 0]
    if not len(steps):
        raise ConfigError(f"{what}: no rows to draw; none has ttft_s")
    steps = chosen(steps, where, evidence, what)
    for column in ("preset", "device", "machine"):
        values = list(dict.fromkeys(steps[column])) if column in steps.columns else []
        if len(values) > 1 and not (column == "device" and steps["evidence"].nunique() > 1):
            raise ConfigError(
                f"{what}: rows differ in {column!r} ({', '.join(map(repr, values[:4]))}); choose with "
                f"where={{{column!r}: {values[0]!r}}}"
            )
    return steps, links[links["load_bytes"].isin(steps["load_bytes"])]


def _link_s(links: Any, kind: str) -> float:
    """Median over the runs; rows that do not say their evidence are of the kind of the rows beside them."""
    of_kind = links[links["evidence"].isna() | (links["evidence"] == kind)]
    return float(of_kind["seconds"].median()) if len(of_kind) else float("nan")


def _resident(rows: Any) -> dict[float, float]:
    """Tokens -> seconds with all experts resident."""
    same = rows[rows["variant"] == RESIDENT]
    return same.groupby("tokens")["ttft_s"].median().to_dict()


def _series(steps: Any) -> list[Series]:
    names = [_name(*row) for row in steps[["variant", "vram_gb"]].itertuples(index=False)]
    steps = steps.assign(_series=names)
    groups = dict(iter(steps.groupby(["_series", "evidence"], sort=False)))
    return [
        Series(number, name, kind, groups[name, kind].sort_values("tokens"))
        for number, name in enumerate(dict.fromkeys(names))
        for kind in dict.fromkeys(steps["evidence"])
        if (name, kind) in groups
    ]


def _name(variant: str, vram_gb: float | None) -> str:
    limited = vram_gb is not None and vram_gb == vram_gb
    return f"{variant}, planned for {vram_gb:g} GB" if limited else variant


def _draw_floor(ax: Axes, rows: Any, links: Any, kind: str) -> bool:
    link_s, resident = _link_s(links, kind), _resident(rows)
    if not resident or link_s != link_s:
        return False
    tokens = sorted(resident)
    ax.plot(tokens, [max(link_s, resident[length]) for length in tokens], **_FLOOR, zorder=1.5, label="_floor")
    return True


def _draw(ax: Axes, one: Series) -> None:
    look: dict[str, Any] = line_of(one.number, one.kind)
    x, y = one.rows["tokens"].to_numpy(np.float64), one.rows["ttft_s"].to_numpy(np.float64)
    ends = np.vstack([y - one.rows["ttft_s_min"], one.rows["ttft_s_max"] - y]).clip(min=0)
    ax.errorbar(x, y, yerr=ends, fmt="none", ecolor=look["color"], elinewidth=0.7, capsize=2, zorder=2.5)
    # Lines that coincide: those of few points are on top, then the first of the table.
    look |= {"markersize": 3.5}
    ax.plot(x, y, **look, zorder=4 - len(x) / 50 - one.number / 1000)


def _label_lengths(ax: Axes, tokens: Any) -> None:
    """The measured lengths on a log axis, in powers of two as prompts are."""
    lengths = sorted({int(length) for length in tokens})
    ax.set_xscale("log")
    ax.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
    ax.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    ax.minorticks_off()


def _label_ends(ax: Axes, series: Sequence[Series]) -> None:
    """A name to the right of each line's last point, moved up or down where two would meet."""
    figure: Any = ax.figure
    at = [(float(one.rows["tokens"].iloc[-1]), float(one.rows["ttft_s"].iloc[-1])) for one in series]
    names = []
    for one, point in zip(series, at, strict=True):
        color = line_of(one.number, one.kind)["color"]
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.4, "shrinkB": 3, "relpos": (0, 0.5)}
        look: dict[str, Any] = {"fontsize": 6, "color": color, "va": "center", "arrowprops": arrow}
        names.append(ax.annotate(one.name, point, (6, 0), textcoords="offset points", annotation_clip=False, **look))
    for _ in range(2):  # the layout makes room for names, which moves the points
        figure.draw_without_rendering()
        points_pt = ax.transData.transform(at) * 72 / figure.dpi
        right_pt = ax.bbox.x1 * 72 / figure.dpi
        for name, (x, y), place in zip(names, points_pt, _apart(points_pt[:, 1], LABEL_PT), strict=True):
            name.set_position((right_pt - x + 6, place - y))


def _apart(heights: np.ndarray, least: float) -> np.ndarray:
    """`heights` moved as little as keeps neighbours `least` apart, in their order.

    Neighbours that are pushed together become a group around the mean of what they want.
    """
    order = np.argsort(heights, kind="stable")
    groups: list[list[float]] = []
    for height in heights[order]:
        groups.append([float(height)])
        while len(groups) > 1 and _middle_gap(groups[-2], groups[-1], least) < 0:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [np.mean(group) + least * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]
    found = np.empty(len(heights))
    found[order] = placed
    return found


def _middle_gap(lower: Sequence[float], upper: Sequence[float], least: float) -> float:
    """Room between the top label of one group and the bottom label of the next, beyond `least`."""
    top = np.mean(lower) + least * (len(lower) - 1) / 2
    bottom = np.mean(upper) - least * (len(upper) - 1) / 2
    return float(bottom - top - least)
