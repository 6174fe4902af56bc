"""`hl.measure_profile`: this machine as the simulator knows it, measured on ops of the real engine and fitted."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab import kernels
from hybridlab.bench.devices import DeviceOptions
from hybridlab.bench.steps import decode_steps, timed
from hybridlab.calibration.ops import (
    KV_TOKENS,
    SERVED,
    between_steps,
    compute_points,
    handoffs,
    load_points,
)
from hybridlab.checkpoint import open_checkpoint
from hybridlab.checkpoint.reader import Checkpoint
from hybridlab.engine.options import check_threads
from hybridlab.errors import ConfigError, KernelError, MemoryBudgetError
from hybridlab.hardware import detect
from hybridlab.hardware.read_bandwidth import read_bandwidth_gb_s
from hybridlab.loading import load
from hybridlab.lowering import Planner
from hybridlab.plans import LaneKind
from hybridlab.simulator.fit import Observed, fit
from hybridlab.simulator.machine import Machine, Profile
from hybridlab.simulator.machine import profile_text as text_of
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape
from hybridlab.spec import NEVER
from hybridlab.strategies.overlap.prefetch import Prefetch
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.strategies.placement.all_resident import AllResident
from hybridlab.strategies.placement.streamed import Streamed

if TYPE_CHECKING:
    from hybridlab.session import Engine

GROUP = 8.0
"""Tokens that the CPU kernels multiply a weight with at once (HL_MAX_GROUP in cython_kernels/kernels.h)."""
COPIED = 2.0
"""Bytes of DRAM that a copy between two places of it moves: read and written."""
POOR = 0.25
"""Median error of a fit beyond which it says little of the machine."""
PARTS = (1, 2, 8)
"""Parts of a layer's experts: copies over the link of these sizes."""
CPU_FIT = (
    *("host_read_efficiency", "cpu_flop_efficiency", "cpu_dense_flop_ratio", "cpu_attention_flop_ratio"),
    *("cpu_overlap", "cpu_wide_read", "cpu_wide_expert_read", "cpu_op_us"),
)
HOST_FIT = ("host_read_efficiency", "cpu_flop_efficiency", "cpu_overlap", "cpu_wide_expert_read", "cpu_op_us")
"""Where the CPU's lane computes experts alone."""
GPU_FIT = (
    *("gpu_read_efficiency", "gpu_flop_efficiency", "gpu_dense_flop_ratio", "gpu_attention_efficiency"),
    *("gpu_overlap", "gpu_wide_read", "gpu_wide_expert_read", "gpu_op_us"),
)
LINK_FIT = ("link_gb_s", "link_latency_us")


@dataclass
class _Known:
    """The machine as far as it is measured; every number enters with its source."""

    machine: Machine
    sources: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def give(self, source: str, **values: float) -> None:
        self.machine = replace(self.machine, **values)
        self.sources |= dict.fromkeys(values, source)

    def fit(self, what: str, shape: ModelShape, points: Sequence[Observed], names: Sequence[str]) -> None:
        found = fit(self.machine, shape, points, names)
        self.machine = found.machine
        error = float(np.median(np.abs(found.errors)))
        source = f"fitted to {len(points)} measured {what}, median error {error:.1%}"
        self.sources |= dict.fromkeys(names, source)
        self.intervals |= {name: each for name, each in found.intervals.items() if np.isfinite(each).all()}
        if error > POOR:
            warnings.warn(
                f"calibrate: half of the {what} are {error:.0%} off or more: other programs compute here, or the model "
                "is too small to tell reading from launching; measure again, or with a larger one",
                stacklevel=2,
            )

    def median(self, source: str, **values: Sequence[float]) -> None:
        """Medians, with the interval that their quartiles give."""
        for name, each in values.items():
            if len(each) >= 2:
                middle, low, high = (float(np.quantile(each, q)) for q in (0.5, 0.25, 0.75))
                notch = 1.57 * (high - low) / len(each) ** 0.5
                self.give(f"{source}, median of {len(each)}", **{name: middle})
                self.intervals[name] = max(0.0, middle - notch), middle + notch


