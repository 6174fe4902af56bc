"""The expert layers of a step on one thread, each as soon as another processor says that its inputs are there.

No interpreter stands between the layers: on a GPU machine a thread that waits in Python costs some 100 us a layer
(docs/decisions/0014). Legend: T tokens, K experts of a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

import numpy as np
from numpy.typing import NDArray

from hybridlab.kernels import MoeLayer, address, native


@dataclass(frozen=True)
class HostOp:
    """One layer: when `ready` (uint32 [1]) is not 0, `out` [T, H] = layer(x [T, H], ids int32, weights [T, K]).

    `done` (uint32 [1]) becomes 1 once `out` is written. `layer` None computes nothing, to time the hand-off alone.
    Arrays are C-contiguous and stay where they are; ids must name experts that the layer has, or be negative.
    """

    ready: np.ndarray
    done: np.ndarray
    layer: MoeLayer | None
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    out: np.ndarray


class HostLane:
    """Runs `ops` one after another, as often as `run` is called; ids are not checked."""

    def __init__(self, ops: Sequence[HostOp]) -> None:
        self.ops = tuple(ops)
        for op in self.ops:
            _check(op)
        self.times = np.zeros((len(self.ops), 2))
        """Of the last run, as it returned them."""
        layers = [op.layer for op in self.ops if op.layer is not None]
        self._native = None
        if native is not None and all(layer.native_layer is not None for layer in layers):
            self._native = native.HostLane([_addresses(op) for op in self.ops])

    def run(self, threads: int, stop: np.ndarray) -> NDArray[np.float64]:
        """Seconds [ops, 2] on `time.perf_counter` when each op began and ended; blocks, without the GIL.

        A value other than 0 in `stop` (uint32 [1]) ends the wait for inputs that do not come. Every `done` is set at
        the end, whatever happened.
        """
        if self._native is None:
            self._run_plain(threads, stop)
        else:
            self._native.run(threads, address(stop), address(self.times))
        return self.times

    def _run_plain(self, threads: int, stop: np.ndarray) -> None:
        try:
            for op, times in zip(self.ops, self.times, strict=True):
                while not op.ready[0] and not stop[0]:
                    sleep(0)
                times[0] = perf_counter()
                if op.layer is not None and not stop[0]:
                    op.layer(op.x, op.ids, op.weights, op.out, threads=threads)
                times[1] = perf_counter()
                op.done[0] = 1
        finally:
            for op in self.ops:
                op.done[0] = 1


def _check(op: HostOp) -> None:
    tokens, slots = op.ids.shape
    expected = {"ids": (tokens, slots), "weights": (tokens, slots), "out": op.x.shape, "ready": (1,), "done": (1,)}
    for name, shape in expected.items():
        array = getattr(op, name)
        if array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected a contiguous array {list(shape)}, got {list(array.shape)}")
    types = {
        "x": "float32",
        "ids": "int32",
        "weights": "float32",
        "out": "float32",
        "ready": "uint32",
        "done": "uint32",
    }
    for name, kind in types.items():
        if (found := getattr(op, name).dtype) != kind:
            raise ValueError(f"{name}: expected {kind}, got {found}")
    if len(op.x) != tokens:
        raise ValueError(f"x: expected {tokens} rows as ids has, got {len(op.x)}")
    if op.layer is not None and op.layer.width != op.x.shape[1]:
        raise ValueError(f"x: expected {op.layer.width} columns as the layer has, got {op.x.shape[1]}")


def _addresses(op: HostOp) -> tuple:
    held = None if op.layer is None else op.layer.native_layer
    arrays = (address(array) for array in (op.x, op.ids, op.weights, op.out))
    return (address(op.ready), address(op.done), held, *arrays, *op.ids.shape)
