"""Where a model's weights on a device come from: made there, or listed first, for memory that several workers have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch

ALIGNMENT = 512
"""As of what torch's allocator gives: cuBLAS chooses kernels by it."""
Fill = Callable[[torch.Tensor], None]
"""Writes what a tensor is to hold, once; on the device it may be enqueued."""


class DeviceWeights(Protocol):
    """Tensors by name that nobody writes to once they are filled."""

    def make(self, name: str, shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        """The tensor of that name, after `fill` if it holds nothing yet. One name, one tensor."""
        ...


class OwnWeights:
    """A copy for one process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[str, torch.Tensor] = {}

    def make(self, name: str, shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        if name not in self._made:
            tensor = self._made[name] = torch.empty(*shape, dtype=dtype, device=self._device)
            fill(tensor)
        return self._made[name]


class ListedWeights:
    """What a model asks for: nothing is allocated or filled.

    `sizes` are bytes by name, shape and dtype, in whole pieces of `ALIGNMENT`: one after another, all are aligned so.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def make(self, name: str, shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        self.sizes[full_name(name, shape, dtype)] = -(-size // ALIGNMENT) * ALIGNMENT
        return torch.empty(*shape, dtype=dtype, device="meta")


def full_name(name: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """A name that no tensor of another form has."""
    return f"{name} {str(dtype).removeprefix('torch.')} {list(shape)}"
