"""From what the machine says of itself to a `HardwareSpec`; measures nothing."""

from __future__ import annotations

from pathlib import Path

from hybridlab.hardware.cgroup import cgroup_limits
from hybridlab.hardware.cores import detect_cores
from hybridlab.hardware.gpu import detect_gpus
from hybridlab.hardware.host_memory import detect_host_memory
from hybridlab.spec import HardwareSpec


def detect(*, gpu: bool = False, root: Path = Path("/")) -> HardwareSpec:
    """This machine as strategies see it: usable cores and memory, rates still unknown (None).

    Args:
        gpu: also ask torch for CUDA devices (imports torch); then `device` is "cuda" if there is one.
        root: the file system root; tests pass a folder.
    """
    limits = cgroup_limits(root)
    cores = detect_cores(root, limits)
    gpus = detect_gpus() if gpu else ()
    return HardwareSpec(
        name=cores.name,
        device="cuda" if gpus else "cpu",
        num_cores=cores.usable,
        host_memory_bytes=detect_host_memory(root, limits).usable_bytes,
        gpu_memory_bytes=gpus[0].memory_bytes if gpus else 0,
    )
