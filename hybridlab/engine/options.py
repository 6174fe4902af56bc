"""What `hl.load` is given, checked before anything is opened or allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hybridlab.errors import ConfigError, StrategyError
from hybridlab.model.weight_layout import check_weight_layout
from hybridlab.plans import PlacementPlan, Tier
from hybridlab.spec import HardwareSpec


def check_format(precision: str, weight_layout: str) -> None:
    """Raises `ConfigError` for an unknown precision or layout, or two that do not go together."""
    if precision not in ("bf16", "exact"):
        raise ConfigError(f"precision is {precision!r}, expected 'bf16' or 'exact'")
    check_weight_layout(weight_layout)
    if weight_layout == "tiles" and precision == "exact":
        raise ConfigError("weight_layout is 'tiles', but precision 'exact' reads rows")


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
    """Raises `ConfigError` naming an option of device "emulated" that is set for another device."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} is for device 'emulated', not for {device!r}")


def is_count(value: Any) -> bool:
    """Whether `value` is an int >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_device(device: str) -> str:
    """The device that "auto" stands for; raises `ConfigError` for one that this version cannot drive."""
    if device in ("auto", "cpu"):
        return "cpu"
    if device == "emulated":
        return device
    raise ConfigError(f"device {device!r} is not available, expected 'cpu' (or 'auto') or 'emulated'")


def check_accelerator_threads(given: int | None, threads: int) -> int:
    """Half of `threads` by default; raises `ConfigError` unless both sides have a thread."""
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
    """Refuse tiers that the device cannot hold; raises `StrategyError` naming the first expert."""
    if not isinstance(placed, PlacementPlan):
        raise StrategyError(
            f"placement {placement_name}: place() returned {type(placed).__name__}, expected PlacementPlan"
        )
    if device != "cpu":
        return
    named = [(f"expert {e} of layer {layer}", tier) for (layer, e), tier in placed.tier_of.items()]
    for what, tier in (("default_tier", placed.default_tier), *named):
        if tier is Tier.STREAMED:
            raise StrategyError(
                f"placement {placement_name}: {what} is streamed, device 'cpu' has no link to stream over"
            )
