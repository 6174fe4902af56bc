"""How many cores this process may use, and what they are."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from hybridlab.hardware.cgroup import CgroupLimits, cgroup_limits


@dataclass(frozen=True)
class Cores:
    """`usable` is what a thread pool should take: the affinity mask, cut by the cgroup quota.

    `l3_bytes` adds up the L3 caches; `flags` are the instruction-set extensions that the operating system
    reports. Both may be missing.
    """

    name: str
    usable: int
    affinity: int
    quota: float | None
    sockets: int
    numa_nodes: int
    l3_bytes: int | None
    flags: frozenset[str]


def detect_cores(root: Path = Path("/"), limits: CgroupLimits | None = None) -> Cores:
    """Look at affinity, quota and topology; never fails, falls back to `os.cpu_count`."""
    limits = limits if limits is not None else cgroup_limits(root)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Rounded down: a pool that spins on more threads than the quota pays for is stopped for whole periods.
    usable = affinity if limits.cpus is None else max(1, min(affinity, int(limits.cpus)))
    cpuinfo = _read(root / "proc/cpuinfo")
    return Cores(
        name=_field(cpuinfo, "model name") or platform.processor() or platform.machine() or "unknown CPU",
        usable=usable,
        affinity=affinity,
        quota=limits.cpus,
        sockets=len(set(re.findall(r"^physical id\s*:\s*(\d+)", cpuinfo, re.MULTILINE))) or 1,
        numa_nodes=len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or 1,
        l3_bytes=_l3_bytes(root),
        flags=frozenset((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split()),
    )


def _l3_bytes(root: Path) -> int | None:
    """All L3 caches together: many CPUs have one for each group of cores."""
    shift = {"": 0, "K": 10, "M": 20, "G": 30}
    size_of: dict[str, int] = {}
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        match = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size").strip())
        if match and _read(index / "level").strip() == "3":
            size_of[_read(index / "shared_cpu_list")] = int(match[1]) << shift[match[2]]
    return sum(size_of.values()) or None


def _field(cpuinfo: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
