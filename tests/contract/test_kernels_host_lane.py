"""The host's lane: layers run in order, each when its word is set, and nobody is left waiting."""

import threading

import numpy as np
import pytest

from hybridlab import kernels
from hybridlab.kernels.host_lane import HostLane, HostOp

TOKENS, SLOTS, EXPERTS, HIDDEN, WIDTH = 3, 2, 4, 128, 96


def layer(seed: int, tier: str) -> kernels.MoeLayer:
    rng = np.random.default_rng(seed)

    def experts(n: int, k: int) -> list[np.ndarray]:
        return [
            (rng.standard_normal((n, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            for _ in range(EXPERTS)
        ]

    return kernels.moe_layer(experts(WIDTH, HIDDEN), experts(WIDTH, HIDDEN), experts(HIDDEN, WIDTH), tier=tier)


def op(seed: int, tier: str) -> HostOp:
    rng = np.random.default_rng(seed)
    words = np.zeros((2, 1), np.uint32)
    x = rng.standard_normal((TOKENS, HIDDEN), np.float32)
    ids = rng.integers(-1, EXPERTS, (TOKENS, SLOTS), np.int32)
    weights = rng.random((TOKENS, SLOTS), np.float32)
    return HostOp(words[0], words[1], layer(seed, tier), x, ids, weights, np.full_like(x, np.nan))


@pytest.fixture(params=kernels.supported_tiers())
def ops(request) -> list[HostOp]:
    return [op(seed, request.param) for seed in range(3)]


def test_each_layer_runs_once_its_word_is_set_and_equals_the_call_alone(ops):
    lane, stop = HostLane(ops), np.zeros(1, np.uint32)
    for _ in range(2):  # a step and the next one
        for one in ops:
            one.ready[0] = one.done[0] = 0
        times: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: times.append(lane.run(2, stop).copy()))  # noqa: B023
        thread.start()
        for one in ops:
            assert one.done[0] == 0
            one.ready[0] = 1
            while not one.done[0]:
                pass
            assert one.layer is not None
            expected = one.layer(one.x, one.ids, one.weights, threads=1)
            np.testing.assert_array_equal(one.out, expected)
        thread.join()
        assert (np.diff(times[0].ravel()) >= 0).all()


def test_stop_ends_the_wait_and_sets_every_word(ops):
    stop = np.zeros(1, np.uint32)
    thread = threading.Thread(target=lambda: HostLane(ops).run(1, stop))
    thread.start()
    stop[0] = 1
    thread.join(10)
    assert not thread.is_alive()
    assert all(one.done[0] == 1 for one in ops)
    assert all(np.isnan(one.out).all() for one in ops)


def test_bad_arrays_are_named(ops):
    one = ops[0]
    fields = {name: getattr(one, name) for name in ("ready", "done", "layer", "x", "ids", "weights", "out")}
    narrow = one.x[:, :64].copy()
    for changed, message in (
        ({"x": narrow, "out": narrow.copy()}, "x: expected 128 columns"),
        ({"out": one.out[:2]}, "out: expected a contiguous array"),
        ({"ids": one.ids.astype(np.int64)}, "ids: expected int32"),
        ({"weights": one.weights[:, ::-1]}, "weights: expected a contiguous array"),
        ({"ready": np.zeros(1, np.int32)}, "ready: expected uint32"),
    ):
        with pytest.raises(ValueError, match=message):
            HostLane([HostOp(**{**fields, **changed})])


def test_no_ops_is_a_lane_of_nothing():
    assert HostLane([]).run(1, np.zeros(1, np.uint32)).shape == (0, 2)
