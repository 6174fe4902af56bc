"""What the machine says of itself becomes a HardwareSpec, whatever is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlab.hardware import detect
from hybridlab.hardware.cgroup import CgroupLimits
from hybridlab.hardware.cores import detect_cores
from hybridlab.hardware.host_memory import detect_host_memory

CPUINFO = """\
processor\t: 0
model name\t: Test CPU 9000
physical id\t: 0
flags\t\t: fpu avx2 avx512_bf16
processor\t: 1
model name\t: Test CPU 9000
physical id\t: 1
flags\t\t: fpu avx2 avx512_bf16
"""
MEMINFO = "MemTotal:       1000000 kB\nMemFree:  100 kB\nMemAvailable:    600000 kB\n"


def test_cores_follow_affinity_and_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert detect_cores(tmp_path, CgroupLimits()).usable == 8
    assert detect_cores(tmp_path, CgroupLimits(cpus=3.7)).usable == 3
    assert detect_cores(tmp_path, CgroupLimits(cpus=0.2)).usable == 1
    assert detect_cores(tmp_path, CgroupLimits(cpus=64.0)).usable == 8


def test_cores_without_affinity_count_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    cores = detect_cores(tmp_path, CgroupLimits())
    assert (cores.usable, cores.sockets, cores.numa_nodes, cores.l3_bytes) == (6, 1, 1, None)
    assert cores.name


def test_topology_is_read(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO, encoding="ascii")
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        cache = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index3"
        cache.mkdir(parents=True)
        for name, text in (("level", "3"), ("size", "32768K"), ("shared_cpu_list", shared)):
            (cache / name).write_text(text + "\n", encoding="ascii")
    for node in range(2):
        (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    cores = detect_cores(tmp_path, CgroupLimits())
    assert (cores.name, cores.sockets, cores.numa_nodes) == ("Test CPU 9000", 2, 2)
    assert cores.l3_bytes == 2 * 32 * 2**20
    assert {"avx2", "avx512_bf16"} <= cores.flags


def test_memory_is_cut_by_the_limit(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO, encoding="ascii")
    free = detect_host_memory(tmp_path, CgroupLimits())
    assert (free.usable_bytes, free.available_bytes, free.limit_bytes) == (1_024_000_000, 614_400_000, None)
    cut = detect_host_memory(tmp_path, CgroupLimits(memory_bytes=10**9, memory_used_bytes=9 * 10**8))
    assert (cut.usable_bytes, cut.available_bytes, cut.limit_bytes) == (10**9, 10**8, 10**9)
    wide = detect_host_memory(tmp_path, CgroupLimits(memory_bytes=10**12))
    assert wide == free


def test_memory_without_proc_asks_the_system(tmp_path: Path) -> None:
    memory = detect_host_memory(tmp_path, CgroupLimits())
    assert 0 < memory.available_bytes <= memory.usable_bytes


def test_detect_measures_nothing_and_imports_no_torch() -> None:
    source = (
        "import sys; from hybridlab.hardware import detect; spec = detect();"
        "assert spec.device == 'cpu' and spec.host_read_gb_s is None and spec.link_gb_s is None;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


def test_detect_here() -> None:
    spec = detect(gpu=True)
    assert spec.device in ("cpu", "cuda")
    assert (spec.gpu_memory_bytes > 0) == (spec.device == "cuda")
    assert spec.num_cores >= 1
    assert spec.host_memory_bytes > 0
