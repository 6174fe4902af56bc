"""Experts that live on the device for good, on their way there from the checkpoint or from shared memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from hybridlab.engine.pinned import Pins, pages
from hybridlab.model.expert_block import Expert, ExpertBlock


class Staging:
    """One buffer, which many threads fill with the blocks of up to `most` experts before they are copied as one.

    Use it as a context manager: at its end the buffer is given back.
    """

    def __init__(
        self,
        layers: Mapping[int, Mapping[int, Expert] | Sequence[Expert]],
        block: ExpertBlock,
        most: int,
        *,
        pin: bool,
        threads: int,
    ) -> None:
        self._layers, self._block, self._pins = layers, block, Pins()
        self._room = pages(max(1, most) * block.num_bytes).view(-1, block.num_bytes)
        if pin and most:
            with suppress(RuntimeError):  # pageable memory is slower, and good enough for once
                self._pins.pin(self._room)
        self._pool = ThreadPoolExecutor(threads, "hybridlab-staging")

    def copy(self, layer: int, experts: Sequence[int], target: torch.Tensor) -> None:
        """As `HostStore.copy`, and wait until they are there."""
        room = self._room[: len(experts)]
        list(self._pool.map(self._block.write, room.numpy(), [self._layers[layer][e] for e in experts]))
        target[: len(experts)].copy_(room)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._pins.close()
