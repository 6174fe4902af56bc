"""Checks of a strategy's own fields, for its `__post_init__`: they come from YAML as well as from code."""

from __future__ import annotations

from typing import Any

from hybridlab.errors import StrategyError


def check_positive(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise StrategyError naming the field unless `value` is an integer >= 1, or None where that is allowed."""
    if (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise StrategyError(f"{name}: expected an integer >= 1{' or None' if optional else ''}, got {value!r}")
