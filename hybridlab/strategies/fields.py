"""Checks of a strategy's own fields, for its `__post_init__`: they come from YAML as well as from code."""

from __future__ import annotations

from typing import Any

from hybridlab.errors import StrategyError

MOST_PARTS = 8
"""Groups that a layer's streamed experts may be cut into."""


def check_positive(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Raise StrategyError naming the field unless `value` is an integer >= `least`, or None where that is allowed."""
    if not (value is None and optional) and not _is_count(value, least):
        raise StrategyError(f"{name}: expected an integer >= {least}{' or None' if optional else ''}, got {value!r}")


def check_ring(ring_slots: Any, parts_per_layer: Any, *, least_slots: int) -> None:
    """Raise StrategyError naming `ring_slots` or `parts_per_layer` unless a ring can have them."""
    if not _is_count(ring_slots, least_slots):
        raise StrategyError(f"ring_slots: expected an integer >= {least_slots}, got {ring_slots!r}")
    if not _is_count(parts_per_layer, 1) or parts_per_layer > MOST_PARTS:
        raise StrategyError(f"parts_per_layer: expected an integer from 1 to {MOST_PARTS}, got {parts_per_layer!r}")


def check_budget(name: str, value: Any) -> None:
    """Raise StrategyError naming the field unless `value` is a number >= 0 or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and value >= 0):
        raise StrategyError(f"{name}: expected a number >= 0 or None, got {value!r}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
