"""Expert weights in pinned host memory, once: what the link copies from and the CPU's kernels read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

from hybridlab.engine.pinned import Pins, pages
from hybridlab.errors import MemoryBudgetError, PlanError
from hybridlab.model.expert_block import Expert, ExpertBlock

Kept = Mapping[int, Sequence[int]]
"""Layer -> the experts of it that host memory holds, ascending."""


class HostStore:
    """A layer's experts lie one after another as blocks, so that neighbours are one copy.

    `rooms[layer]` is uint8 [rows, block bytes]; `rows[layer]` says in which one each expert is. `pins` are the store's.
    """

    def __init__(
        self, block: ExpertBlock, rooms: dict[int, torch.Tensor], rows: dict[int, dict[int, int]], pins: Pins
    ) -> None:
        self.block = block
        self._rooms, self._rows, self._pins = rooms, rows, pins

    @classmethod
    def filled(
        cls,
        layers: Mapping[int, Sequence[Expert]],
        block: ExpertBlock,
        kept: Kept,
        *,
        pin: bool,
        threads: int,
        progress: bool = False,
    ) -> HostStore:
        """With a copy of its own of those of `layers` that are `kept`."""
        store = cls(block, {}, {}, Pins())
        try:
            store._fill(layers, kept, pin, threads, progress)
        except BaseException:
            store.close()
            raise
        return store

    @property
    def num_bytes(self) -> int:
        """Of the experts that it has."""
        return sum(map(len, self._rows.values())) * self.block.num_bytes

    def has(self, layer: int, experts: Sequence[int]) -> bool:
        return self._rows.get(layer, {}).keys() >= set(experts)

    def copy(self, layer: int, experts: Sequence[int], target: torch.Tensor) -> None:
        """Enqueue copies of `experts` into the first rows of `target` on the current stream; neighbours travel as one.

        Raises `PlanError` for one that is not here.
        """
        at = 0
        for first, end in _runs([self._row(layer, expert) for expert in experts]):
            target[at : at + end - first].copy_(self._rooms[layer][first:end], non_blocking=True)
            at += end - first

    def bytes_of(self, layer: int, expert: int) -> torch.Tensor:
        """uint8 [block bytes]; raises `PlanError` if it is not here."""
        row = self._row(layer, expert)
        return self._rooms[layer][row]

    def experts(self, layer: int) -> dict[int, Expert]:
        """Those of a layer that are here, as weights over the same bytes."""
        room = self._rooms[layer].numpy()
        return {expert: self.block.views(room[row]) for expert, row in self._rows[layer].items()}

    def close(self) -> None:
        """Give the pages back to the driver and the system; idempotent."""
        self._pins.close()
        self._rooms.clear()
        self._rows.clear()

    def _row(self, layer: int, expert: int) -> int:
        row = self._rows.get(layer, {}).get(expert)
        if row is None:
            raise PlanError(
                f"expert {expert} of layer {layer} is not in host memory: its plan says that it never moves"
            )
        return row

    def _fill(
        self, layers: Mapping[int, Sequence[Expert]], kept: Kept, pin: bool, threads: int, progress: bool
    ) -> None:
        from tqdm.auto import tqdm

        size = self.block.num_bytes
        total = sum(map(len, kept.values())) * size
        bar = tqdm(total=total, desc="pin experts", unit="B", unit_scale=True, disable=not (progress and total))
        with bar, ThreadPoolExecutor(threads, "hybridlab-store") as pool:
            for layer, numbers in kept.items():
                if not numbers:
                    continue
                try:
                    # Filled first, pinned then: pages are touched by many threads instead of by the driver.
                    room = pages(len(numbers) * size).view(len(numbers), size)
                    list(pool.map(self.block.write, room.numpy(), [layers[layer][e] for e in numbers]))
                    if pin:
                        self._pins.pin(room)
                except RuntimeError as error:
                    done = self.num_bytes / 1e9
                    raise MemoryBudgetError(
                        f"pinned {done:.2f} of {total / 1e9:.2f} GB of experts, then the driver refused "
                        f"({str(error).splitlines()[0]}); raise the memlock limit (ulimit -l)"
                    ) from None
                self._rooms[layer], self._rows[layer] = room, {e: row for row, e in enumerate(numbers)}
                bar.update(len(numbers) * size)


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending rows as (first, end) of neighbours."""
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(rows)) if b != a + 1), len(rows)]
    return [(rows[a], rows[b - 1] + 1) for a, b in pairwise(cuts) if a < b]
