"""The thread pool under concurrent callers, forks and more threads than cores."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from hybridlab import kernels

COMPILED = [tier for tier in kernels.supported_tiers() if tier != "numpy"]
N, K = 700, 600


def layer_and_input(tier: str) -> tuple[kernels.Linear, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x7F, (N, K), dtype=np.uint8)
    layer = kernels.linear(codes, np.ones((6, 5), np.float32), tier=tier)
    return layer, rng.standard_normal((3, K)).astype(np.float32)


@pytest.mark.parametrize("tier", COMPILED)
@pytest.mark.parametrize("callers", [2, 12])
def test_concurrent_callers(tier: str, callers: int) -> None:
    layer, x = layer_and_input(tier)
    expected = layer(x, threads=1)
    wrong: list[int] = []

    def call(which: int) -> None:
        for i in range(60):
            if not np.array_equal(layer(x, threads=1 + i % 3), expected):
                wrong.append(which)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("tier", COMPILED)
def test_more_threads_than_cores_or_rows(tier: str) -> None:
    layer, x = layer_and_input(tier)
    expected = layer(x, threads=1)
    np.testing.assert_array_equal(layer(x, threads=17), expected)
    small = kernels.linear(np.zeros((1, 1), np.uint8), np.ones((1, 1), np.float32), tier=tier)
    assert small(np.ones((1, 1), np.float32), threads=9) == 0


@pytest.mark.parametrize("tier", COMPILED)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_working_pool(tier: str) -> None:
    layer, x = layer_and_input(tier)
    expected = layer(x, threads=2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a lost wake-up would hang
        os._exit(0 if np.array_equal(layer(x, threads=2), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(layer(x, threads=2), expected)


@pytest.mark.parametrize("tier", COMPILED)
def test_native_seconds_grow(tier: str) -> None:
    layer, x = layer_and_input(tier)
    before = kernels.native_seconds()
    layer(x, threads=2)
    assert kernels.native_seconds() > before
