"""The service level that a figure draws, and what it is called there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from hybridlab.errors import ConfigError
from hybridlab.figures.marks import LETTER_PT
from hybridlab.figures.style import GREY
from hybridlab.figures.tables import Series
from hybridlab.metrics import SLO, find_slo

Level = str | SLO | Mapping[str, Any]
DASHED = (0, (4, 2))


def level_of(series: Sequence[Series], slo: Level | None, what: str) -> SLO | None:
    """`slo` (a preset's name, an SLO or {ttft_s, tpot_s}), else the one SLO that all rows name, else None.

    Rows with several SLOs share no limit: None. Raises ConfigError for an unknown or incomplete SLO.
    """
    if isinstance(slo, Mapping):
        try:
            return SLO.model_validate(dict(slo))
        except ValueError as error:
            raise ConfigError(f"{what}: slo: expected {{ttft_s, tpot_s}} in seconds, got {slo!r}") from error
    if slo is not None:
        return find_slo(slo)
    named = set()
    for one in series:
        if not {"slo", "slo_ttft_s", "slo_tpot_s"} <= set(one.rows.columns):
            return None
        named |= set(one.rows[["slo", "slo_ttft_s", "slo_tpot_s"]].itertuples(index=False, name=None))
    name, ttft_s, tpot_s = named.pop() if len(named) == 1 else (None, 0.0, 0.0)
    return SLO(name=name, ttft_s=float(ttft_s), tpot_s=float(tpot_s)) if isinstance(name, str) else None


def draw_limit(ax: Axes, which: str, limit: float) -> str:
    """A dashed line at `limit` on the "x" or "y" axis, if it is near enough to be worth showing.

    The axis is stretched to it if that takes less than four times what is drawn. Returns what to say of the
    line in the title: " (dashed)", or " (out of view)".
    """
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    if not low / 4 < limit < 4 * high:
        return " (out of view)"
    line = ax.axvline if which == "x" else ax.axhline
    line(limit, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=1.5)
    ax.set(**{f"{which}lim": (min(low, limit / 1.3), max(high, limit * 1.3))})
    return " (dashed)"


def name_level(ax: Axes, level: SLO, limits: str) -> None:
    """The name of the service level and its `limits`, small, at the left above the axes."""
    text = f"SLO {level.name}: {limits}"
    too_wide = len(text) * LETTER_PT * ax.figure.dpi / 72 > ax.bbox.width
    ax.set_title(text.replace(": ", ":\n", 1) if too_wide else text, loc="left", fontsize=7)
