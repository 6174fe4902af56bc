"""`hybridlab bench`: measurements that hold a kernel or a step against a yardstick taken in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlab.cli_output import Json, emit, human_output, note
from hybridlab.errors import ConfigError

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure against a yardstick.")

_DEFAULT_PRESET = "qwen3-7b-a1b"
# As in bench_shapes.LAYERS and bench_peers.PEERS, whose import would slow every command.
SHAPES = ("deepseek-v3", "qwen3-235b-a22b", "qwen3-30b-a3b", "qwen3-7b-a1b", "tiny")
PEERS = ("torch_bf16", "torch_fp8", "ggml_q8_0", "ggml_bf16", "kt_kernel")
_MOST_DIGITS = 9  # int() refuses thousands of them with an error of its own


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
    weight_layout: Annotated[
        str, typer.Option(help="rows (mapped from the checkpoint) or tiles (packed at load).")
    ] = "rows",
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps.")] = 32,
    json: Json = False,
) -> None:
    """Decode speed, bytes per token, and the fraction of the read bandwidth measured in between."""
    _one_source("decode", preset, checkpoint, layers)
    from hybridlab import bench as measure

    with human_output():
        result = measure.decode(
            preset or _DEFAULT_PRESET,
            checkpoint=checkpoint,
            layers=layers,
            depth=depth,
            batch=batch,
            threads=threads,
            weight_layout=weight_layout,  # type: ignore[arg-type]  # checked there
            steps=steps,
        )
    emit(result.as_dict() if json else str(result), json)


@bench.command()
def prefill(
    preset: Annotated[
        str | None, typer.Option(help=f"Random weights in a temporary folder. [default: {_DEFAULT_PRESET}]")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint folder instead of a preset.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the preset has.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt, computed in one step.")] = 512,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: every usable core.")] = None,
    weight_layout: Annotated[
        str, typer.Option(help="rows (mapped from the checkpoint) or tiles (packed at load).")
    ] = "rows",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 5,
    json: Json = False,
) -> None:
    """Prefill speed, and the fraction of the multiply ceiling measured in between."""
    _one_source("prefill", preset, checkpoint, layers)
    from hybridlab import bench_prefill as measure

    with human_output():
        result = measure.prefill(
            preset or _DEFAULT_PRESET,
            checkpoint=checkpoint,
            layers=layers,
            tokens=tokens,
            threads=threads,
            weight_layout=weight_layout,  # type: ignore[arg-type]  # checked there
            steps=steps,
        )
    emit(result.as_dict() if json else str(result), json)


@bench.command("kernels")
def bench_kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL", help=f"Shapes of this model; may be repeated: {', '.join(SHAPES)}. [default: all]"
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Tokens multiplied at once, M. [default: 1,2,4,...,4096]")] = None,
    threads: Annotated[str | None, typer.Option(help="Thread counts. [default: 1 and every usable core]")] = None,
    seconds: Annotated[float | None, typer.Option(help="For each point. [default: 0.25]")] = None,
    peers: Annotated[
        str | None, typer.Option(help=f"With commas, or none: {', '.join(PEERS)}. [default: all that run here]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, few M, torch alone: seconds.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write tables and figures into this folder.")] = None,
    json: Json = False,
) -> None:
    """Our CPU kernels and their peers against the read and multiply ceilings measured in between."""
    from hybridlab.bench_kernels import run

    row_counts, thread_counts = _numbers(rows, "--rows"), _numbers(threads, "--threads")
    if out is not None:
        import matplotlib

        matplotlib.use("Agg")  # a terminal has no window to draw into
        from hybridlab.figures.kernel_bench import check_folder

        check_folder(out)
    with human_output():
        result = run(
            shape or None,
            rows=row_counts,
            threads=thread_counts,
            seconds=seconds,
            peers=None if peers is None else () if peers == "none" else peers.split(","),
            quick=quick,
        )
        if out is not None:
            from hybridlab.figures.kernel_bench import save_kernel_bench

            given = {"--rows": rows, "--threads": threads, "--seconds": seconds, "--peers": peers}
            words = ["hybridlab bench kernels", *(["--quick"] if quick else []), *(f"--shape {s}" for s in shape or ())]
            words += [f"{name} {value}" for name, value in given.items() if value is not None]
            for path in save_kernel_bench(result, out, " ".join([*words, "--out DIR"])):
                note(str(path))
    emit(result.as_dict() if json else str(result), json)
    if not result.complete:
        raise typer.Exit(130)


def _one_source(command: str, preset: str | None, checkpoint: Path | None, layers: int | None) -> None:
    if preset is not None and checkpoint is not None:
        raise ConfigError(f"bench {command}: give --preset or --checkpoint, not both")
    if checkpoint is not None and layers is not None:
        raise ConfigError(f"bench {command}: --layers cuts a preset; a checkpoint is taken as it is")


def _numbers(text: str | None, option: str) -> list[int] | None:
    """Parse "1,2,4"."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) <= _MOST_DIGITS):
            raise ConfigError(f"{option}: expected numbers such as 1,2,4, got {word!r:.40}")
    return [int(word) for word in words]
