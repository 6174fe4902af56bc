"""What `hybridlab run` makes of a result: a table, JSON, and the figure beside the runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab import cli_sweep

if TYPE_CHECKING:
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
    """Metrics per run, where the runs are, which failed, and the figure."""
    return {**cli_sweep.as_json(result), "figure": None if figure is None else str(figure)}
