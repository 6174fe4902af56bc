"""`hybridlab bench`: measurements that hold a kernel or a step against a yardstick taken in the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlab.cli.output import Json, emit, human_output, note
from hybridlab.errors import ConfigError

if TYPE_CHECKING:
    from hybridlab.bench.devices import DeviceBench

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure against a yardstick.")

_DEFAULT_PRESET = "qwen3-7b-a1b"
# As in bench_shapes.LAYERS, bench_peers.PEERS and bench_prefill_devices, whose import would slow every command.
SHAPES = ("deepseek-v3", "qwen3-235b-a22b", "qwen3-30b-a3b", "qwen3-7b-a1b", "tiny")
PEERS = ("torch_bf16", "torch_fp8", "ggml_q8_0", "ggml_bf16", "kt_kernel")
VARIANTS = (
    "all resident",
    "ring of 2 layers",
    "sequential",
    "ring of 2 x half a layer",
    "one buffer",
    "CPU experts",
)
_MOST_DIGITS = 9  # int() refuses thousands of them with an error of its own


@bench.callback()
def _group() -> None:
    # With a single command typer would drop its name; a callback keeps `bench decode`.
    pass


Preset = Annotated[str | None, typer.Option(help=f"Random weights in a temporary folder. [default: {_DEFAULT_PRESET}]")]
Checkpoint = Annotated[Path | None, typer.Option(help="A checkpoint folder instead of a preset.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Fewer layers than the preset has.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: every usable core.")]
Layout = Annotated[str, typer.Option(help="rows (mapped from the checkpoint) or tiles (packed at load).")]
Device = Annotated[str | None, typer.Option(help="cuda or emulated: experts on the host or streamed. [default: cpu]")]
VramGb = Annotated[float | None, typer.Option(help="On a device: its memory to use, in 1e9 bytes.")]
LinkGbS = Annotated[float | None, typer.Option(help="Emulated: cap of the link. [default: none]")]
AcceleratorThreads = Annotated[int | None, typer.Option(help="Emulated: cores in a GPU's place. [default: half]")]
Out = Annotated[Path | None, typer.Option(help="On a device: append rows to a file in this folder as they are made.")]


@bench.command()
def decode(
    preset: Preset = None,
    checkpoint: Checkpoint = None,
    layers: Layers = None,
    depth: Annotated[
        int | None, typer.Option(min=0, help="Tokens already in each request's cache. [default: 0; on a device 1024]")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Requests that decode together. [default: 1; on a device 1,2,4,6,8]")
    ] = None,
    threads: Threads = None,
    weight_layout: Layout = "rows",
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps.")] = 32,
    device: Device = None,
    beside_cpu: Annotated[bool, typer.Option("--beside-cpu", help="On a device: the same on the CPU alone.")] = False,
    vram_gb: VramGb = None,
    link_gb_s: LinkGbS = None,
    accelerator_threads: AcceleratorThreads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Decode speed, bytes per token, and the fraction of the read bandwidth measured in between.

    On a device: plain batch and dual batch of the same requests in turns, time per token of a user beside the
    throughput, and the bound from the same steps' ops.
    """
    _one_source("decode", preset, checkpoint, layers)
    batches = _numbers(batch, "bench decode: --batch")
    common = {"checkpoint": checkpoint, "layers": layers, "threads": threads, "weight_layout": weight_layout}
    on_device = {"vram_gb": vram_gb, "link_gb_s": link_gb_s, "accelerator_threads": accelerator_threads, "out": out}
    if device is not None and device not in ("cpu", "auto"):
        from hybridlab.bench import decode_devices as devices

        given = {"batch": batches, "depth": depth}
        given = {name: value for name, value in given.items() if value is not None}
        chosen = {**common, **on_device, **given, "device": device, "beside_cpu": beside_cpu, "steps": steps}
        _emit_devices(partial(devices.decode, preset or _DEFAULT_PRESET, **chosen), json)
        return
    _for_devices("decode", {**on_device, "beside_cpu": beside_cpu or None})
    from hybridlab.bench import decode as measure

    one = _single(batches, "bench decode: --batch", 1)
    with human_output():
        result = measure.decode(preset or _DEFAULT_PRESET, **common, depth=depth or 0, batch=one, steps=steps)
    emit(result.as_dict() if json else str(result), json)


