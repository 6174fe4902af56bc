"""CPU and memory limits of the control group that this process runs in (cgroup v1, v2 or both; Linux only).

Limits hold along the whole path from the process's group to the root, so the smallest one counts. Whatever is
missing or unreadable means "no limit": a machine without cgroups is not an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# v1 writes "no limit" as the largest multiple of the page size in an int64.
_V1_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class CgroupLimits:
    """Limits of this process; None means unlimited. `cpus` is quota/period, so it may be a fraction.

    `memory_used_bytes` leaves out the page cache that the kernel can drop, and is known only with a limit.
    """

    version: str = "none"
    cpus: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None


def cgroup_limits(root: Path = Path("/")) -> CgroupLimits:
    """Read the limits; `root` stands for the file system root (tests pass a folder)."""
    cpus: float | None = None
    memory: int | None = None
    used: int | None = None
    versions: set[str] = set()
    for kind, group, top in _groups(root):
        versions.add("v2" if kind == "v2" else "v1")
        for folder in _upwards(group, top):
            quota = _v2_cpus(folder) if kind == "v2" else _v1_cpus(folder) if kind == "cpu" else None
            if quota is not None:
                cpus = quota if cpus is None else min(cpus, quota)
            limit = _memory_limit(folder, kind)
            if limit is not None and (memory is None or limit < memory):
                memory, used = limit, _memory_used(folder, kind)
    return CgroupLimits("+".join(sorted(versions)) or "none", cpus, memory, used)


def _groups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield (kind, this process's folder, the mount point above it); kind is "v2", "cpu" or "memory"."""
    paths: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in ["v2"] if number == "0" and not controllers else controllers.split(","):
            paths[name] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, tail = line.partition(" - ")
        columns, source = fields.split(), tail.split()
        if len(columns) < 5 or not source or source[0] not in ("cgroup", "cgroup2"):
            continue
        mounted = ["v2"] if source[0] == "cgroup2" else source[-1].split(",")
        top = root / columns[4].lstrip("/")
        for kind in ("v2", "cpu", "memory"):
            if kind in mounted and kind in paths:
                yield kind, top / _below(paths[kind], columns[3]), top


def _below(path: str, mount_root: str) -> PurePosixPath:
    """Where `path` lies below a mount of `mount_root`; a container may see only its own part of the tree."""
    try:
        inside = PurePosixPath(path).relative_to(mount_root)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in inside.parts else inside


def _upwards(folder: Path, top: Path) -> Iterator[Path]:
    while True:
        yield folder
        if folder == top:
            return
        folder = folder.parent


def _v1_cpus(folder: Path) -> float | None:
    quota, period = _int(folder / "cpu.cfs_quota_us"), _int(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _v2_cpus(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    if not words or not words[0].isdigit():
        return None
    period = int(words[1]) if len(words) > 1 else 100_000
    return int(words[0]) / period if period else None


def _memory_limit(folder: Path, kind: str) -> int | None:
    if kind == "cpu":
        return None
    # Above memory.high the kernel throttles the process until it crawls, so it is a limit too.
    names = ("memory.max", "memory.high") if kind == "v2" else ("memory.limit_in_bytes",)
    limits = [n for name in names if (n := _int(folder / name)) is not None and n < _V1_UNLIMITED_BYTES]
    return min(limits, default=None)


def _memory_used(folder: Path, kind: str) -> int | None:
    used = _int(folder / ("memory.current" if kind == "v2" else "memory.usage_in_bytes"))
    if used is None:
        return None
    wanted = "inactive_file" if kind == "v2" else "total_inactive_file"
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == wanted and value.strip().isdigit():
            return max(0, used - int(value))
    return used


def _int(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
