"""One copy of the expert weights in pinned host memory: what the link copies from and the CPU's kernels read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hybridlab.engine.pinned import Pins, pages
from hybridlab.errors import MemoryBudgetError
from hybridlab.model.expert_block import Expert, ExpertBlock


class HostStore:
    """A layer's experts lie one after another as blocks, so that a part of neighbouring experts is one copy.

    `blocks(layer)` uint8 [E, block bytes], pinned by `pins`; `experts(layer)` the same bytes as weights.
    """

    def __init__(self, block: ExpertBlock, layers: dict[int, torch.Tensor], pins: Pins) -> None:
        self.block = block
        self._layers, self._pins = layers, pins

    @classmethod
    def filled(
        cls,
        layers: Mapping[int, Sequence[Expert]],
        block: ExpertBlock,
        *,
        pin: bool,
        threads: int,
        progress: bool = False,
    ) -> HostStore:
        """With a copy of its own of all `layers`."""
        store = cls(block, {}, Pins())
        try:
            store._fill(layers, pin, threads, progress)
        except BaseException:
            store.close()
            raise
        return store

    def blocks(self, layer: int) -> torch.Tensor:
        return self._layers[layer]

    def experts(self, layer: int) -> list[Expert]:
        return [self.block.views(block) for block in self._layers[layer].numpy()]

    def close(self) -> None:
        """Give the pages back to the driver; idempotent."""
        self._pins.close()

    def _fill(self, layers: Mapping[int, Sequence[Expert]], pin: bool, threads: int, progress: bool) -> None:
        from tqdm.auto import tqdm

        size = self.block.num_bytes
        total = sum(len(experts) for experts in layers.values()) * size
        bar = tqdm(total=total, desc="pin experts", unit="B", unit_scale=True, disable=not progress)
        with bar, ThreadPoolExecutor(threads, "hybridlab-store") as pool:
            for layer, experts in layers.items():
                try:
                    # Filled first, pinned then: pages are touched by many threads instead of by the driver.
                    room = pages(len(experts) * size).view(len(experts), size)
                    list(pool.map(self._write, room.numpy(), experts))
                    if pin:
                        self._pins.pin(room)
                    self._layers[layer] = room
                except RuntimeError as error:
                    done = len(self._layers) * len(experts) * size
                    raise MemoryBudgetError(
                        f"pinned {done / 1e9:.2f} of {total / 1e9:.2f} GB of experts, then the driver refused "
                        f"({str(error).splitlines()[0]}); raise the memlock limit (ulimit -l)"
                    ) from None
                bar.update(len(experts) * size)

    def _write(self, target: np.ndarray, expert: Expert) -> None:
        for offset, source in self.block.pieces(expert):
            target[offset : offset + len(source)] = source
