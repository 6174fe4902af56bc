"""From sweep axes to the points of an experiment. Now: a grid; other kinds of axes join `combinations`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlab.errors import ConfigError

MAX_POINTS = 10_000
NOT_SWEEPABLE = {
    "experiment": "it names the folder of the results",
    "repeats": "set it outside the sweep",
    "sweep": "sweeps do not nest",
    "slo": "it does not change a run; pass slo= when reading results",
}


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The grid over all axes, last axis fastest; [{}] without axes.

    `sweep` maps dotted config keys ("workload.rate_scale") to non-empty lists. Raises ConfigError naming the
    axis.
    """
    for key, values in sweep.items():
        root = key.split(".")[0]
        if root in NOT_SWEEPABLE:
            raise ConfigError(f"sweep: {root!r} cannot be swept: {NOT_SWEEPABLE[root]}")
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"sweep: {key}: expected a list with at least one value, got {values!r}")
    size = math.prod(len(values) for values in sweep.values())
    if size > MAX_POINTS:
        raise ConfigError(f"sweep: a grid of {size:,} points; expected at most {MAX_POINTS:,}")
    for key, values in sweep.items():
        for index, value in enumerate(values):
            if any(type(value) is type(other) and value == other for other in values[:index]):
                raise ConfigError(f"sweep: {key}: {value!r} is listed twice")
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def override(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the config dict `raw` with dotted keys set; a strategy given by name becomes a mapping."""
    result = dict(raw)
    # Whole sections before their fields, whatever the order of the axes.
    for key in sorted(overrides, key=lambda name: name.count(".")):
        *parents, last = key.split(".")
        node = result
        for depth, parent in enumerate(parents):
            child = node.get(parent, {})
            if depth == 0 and parent in ("scheduler", "placement", "overlap") and isinstance(child, str):
                child = {"class" if ":" in child else "name": child}
            if not isinstance(child, Mapping):
                path = ".".join(parents[: depth + 1])
                raise ConfigError(f"sweep: {key}: {path} is {child!r}, which has no keys to sweep over")
            node[parent] = dict(child)
            node = node[parent]
        node[last] = overrides[key]
    return result
