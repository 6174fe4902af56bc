"""How fast bytes cross between host and GPU: pinned copies, timed by CUDA events. Needs CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from hybridlab.errors import HybridlabError


@dataclass(frozen=True)
class LinkProbe:
    """Median rates in GB/s (1e9 bytes) of one pinned copy at a time, in each direction."""

    gpu: int
    h2d_gb_s: float
    d2h_gb_s: float
    h2d_spread_gb_s: tuple[float, float]
    d2h_spread_gb_s: tuple[float, float]
    repeats: int
    buffer_bytes: int

    def __str__(self) -> str:
        return (
            f"to the GPU {self.h2d_gb_s:.1f} GB/s, from it {self.d2h_gb_s:.1f} GB/s"
            f" ({self.repeats} pinned copies of {self.buffer_bytes / 2**20:.0f} MiB)"
        )


def probe_link(gpu: int = 0, *, repeats: int = 7, buffer_bytes: int = 256 << 20) -> LinkProbe:
    """Measure the link of one GPU.

    Raises:
        HybridlabError: torch has no CUDA device `gpu`.
    """
    import torch

    if not torch.cuda.is_available() or not 0 <= gpu < torch.cuda.device_count():
        raise HybridlabError(f"link probe: torch sees no CUDA device {gpu}")
    device = torch.device("cuda", gpu)
    host = torch.ones(buffer_bytes, dtype=torch.uint8).pin_memory()
    there = torch.empty(buffer_bytes, dtype=torch.uint8, device=device)

    def rates(target: torch.Tensor, source: torch.Tensor) -> list[float]:
        found = []
        with torch.cuda.device(device):
            for _ in range(repeats + 1):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                target.copy_(source, non_blocking=True)
                end.record()
                end.synchronize()
                found.append(buffer_bytes / start.elapsed_time(end) / 1e6)
        return found[1:]  # the first one wakes the link from its low-power state

    h2d, d2h = rates(there, host), rates(host, there)
    return LinkProbe(gpu, median(h2d), median(d2h), (min(h2d), max(h2d)), (min(d2h), max(d2h)), repeats, buffer_bytes)
