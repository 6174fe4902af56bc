"""From the `sweep:` section of a config to the points of an experiment.

Plain keys and `grid` combine every value with every other; `zip` takes values side by side; `list` names points one by
one; `random` draws them. The points are the product of the blocks in their order, the last one fastest.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hybridlab.axes_random import draw, num_draws
from hybridlab.errors import ConfigError

MAX_POINTS = 10_000
MAX_RUNS = 10_000
NOT_SWEEPABLE = {
    "experiment": "it names the folder of the results",
    "repeats": "set it outside the sweep",
    "sweep": "sweeps do not nest",
    "slo": "it does not change a run; pass slo= when reading results",
    "figures": "figures are drawn of a whole experiment",
}
BLOCKS = ("grid", "zip", "list", "random")

Point = dict[str, Any]


def combinations(sweep: Mapping[str, Any], repeats: int = 1) -> list[Point]:
    """The points as dotted config key -> value; [{}] without axes.

    Everything is checked, and the points and runs (points times `repeats`) are counted, before any point is made.
    Raises ConfigError naming block and key.
    """
    _refuse_shared_keys(sweep)
    sizes, makers = [], []
    for name, block in sweep.items():
        parts = _BLOCKS[name](block) if name in BLOCKS else [_axis(name, block, "sweep")]
        sizes += [size for size, _ in parts]
        makers += [make for _, make in parts]
    size = math.prod(sizes)
    if size > MAX_POINTS:
        raise ConfigError(f"sweep: a grid of {size:,} points; expected at most {MAX_POINTS:,}")
    if size * repeats > MAX_RUNS:
        raise ConfigError(f"sweep: {size:,} points and {repeats} repeats; expected at most {MAX_RUNS:,} runs")
    product = itertools.product(*[make() for make in makers])
    return [{key: value for part in parts for key, value in part.items()} for parts in product]


def keys_of(sweep: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(block, dotted key) of every axis; the block of a plain key is ""."""
    found: list[tuple[str, str]] = []
    for name, block in sweep.items():
        if name not in BLOCKS:
            found.append(("", name))
        elif name == "list":
            points = [point for point in _listed(block) if isinstance(point, Mapping)]
            found += [(name, key) for key in dict.fromkeys(key for point in points for key in point)]
        else:
            axes = block.get("axes") if name == "random" and isinstance(block, Mapping) else block
            found += [(name, key) for key in axes] if isinstance(axes, Mapping) else []
    return found


def without(sweep: Mapping[str, Any], roots: Iterable[str]) -> dict[str, Any]:
    """`sweep` without the axes whose key begins with one of `roots`; points that fall together are kept once."""
    gone = {key for _, key in keys_of(sweep) if key.split(".")[0] in set(roots)}
    kept: dict[str, Any] = {}
    for name, block in sweep.items():
        if name not in BLOCKS:
            left = None if name in gone else block
        elif name == "random":
            axes = {key: axis for key, axis in block["axes"].items() if key not in gone}
            left = {**block, "axes": axes} if axes else None
        elif name == "grid":
            left = {key: values for key, values in block.items() if key not in gone}
        else:
            points = _zipped(block) if name == "zip" else block
            left = [{key: value for key, value in point.items() if key not in gone} for point in points]
            left = _distinct(point for point in left if point)
            if name == "zip" and left:
                left = {key: [point[key] for point in left] for key in left[0]}
        if left:
            kept[name] = left
    return kept


def axis_value(value: Any) -> Any:
    """A setting as a cell of a table: words and numbers as they are, everything else as text.

    A range of one ([16, 16]) is that number: a config may say either. Tuples look like the lists that they are in YAML
    and in stored manifests.
    """
    if isinstance(value, str | int | float | bool | None):
        return value
    listed = _listed_within(value)
    if isinstance(listed, list) and len(listed) == 2 and all(type(n) is int for n in listed) and listed[0] == listed[1]:
        return listed[0]
    return repr(listed)


def _listed_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed_within(one) for key, one in value.items()}
    return [_listed_within(one) for one in value] if isinstance(value, list | tuple) else value


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


Part = tuple[int, Callable[[], Sequence[Point]]]
"""How many points a factor of the product has, and what makes them."""


