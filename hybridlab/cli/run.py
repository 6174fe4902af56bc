"""What `hybridlab run` and `hybridlab sweep` make of a result: tables, JSON, and figures beside the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlab.cli.output import note

if TYPE_CHECKING:
    from hybridlab.experiment import ExperimentResult


@dataclass(frozen=True)
class Drawn:
    """The files of the figures that a config asks for, and a line for each figure that could not be drawn."""

    files: Sequence[Path] = ()
    failed: Sequence[str] = ()


def draw(result: ExperimentResult, command: str) -> Drawn:
    """Draw the config's figures into the experiment's folder; one that cannot be drawn stops no other."""
    if not result.paths:
        return Drawn()
    import matplotlib

    matplotlib.use("Agg")  # a terminal has no window to draw into
    from hybridlab.figures.draw import draw_each
    from hybridlab.figures.tables import Tables

    tables = Tables(result.summary, result.requests, result.spans)
    files, errors = draw_each(result.config.figures, tables, Path(result.paths[0]).parent, command)
    if "figures" in result.config.model_fields_set:
        return Drawn(files, errors)
    for error in errors:  # of a figure that nobody asked for
        note(f"hybridlab: {error}")
    return Drawn(files)


def table(result: ExperimentResult) -> str:
    """The summary with one metric a line and one run a column: the metrics are many, the runs few."""
    return result.table.T.to_string(header=False, float_format=lambda x: f"{x:.4g}")
