"""Predicted beside measured, and where very many predicted configurations lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.errors import ConfigError
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, TWO_COLUMNS_IN, cycle_color, log_axis, new_axes, style

if TYPE_CHECKING:
    import pandas as pd

BAND = 0.10
NAMES = {"step_s": "decode step", "ttft_s": "TTFT", "tpot_s": "TPOT"}
MARKERS = {"step_s": "s", "ttft_s": "o", "tpot_s": "^"}


def predicted_measured(df: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Each pair of columns `predicted_X` and `measured_X` of `NAMES` as points, in seconds; the band is +-10%.

    Raises ConfigError naming a column that is missing or has a value that is no finite number above 0.
    """
    _check(df, [f"{side}_{name}" for name in NAMES for side in ("measured", "predicted")], "predicted_measured")
    with style():
        ax = ax if ax is not None else new_axes(ONE_COLUMN_IN, 3.0)
        for number, (name, label) in enumerate(NAMES.items()):
            x, y = (df[f"{side}_{name}"].to_numpy(float) for side in ("measured", "predicted"))
            error = float(np.median(np.abs(y / x - 1)))
            ax.plot(
                x, y, MARKERS[name], ms=3.5, mew=0.8, mfc="none", color=cycle_color(number),
                label=f"{label}: {error:.1%}",
            )  # fmt: skip
        columns = [df[f"{side}_{name}"].to_numpy(float) for side in ("measured", "predicted") for name in NAMES]
        low, high = min(map(np.min, columns)) / 1.3, max(map(np.max, columns)) * 1.3
        ends = np.array([low, high])
        ax.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=GREY, alpha=0.15, lw=0)
        ax.plot(ends, ends, color=GREY, lw=0.7)
        ax.set(xlim=(low, high), ylim=(low, high), xlabel="measured (s)", ylabel="predicted (s)")
        log_axis(ax, "x")
        log_axis(ax, "y")
        ax.legend(loc="upper left", title=f"median error, {len(df)} configurations", alignment="left", title_fontsize=7)
        return ax


def configuration_map(df: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Each `machine` of very many simulated ones as a point, TTFT (`ttft_s`) against `output_tokens_per_s`, coloured by
    the `strategy` that is the fastest there: the least TTFT, among these the most throughput.

    Raises ConfigError as `predicted_measured` does.
    """
    _check(df, ["ttft_s", "output_tokens_per_s"], "configuration_map", ["machine", "strategy"])
    with style():
        ax = ax if ax is not None else new_axes(TWO_COLUMNS_IN * 0.7, 2.9)
        best = df.sort_values(["ttft_s", "output_tokens_per_s"], ascending=[True, False]).groupby("machine").head(1)
        best = best.sample(frac=1.0, random_state=0)  # so that no strategy hides another
        x, y = best["output_tokens_per_s"].to_numpy(float), best["ttft_s"].to_numpy(float)
        names = list(dict.fromkeys(df["strategy"]))
        number = np.array([names.index(name) for name in best["strategy"]])
        colors = np.array([cycle_color(i) for i in range(len(names))])
        ax.scatter(x, y, s=1.2, c=colors[number], lw=0, rasterized=True)
        ax.set(
            xlim=(x.min() / 1.1, x.max() * 1.1), ylim=(y.min() / 1.15, y.max() * 1.15),
            xlabel="decode throughput (tokens/s)", ylabel="TTFT (s)",
        )  # fmt: skip
        log_axis(ax, "x")
        log_axis(ax, "y")
        handles = [
            Line2D([], [], ls="", marker="o", ms=4, color=color, label=f"{name}: {np.mean(number == i):.0%}")
            for i, (name, color) in enumerate(zip(names, colors, strict=True))
        ]
        title = f"{len(df):,} configurations, simulated:\nthe fastest on each of {len(best):,} machines"
        ax.legend(
            handles=handles, title=title, title_fontsize=7, alignment="left", loc="center left", bbox_to_anchor=(1, 0.5)
        )
        return ax


def _check(df: pd.DataFrame, columns: Sequence[str], what: str, others: Sequence[str] = ()) -> None:
    if missing := [name for name in (*columns, *others) if name not in df.columns]:
        raise ConfigError(f"{what}: no column {missing[0]!r}")
    if not len(df):
        raise ConfigError(f"{what}: no rows to draw")
    for name in columns:
        values = df[name].to_numpy(float)
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            raise ConfigError(f"{what}: {name} is {values[wrong][0]} in a row, expected finite numbers above 0")
