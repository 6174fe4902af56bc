"""Host memory that a CUDA device copies from and to by itself."""

from __future__ import annotations

import mmap
from typing import Any

import torch

from hybridlab.hardware.pinning import forget_error

_READ_ONLY = 8  # cudaHostRegisterReadOnly


def pages(num_bytes: int) -> torch.Tensor:
    """Zeros, flat uint8, in pages of their own (huge ones where the system gives them) that nobody has touched yet."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Pins:
    """Memory that is pinned in place; `close` gives it back to the system."""

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor] = []

    def pin(self, room: torch.Tensor, *, read_only: bool = False) -> None:
        """Register the memory of `room` with CUDA; raises RuntimeError when the driver refuses.

        Memory that this process cannot write is `read_only`, which not every driver takes.
        """
        runtime: Any = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(room.data_ptr(), room.nbytes, _READ_ONLY if read_only else 0))
        if status != 0:
            forget_error()
            raise RuntimeError(f"cudaHostRegister: error {status}")
        self._pinned.append(room)

    def close(self) -> None:
        """Idempotent."""
        runtime: Any = torch.cuda.cudart() if self._pinned else None
        for room in self._pinned:
            runtime.cudaHostUnregister(room.data_ptr())
        self._pinned.clear()