def measure_profile(
    path: str | Path,
    device: str = "cpu",
    *,
    layers: int = 4,
    threads: int | None = None,
    accelerator_threads: int | None = None,
    link_gb_s: float | None = None,
    vram_gb: float | None = None,
    progress: bool = True,
) -> Profile:
    """This machine for the simulator, by ops of the engine on the first `layers` MoE layers of a checkpoint.

    On every device: read bandwidth, experts and dense ops over tokens, attention over context, and what a step takes
    beside its ops. On "emulated" and "cuda" also the link over sizes and the hand-offs between lanes; there the CPU and
    the accelerator are fitted each by itself, with nothing beside them. Raises `ConfigError`, `CheckpointError` or
    `MemoryBudgetError` in one line.
    """
    if device not in ("cpu", "emulated", "cuda"):
        raise ConfigError(f"device is {device!r}, expected cpu, emulated or cuda")
    whole = open_checkpoint(path)
    if not whole.spec.moe_layers:
        raise ConfigError(f"{whole.folder}: the model has no MoE layer, so that no expert can be measured")
    cut = whole.first_moe_layers(layers)
    if device == "cpu":
        if accelerator_threads is not None or link_gb_s is not None or vram_gb is not None:
            raise ConfigError("device 'cpu' has neither accelerator_threads nor link_gb_s nor vram_gb")
        known = _measured_cpu(cut, check_threads(threads, detect()), progress)
    else:
        options = DeviceOptions(device, threads, accelerator_threads, link_gb_s, vram_gb)
        known = _measured_pair(cut, options, check_threads(threads, detect()), progress)
    when = date.today().isoformat()
    sources = {each.name: each.metadata["source"] for each in fields(Machine)}
    sources |= {name: f"`hybridlab calibrate`, {when}: {each}" for name, each in known.sources.items()}
    about = (
        f"{detect().name}, device {device}, {check_threads(threads, detect())} threads, by {whole.folder.name}, {when}"
    )
    return Profile(device, about, known.machine, sources, known.intervals)


def _measured_cpu(cut: Checkpoint, threads: int, progress: bool) -> _Known:
    known, shape, routes = _host(threads), ModelShape.of(cut.spec), Routes(cut.spec)
    with _loaded(cut, "cpu", placement=AllHost(), threads=threads) as engine:
        points = list(_shown(compute_points(engine, engine.planner, routes), "ops", progress))
        known.fit("ops on the CPU", shape, points, CPU_FIT)
        _beside_ops(known, engine, known.machine.cpu_op_us)
    return known


def _measured_pair(cut: Checkpoint, options: DeviceOptions, threads: int, progress: bool) -> _Known:
    """CPU and accelerator, each alone, and the link; on "emulated", cores in the accelerator's place share the DRAM."""
    shape, routes = ModelShape.of(cut.spec), Routes(cut.spec)
    emulated = options.device == "emulated"
    lane_threads = threads - options.chosen_accelerator_threads if emulated else threads
    known = _host(lane_threads)
    _accelerator(known, options, threads)
    given = options.given()
    copies: list[Observed] = []
    for parts in PARTS:
        placement = Streamed(stream_from_tokens=1, ring_slots=2, parts_per_layer=parts)
        with _loaded(cut, placement=placement, **given) as engine:
            copies.extend(load_points(engine, engine.planner, routes))
            if parts != PARTS[0]:
                continue
            on_host = Streamed(stream_from_tokens=NEVER)
            planner = Planner(cut.spec, engine.planner.hardware, on_host, Prefetch(), engine.planner.placed)
            ops = list(_shown(compute_points(engine, planner, routes), "experts on the host", progress))
            between: dict[str, list[float]] = {}
            for step in list(zip(decode_steps(engine, planner, 2, 64), range(8), strict=False))[2:]:
                for name, seconds in handoffs(timed(engine, step[0]).spans).items():
                    between.setdefault(name, []).extend(1e6 * each for each in seconds)
            known.median("spans of decode steps", **between)
    on_cpu = [point for point in ops if point.cls.on_cpu]
    known.fit("experts on the CPU", shape, on_cpu, HOST_FIT)
    known.fit("copies over the link", shape, copies, LINK_FIT)
    if emulated and options.link_gb_s is None:
        known.give("emulated: a core copies, at the link's rate", link_core_gb_s=known.machine.link_gb_s)
    on_gpu = [point for point in ops if not point.cls.on_cpu]
    with suppress(MemoryBudgetError), _loaded(cut, placement=AllResident(), **given) as engine:
        on_gpu += list(_shown(compute_points(engine, engine.planner, routes, LaneKind.GPU), "experts", progress))
        _beside_ops(known, engine, known.machine.gpu_op_us)
    if any(point.cls.kind == "experts" for point in on_gpu):
        known.fit("ops on the accelerator", shape, on_gpu, GPU_FIT)
    else:  # the accelerator has no room for the experts, which keep the assumed rate
        names = [name for name in GPU_FIT if name not in ("gpu_flop_efficiency", "gpu_wide_expert_read")]
        known.fit("dense ops on the accelerator", shape, on_gpu, names)
    return known


