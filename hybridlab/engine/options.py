"""What `hl.load` is given, checked before anything is opened or allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybridlab.errors import ConfigError, StrategyError
from hybridlab.hardware.gpu import Gpu, detect_gpus
from hybridlab.model.weight_layout import check_weight_layout
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.spec import HardwareSpec
from hybridlab.strategies.fields import check_ring

FP8_CAPABILITY = (8, 9)
"""Compute capability from which NVIDIA's tensor cores multiply FP8."""


def check_format(precision: str, weight_layout: str, device: str) -> None:
    """Raises `ConfigError` for an unknown precision or layout, or ones that do not go together or with the device."""
    if precision not in ("bf16", "exact", "fp8"):
        raise ConfigError(f"precision is {precision!r}, expected 'bf16', 'exact' or 'fp8'")
    check_weight_layout(weight_layout)
    if weight_layout == "tiles" and precision == "exact":
        raise ConfigError("weight_layout is 'tiles', but precision 'exact' reads rows")
    if device == "cuda" and weight_layout == "tiles":
        raise ConfigError(
            "weight_layout is 'tiles', but device 'cuda' computes from its pinned copy, which is in 'rows'"
        )
    if device == "cuda" and precision == "exact":
        raise ConfigError(f"precision is {precision!r}, device 'cuda' computes in 'bf16' or 'fp8'")
    if device != "cuda" and precision == "fp8":
        raise ConfigError(
            f"precision is 'fp8', device {device!r} computes in 'bf16' or 'exact': activations are quantised only on "
            "GPUs that have FP8 (device 'cuda')"
        )


def check_fp8(experts: str, gpus: Sequence[Gpu]) -> None:
    """Raises `ConfigError` unless `experts` are stored as "fp8" and the first of `gpus` multiplies FP8."""
    if experts != "fp8":
        raise ConfigError(f"precision is 'fp8', but the experts of this checkpoint are stored in {experts!r}")
    if gpus[0].capability < FP8_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (gpus[0].capability, FP8_CAPABILITY))
        raise ConfigError(
            f"precision is 'fp8', but {gpus[0].name} has no FP8 (compute capability {found}, expected {least} or more)"
        )


def host_precision(precision: str) -> str:
    """What the host's cores compute in: only a GPU has "fp8"."""
    return "bf16" if precision == "fp8" else precision


def check_numbers(counts: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming a count that is no int >= 1, or a size that is no finite number > 0; None is fine."""
    for name, value in counts.items():
        if value is not None and not is_count(value):
            raise ConfigError(f"{name} is {value!r}, expected an int >= 1")
    for name, value in sizes.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < float("inf")):
            raise ConfigError(f"{name} is {value!r}, expected a finite number > 0")


def check_unused(options: Mapping[str, Any], device: str) -> None:
    """Raises `ConfigError` naming an option that is set for a device that has no use for it."""
    for name, value in options.items():
        if value is not None:
            devices = "devices 'emulated' and 'cuda'" if name == "vram_gb" else "device 'emulated'"
            raise ConfigError(f"{name} is for {devices}, not for {device!r}")


def check_worker(worker: str, device: str, *, in_files: bool) -> bool:
    """Whether the worker is a process: it must be able to open the checkpoint's files. Raises `ConfigError`."""
    if worker not in ("auto", "thread", "process"):
        raise ConfigError(f"worker is {worker!r}, expected 'auto', 'thread' or 'process'")
    if worker == "process" and not in_files:
        raise ConfigError("worker is 'process', which needs the folder of a checkpoint to open, not an opened one")
    return worker == "process" or (worker == "auto" and device == "cuda" and in_files)


def is_count(value: Any) -> bool:
    """Whether `value` is an int >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_device(device: str) -> str:
    """The device that "auto" stands for; raises `ConfigError` for one that this version cannot drive."""
    if device in ("auto", "cpu"):
        return "cpu"
    if device == "emulated":
        return device
    if device == "cuda":
        if detect_gpus():
            return device
        raise ConfigError("device 'cuda' is not available: torch finds no CUDA device; expected 'cpu' or 'emulated'")
    raise ConfigError(f"device {device!r} is not available, expected 'cpu' (or 'auto'), 'emulated' or 'cuda'")


def cuda_hardware(hardware: HardwareSpec, vram_gb: float | None) -> HardwareSpec:
    """What placements plan with: `hardware`, of whose GPU memory at most `vram_gb` (1e9 bytes) is taken."""
    if vram_gb is None:
        return hardware
    return replace(hardware, gpu_memory_bytes=min(hardware.gpu_memory_bytes, int(vram_gb * 1e9)))


def emulated_hardware(hardware: HardwareSpec, vram_gb: float | None, link_gb_s: float | None) -> HardwareSpec:
    """What placements plan with: `hardware` with a GPU of `vram_gb` (1e9 bytes; None: all memory of the host)."""
    vram_bytes = hardware.host_memory_bytes if vram_gb is None else int(vram_gb * 1e9)
    return replace(hardware, device="emulated", gpu_memory_bytes=vram_bytes, link_gb_s=link_gb_s)


def check_accelerator_threads(given: int | None, threads: int) -> int:
    """Half of `threads` by default; raises `ConfigError` unless both sides have a thread."""
    if threads < 2:
        raise ConfigError("device 'emulated' needs 2 threads, one for each side; there is 1")
    chosen = threads // 2 if given is None else given
    if not isinstance(chosen, int) or isinstance(chosen, bool) or not 1 <= chosen < threads:
        raise ConfigError(
            f"accelerator_threads is {given!r}, expected an int from 1 to threads - 1; device 'emulated' has "
            f"{threads} threads to share out"
        )
    return chosen


def check_threads(threads: int | None, hardware: HardwareSpec) -> int:
    """All cores that this process may use by default; raises `ConfigError` for an impossible number."""
    if threads is None:
        return hardware.num_cores
    most = 4 * (os.cpu_count() or 1)
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= most:
        raise ConfigError(f"threads is {threads!r}, expected an int from 1 to {most}")
    return threads


def check_placed(placed: PlacementPlan, placement_name: str, device: str) -> None:
    """Refuse tiers that the device cannot hold, or a ring that cannot be; raises `StrategyError` naming what is off."""
    if not isinstance(placed, PlacementPlan):
        raise StrategyError(
            f"placement {placement_name}: place() returned {type(placed).__name__}, expected PlacementPlan"
        )
    streams = placed.default_tier is Tier.STREAMED or Tier.STREAMED in placed.tier_of.values()
    try:
        check_ring(placed.ring_slots, placed.parts_per_layer, least_slots=int(streams and device != "cpu"))
    except StrategyError as error:
        raise StrategyError(f"placement {placement_name}: {error}") from None
    if device != "cpu" or not streams:
        return
    named = [(f"expert {e} of layer {layer}", tier) for (layer, e), tier in placed.tier_of.items()]
    what = next(name for name, tier in (("default_tier", placed.default_tier), *named) if tier is Tier.STREAMED)
    raise StrategyError(f"placement {placement_name}: {what} is streamed, device 'cpu' has no link to stream over")
