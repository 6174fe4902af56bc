"""The command line: `hybridlab COMMAND`. Results go to stdout, everything else to stderr.

Exit status: 0 done, 1 some runs failed or a figure could not be drawn, 2 bad input (one line on stderr), 130
interrupted. With `--json`, stdout holds one JSON value and nothing else. Packages are imported inside the commands, so
that `hybridlab --help` answers at once.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hybridlab.cli.bench import bench
from hybridlab.cli.calibrate import calibrate
from hybridlab.cli.checkpoint import checkpoint
from hybridlab.cli.figures import figures
from hybridlab.cli.output import Json, emit, human_output, note
from hybridlab.cli.sweep import Backend, Config, Figures, Force, ResultsDir, RetryFailed, plan, results, sweep
from hybridlab.cli.tune import tune
from hybridlab.cli.weights import weights
from hybridlab.errors import HybridlabError, RequestError

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own click and exports only this subclass


def _one_line(error: Any) -> Exception:
    if type(error).__name__ == "NoArgsIsHelpError":
        return error  # not a mistake: it shows the help
    message = " ".join(error.format_message().split()).rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "hybridlab"
    note(f"hybridlab: error: {message} (see {path} --help)")
    return typer.Exit(2)


class _OneLineErrors(TyperGroup):
    """Turns what a user can cause into one line and an exit status; every command runs inside `invoke`."""

    def make_context(self, *args, **extra):
        try:
            return super().make_context(*args, **extra)
        except _UsageError as error:
            raise _one_line(error) from None

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            raise _one_line(error) from None
        except BrokenPipeError:
            raise  # typer ends quietly: the reader of our output has gone
        except (HybridlabError, OSError) as error:
            note(f"hybridlab: error: {' '.join(str(error).split())}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            note("hybridlab: interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Mixture-of-Experts inference with CPU and GPU together: experiments, checkpoints, measurements.",
)
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(bench, name="bench")
app.add_typer(weights, name="weights")
app.command()(calibrate)
app.command()(figures)
app.command()(plan)
app.command()(sweep)
app.command()(results)
app.command()(tune)


@app.command()
def doctor(
    json: Json = False,
    probe: Annotated[bool, typer.Option(help="Measure memory reads and the link (seconds, 1 GiB).")] = True,
    release_weights: Annotated[
        bool, typer.Option("--release-weights", help="Let go of all held weights first.")
    ] = False,
) -> None:
    """Say what this machine can do, what is missing and what cannot be tested on it."""
    from hybridlab.hardware import doctor as examine

    if release_weights:
        from hybridlab.weights_held import release

        for held in release():
            note(f"released {held}")
    report = examine(probe=probe)
    emit(report.as_dict() if json else str(report), json)


@app.command()
def run(
    config: Config,
    force: Force = False,
    retry_failed: RetryFailed = False,
    results_dir: ResultsDir = None,
    backend: Backend = "engine",
    figures: Figures = True,
    json: Json = False,
) -> None:
    """Serve an experiment's requests, print the metrics, keep the runs and draw its figures."""
    import hybridlab as hl
    from hybridlab.cli.run import Drawn, draw, table
    from hybridlab.cli.sweep import as_json, end

    with human_output():
        result = hl.run(config, backend=backend, force=force, retry_failed=retry_failed, results_dir=results_dir)
        drawn = draw(result, f"hybridlab run {config}") if figures else Drawn()
    emit(as_json(result, drawn) if json else table(result), json)
    end(result, drawn)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder in Hugging Face layout.")],
    tokens: Annotated[str | None, typer.Option(help="The prompt as token ids: 1,2,3")] = None,
    text: Annotated[str | None, typer.Option(help="The prompt as text (needs tokenizer.json).")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 16,
    precision: Annotated[str, typer.Option(help="exact (float64, for checking) or bf16.")] = "bf16",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: every usable core.")] = None,
    json: Json = False,
) -> None:
    """Continue one prompt, given as token ids or as text."""
    if (tokens is None) == (text is None):
        raise RequestError("generate: give the prompt as --tokens or as --text, one of the two")
    if not math.isfinite(temperature):
        raise RequestError(f"--temperature: expected a finite number from 0, got {temperature}")
    prompt = text if text is not None else _token_ids(tokens or "")
    import hybridlab as hl

    with human_output(), hl.load(checkpoint, precision=precision, threads=threads, quiet=True) as engine:
        # A request that cannot be served is refused here, before anything else is said.
        pieces = engine.stream(prompt, max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        note(f"hybridlab: {engine.memory}")
        output = list(pieces)
    if json:
        emit({"tokens": output} if text is None else {"text": "".join(map(str, output))}, json)
    else:
        emit(",".join(map(str, output)) if text is None else "".join(map(str, output)), json)


def _token_ids(text: str) -> list[int]:
    """Parse "1,2,3"; the engine checks the ids against the vocabulary."""
    ids = []
    for position, word in enumerate(text.split(",")):
        word = word.strip()
        # isdigit alone would accept digits of other scripts and superscripts
        if not (word.isascii() and word.isdigit()):
            raise RequestError(f"--tokens: expected ids such as 1,2,3, got {word!r} at position {position}")
        ids.append(int(word))
    return ids


def main() -> None:
    """Entry point of the `hybridlab` script."""
    app(prog_name="hybridlab")
