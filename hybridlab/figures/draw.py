"""The figures that an experiment's config asks for, drawn and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab import __version__
from hybridlab.errors import ConfigError
from hybridlab.figures.latency_cdf import latency_cdf
from hybridlab.figures.load_curves import load_curves
from hybridlab.figures.save import save_figure
from hybridlab.figures.style import ONE_COLUMN_IN, TWO_COLUMNS_IN
from hybridlab.figures.tables import Tables
from hybridlab.figures.timeline import timeline
from hybridlab.figures.ttft_prompt_length import ttft_prompt_length
from hybridlab.figures.ttft_throughput import ttft_throughput

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.config import ExperimentConfig
    from hybridlab.figures_config import FigureConfig

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "ttft_throughput": ttft_throughput,
    "load_curves": load_curves,
    "ttft_prompt_length": ttft_prompt_length,
    "latency_cdf": latency_cdf,
    "timeline": timeline,
}
WIDTHS_IN = {"one_column": ONE_COLUMN_IN, "two_columns": TWO_COLUMNS_IN}


def draw_figures(
    config: ExperimentConfig,
    summary: pd.DataFrame,
    requests: pd.DataFrame,
    spans: pd.DataFrame,
    folder: Path,
    command: str,
) -> list[Path]:
    """Draw `config.figures` from the tables of a result into `folder`; returns every file, sidecars included.

    `command` goes into the files. A program without a window calls `matplotlib.use("Agg")` first. A figure that
    cannot be drawn stops no other; then raises ConfigError naming the first.
    """
    return draw_all(config.figures, Tables(summary, requests, spans), folder, command)


def draw_all(
    figures: Sequence[FigureConfig], tables: Tables, folder: Path, command: str, version: str = __version__
) -> list[Path]:
    """Like `draw_figures`, for entries and tables from elsewhere; `version` of hybridlab is told in the files."""
    written, errors = draw_each(figures, tables, folder, command, version)
    if errors:
        more = f" (and {len(errors) - 1} more figures)" if len(errors) > 1 else ""
        raise ConfigError(errors[0] + more)
    return written


def draw_each(
    figures: Sequence[FigureConfig], tables: Tables, folder: Path, command: str, version: str = __version__
) -> tuple[list[Path], list[str]]:
    """The files of the figures that could be drawn, and a line for each that could not."""
    import matplotlib.pyplot as plt

    written: list[Path] = []
    errors: list[str] = []
    for figure in figures:
        open_before = set(plt.get_fignums())
        try:
            drawn = FUNCTIONS[figure.figure](tables, **_keywords(figure))
            written += save_figure(drawn, folder / figure.stem, command=command, version=version).values()
        except ConfigError as error:
            errors.append(f"figures: {figure.stem}: {error}")
        finally:
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)
    return written, errors


def _keywords(figure: FigureConfig) -> dict[str, Any]:
    width = {"width_in": WIDTHS_IN[figure.width]} if figure.width else {}
    return figure.arguments() | width
