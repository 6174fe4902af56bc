"""What `hl.tune` may choose from, and the walk through spaces that are too large to try all of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridlab.axes import NOT_SWEEPABLE
from hybridlab.errors import ConfigError

Space = Mapping[str, Sequence[Any]]
"""Dotted config key -> its values; strategies with their parameters are values of scheduler, placement, overlap."""
Place = tuple[int, ...]
"""The index of the value of each axis."""

CHUNKS = (128, 256, 512, 1024, 2048)
STREAM_FROM = (512, 2048, 8192)
RING = {"ring_slots": 8, "parts_per_layer": 8}


def default_space(*, gpu: bool) -> dict[str, list[Any]]:
    """The strategies that come with this package, by what the device has lanes for."""
    schedulers = ["fcfs", *({"name": "chunked_prefill", "chunk_tokens": n} for n in CHUNKS)]
    if not gpu:
        return {"scheduler": schedulers}
    streamed = {"name": "streamed", **RING}
    return {
        "scheduler": schedulers,
        "placement": [
            "all_host",
            "hot_resident",
            "layer_split",
            *({**streamed, "stream_from_tokens": n} for n in STREAM_FROM),
            *({**streamed, "stream_from_tokens": 8192, "mixed_from_tokens": n} for n in (256, 1024)),
        ],
        "overlap": ["prefetch", "dual_batch"],
    }


def checked_space(space: Any) -> dict[str, list[Any]]:
    """The space itself. Raises ConfigError naming a key without values, or one that changes no run."""
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(f"space: expected a mapping of config keys to lists of values, got {space!r:.60}")
    found: dict[str, list[Any]] = {}
    for key, values in space.items():
        root = str(key).split(".")[0]
        if not isinstance(key, str) or root in NOT_SWEEPABLE or root in ("model", "workload", "simulator"):
            raise ConfigError(f"space: {key!r} is nothing to choose from; expected scheduler, placement, engine.*, ...")
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"space: {key}: expected a list of values, got {values!r:.60}")
        found[key] = list(values)
    return found


def size_of(space: Space) -> int:
    return math.prod(len(values) for values in space.values())


def walk(space: Space, most: int, best_of: Callable[[Sequence[Place]], Place | None]) -> None:
    """Look at every place if there are at most `most`; else go from the first along one axis after the other.

    `best_of` looks at some places and says which is the best of all seen so far; None if none of them can be. The walk
    ends when no axis leads to a better place, or `most` were looked at.
    """
    sizes = [len(values) for values in space.values()]
    if math.prod(sizes) <= most:
        best_of(list(itertools.product(*map(range, sizes))))
        return
    here: Place = (0,) * len(sizes)
    seen: set[Place] = {here}
    best_of([here])
    moved = True
    while moved and len(seen) < most:
        moved = False
        for axis, size in enumerate(sizes):
            row = [(*here[:axis], i, *here[axis + 1 :]) for i in range(size)]
            new = [place for place in row if place not in seen][: most - len(seen)]
            if not new:
                continue
            seen.update(new)
            best = best_of(new) or here
            moved, here = moved or best != here, best
