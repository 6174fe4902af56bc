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


def read_gb_s(index: int = 0, *, repeats: int = 7, buffer_bytes: int = 1 << 30) -> float:
    """GB/s (1e9 bytes) of a CUDA device's memory while it copies within it: each byte is read and written; median."""
    from statistics import median

    import torch

    device = torch.device("cuda", index)
    source, target = (torch.ones(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    rates = []
    with torch.cuda.device(device):
        for _ in range(repeats + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            rates.append(2 * buffer_bytes / start.elapsed_time(end) / 1e6)
    del source, target
    torch.cuda.empty_cache()
    return median(rates[1:])
