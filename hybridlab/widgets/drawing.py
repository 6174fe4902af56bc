"""From a choice to a picture: PNG bytes for the panel, figure files at print size."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from hybridlab import figures
from hybridlab.errors import ConfigError
from hybridlab.figures.tables import Tables, rows_of
from hybridlab.widgets.metrics_xy import metrics_xy
from hybridlab.widgets.table import Choice, ResultsTable, Rows

WIDTH_IN, DPI = 5.9, 120
FALLBACK_COLORS = 128
# Fixed margins: a layout engine would add half to the time of a redraw.
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 0.72, 0.15, 0.3, 0.42
FEW_NAMES = 6
# Of legend entries: height, width of a letter, width of the rest; with few names and with many.
LEGEND = {True: (7, 0.165, 0.058, 0.45), False: (6, 0.14, 0.05, 0.4)}


@dataclass(frozen=True)
class View:
    """A figure that a panel shows. `settings`: which controls it heeds, and the names they have in its call."""

    title: str
    draw: Callable[..., Any]
    settings: Mapping[str, str]
    table: str = "summary"
    num_axes: int = 1
    height_in: float = 2.9

    @property
    def controls(self) -> frozenset[str]:
        return frozenset({"by", "slo", "band", *self.settings})

    def call(self, rows: Rows, choice: Choice, ax: Any) -> Axes:
        """Draw, and return the Axes, the first of several."""
        frame = rows.summary
        if self.table == "requests":
            frame = rows_of(Tables(frame, rows.requests, None), "requests", (), self.title)  # type: ignore[arg-type]
            # Without the id there are no single runs, and so no range over them.
            frame = frame if choice.band else frame.drop(columns="run_id")
        chosen = {argument: getattr(choice, control) for control, argument in self.settings.items()}
        drawn = self.draw(frame, ax, by=rows.by, where=rows.where, evidence=rows.evidence, **chosen)
        return drawn if isinstance(drawn, Axes) else drawn[0]


VIEWS: Mapping[str, View] = MappingProxyType(
    {
        "ttft_throughput": View("TTFT over throughput", figures.ttft_throughput, {"percentile": "ttft"}),
        "load_curves": View("load curves", figures.load_curves, {"percentile": "tpot"}, num_axes=2, height_in=3.4),
        "latency_cdf": View("latency CDF", figures.latency_cdf, {"metric": "metric"}, table="requests"),
        "ttft_prompt_length": View("TTFT over prompts", figures.ttft_prompt_length, {}, table="requests"),
        "metrics_xy": View("any two metrics", metrics_xy, {"x": "x", "y": "y"}),
    }
)


def picture(table: ResultsTable, choice: Choice) -> tuple[bytes, Rows]:
    """The figure of `choice` as PNG, and the rows it shows. Raises ConfigError if there is nothing to draw."""
    view, rows = _prepared(table, choice)
    with figures.style():
        no_layout: Any = "none"
        figure = Figure(dpi=DPI, layout=no_layout)
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(view.num_axes, 1, sharex=True, gridspec_kw={"hspace": 0.25})
        _lay_out(figure, view.height_in, 0.0)
        view.call(rows, choice, axes)
        _lay_out(figure, view.height_in, _legend_below(figure))
        canvas.draw()
        shown = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return _png(shown, compress_level=1), rows  # lightly: the bytes only travel to the browser


def small_png(png: bytes) -> bytes:
    """The same picture in a third of the bytes and a palette of its own, to lie in a notebook."""
    return _png(Image.open(io.BytesIO(png)).quantize(FALLBACK_COLORS, dither=Image.Dither.NONE), compress_level=9)


def save_picture(table: ResultsTable, choice: Choice, path: str | Path, command: str) -> dict[str, Path]:
    """Write the figure of `choice` at print size as PDF, SVG, PNG and sidecar; returns the paths by suffix."""
    import matplotlib.pyplot as plt

    view, rows = _prepared(table, choice)
    before = set(plt.get_fignums())
    try:
        ax = view.call(rows, choice, None)
        return figures.save_figure(ax, path, run_ids=rows.run_ids, command=command)
    finally:  # or a notebook would show it under the next cell
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def _png(image: Image.Image, compress_level: int) -> bytes:
    png = io.BytesIO()
    image.save(png, "png", compress_level=compress_level)
    return png.getvalue()


def _prepared(table: ResultsTable, choice: Choice) -> tuple[View, Rows]:
    view = VIEWS[choice.figure]
    if view.table == "requests" and table.requests is None:
        raise ConfigError(f"{view.title} needs the requests: explore a result, or an experiment by its name")
    return view, table.rows(choice, view.table == "requests")


def _legend_below(figure: Figure) -> float:
    """Move the legend out of the axes, where it hides no point; the height that it needs, in inches."""
    legend = next((ax.get_legend() for ax in figure.axes if ax.get_legend()), None)
    if legend is None:
        return 0.0
    handles: Any = legend.legend_handles
    names = [text.get_text() for text in legend.get_texts()]
    legend.remove()
    size, row_in, letter_in, handle_in = LEGEND[len(names) <= FEW_NAMES]
    columns = max(1, min(len(names), int((WIDTH_IN - 0.2) / (handle_in + letter_in * max(map(len, names))))))
    figure.legend(handles, names, loc="lower center", ncols=columns, fontsize=size)
    return 0.1 + row_in * ceil(len(names) / columns)


def _lay_out(figure: Figure, height_in: float, legend_in: float) -> None:
    """Axes of a fixed size, above a legend of `legend_in`."""
    whole_in = TOP_IN + height_in + BOTTOM_IN + legend_in
    figure.set_size_inches(WIDTH_IN, whole_in)
    figure.subplots_adjust(
        left=LEFT_IN / WIDTH_IN,
        right=1 - RIGHT_IN / WIDTH_IN,
        top=1 - TOP_IN / whole_in,
        bottom=(BOTTOM_IN + legend_in) / whole_in,
    )
