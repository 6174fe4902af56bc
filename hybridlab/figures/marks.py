"""How rows are told apart: colour and marker by series, fill and line by kind of evidence; and the legend."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hybridlab.columns import EVIDENCE, Evidence
from hybridlab.errors import ConfigError
from hybridlab.figures.style import GREY, cycle_color
from hybridlab.sections import did_you_mean

# Filled shapes only: the fill says the evidence. One marker fewer than colours, so that pairs repeat late.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
# Of the legend's 7 pt letters: how wide one is on average, and what else an entry takes.
LETTER_PT = 3.9
HANDLE_PT = 32.0
EDGE_PT = 8.0


@dataclass(frozen=True)
class EvidenceMark:
    """How a kind of evidence is drawn; fill and line differ, so that it survives a grey print."""

    fillstyle: Any
    linestyle: Any


EVIDENCE_MARKS: Mapping[Evidence, EvidenceMark] = MappingProxyType(
    {
        "measured": EvidenceMark("full", "-"),
        "emulated": EvidenceMark("left", (0, (5, 1.5))),
        "simulated": EvidenceMark("none", (0, (1, 1.2))),
        "extrapolated": EvidenceMark("bottom", (0, (4, 1.5, 1, 1.5))),
        "published": EvidenceMark("none", "none"),  # stars, and no line: what lies between is not known
    }
)


def evidence_mark(kind: str) -> EvidenceMark:
    """The mark of a kind of evidence. Raises ConfigError for an unknown kind."""
    if kind not in EVIDENCE:
        raise ConfigError(f"evidence: unknown kind {kind!r}{did_you_mean(str(kind), EVIDENCE)}")
    return EVIDENCE_MARKS[kind]


def line_of(number: int, kind: str) -> dict[str, Any]:
    """Keywords of `ax.plot` for series `number` with evidence `kind`."""
    mark = evidence_mark(kind)
    # Published points are stars with as many points as tell the series apart.
    star = (5 + number % len(MARKERS), 1, 0)
    return {
        "color": cycle_color(number),
        "linestyle": mark.linestyle,
        "marker": star if kind == "published" else MARKERS[number % len(MARKERS)],
        "markersize": 7.0 if kind == "published" else 4.5,
        "fillstyle": mark.fillstyle,
        "markerfacecoloralt": "white",
    }


def series_handles(series: Iterable[Any]) -> list[Line2D]:
    """Legend entries that show colour and marker of each series (with `number` and `name`), once."""
    named = {one.number: one.name for one in series}
    looks: dict[int, Any] = {number: line_of(number, "measured") | {"linewidth": 2.0} for number in named}
    return [Line2D([], [], **looks[number], label=name) for number, name in named.items()]


def evidence_handle(kind: str) -> Line2D:
    """A legend entry, in grey, that shows how `kind` is drawn."""
    return Line2D([], [], **{**line_of(0, kind), "color": GREY}, label=kind)


def saturated_mark(x: Any, y: Any, label: str = "_saturated") -> Line2D:
    """Crosses over points of saturated runs, whose latencies say how long the runs were."""
    look: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 8, "markeredgewidth": 1.0}
    return Line2D(x, y, **look, color="black", zorder=5, label=label)


def saturated_handle() -> Line2D:
    return saturated_mark([], [], label="saturated: grows with the run")


def band_handle() -> Patch:
    """A legend entry for the band that spans repeats."""
    return Patch(facecolor=GREY, alpha=0.25, linewidth=0, label="range of repeats")


def put_legend(ax: Axes, series: Sequence[Any], marks: Sequence[Any], *, below: bool) -> None:
    """The legend: below the axes of a figure of our own, which grows by it, else inside the caller's axes.

    Series and what else is drawn each take as many columns as fit the figure; labels wider than it are broken.
    """
    if not below:
        ax.legend(handles=[*series, *marks], loc="best", fontsize=6)
        return
    figure: Any = ax.figure
    width_in, height_in = figure.get_size_inches()
    room_pt = width_in * 72 - 2 * EDGE_PT
    for handle in series:
        most = int((room_pt - HANDLE_PT) / LETTER_PT)
        handle.set_label(textwrap.fill(handle.get_label(), most, subsequent_indent="  "))
    legends = []
    for group in filter(None, (series, marks)):
        longest = max(len(line) for handle in group for line in handle.get_label().split("\n"))
        rows = -(-len(group) // max(1, int(room_pt / (HANDLE_PT + LETTER_PT * longest))))
        # Balanced: six entries in room for five become three and three.
        columns = -(-len(group) // rows)
        legends.append(figure.legend(handles=group, ncols=columns, loc="upper left", borderaxespad=0, borderpad=0.3))
    heights_in = [legend.get_window_extent().height / figure.dpi for legend in legends]
    total_in = sum(heights_in)
    figure.set_size_inches(width_in, height_in + total_in)
    figure.get_layout_engine().set(rect=(0, total_in / (height_in + total_in), 1, height_in / (height_in + total_in)))
    top_in = total_in
    for legend, own_in in zip(legends, heights_in, strict=True):
        legend.set_bbox_to_anchor((EDGE_PT / 72 / width_in, top_in / (height_in + total_in)))
        top_in -= own_in
