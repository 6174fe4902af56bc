"""Where the kernels read weights from: the memory-mapped checkpoint, or tiles packed into huge pages at load."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import numpy as np

from hybridlab import kernels
from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.errors import ConfigError
from hybridlab.kernels import layouts as kernel_layouts
from hybridlab.kernels.checks import Weight

WeightLayout = Literal["rows", "tiles"]

ARENA_BYTES = 2**28
"""NumPy asks for huge pages for arrays of this size: a page walk every 4 KiB costs a random expert some 10% of DRAM."""


def check_weight_layout(layout: str) -> None:
    """Raises `ConfigError` for an unknown one."""
    if layout not in get_args(WeightLayout):
        expected = " or ".join(map(repr, get_args(WeightLayout)))
        raise ConfigError(f"weight_layout is {layout!r:.40}, expected {expected}")


class WeightSource(Protocol):
    """Gives a linear layer's weights in the layout that its kernel reads."""

    @property
    def num_packed(self) -> int:
        """Weights that this process has packed."""
        ...

    def __call__(self, weights: LinearWeights) -> Weight: ...


class Rows:
    """As in the checkpoint: nothing is copied."""

    num_packed = 0

    def __call__(self, weights: LinearWeights) -> Weight:
        return weights.weight, weights.scale


class Tiles:
    """A packed copy of each weight, made the first time it is asked for."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._packed: dict[str, kernels.Packed] = {}
        self._arena = np.empty(0, np.uint8)

    @property
    def num_packed(self) -> int:
        return len(self._packed)

    def __call__(self, weights: LinearWeights) -> Weight:
        if (packed := self._packed.get(weights.name)) is None:
            n, k = weights.weight.shape
            room = self._take(kernel_layouts.packed_bytes(n, k, weights.weight.itemsize))
            packed = kernels.pack(weights.weight, weights.scale, out=room, threads=self._threads)
            self._packed[weights.name] = packed
        return packed, packed.scale

    def _take(self, size: int) -> np.ndarray:
        if size > len(self._arena):
            self._arena = kernel_layouts.aligned(max(size, ARENA_BYTES))
        room, self._arena = self._arena[:size], self._arena[size:]
        return room


def weight_source(layout: WeightLayout, threads: int) -> WeightSource:
    """`Rows` or `Tiles`."""
    return Tiles(threads) if layout == "tiles" else Rows()
