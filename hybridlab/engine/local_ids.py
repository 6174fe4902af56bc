"""From a model's expert ids to places in a group of experts that lie together."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LocalIds:
    """Tables on `device`, kept for groups that are computed whole: those come again in every step."""

    def __init__(self, num_experts: int, device: torch.device | str) -> None:
        self._num_experts, self._device = num_experts, device
        self._tables: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, ids_TS: torch.Tensor, experts: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
        """int64 [T, S]: the place in `experts` of each id that is `wanted`, -1 for the others and skipped routes."""
        if len(wanted) < len(experts):
            return self._table(experts, wanted)[ids_TS.long()]
        key = tuple(experts)
        if (table := self._tables.get(key)) is None:
            table = self._tables[key] = self._table(experts, wanted)
        return table[ids_TS.long()]

    def _table(self, experts: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
        where = {expert: place for place, expert in enumerate(experts)}
        table = torch.full((self._num_experts + 1,), -1, dtype=torch.int64)  # the last one: a skipped route, -1
        for expert in wanted:
            table[expert] = where[expert]
        return table.to(self._device)
