"""`hybridlab tune`: the best settings of an experiment's sweep, searched on the simulator and run on the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlab.cli.output import Json, emit, human_output, note
from hybridlab.cli.sweep import Config, ResultsDir, records


def tune(
    config: Config,
    output: Annotated[Path | None, typer.Option(help="Write the best config here, as YAML.")] = None,
    most_runs: Annotated[int, typer.Option(min=0, max=10, help="Of the engine; 0 predicts alone.")] = 10,
    most_simulated: Annotated[int, typer.Option(min=1, help="Candidates.")] = 400,
    processes: Annotated[int, typer.Option(min=1, help="How many are simulated at a time.")] = 1,
    results_dir: ResultsDir = None,
    json: Json = False,
) -> None:
    """Choose from a config's sweep (without one: from the package's strategies) what gives the most goodput at its SLO.

    Candidates are simulated, the best of them run; exit status 130 if it was interrupted with something to show.
    """
    from hybridlab.tuning.search import tune_config

    with human_output():
        found = tune_config(
            config, most_runs=most_runs, most_simulated=most_simulated, processes=processes, results_dir=results_dir
        )
        if output is not None:
            note(f"written {found.save(output)}")
    told = {"config": found.config.to_dict(), "candidates": records(found.table), "size": found.size}
    emit({**told, "runs": found.runs, "complete": found.complete} if json else str(found), json)
    if not found.complete:
        raise typer.Exit(130)
