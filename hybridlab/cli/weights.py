"""`hybridlab weights`: packed weights that a process keeps in memory for the next notebook kernel."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hybridlab.cli.output import Json, emit, human_output, note

weights = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Keep packed weights in memory between processes."
)


@weights.command()
def hold(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder in Hugging Face layout.")],
    idle: Annotated[str, typer.Option(help="End after so long without use: 90s, 30m, 2h.")] = "30m",
    weight_layout: Annotated[
        str, typer.Option(help="tiles, for the CPU, or blocks: experts as device cuda pins them.")
    ] = "tiles",
    threads: Annotated[int | None, typer.Option(min=1, help="To fill them. Default: every usable core.")] = None,
    json: Json = False,
) -> None:
    """Pack weights once and keep them for whoever loads them next, in a process that ends by itself."""
    from hybridlab.hardware import detect
    from hybridlab.weights_held import parse_idle
    from hybridlab.weights_sharing import hold, pages_note

    idle_s = parse_idle(idle)
    with human_output():
        held = hold(path, idle_s=idle_s, layout=weight_layout, threads=threads or detect(gpu=False).num_cores)
        if text := pages_note():
            note(f"hybridlab: {text}")
    emit(asdict(held) if json else str(held), json)


@weights.command("list")
def list_(json: Json = False) -> None:
    """Say which weights are held, by which process, and for how long."""
    from hybridlab.weights_held import list_held

    found = list_held()
    emit([asdict(held) for held in found] if json else "\n".join(map(str, found)) or "no weights are held", json)


@weights.command()
def release(
    path: Annotated[Path | None, typer.Argument(help="A checkpoint folder. Default: all that are held.")] = None,
    json: Json = False,
) -> None:
    """Let go of held weights; processes that use them go on, and their memory is freed after the last one."""
    from hybridlab.errors import WeightsError
    from hybridlab.weights_held import release

    ended = release(path)
    if path is not None and not ended:
        raise WeightsError(f"{path}: no weights of it are held (hybridlab weights list)")
    emit(
        [asdict(held) for held in ended] if json else "\n".join(f"released {h}" for h in ended) or "nothing held", json
    )
