"""One expert's weights as one run of bytes: what a ring slot holds, expert after expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.errors import PlanError

ALIGNMENT = 64
Expert = tuple[LinearWeights, LinearWeights, LinearWeights]
"""Gate, up and down."""


@dataclass(frozen=True)
class ExpertBlock:
    """(offset, shape, dtype) of gate, up, down and, for FP8, of their scales; each offset is a multiple of 64."""

    weights: tuple[tuple[int, tuple[int, ...], np.dtype], ...]
    scales: tuple[tuple[int, tuple[int, ...], np.dtype], ...]
    num_bytes: int

    @classmethod
    def of(cls, expert: Expert) -> ExpertBlock:
        """The block that holds an expert like this one."""
        at = 0

        def place(array: np.ndarray) -> tuple[int, tuple[int, ...], np.dtype]:
            nonlocal at
            offset, at = at, -(-(at + array.nbytes) // ALIGNMENT) * ALIGNMENT
            return offset, array.shape, array.dtype

        weights = tuple(place(linear.weight) for linear in expert)
        scales = tuple(place(linear.scale) for linear in expert if linear.scale is not None)
        return cls(weights, scales, at)

    def views(self, block: np.ndarray) -> Expert:
        """Gate, up and down as arrays over `block` (uint8, `num_bytes` long); they have no name, since they change."""
        weights = [self._view(block, *field) for field in self.weights]
        scales = [self._view(block, *field) for field in self.scales] or [None, None, None]
        gate, up, down = (LinearWeights("", w, s) for w, s in zip(weights, scales, strict=True))
        return gate, up, down

    def pieces(self, expert: Expert) -> list[tuple[int, np.ndarray]]:
        """(offset, bytes) of each array of `expert`, which must be of this block's shape."""
        result = []
        arrays = [linear.weight for linear in expert] + [linear.scale for linear in expert if linear.scale is not None]
        for (offset, shape, dtype), array in zip((*self.weights, *self.scales), arrays, strict=True):
            if array.shape != shape or array.dtype != dtype:
                found, expected = f"{array.dtype} {list(array.shape)}", f"{dtype} {list(shape)}"
                raise PlanError(f"{expert[0].name}: {found}, the ring's slots hold experts of {expected}")
            result.append((offset, array.reshape(-1).view(np.uint8)))
        return result

    def write(self, target: np.ndarray, expert: Expert) -> None:
        """`expert` into `target` (uint8, `num_bytes` long)."""
        for offset, source in self.pieces(expert):
            target[offset : offset + len(source)] = source

    @staticmethod
    def _view(block: np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return block[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def experts_of(groups: Sequence[Sequence[LinearWeights]]) -> list[Expert]:
    """From (all gates, all ups, all downs) of a layer to one triple per expert."""
    return [(gate, up, down) for gate, up, down in zip(*groups, strict=True)]
