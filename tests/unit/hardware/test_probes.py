"""Probes report rates of what they were asked to read, and refuse what they cannot measure."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hybridlab import kernels
from hybridlab.errors import HybridlabError
from hybridlab.hardware import probe_link, read_bandwidth, read_bandwidth_gb_s

SIZE = 1 << 22


@pytest.mark.parametrize("loop", ["numpy", "auto"])
@pytest.mark.parametrize("threads", [1, 2])
def test_read_bandwidth(loop: str, threads: int) -> None:
    probe = read_bandwidth_gb_s(threads, repeats=3, buffer_bytes=SIZE, loop=loop)
    assert (probe.threads, probe.repeats, probe.buffer_bytes) == (threads, 3, SIZE)
    assert 0 < probe.min_gb_s <= probe.median_gb_s <= probe.max_gb_s < 100_000
    assert probe.loop == ("numpy" if loop == "numpy" or kernels.tier() == "numpy" else "native")
    assert f"{probe.median_gb_s:.1f} GB/s" in str(probe)


def test_rate_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a reader that takes 20 ms for a buffer of 4 MiB: 0.2 GB/s, never more."""

    def slow(loop: str, threads: int):
        return (lambda buffer: time.sleep(0.02)), "slow"

    monkeypatch.setattr(read_bandwidth, "_reader", slow)
    probe = read_bandwidth_gb_s(1, repeats=3, buffer_bytes=SIZE)
    assert 0.01 < probe.median_gb_s <= SIZE / 0.02 / 1e9


def test_loops_read_every_word() -> None:
    buffer = np.zeros(SIZE // 8, dtype=np.uint64)
    buffer[[0, -1]] = 3, 4
    assert kernels.read_bandwidth_bytes(buffer.view(np.uint8), 2) == 7


@pytest.mark.parametrize(
    "options",
    [{"threads": 0}, {"repeats": 0}, {"buffer_bytes": 0}, {"loop": "fast"}],
)
def test_impossible_probes_are_refused(options: dict) -> None:
    with pytest.raises(HybridlabError, match="read bandwidth: "):
        read_bandwidth_gb_s(**{"threads": 1, "repeats": 1, "buffer_bytes": SIZE, **options})


def test_native_loop_needs_a_native_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDLAB_ISA", "numpy")
    assert read_bandwidth_gb_s(1, repeats=1, buffer_bytes=SIZE).loop == "numpy"
    with pytest.raises(HybridlabError, match="no compiled kernel"):
        read_bandwidth_gb_s(1, repeats=1, buffer_bytes=SIZE, loop="native")


def test_link_probe_names_the_missing_device() -> None:
    with pytest.raises(HybridlabError, match="no CUDA device 99"):
        probe_link(99)