def _host(threads: int) -> _Known:
    """What the machine says of itself, and its ceilings as loops of our own reach them."""
    hardware, probe = detect(), read_bandwidth_gb_s(threads)
    try:
        flop_s, how = kernels.multiply_rate(threads), "multiply loop on registers"
    except KernelError:
        flop_s, how = 1e10, "assumed: no compiled kernel runs here"
    known = _Known(Machine(hardware.host_memory_bytes / 1e9, probe.median_gb_s, float(threads), flop_s / 1e12))
    known.give("what this machine says", host_memory_gb=hardware.host_memory_bytes / 1e9, cpu_cores=float(threads))
    known.give(f"read loop, {probe}", host_peak_gb_s=probe.median_gb_s)
    known.intervals["host_peak_gb_s"] = probe.min_gb_s, probe.max_gb_s
    known.give(f"{how}, {threads} threads", cpu_tflops=flop_s / 1e12)
    if how.startswith("multiply"):
        known.give("group of the CPU kernels", cpu_narrow_tokens=GROUP)
    return known


def _accelerator(known: _Known, options: DeviceOptions, threads: int) -> None:
    """Ceilings of the accelerator, and what DRAM gives it beside the CPU."""
    hardware = detect(gpu=options.device == "cuda")
    peak = options.peak_flop_s()
    if peak is None:
        raise ConfigError("a profile of device 'emulated' needs a compiled kernel tier, none runs here")
    known.give("largest product or multiply loop", gpu_tflops=peak / 1e12)
    if options.device == "cuda":
        from hybridlab.hardware.gpu import read_gb_s
        from hybridlab.hardware.link import probe_link

        memory_gb = min(hardware.gpu_memory_bytes / 1e9, options.vram_gb or 1e9)
        link = probe_link()
        known.give("what this machine says", gpu_memory_gb=memory_gb)
        known.give("copy within its memory", gpu_read_gb_s=read_gb_s())
        known.give(f"pinned copies, {link}", link_gb_s=link.h2d_gb_s)
        return
    cores = options.chosen_accelerator_threads
    alone, together = read_bandwidth_gb_s(cores), read_bandwidth_gb_s(threads)
    known.give(
        "memory of the host, which is the emulated accelerator's too", gpu_memory_gb=known.machine.host_memory_gb
    )
    known.give(f"read loop, {alone}", gpu_read_gb_s=alone.median_gb_s)
    shared = max(1.0, together.median_gb_s / known.machine.host_peak_gb_s)
    known.give("all threads reading / the CPU lane's alone", host_shared_ratio=shared)
    known.give("emulated: cores of the host", gpu_dram_bytes=1.0, gpu_cores=float(cores))
    known.give("emulated: read and written", link_dram_bytes=COPIED)
    known.give("group of the CPU kernels", gpu_narrow_tokens=GROUP)
    known.give("start of the fit", link_gb_s=alone.median_gb_s / 2)


def _beside_ops(known: _Known, engine: Engine, op_us: float) -> None:
    """A constant for each step and one for each row, least squares through medians, none below 0."""
    rows = {number: median(between_steps(engine, number)) * 1e6 - op_us for number in SERVED}
    slope, constant = np.polyfit(list(rows), list(rows.values()), 1)
    source = f"served decode steps of {', '.join(map(str, SERVED))} requests, between their ops"
    known.give(source, step_us=max(0.0, float(constant)), row_us=max(0.0, float(slope)))


def _loaded(cut: Checkpoint, device: str, *, placement: Any, **given: Any) -> Any:
    engine = load(
        cut, device=device, placement=placement, overlap=Prefetch(), token_budget=1024, kv_tokens=KV_TOKENS, quiet=True,
        prefix_cache=False, **given,
    )  # fmt: skip
    engine.lone_runtime.wait_mapped()
    engine.lone_runtime.randomise_cache(0)
    return engine


def _shown(points: Iterable[Observed], what: str, progress: bool) -> Iterable[Observed]:
    from tqdm.auto import tqdm

    return tqdm(points, desc=f"calibrate: {what}", unit=" ops", disable=not progress)


def write_profile(profile: Profile, path: Path) -> Path:
    """The TOML that `simulator.machine` takes, whole or not at all; raises ConfigError."""
    if path.suffix != ".toml":
        raise ConfigError(f"{path}: expected a name that ends in .toml")
    measured = [each.name for each in fields(Machine) if profile.sources[each.name] != each.metadata["source"]]
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".part-", delete=False, encoding="utf-8") as file:
            part = Path(file.name)
            file.write(text_of(profile, measured))
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path}: the profile cannot be written ({error.strerror or error})") from None
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return path
