"""Which CUDA devices torch can use. Asking imports torch, so nothing here runs unless it is called."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]


def detect_gpus() -> tuple[Gpu, ...]:
    """CUDA devices in torch's order; empty without torch, without CUDA, or if the driver does not answer."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        found.append(Gpu(index, properties.name, properties.total_memory, capability))
    return tuple(found)


def free_memory_bytes(index: int = 0) -> int:
    """What nobody uses now of a CUDA device's memory; this process gets a context on it."""
    import torch

    free, _ = torch.cuda.mem_get_info(index)
    return int(free)
