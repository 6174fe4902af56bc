"""What `hybridlab run` makes of a result: a table, JSON, and the figure beside the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.experiment import ExperimentResult

_FIGURE = "ttft_throughput.png"


def draw(result: ExperimentResult, config: Path) -> Path | None:
    """Draw TTFT against throughput into the experiment's folder; None if no run is there to draw."""
    if not result.paths:
        return None
    import matplotlib

    matplotlib.use("Agg")  # a terminal has no window to draw into
    from hybridlab.figures import save_figure, ttft_throughput

    path = Path(result.paths[0]).parent / _FIGURE
    ax = ttft_throughput(result.summary)
    run_ids = [Path(run).name for run in result.paths]
    save_figure(ax, path, run_ids=run_ids, command=f"hybridlab run {config}")
    return path


def table(result: ExperimentResult) -> str:
    """The summary with one metric a line and one run a column: the metrics are many, the runs few."""
    return result.table.T.to_string(header=False, float_format=lambda x: f"{x:.4g}")


def as_json(result: ExperimentResult, figure: Path | None) -> dict[str, Any]:
    """Metrics per run, where the runs are, and the figure."""
    return {
        "summary": _records(result.summary),
        "paths": [str(path) for path in result.paths],
        "figure": None if figure is None else str(figure),
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    # pandas turns its own scalars and NaN into JSON's better than a loop over cells would
    return json.loads(frame.to_json(orient="records") or "[]")
