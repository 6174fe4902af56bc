"""The one look of all figures: print widths, fonts, colours, and the frame that keeps them from a user's settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hybridlab.columns import ACRONYMS, UNITS

ONE_COLUMN_IN = 3.33
TWO_COLUMNS_IN = 7.0
GREY = "#5b5b5b"

RC: Mapping[Any, Any] = MappingProxyType(
    {
        "axes.prop_cycle": matplotlib.style.library["petroff10"]["axes.prop_cycle"],
        "figure.figsize": (ONE_COLUMN_IN, 2.6),
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.015,
        "savefig.dpi": 300,
        # The fonts that matplotlib brings: the same letters, and the same bytes, on every machine.
        "font.family": ["DejaVu Sans"],
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "legend.fontsize": 7,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.4,
        "axes.axisbelow": True,
        "lines.linewidth": 1.2,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        # Embedded TrueType: Type 3 fonts are refused by publishers, outlines cannot be searched.
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "svg.fonttype": "none",
        # Without a salt the ids in an SVG differ from one file to the next.
        "svg.hashsalt": "hybridlab",
    }
)

NAMES = {
    "offered_req_s": "offered load (req/s)",
    "output_tokens_per_s": "output throughput (tokens/s)",
    "prompt_tokens": "prompt length (tokens)",
    "computed_tokens": "prompt computed, not reused (tokens)",
}
# Labels of a log axis within a decade, densest first, and the room that one takes.
LOG_STEPS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
LABEL_WIDTH_PT, LABEL_HEIGHT_PT = 24.0, 16.0


@contextmanager
def style() -> Iterator[None]:
    """`with style(): ...` for figures of your own; those of this package apply it themselves.

    Starts from matplotlib's defaults, so that a user's matplotlibrc changes no figure.
    """
    interactive = mpl.is_interactive()
    try:
        with matplotlib.style.context(["default", dict(RC)]):
            try:
                yield
            finally:
                # A notebook's backend loads with its first figure, in here, and makes figures show: that must last.
                interactive = mpl.is_interactive()
    finally:
        mpl.interactive(interactive)


def new_axes(width_in: float = ONE_COLUMN_IN, height_in: float = 2.6) -> Axes:
    """Axes of a new figure in the house style."""
    return plt.subplots(figsize=(width_in, height_in))[1]


def cycle_color(number: int) -> str:
    """A colour of the cycle. "C0" would be looked up when drawn, which a notebook does outside of `style()`."""
    colors = RC["axes.prop_cycle"].by_key()["color"]
    return colors[number % len(colors)]


def axis_label(column: str) -> str:
    """What a table's column is called on an axis, with its unit: "median_ttft_s" -> "median TTFT (s)"."""
    name = column.split(".")[-1]
    if name in NAMES:
        return NAMES[name]
    suffix = next((end for end in UNITS if name.endswith(end)), "")
    words = re.split("_", name.removesuffix(suffix))
    text = " ".join(ACRONYMS.get(word, word) for word in words)
    return f"{text} ({UNITS[suffix]})" if suffix else text


def log_axis(ax: Axes, which: str) -> None:
    """A log scale on "x" or "y" with plain numbers, as many as have room; call it when the limits are final."""
    ax.set(**{f"{which}scale": "log"})
    axis, (low, high) = (ax.xaxis, ax.get_xlim()) if which == "x" else (ax.yaxis, ax.get_ylim())
    size_pt = (ax.bbox.width if which == "x" else ax.bbox.height) * 72 / ax.figure.dpi
    room = size_pt / (LABEL_WIDTH_PT if which == "x" else LABEL_HEIGHT_PT)
    decades = math.log10(high / low)
    fitting = [steps for steps in LOG_STEPS if decades * len(steps) <= room]
    axis.set_major_locator(LogLocator(subs=fitting[0] if fitting else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
