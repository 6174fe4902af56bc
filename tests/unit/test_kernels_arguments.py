"""Wrong arguments to the kernels end in an error that names them, on every tier; never in a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybridlab import kernels
from hybridlab.errors import KernelError

F32 = np.float32
CODES, SCALE = np.zeros((130, 200), np.uint8), np.ones((2, 2), F32)
BITS = np.zeros((130, 200), np.uint16)
X = np.zeros((2, 200), F32)


@pytest.fixture(params=kernels.supported_tiers())
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("weight", "scale", "named"),
    [
        (CODES.astype(np.int8), SCALE, "weight"),
        (CODES.astype(F32), None, "weight"),
        (BITS.astype(">u2"), None, "weight"),
        (CODES[0], SCALE, "weight"),
        (CODES.T, SCALE, "weight"),
        (CODES[:, ::2], np.ones((2, 1), F32), "weight"),
        (CODES[:0], SCALE[:0], "weight"),
        (CODES.tolist(), SCALE, "weight"),
        (BITS, SCALE, "scale"),
        (CODES, None, "scale"),
        (CODES, SCALE.astype(np.float64), "scale"),
        (CODES, SCALE[:1], "scale"),
        (CODES, np.ones((2, 3), F32), "scale"),
        (CODES, np.ones((2, 4), F32)[:, ::2], "scale"),
        (CODES, SCALE.reshape(-1), "scale"),
    ],
)
def test_bad_weights(tier: str, weight: Any, scale: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kernels.linear(weight, scale, tier=tier)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _misaligned(shape: tuple[int, int]) -> np.ndarray:
    return np.zeros(4 * shape[0] * shape[1] + 1, np.uint8)[1:].view(F32).reshape(shape)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: f(X.astype(np.float64), threads=1), "x"),
        (lambda f: f(X[0], threads=1), "x"),
        (lambda f: f(X[:, :199], threads=1), "x"),
        (lambda f: f(np.zeros((2, 400), F32)[:, ::2], threads=1), "x"),
        (lambda f: f(np.zeros((200, 2), F32).T, threads=1), "x"),
        (lambda f: f(_misaligned((2, 200)), threads=1), "x"),
        (lambda f: f(None, threads=1), "x"),
        (lambda f: f(X, np.zeros((2, 131), F32), threads=1), "out"),
        (lambda f: f(X, np.zeros((3, 130), F32), threads=1), "out"),
        (lambda f: f(X, np.zeros((2, 130)), threads=1), "out"),
        (lambda f: f(X, _read_only(np.zeros((2, 130), F32)), threads=1), "out"),
        (lambda f: f(X, X.reshape(-1)[:260].reshape(2, 130), threads=1), "out"),
        (lambda f: f(X, threads=0), "threads"),
        (lambda f: f(X, threads=10**6), "threads"),
        (lambda f: f(X, threads=1.5), "threads"),
    ],
)
def test_bad_linear_calls(tier: str, call: Callable[[kernels.Linear], Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: "):
        call(kernels.linear(CODES, SCALE, tier=tier))


def experts(count: int = 3) -> tuple[list[Any], ...]:
    up, down = np.zeros((64, 130), np.uint16), np.zeros((130, 64), np.uint16)
    return [up] * count, [up] * count, [down] * count


def test_bad_experts(tier: str) -> None:
    gate, up, down = experts()
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("gate, up, down", lambda: kernels.moe_layer(gate, up[:2], down, tier=tier)),
        ("gate, up, down", lambda: kernels.moe_layer([], [], [], tier=tier)),
        ("gate", lambda: kernels.moe_layer([None], [None], [None], tier=tier)),
        (r"up\[1\]", lambda: kernels.moe_layer(gate, [up[0], None, up[0]], down, tier=tier)),
        (r"up\[2\]", lambda: kernels.moe_layer(gate, [*up[:2], down[0]], down, tier=tier)),
        (r"down\[0\]", lambda: kernels.moe_layer(gate, up, gate, tier=tier)),
        (r"gate\[0\]", lambda: kernels.moe_layer([g.astype(np.uint8) for g in gate], up, down, tier=tier)),
        (r"gate\[0\]", lambda: kernels.moe_layer(gate, up, down, [SCALE] * 3, tier=tier)),
        ("up_scale", lambda: kernels.moe_layer(gate, up, down, None, [None], tier=tier)),
    ]
    for named, build in cases:
        with pytest.raises(ValueError, match=rf"^{named}"):
            build()


def test_bad_routing(tier: str) -> None:
    moe = kernels.moe_layer(*experts(), tier=tier)
    x = np.zeros((2, 130), F32)
    ids, weights = np.zeros((2, 2), np.int32), np.zeros((2, 2), F32)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("expert_ids", (x, ids.astype(np.int64), weights)),
        ("expert_ids", (x, ids[:1], weights)),
        ("expert_ids", (x, np.zeros((2, 0), np.int32), np.zeros((2, 0), F32))),
        ("expert_ids", (x, np.zeros((2, 4), np.int32)[:, ::2], weights)),
        ("expert_ids", (x, np.full((2, 2), 3, np.int32), weights)),
        ("expert_ids", (x, np.full((2, 2), 2**31 - 1, np.int32), weights)),
        ("expert_weights", (x, ids, weights.astype(np.float64))),
        ("expert_weights", (x, ids, weights[:, :1])),
        ("x", (x[:, :129], ids, weights)),
        ("out", (x, ids, weights, x)),
    ]
    for named, arguments in cases:
        with pytest.raises(ValueError, match=rf"^{named}: "):
            moe(*arguments, threads=1)


def test_tier_comes_from_the_environment_and_must_be_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRIDLAB_ISA", raising=False)
    assert kernels.tier() == kernels.supported_tiers()[0]
    monkeypatch.setenv("HYBRIDLAB_ISA", "numpy")
    assert kernels.tier() == "numpy"
    assert kernels.linear(CODES, SCALE).tier == "numpy"
    monkeypatch.setenv("HYBRIDLAB_ISA", "sse9")
    with pytest.raises(KernelError, match=r"HYBRIDLAB_ISA.*sse9"):
        kernels.tier()
    with pytest.raises(KernelError, match="neon"):
        kernels.linear(CODES, SCALE, tier="neon")


@pytest.mark.parametrize("size", [0, 1, 8, 1000, 4096 * 3 + 5, 1 << 20])
def test_read_loop_reads_every_byte(tier: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDLAB_ISA", tier)
    raw = np.random.default_rng(0).integers(0, 256, size + 3, dtype=np.uint8)[3:]
    padded = raw.tobytes() + bytes(-size % 8)
    expected = int(np.frombuffer(padded, np.uint64).sum(dtype=np.uint64))
    for threads in (1, 2, 3):
        assert kernels.read_bandwidth_bytes(raw, threads) == expected
    with pytest.raises(ValueError, match="buffer"):
        kernels.read_bandwidth_bytes(raw.astype(np.int8), 1)  # pyright: ignore[reportArgumentType]
