"""What the doctor says of pinned memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from hybridlab.hardware import doctor, pinning
from hybridlab.hardware.pinning import Pinning, detect_pinning, pinnable_bytes


def test_the_limit_is_the_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    expected = None if soft == resource.RLIM_INFINITY else soft
    assert detect_pinning(gpu=False).memlock_bytes == expected
    for limit, found in ((12345, 12345), (resource.RLIM_INFINITY, None)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        assert detect_pinning(gpu=False).memlock_bytes == found


@pytest.mark.parametrize("text, found", [("always [madvise] never\n", "madvise"), ("[never]", "never"), ("", "")])
def test_huge_pages_as_the_system_has_them(tmp_path: Path, text: str, found: str) -> None:
    assert detect_pinning(gpu=False, root=tmp_path).huge_pages == ""
    file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert detect_pinning(gpu=False, root=tmp_path).huge_pages == found


def test_each_finding_is_said() -> None:
    words = str(Pinning(8 << 20, "never", None))
    assert words == "not tried: no GPU; memlock limit 8 MiB; no transparent huge pages"
    assert str(Pinning(None, "madvise", True)).startswith("CUDA pins 64 MiB in place; no memlock limit; ")
    assert str(Pinning(2 << 30, "", False)) == ("CUDA refuses to pin 64 MiB; memlock limit 2.0 GiB; huge pages unknown")
    assert "memlock limit 8 MiB (CUDA does not heed it)" in str(Pinning(8 << 20, "", True))
    report = doctor(probe=False, gpu=False)
    assert f"pinned memory  {report.pinning}" in str(report) and report.as_dict()["pinning"]["registered"] is None


@pytest.mark.parametrize("driver", ["counts nobody's pages", "counts pages", "pins nothing"])
def test_the_limit_counts_where_the_driver_heeds_it(monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    limits = [(1 << 30, 4 << 30)]

    def registers(num_bytes: int) -> bool:
        return driver == "counts nobody's pages" or (driver == "counts pages" and num_bytes <= limits[-1][0])

    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pinning, "_registers", registers)
    assert pinnable_bytes() == {"counts nobody's pages": None, "counts pages": 1 << 30, "pins nothing": 0}[driver]
    lowered = [] if driver == "pins nothing" else [(0, 4 << 30), (1 << 30, 4 << 30)]
    assert limits == [(1 << 30, 4 << 30), *lowered]  # as it was
    limits[-1] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert pinnable_bytes() is None


def test_without_a_gpu_nothing_limits_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resource, "setrlimit", None)  # not even tried
    assert pinnable_bytes() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_a_limit_that_is_said_to_bind_does() -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = pinnable_bytes()
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == before
    assert limit is None or not pinning._registers(limit + (1 << 20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda_says_whether_it_pins() -> None:
    assert detect_pinning(gpu=True).registered is not None
