"""`hybridlab calibrate`: from how many tokens which path of the experts is faster, on this machine for this model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlab.cli.output import Json, emit, human_output, note


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder in Hugging Face layout.")],
    device: Annotated[
        str, typer.Option(help="cuda, or emulated: cores in a GPU's place; with --profile also cpu.")
    ] = "cuda",
    layers: Annotated[int, typer.Option(min=1, help="MoE layers to measure; the others are like them.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 8192,
    requests: Annotated[
        list[int] | None, typer.Option(min=2, help="That decode together; repeatable. [default: 2, 4, 6, 8, 16, 32]")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Tokens already in each request's cache.")] = 1024,
    repeats: Annotated[int, typer.Option(min=2, help="Steps a point, at most.")] = 5,
    seconds: Annotated[float, typer.Option(help="For the steps; longer prompts are left out then.")] = 90.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: every usable core.")] = None,
    accelerator_threads: Annotated[
        int | None, typer.Option(min=1, help="Of these, in the GPU's place. [default: half]")
    ] = None,
    link_gb_s: Annotated[float | None, typer.Option(help="Cap of an emulated link, in 1e9 bytes/s.")] = None,
    vram_gb: Annotated[float | None, typer.Option(help="GPU memory to use, in 1e9 bytes.")] = None,
    precision: Annotated[str, typer.Option(help="As the model will be loaded.")] = "bf16",
    weight_layout: Annotated[str, typer.Option(help="rows or tiles, as the model will be loaded.")] = "rows",
    save: Annotated[bool, typer.Option(help="Keep the result where loading finds it.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write calibration.json and figures into this folder, too.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measure single ops for the simulator instead, and write this .toml.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure from how many tokens streamed experts, or a share of them, beat the CPU's, and when dual batch pays."""
    if profile is not None:
        lanes: dict[str, Any] = {"threads": threads, "accelerator_threads": accelerator_threads}
        _measure_profile(checkpoint, device, layers, profile, lanes, link_gb_s, vram_gb, json)
        return
    if out is not None:
        import matplotlib

        matplotlib.use("Agg")  # a terminal has no window to draw into
        from hybridlab.figures.kernel_bench import check_folder

        check_folder(out)
    from hybridlab.calibration.files import calibration_path
    from hybridlab.calibration.steps import REQUESTS
    from hybridlab.calibration.steps import calibrate as measure

    with human_output():
        found = measure(
            checkpoint,
            device,
            layers=layers,
            max_tokens=max_tokens,
            requests=requests or REQUESTS,
            depth=depth,
            repeats=repeats,
            seconds=seconds,
            threads=threads,
            accelerator_threads=accelerator_threads,
            link_gb_s=link_gb_s,
            vram_gb=vram_gb,
            precision=precision,
            weight_layout=weight_layout,  # type: ignore[arg-type]  # checked there
            save=save,
        )
        if save and found.complete:
            note(f"kept in {calibration_path(found.subject)}")
        if out is not None:
            from hybridlab.figures.crossover import save_calibration

            for path in save_calibration(found, out, f"hybridlab calibrate {checkpoint} --device {device} --out DIR"):
                note(str(path))
    emit(found.as_dict() if json else str(found), json)
    if not found.complete:
        raise typer.Exit(130)


def _measure_profile(
    checkpoint: Path,
    device: str,
    layers: int,
    file: Path,
    lanes: dict[str, Any],
    link_gb_s: float | None,
    vram_gb: float | None,
    json: bool,
) -> None:
    from hybridlab.calibration.profile import measure_profile, write_profile
    from hybridlab.errors import ConfigError
    from hybridlab.simulator.machine import profile_dict

    with human_output():
        if file.suffix != ".toml":
            raise ConfigError(f"--profile {file}: expected a name that ends in .toml")
        found = measure_profile(checkpoint, device, layers=layers, link_gb_s=link_gb_s, vram_gb=vram_gb, **lanes)
        note(f"wrote {write_profile(found, file)}")
    emit(profile_dict(found) if json else str(found), json)
