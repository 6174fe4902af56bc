"""Memory of a device that other processes map as well, and what stands for it where the device is torch's CPU."""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from typing import Protocol

import torch

from hybridlab.engine.cuda_mapped import CudaMemory

NAME = "hybridlab-device"
"""As /proc/PID/maps shows what stands for a device's memory."""


class DeviceMemory(Protocol):
    """`whole` is uint8, flat. It and its views are good until the last of them is gone, whatever ends elsewhere."""

    whole: torch.Tensor

    def export(self) -> int:
        """A descriptor of the same memory, which the caller then owns. It keeps the memory, as a mapping does."""
        ...


class PlainMemory:
    """A memfd."""

    def __init__(self, descriptor: int, num_bytes: int, *, writable: bool) -> None:
        self._descriptor = os.dup(descriptor)
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            memory = mmap.mmap(self._descriptor, num_bytes, mmap.MAP_SHARED, protection)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"mmap: {error}") from None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes to it
            self.whole = torch.frombuffer(memory, dtype=torch.uint8)

    @classmethod
    def create(cls, num_bytes: int) -> PlainMemory:
        """Zeros, to be written."""
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, num_bytes)
            return cls(descriptor, num_bytes, writable=True)
        finally:
            os.close(descriptor)

    def export(self) -> int:
        return os.dup(self._descriptor)


def create_memory(num_bytes: int, device: torch.device) -> DeviceMemory:
    """Memory of `device` to be filled; raises RuntimeError where it cannot be had, or not be shared."""
    return CudaMemory.create(num_bytes, device) if device.type == "cuda" else PlainMemory.create(num_bytes)


def attach_memory(descriptor: int, num_bytes: int, device: torch.device) -> DeviceMemory:
    """Memory that another process has exported, to be read; `descriptor` stays the caller's. Raises RuntimeError."""
    if device.type == "cuda":
        return CudaMemory.attach(descriptor, num_bytes, device)
    return PlainMemory(descriptor, num_bytes, writable=False)
