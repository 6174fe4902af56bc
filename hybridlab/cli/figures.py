"""`hybridlab figures`: rebuild the published figures, or publish those of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlab.cli.output import Json, emit, human_output
from hybridlab.errors import ConfigError


def figures(
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="[QUESTION]...", help="Folders of results/paper; default: all.")
    ] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Take the stored runs of experiments/QUESTION.")] = False,
    results_dir: Annotated[Path | None, typer.Option(help="Default: the project's results.")] = None,
    json: Json = False,
) -> None:
    """Rebuild the figures of results/paper from the tables there; --publish writes tables and figures anew."""
    asked = questions or []
    if publish and not asked:
        raise ConfigError("figures --publish: name the question, a folder of experiments/")
    import matplotlib

    matplotlib.use("Agg")  # a terminal has no window to draw into
    from hybridlab.figures.publish import publish as publish_one
    from hybridlab.figures.publish import rebuild

    with human_output():
        if publish:
            written = [path for question in asked for path in publish_one(question, results_dir)]
        else:
            written = rebuild(asked, results_dir)
    emit({"files": [str(path) for path in written]} if json else "\n".join(map(str, written)), json)
