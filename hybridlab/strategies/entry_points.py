"""Strategies that other installed packages bring: entry points by group. Nothing of theirs is imported to list them."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import dataclass

GROUPS = {"scheduler": "hybridlab.schedulers", "placement": "hybridlab.placements", "overlap": "hybridlab.overlaps"}


@dataclass(frozen=True)
class Foreign:
    """A strategy of an installed distribution; `target` is "module:Class", as its metadata say."""

    package: str
    version: str
    target: str


def find(kind: str) -> Mapping[str, tuple[Foreign, ...]]:
    """Name -> who brings a strategy of `kind` by that name; more than one is for the caller to refuse."""
    return _find(GROUPS[kind], tuple(sys.path))


def look_again() -> None:
    """Forget what was found: packages may have been installed since."""
    _find.cache_clear()


@functools.cache
def _find(group: str, path: tuple[str, ...]) -> Mapping[str, tuple[Foreign, ...]]:
    found: dict[str, dict[Foreign, None]] = {}
    for point in importlib.metadata.entry_points(group=group):
        package, version = (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "")
        target = point.value.partition("[")[0].strip()  # extras may follow
        # The same distribution may be found twice, by two entries of sys.path.
        found.setdefault(point.name, {})[Foreign(package, version, target)] = None
    return {name: tuple(brought) for name, brought in sorted(found.items())}
