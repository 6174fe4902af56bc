"""Arguments that several figures take, checked before anything is drawn: a mistake is one line that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from matplotlib.axes import Axes

from hybridlab.errors import ConfigError

MOST_IN = 100.0
"""Of a figure's width: at 300 dots per inch more is a slip."""


def check_target(ax: Any, width_in: Any, what: str) -> None:
    """Raise ConfigError unless `ax` is Axes, or None and `width_in` a width of a figure to make."""
    if ax is not None and not isinstance(ax, Axes):
        raise ConfigError(f"{what}: ax: expected Axes, got {ax!r:.60}")
    check_width(width_in, what)


def check_width(width_in: Any, what: str) -> None:
    """Raise ConfigError unless `width_in` is a width of a figure."""
    if not (is_number(width_in) and 0 < width_in <= MOST_IN):
        raise ConfigError(f"{what}: width_in: expected inches above 0, at most {MOST_IN:g}, got {width_in!r:.60}")


def check_pair(ax: Any, what: str) -> tuple[Axes, Axes]:
    """The two Axes of `ax`. Raises ConfigError if it is anything else."""
    axes = [] if isinstance(ax, str | Axes) or not hasattr(ax, "__iter__") else list(ax)
    if len(axes) != 2 or not all(isinstance(one, Axes) for one in axes):
        got = "one Axes" if isinstance(ax, Axes) else f"{ax!r:.60}"
        raise ConfigError(f"{what}: ax: expected two Axes (throughput, TPOT), got {got}")
    return axes[0], axes[1]


def check_choice(value: Any, known: Sequence[str], name: str) -> None:
    """Raise ConfigError unless `value` is one of `known`; `name` is "figure: argument"."""
    if value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r:.60}")


def check_time(value: Any, name: str) -> None:
    """Raise ConfigError unless `value` is None or seconds."""
    if value is not None and not is_number(value):
        raise ConfigError(f"{name}: expected seconds, got {value!r:.60}")


def check_numbers(frame: Any, column: str, name: str) -> None:
    """Raise ConfigError unless the column of a DataFrame holds numbers."""
    from pandas.api.types import is_numeric_dtype

    if not is_numeric_dtype(frame[column]):
        raise ConfigError(f"{name}: expected a column of numbers; {column!r} holds {frame[column].iloc[0]!r:.60}")


def check_where(where: Any, what: str) -> Mapping[Any, Any]:
    """`where` ({} for None). Raises ConfigError unless it maps columns to what is wanted of them."""
    if where is not None and not isinstance(where, Mapping):
        raise ConfigError(f"{what}: where: expected {{column: value or list of values}}, got {where!r:.60}")
    return where or {}


def names_of(value: Any, name: str, noun: str) -> list[str]:
    """A text or a sequence of texts as a list. Raises ConfigError that asks for a `noun` if it is neither, or empty."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed or not all(isinstance(one, str) for one in listed):
        raise ConfigError(f"{name}: expected a {noun} or a list of {noun}s, got {value!r:.60}")
    return list(listed)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
