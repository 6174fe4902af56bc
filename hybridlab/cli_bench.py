"""`hybridlab bench`: measurements that hold a kernel or a step against a yardstick taken in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlab.cli_output import Json, emit, human_output
from hybridlab.errors import ConfigError

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure against a yardstick.")

_DEFAULT_PRESET = "qwen3-7b-a1b"


@bench.callback()
def _group() -> None:
    # With a single command typer would drop its name; a callback keeps `bench decode`.
    pass


@bench.command()
def decode(
    preset: Annotated[
        str | None, typer.Option(help=f"Random weights in a temporary folder. [default: {_DEFAULT_PRESET}]")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint folder instead of a preset.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the preset has.")] = None,
    depth: Annotated[int, typer.Option(min=0, help="Tokens already in each request's cache.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Requests that decode together.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: every usable core.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps.")] = 32,
    json: Json = False,
) -> None:
    """Decode speed, bytes per token, and the fraction of the read bandwidth measured in between."""
    if preset is not None and checkpoint is not None:
        raise ConfigError("bench decode: give --preset or --checkpoint, not both")
    if checkpoint is not None and layers is not None:
        raise ConfigError("bench decode: --layers cuts a preset; a checkpoint is taken as it is")
    from hybridlab import bench as measure

    with human_output():
        result = measure.decode(
            preset or _DEFAULT_PRESET,
            checkpoint=checkpoint,
            layers=layers,
            depth=depth,
            batch=batch,
            threads=threads,
            steps=steps,
        )
    emit(result.as_dict() if json else str(result), json)
