"""What `hybridlab run` and `hybridlab sweep` make of a result: tables, JSON, and figures beside the runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hybridlab.cli_output import note
from hybridlab.errors import ConfigError

if TYPE_CHECKING:
    from hybridlab.experiment import ExperimentResult


def draw(result: ExperimentResult, command: str) -> list[Path]:
    """Draw the config's figures into the experiment's folder; what cannot be drawn is a note, for the runs are kept."""
    if not result.paths:
        return []
    import matplotlib

    matplotlib.use("Agg")  # a terminal has no window to draw into
    from hybridlab.figures import draw_figures

    folder = Path(result.paths[0]).parent
    try:
        return draw_figures(result.config, result.summary, result.requests, result.spans, folder, command)
    except ConfigError as error:
        note(f"hybridlab: {error}")
        return []


def table(result: ExperimentResult) -> str:
    """The summary with one metric a line and one run a column: the metrics are many, the runs few."""
    return result.table.T.to_string(header=False, float_format=lambda x: f"{x:.4g}")
