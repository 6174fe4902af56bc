"""`hybridlab plan`, `hybridlab sweep` and `hybridlab results`: experiments before, while and after they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlab.cli.output import Json, emit, human_output, note
from hybridlab.cli.run import Drawn, draw

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.experiment import ExperimentResult

Config = Annotated[Path, typer.Argument(help="An experiment's YAML file.")]
Backend = Annotated[str, typer.Option(help="engine, or simulator: on the clock of a described machine.")]
ResultsDir = Annotated[Path | None, typer.Option(help="Default: the project's results.")]
Force = Annotated[bool, typer.Option("--force", help="Run again what results/ already holds.")]
Figures = Annotated[bool, typer.Option(help="Draw the figures that the config asks for.")]
Processes = Annotated[int, typer.Option(min=1, help="How many runs are simulated at a time.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run again what failed earlier.")]


MOST_ROWS = 50
"""Runs of a plan that are listed one by one."""


def plan(config: Config, results_dir: ResultsDir = None, json: Json = False) -> None:
    """Say how many runs an experiment has, how long they may take, and what memory and disk; starts nothing."""
    import hybridlab as hl

    with human_output():
        found = hl.plan(config, results_dir=results_dir)
    shown = _plan_table(found.frame)
    more = f"\n... and {len(shown) - MOST_ROWS} more; --json has all" if len(shown) > MOST_ROWS else ""
    emit(found.as_dict() if json else f"{found}\n{rows(shown.head(MOST_ROWS))}{more}", json)


def sweep(
    config: Config,
    retry_failed: RetryFailed = False,
    force: Force = False,
    results_dir: ResultsDir = None,
    backend: Backend = "engine",
    processes: Processes = 1,
    figures: Figures = True,
    json: Json = False,
) -> None:
    """Run what is missing of an experiment; killed or interrupted, it resumes when called again.

    Exit status 1 if some runs failed, or a figure could not be drawn.
    """
    import hybridlab as hl

    with human_output():
        if backend != "simulator":  # which takes no time worth planning
            note(str(hl.plan(config, force=force, retry_failed=retry_failed, results_dir=results_dir)))
        how: Any = {"force": force, "retry_failed": retry_failed, "results_dir": results_dir}
        result = hl.run(config, backend=backend, processes=processes, **how)
        drawn = draw(result, f"hybridlab sweep {config}") if figures else Drawn()
    emit(as_json(result, drawn) if json else rows(result.table), json)
    end(result, drawn)


def results(
    experiment: Annotated[str, typer.Argument(help="The experiment's name, or its YAML file.")],
    slo: Annotated[str | None, typer.Option(help="Goodput at another service level.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Show the runs that failed, too.")] = False,
    evidence: Annotated[list[str] | None, typer.Option(help="Kinds to take (may be repeated).")] = None,
    export: Annotated[Path | None, typer.Option(help="Write all of it to a .csv, .parquet or .tex file.")] = None,
    results_dir: ResultsDir = None,
    json: Json = False,
) -> None:
    """Print what the store holds of an experiment, one run a row."""
    import hybridlab as hl
    from hybridlab.summary_table import short_table

    with human_output():
        table = hl.results(experiment, results_dir, slo=slo, failed=failed, evidence=evidence)
        if export is not None:
            note(f"written {hl.export_results(table, export)}")
    if json or len(table):
        emit(records(table) if json else rows(short_table(table)), json)
    else:
        note(f"{experiment}: no runs to show")


def end(result: ExperimentResult, drawn: Drawn) -> None:
    """Name the folders of the runs, the figures, and what failed; exit status 1 if anything did."""
    for path in result.paths:
        note(f"run     {path}")
    for path in drawn.files:
        if path.suffix == ".png":
            note(f"figure  {path}")
    for run in result.failed:
        note(f"failed  {run.path}: {run.error}")
    for error in drawn.failed:
        note(f"failed  {error}")
    if result.failed or drawn.failed:
        raise typer.Exit(1)


def as_json(result: ExperimentResult, drawn: Drawn) -> dict[str, Any]:
    """Metrics per run, where the runs are, which failed, the files of the figures, and which were not drawn."""
    return {
        "summary": records(result.summary),
        "paths": [str(path) for path in result.paths],
        "failed": {run.run_id: run.error for run in result.failed},
        "figures": [str(path) for path in drawn.files],
        "figures_failed": list(drawn.failed),
    }


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data."""
    import json

    # pandas turns its own scalars and NaN into JSON's better than a loop over cells would
    return json.loads(table.to_json(orient="records") or "[]")


def rows(table: pd.DataFrame) -> str:
    """A table with one run a line."""
    return table.to_string(index=False, float_format=lambda x: f"{x:.4g}", max_colwidth=80)


def _plan_table(frame: pd.DataFrame) -> pd.DataFrame:
    from hybridlab.summary_table import axes_of

    shown = ["num_requests", "arrival_span_s", "work_s", "predicted_s", "memory_gib", "status"]
    return frame.loc[:, [*axes_of(frame), *shown]]