def _axis(key: Any, values: Any, where: str) -> Part:
    _refuse_key(key, where)
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"{where}: {key}: expected a list with at least one value, got {values!r:.80}")
    _refuse_twice([{key: value} for value in values], lambda point: f"{where}: {key}: {point[key]!r:.80}")
    return len(values), lambda: [{key: value} for value in values]


def _grid(block: Any) -> list[Part]:
    return [_axis(key, values, "sweep.grid") for key, values in _mapping(block, "grid").items()]


def _zip(block: Any) -> list[Part]:
    for key, values in _mapping(block, "zip").items():
        _refuse_key(key, "sweep.zip")
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"sweep.zip: {key}: expected a list with at least one value, got {values!r:.80}")
    if len({len(values) for values in block.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(values)}" for key, values in block.items())
        raise ConfigError(f"sweep.zip: expected lists of equal length; {lengths}")
    points = _zipped(block)
    _refuse_twice(points, lambda point: f"sweep.zip: {_shown(point)}")
    return [(len(points), lambda: points)]


def _zipped(block: Mapping[str, Sequence[Any]]) -> list[Point]:
    return [dict(zip(block, values, strict=True)) for values in zip(*block.values(), strict=True)]


def _list(block: Any) -> list[Part]:
    points = _listed(block)
    if not points:
        raise ConfigError(f"sweep.list: expected a list with at least one point, got {block!r:.80}")
    for index, point in enumerate(points):
        if not isinstance(point, Mapping) or not point:
            raise ConfigError(f"sweep.list.{index}: expected a mapping of keys to values, got {point!r:.80}")
        for key in point:
            _refuse_key(key, f"sweep.list.{index}")
    _refuse_twice(points, lambda point: f"sweep.list: {_shown(point)}")
    return [(len(points), lambda: points)]


def _listed(block: Any) -> list[Any]:
    return list(block) if isinstance(block, list | tuple) else []


def _random(block: Any) -> list[Part]:
    size = num_draws(_mapping(block, "random"), MAX_POINTS)
    for key in block["axes"]:
        _refuse_key(key, "sweep.random.axes")
    return [(size, lambda: draw(block))]


_BLOCKS: dict[str, Callable[[Any], list[Part]]] = {"grid": _grid, "zip": _zip, "list": _list, "random": _random}


def _mapping(block: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(block, Mapping) or not block:
        raise ConfigError(f"sweep.{name}: expected a mapping with at least one key, got {block!r:.80}")
    return block


def _refuse_key(key: Any, where: str) -> None:
    if not isinstance(key, str) or not key:
        raise ConfigError(f"{where}: expected a dotted config key, got {key!r:.80}")
    root = key.split(".")[0]
    if root in NOT_SWEEPABLE:
        raise ConfigError(f"{where}: {root!r} cannot be swept: {NOT_SWEEPABLE[root]}")


def _refuse_shared_keys(sweep: Mapping[str, Any]) -> None:
    seen: dict[str, str] = {}
    for block, key in keys_of(sweep):
        if key in seen:
            places = " and ".join(f"sweep.{name}" if name else "sweep" for name in (seen[key], block))
            raise ConfigError(f"sweep: {key} is in {places}; expected one place")
        seen[key] = block


def _refuse_twice(points: Sequence[Point], describe: Callable[[Point], str]) -> None:
    # Counted first: comparing every value of a list of millions would take longer than refusing it.
    if len(points) <= MAX_POINTS:
        for point, is_new in _compared(points):
            if not is_new:
                raise ConfigError(f"{describe(point)} is listed twice")


def _distinct(points: Iterable[Point]) -> list[Point]:
    return [point for point, is_new in _compared(points) if is_new]


def _compared(points: Iterable[Point]) -> Iterator[tuple[Point, bool]]:
    """Each point, and whether it differs from all before it. 1, 1.0 and true are three values."""
    plain: set[str] = set()
    others: list[Point] = []
    for point in points:
        try:
            text = json.dumps(point, sort_keys=True)
        except (TypeError, ValueError):  # holds an object
            yield point, not any(_same(point, other) for other in others)
            others.append(point)
        else:
            yield point, text not in plain
            plain.add(text)


def _same(one: Point, other: Point) -> bool:
    return one.keys() == other.keys() and all(
        type(value) is type(other[key]) and value == other[key] for key, value in one.items()
    )


def _shown(point: Point) -> str:
    return ", ".join(f"{key}={value!r:.40}" for key, value in point.items())
