"""`hybridlab checkpoint`: make random checkpoints, look at existing ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlab.cli.output import Json, emit, human_output, note, plain

checkpoint = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make or inspect a checkpoint.")


@checkpoint.command()
def make(
    out: Annotated[Path, typer.Argument(help="The folder to create; it must not exist.")],
    preset: Annotated[str, typer.Option(help="tiny, qwen3-7b-a1b or qwen3-30b-a3b.")],
    dtype: Annotated[str, typer.Option(help="fp8 (128 x 128 blocks) or bf16.")] = "fp8",
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same bytes.")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the preset has.")] = None,
    routing: Annotated[str, typer.Option(help="uniform, or skewed like olmoe or mixtral.")] = "uniform",
    json: Json = False,
) -> None:
    """Write a random checkpoint in Hugging Face layout."""
    import hybridlab as hl

    with human_output():
        hl.make_checkpoint(out, preset, dtype=dtype, seed=seed, layers=layers, routing=routing, progress=True)
    made = hl.open_checkpoint(out)
    if json:
        emit({"path": str(out), "num_bytes": made.num_bytes}, json)
    else:
        emit(f"{out}: {made.num_bytes / 1e9:.3f} GB", json)


@checkpoint.command()
def info(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder in Hugging Face layout.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every tensor: NaN codes, scales.")] = False,
    json: Json = False,
) -> None:
    """Say what a checkpoint holds; sizes, types and shapes are checked in any case."""
    import hybridlab as hl

    opened = hl.open_checkpoint(path)
    if verify:
        note(f"reading {opened.num_bytes / 1e9:.3f} GB")
        with human_output():
            opened.verify()
    facts = _facts(opened.spec) | {"num_bytes": opened.num_bytes, "verified": verify}
    if json:
        emit(facts | {"path": str(path)}, json)
        return
    width = max(map(len, facts))
    emit("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()), json)


def _facts(spec: Any) -> dict[str, Any]:
    facts = plain(spec)
    facts["kv_entries"] = {entry.name: list(entry.shape) for entry in spec.kv_entries}
    return facts | {"expert_bytes": spec.expert_bytes}
