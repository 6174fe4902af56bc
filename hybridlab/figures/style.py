"""The one look of all figures: colour-blind-safe colours, print widths, a mark for each kind of evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

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
    }
)


@dataclass(frozen=True)
class EvidenceMark:
    """How a kind of evidence is drawn; shape and line differ, so that it survives a grey print."""

    fillstyle: Any
    linestyle: Any
    marker: str


EVIDENCE: Mapping[str, EvidenceMark] = MappingProxyType(
    {
        "measured": EvidenceMark("full", "-", "o"),
        "emulated": EvidenceMark("left", "--", "o"),
        "simulated": EvidenceMark("none", ":", "o"),
        "extrapolated": EvidenceMark("none", (0, (1, 3)), "D"),
        "published": EvidenceMark("none", "none", "*"),
    }
)


@contextmanager
def style() -> Iterator[None]:
    """`with style(): ...` for figures of your own; those of this package apply it themselves."""
    interactive = mpl.is_interactive()
    try:
        with mpl.rc_context(dict(RC)):
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


def evidence_mark(kind: str) -> EvidenceMark:
    """The mark of a kind of evidence. Raises ConfigError for an unknown kind."""
    if kind not in EVIDENCE:
        raise ConfigError(f"evidence: unknown kind {kind!r}; expected one of {', '.join(EVIDENCE)}")
    return EVIDENCE[kind]


def evidence_handle(kind: str) -> Line2D:
    """A legend entry, in grey, that shows how `kind` is drawn."""
    mark = evidence_mark(kind)
    return Line2D(
        [],
        [],
        color=GREY,
        markerfacecoloralt="white",
        fillstyle=mark.fillstyle,
        linestyle=mark.linestyle,
        marker=mark.marker,
        label=kind,
    )


def require(data: Any, attribute: str, columns: tuple[str, ...], what: str) -> pd.DataFrame:
    """`data`, or its `attribute` (of a result), if that has rows and the columns that `what` needs.

    Raises ConfigError that says what to pass or names the first column that is missing.
    """
    frame = getattr(data, attribute, data)
    if not hasattr(frame, "columns"):
        raise ConfigError(f"{what}: pass a result or result.{attribute}, got {type(data).__name__}")
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ConfigError(f"{what}: no column {missing[0]!r}; pass a result or result.{attribute}")
    if not len(frame):
        raise ConfigError(f"{what}: no rows to draw")
    return frame
