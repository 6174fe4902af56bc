"""From a model's expert ids to places in a group of experts that lie together, and to how often each was chosen.

Nothing here waits for a CUDA device. Legend: T tokens, S slots of a token (top-k), E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_KEPT_TABLES = 2048
"""More than the groups of a step; placements that move experts bring new ones."""


_HELD: ContextVar[list[torch.Tensor] | None] = ContextVar("held", default=None)


@contextmanager
def tables_held() -> Iterator[list[torch.Tensor]]:
    """All tables that are used inside, for a captured step to keep: it reads them where they lie."""
    token = _HELD.set(held := [])
    try:
        yield held
    finally:
        _HELD.reset(token)


class LocalIds:
    """Tables on `device`, kept for the groups used last: those come again in every step."""

    def __init__(self, num_experts: int, device: torch.device | str) -> None:
        self._num_experts, self._device = num_experts, torch.device(device)
        self._tables: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, ids_TS: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
        """int64 [T, S]: the place in `experts` of each id, -1 for the others and for skipped routes (-1)."""
        key = tuple(experts)
        if (table := self._tables.pop(key, None)) is None:
            table = table_of(key, self._num_experts)
            # From pageable memory the copy would wait for what the stream has still to do.
            if self._device.type == "cuda":
                table = table.pin_memory().to(self._device, non_blocking=True)
            if len(self._tables) >= _KEPT_TABLES:
                del self._tables[next(iter(self._tables))]  # the one not used for longest
        self._tables[key] = table
        if (held := _HELD.get()) is not None:
            held.append(table)
        return table[ids_TS.long()]


def table_of(experts: Sequence[int], num_experts: int) -> torch.Tensor:
    """int64 [E + 1]: the place in `experts` of each expert, -1 for the others; the last one, of skipped routes, too."""
    table = torch.full((num_experts + 1,), -1, dtype=torch.int64)
    table[list(experts)] = torch.arange(len(experts))
    return table


def count_ids(ids_TS: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int64 [E + 1] on the device of `ids_TS`: how often each id occurs; the last one counts skipped routes (-1)."""
    ids = torch.remainder(ids_TS.flatten().long(), num_experts + 1)
    # Not bincount, which waits for the device.
    return torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))
