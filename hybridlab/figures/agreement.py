"""Predicted beside measured, and where very many predicted configurations lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from hybridlab.figures.style import GREY, ONE_COLUMN_IN, cycle_color, log_axis, new_axes, style

if TYPE_CHECKING:
    import pandas as pd

BAND = 0.10
NAMES = {"step_s": "decode step", "ttft_s": "TTFT", "tpot_s": "TPOT"}
MARKERS = {"step_s": "s", "ttft_s": "o", "tpot_s": "^"}


def predicted_measured(df: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Each pair of columns `predicted_X` and `measured_X` of `NAMES` as points, in seconds; the band is +-10%."""
    with style():
        ax = ax if ax is not None else new_axes(ONE_COLUMN_IN, 3.0)
        for number, (name, label) in enumerate(NAMES.items()):
            x, y = (df[f"{side}_{name}"].to_numpy(float) for side in ("measured", "predicted"))
            error = float(np.median(np.abs(y / x - 1)))
            ax.plot(
                x, y, MARKERS[name], ms=3.5, mew=0.8, mfc="none", color=cycle_color(number),
                label=f"{label}, {len(x)} configurations: {error:.1%}",
            )  # fmt: skip
        columns = [df[f"{side}_{name}"].to_numpy(float) for side in ("measured", "predicted") for name in NAMES]
        low, high = min(map(np.min, columns)) / 1.3, max(map(np.max, columns)) * 1.3
        ends = np.array([low, high])
        ax.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=GREY, alpha=0.15, lw=0)
        ax.plot(ends, ends, color=GREY, lw=0.7)
        ax.set(xlim=(low, high), ylim=(low, high), xlabel="measured (s)", ylabel="predicted (s)")
        log_axis(ax, "x")
        log_axis(ax, "y")
        ax.legend(loc="upper left", title="median error", alignment="left", title_fontsize=7)
        return ax


def configuration_map(df: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """TTFT (`ttft_s`) against throughput (`output_tokens_per_s`) of very many configurations, how densely they lie,
    and for each `strategy` the best that any of them reaches. All are `evidence` "simulated"."""
    with style():
        ax = ax if ax is not None else new_axes(ONE_COLUMN_IN, 3.0)
        x, y = df["output_tokens_per_s"].to_numpy(float), df["ttft_s"].to_numpy(float)
        cells = ax.hexbin(x, y, xscale="log", yscale="log", gridsize=55, bins="log", cmap="Greys", mincnt=1, lw=0.1)
        cells.set_rasterized(True)
        for number, (strategy, group) in enumerate(df.groupby("strategy", sort=False)):
            order = group.sort_values("output_tokens_per_s", ascending=False)
            best = order["ttft_s"].cummin()
            front = order[order["ttft_s"] <= best]
            ax.step(
                front["output_tokens_per_s"], front["ttft_s"], where="post", color=cycle_color(number), label=strategy
            )
        ax.set(xlabel="decode throughput (tokens/s)", ylabel="TTFT (s)")
        log_axis(ax, "x")
        log_axis(ax, "y")
        ax.legend(loc="upper left", title=f"{len(df):,} simulated configurations; fronts of", alignment="left",
                  title_fontsize=7)  # fmt: skip
        return ax
