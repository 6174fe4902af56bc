"""How much memory this process may use."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from hybridlab.hardware.cgroup import CgroupLimits, cgroup_limits


@dataclass(frozen=True)
class HostMemory:
    """`usable_bytes` is the machine's memory cut by the cgroup limit; `available_bytes` is free of it now."""

    usable_bytes: int
    available_bytes: int
    total_bytes: int
    limit_bytes: int | None


def detect_host_memory(root: Path = Path("/"), limits: CgroupLimits | None = None) -> HostMemory:
    """Read /proc/meminfo and the cgroup limit; elsewhere ask the operating system (0 if it does not say)."""
    limits = limits if limits is not None else cgroup_limits(root)
    total, available = _meminfo(root) or _asked_from_system()
    limit = limits.memory_bytes
    if limit is None or (total and limit >= total):
        return HostMemory(total, available, total, None)
    room = max(0, limit - (limits.memory_used_bytes or 0))
    return HostMemory(limit, min(available, room) if total else room, total, limit)


def _meminfo(root: Path) -> tuple[int, int] | None:
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s*(\d+) kB", text, re.MULTILINE)}
    if "MemTotal" not in kib:
        return None
    return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib.get("MemFree", kib["MemTotal"])) * 1024


def _asked_from_system() -> tuple[int, int]:
    if sys.platform == "win32":
        return _windows()
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0, 0
    try:
        return total, page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):  # macOS does not know it
        return total, total


def _windows() -> tuple[int, int]:
    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return 0, 0
    return status.total, status.available
