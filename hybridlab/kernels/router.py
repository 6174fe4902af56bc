"""What stands before the experts of a MoE layer in one compiled call: norm, router, choice of experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybridlab.kernels import Linear, address, native, rms_norm, route, uses_compiled
from hybridlab.kernels.checks import Array, check_float32, check_input, check_threads


class RouterStep:
    """RMS norm by `norm` [H], logits by `gate` [E, H], the `top_k` largest of their softmax.

    Raises ValueError for a wrong argument.
    """

    def __init__(self, gate: Linear, norm: Array, eps: float, top_k: int, normalise: bool) -> None:
        experts, self._hidden = gate.shape
        check_float32("norm", norm, (self._hidden,))
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: expected 1 to {experts}, got {top_k}")
        self._gate, self._norm, self._eps, self._top_k, self._normalise = gate, norm, eps, top_k, normalise
        self._native = None
        if native is not None and uses_compiled() and gate.tier not in ("portable", "numpy"):
            self._native = native.RouterStep(gate.tier, gate.native_parts, address(norm), eps, top_k, normalise)

    def __call__(self, x: Array, *, threads: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
        """x float32 [T, H] -> normed x [T, H], ids int32 [T, top_k] in descending order, their weights [T, top_k]."""
        tokens = check_input("x", x, np.float32, self._hidden)
        threads = check_threads(threads)
        if self._native is None:
            normed = rms_norm(x, self._norm, self._eps)
            return normed, *route(self._gate(normed, threads=threads), self._top_k, self._normalise)
        normed = np.empty_like(x)
        ids, weights = np.empty((tokens, self._top_k), np.int32), np.empty((tokens, self._top_k), np.float32)
        self._native.run(address(x), tokens, address(normed), address(ids), address(weights), threads)
        return normed, ids, weights
