"""Limits are the smallest along the group's path, in both cgroup versions and inside containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridlab.hardware.cgroup import CgroupLimits, cgroup_limits

V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    return root


def test_no_cgroups_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == CgroupLimits()


def test_v2_takes_the_smallest_of_the_path(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/a/cpu.max": "150000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000",
        "sys/fs/cgroup/a/memory.max": "2000000000",
        "sys/fs/cgroup/a/memory.current": "900000000",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 400000000",
        "sys/fs/cgroup/a/b/memory.max": "4000000000",
        "sys/fs/cgroup/a/b/memory.high": "max",
    }
    found = cgroup_limits(tree(tmp_path, files))
    assert found == CgroupLimits("v2", 1.5, 2_000_000_000, 500_000_000)


def test_v2_counts_the_throttling_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/memory.max": "3000000000",
        "sys/fs/cgroup/memory.high": "1000000000",
    }
    assert cgroup_limits(tree(tmp_path, files)).memory_bytes == 1_000_000_000


def test_v1_reads_each_controller_at_its_mount(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job",
        "proc/self/mountinfo": (
            "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
            "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
        ),
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1073741824",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 300",
    }
    assert cgroup_limits(tree(tmp_path, files)) == CgroupLimits("v1", 4.0, 1 << 30, 700)


def test_container_sees_only_its_part_of_the_tree(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/docker/abc/inner",
        "proc/self/mountinfo": "31 23 0:28 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw",
        "sys/fs/cgroup/cpu.max": "800000 100000",
        "sys/fs/cgroup/inner/cpu.max": "200000 100000",
    }
    assert cgroup_limits(tree(tmp_path, files)).cpus == 2.0


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/below/the/mount"])
def test_paths_outside_the_mount_fall_back_to_it(tmp_path: Path, path: str) -> None:
    files = {
        "proc/self/cgroup": f"0::{path}",
        "proc/self/mountinfo": "31 23 0:28 /docker /sys/fs/cgroup ro - cgroup2 cgroup rw",
        "sys/fs/cgroup/cpu.max": "300000 100000",
    }
    assert cgroup_limits(tree(tmp_path, files)).cpus == 3.0


@pytest.mark.parametrize("text", ["", "garbage", "max", "-5 100000", "100000 0"])
def test_unreadable_limits_are_no_limit(tmp_path: Path, text: str) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/cpu.max": text,
        "sys/fs/cgroup/memory.max": "garbage",
    }
    found = cgroup_limits(tree(tmp_path, files))
    assert (found.cpus, found.memory_bytes) == (None, None)