@bench.command()
def prefill(
    preset: Preset = None,
    checkpoint: Checkpoint = None,
    layers: Layers = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Length of the prompt, computed in one step. [default: 512; on a device 512, 1024, ... 32768 or what "
            "it can do]"
        ),
    ] = None,
    threads: Threads = None,
    weight_layout: Layout = "rows",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 5,
    device: Device = None,
    variants: Annotated[
        str | None, typer.Option(help=f"On a device, with commas: {', '.join(VARIANTS)}. [default: all]")
    ] = None,
    vram_gb: VramGb = None,
    link_gb_s: LinkGbS = None,
    accelerator_threads: AcceleratorThreads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Prefill speed, and the fraction of the multiply ceiling measured in between.

    On a device: prompts with experts streamed in several ways, beside the link alone and all experts resident.
    """
    _one_source("prefill", preset, checkpoint, layers)
    lengths = _numbers(tokens, "bench prefill: --tokens")
    common = {"checkpoint": checkpoint, "layers": layers, "threads": threads, "weight_layout": weight_layout}
    on_device = {"vram_gb": vram_gb, "link_gb_s": link_gb_s, "accelerator_threads": accelerator_threads, "out": out}
    if device is not None and device not in ("cpu", "auto"):
        from hybridlab.bench import prefill_devices as devices

        names = None if variants is None else [name.strip() for name in variants.split(",")]
        chosen = {**common, **on_device, "device": device, "tokens": lengths, "variants": names, "steps": steps}
        _emit_devices(partial(devices.prefill, preset or _DEFAULT_PRESET, **chosen), json)
        return
    _for_devices("prefill", {**on_device, "variants": variants})
    from hybridlab.bench import prefill as measure

    one = _single(lengths, "bench prefill: --tokens", 512)
    with human_output():
        result = measure.prefill(preset or _DEFAULT_PRESET, **common, tokens=one, steps=steps)
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
    from hybridlab.bench.kernels import run

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


@bench.command("simulator")
def bench_simulator(
    configurations: Annotated[int, typer.Option(min=1, help="Machines that a step is mapped over.")] = 100_000,
    requests: Annotated[int, typer.Option(min=1, help="Of the trace that is served.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 3,
    runs: Annotated[int, typer.Option(min=1, help="Of the study, each of as many requests.")] = 200,
    json: Json = False,
) -> None:
    """How many configurations, ops and scheduler steps a second the simulator computes here, and how long a study of
    many runs takes; needs jax."""
    from hybridlab.bench.simulator import measure

    with human_output():
        result = measure(configurations=configurations, requests=requests, repeats=repeats, runs=runs)
    emit(result.as_dict() if json else str(result), json)


def _one_source(command: str, preset: str | None, checkpoint: Path | None, layers: int | None) -> None:
    if preset is not None and checkpoint is not None:
        raise ConfigError(f"bench {command}: give --preset or --checkpoint, not both")
    if checkpoint is not None and layers is not None:
        raise ConfigError(f"bench {command}: --layers cuts a preset; a checkpoint is taken as it is")


def _for_devices(command: str, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"bench {command}: --{name.replace('_', '-')} is for --device cuda or emulated")


def _single(given: list[int] | None, option: str, default: int) -> int:
    """Without a device a benchmark measures one point."""
    if given is None:
        return default
    if len(given) > 1:
        raise ConfigError(f"{option}: several are for --device cuda or emulated, the CPU's benchmark takes one")
    return given[0]


def _emit_devices(measure: Callable[[], DeviceBench], json: bool) -> None:
    with human_output():
        result = measure()
    emit(result.as_dict() if json else str(result), json)
    if not result.complete:
        raise typer.Exit(130)
    if result.failed:
        raise typer.Exit(1)


def _numbers(text: str | None, option: str) -> list[int] | None:
    """Parse "1,2,4"."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) <= _MOST_DIGITS):
            raise ConfigError(f"{option}: expected numbers such as 1,2,4, got {word!r:.40}")
    return [int(word) for word in words]
