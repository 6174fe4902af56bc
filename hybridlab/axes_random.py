"""Seeded random points of a sweep: the same on every machine, and each of them once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from hybridlab.errors import ConfigError
from hybridlab.sections import did_you_mean

DISTRIBUTIONS = ("uniform", "log_uniform", "integer", "choice")
_WHERE = "sweep.random"
_LARGEST_INTEGER = 2**53  # every whole number up to it is a float64


def num_draws(block: Mapping[str, Any], most: int) -> int:
    """How many points `block` = {num_points, seed, axes} asks for; all of it is checked, nothing is drawn.

    Raises ConfigError naming the key and what was expected; a size above `most` is left to the caller.
    """
    for key in block:
        if key not in ("num_points", "seed", "axes"):
            raise ConfigError(f"{_WHERE}: unknown key {key!r}{did_you_mean(str(key), ('num_points', 'seed', 'axes'))}")
    for key, least in (("num_points", 1), ("seed", 0)):
        value = block.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            got = f"got {value!r:.80}" if key in block else "it is missing"
            raise ConfigError(f"{_WHERE}.{key}: expected a whole number from {least}; {got}")
    axes = block.get("axes")
    if not isinstance(axes, Mapping) or not axes:
        raise ConfigError(f"{_WHERE}.axes: expected a mapping of keys to distributions, got {axes!r:.80}")
    there_are = math.prod(_num_values(f"{_WHERE}.axes: {key}", axis) for key, axis in axes.items())
    size = block["num_points"]
    if there_are < size <= most:
        raise ConfigError(f"{_WHERE}.num_points: expected at most {there_are:.0f}, all that the axes have; got {size}")
    return size


def draw(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `num_points` points of a checked block, all different.

    Every axis has a random stream of its own, from the seed and its key, so that another axis changes no value of
    it. Real numbers are drawn to six significant digits: what a table shows is what was run.
    """
    import numpy as np

    streams = {
        key: (np.random.default_rng([block["seed"], zlib.crc32(key.encode())]), _sampler(axis))
        for key, axis in block["axes"].items()
    }
    size, found = block["num_points"], {}
    for _ in range(1000 + 50 * size):  # drawing each of n values once takes about n log n draws
        if len(found) == size:
            break
        point = {key: sample(float(rng.random())) for key, (rng, sample) in streams.items()}
        found.setdefault(repr(point), point)
    if len(found) < size:
        raise ConfigError(f"{_WHERE}: the axes have too few different values for {size} points; widen them")
    return list(found.values())


def _num_values(where: str, axis: Any) -> float:
    """How many values the axis can take; infinite for real numbers. Raises ConfigError if it is not well formed."""
    if not isinstance(axis, Mapping) or len(axis) != 1:
        raise ConfigError(f"{where}: expected one of {', '.join(DISTRIBUTIONS)} with its values, got {axis!r:.80}")
    ((kind, values),) = axis.items()
    if kind not in DISTRIBUTIONS:
        raise ConfigError(f"{where}: unknown distribution {kind!r}{did_you_mean(str(kind), DISTRIBUTIONS)}")
    if kind == "choice":
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"{where}: choice: expected a list with at least one value, got {values!r:.80}")
        for index, value in enumerate(values):
            if any(type(value) is type(other) and value == other for other in values[:index]):
                raise ConfigError(f"{where}: choice: {value!r:.80} is listed twice")
        return len(values)
    right = _is_int if kind == "integer" else _is_number
    if not isinstance(values, list | tuple) or len(values) != 2 or not all(map(right, values)):
        what = "whole numbers" if kind == "integer" else "numbers"
        raise ConfigError(f"{where}: {kind}: expected two {what} [low, high], got {values!r:.80}")
    low, high = values
    if not low < high:
        raise ConfigError(f"{where}: {kind}: expected low < high, got {list(values)!r}")
    if kind == "log_uniform" and low <= 0:
        raise ConfigError(f"{where}: log_uniform: expected low > 0, got {low!r}")
    if kind == "integer" and max(abs(low), abs(high)) > _LARGEST_INTEGER:
        raise ConfigError(f"{where}: integer: expected numbers up to {_LARGEST_INTEGER}, got {list(values)!r}")
    return high - low + 1 if kind == "integer" else math.inf


def _sampler(axis: Mapping[str, Any]) -> Callable[[float], Any]:
    """From a uniform number in [0, 1) to a value of the axis. `integer` takes both ends."""
    ((kind, values),) = axis.items()
    if kind == "choice":
        return lambda u: values[int(u * len(values))]
    low, high = values
    if kind == "integer":
        return lambda u: min(low + int(u * (high - low + 1)), high)
    if kind == "uniform":
        return lambda u: _rounded(low + u * (high - low), low, high)
    return lambda u: _rounded(math.exp(math.log(low) + u * (math.log(high) - math.log(low))), low, high)


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.6g}"), float(low)), float(high))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
