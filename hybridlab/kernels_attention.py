"""Compiled attention for decoding tokens: the parts, and a whole layer in one call.

Legend: T tokens, H model width, N query heads, G key/value heads, D head size. BF16 arrays hold bits (uint16).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybridlab import kernels_numpy
from hybridlab.kernel_checks import Array, check_cached, check_float32, check_input, check_threads
from hybridlab.kernels import Linear, address, native, uses_compiled


def norm_rope(x: Array, weight: Array, eps: float, cosines: Array, sines: Array) -> NDArray[np.float32]:
    """RMS norm of each head of x float32 [T, N, D] by weight [D], then rotation by cosines and sines [T, D/2].

    Halves of a head are rotated against each other (Llama's layout). Raises ValueError for a wrong argument.
    """
    tokens, heads, size = x.shape if isinstance(x, np.ndarray) and x.ndim == 3 else (0, 0, 0)
    check_float32("x", x, (tokens, heads, size // 2 * 2))
    check_float32("weight", weight, (size,))
    check_float32("cosines", cosines, (tokens, size // 2))
    check_float32("sines", sines, (tokens, size // 2))
    if native is None or not uses_compiled():
        return kernels_numpy.norm_rope(x, weight, eps, cosines, sines)
    out = np.empty_like(x)
    native.norm_rope(address(x), address(weight), eps, address(cosines), address(sines), tokens, heads, size,
                       address(out))  # fmt: skip
    return out


def attend_one(q: Array, keys: Array, values: Array, cached: slice | Array, *, threads: int) -> NDArray[np.float32]:
    """One query's attention: q float32 [N, D] over the slots `cached` (a slice or int64 array) of keys and values.

    keys and values are BF16 bits (uint16) [slots, G, D]; N / G query heads share a key/value head.
    """
    check_float32("q", q, (q.shape[0], keys.shape[2]))
    count = check_cached(keys, values, cached, q.shape[0])
    if native is None or not uses_compiled() or q.shape[1] % 8:
        return kernels_numpy.attend_one(q, keys[cached], values[cached])
    out = np.empty_like(q)
    slots, first = (0, cached.start) if isinstance(cached, slice) else (address(cached), 0)
    native.attend_one(address(q), address(keys), address(values), slots, first, count, q.shape[0],
                        keys.shape[1], keys.shape[2], address(out), check_threads(threads))  # fmt: skip
    return out


class AttentionStep:
    """A whole attention layer for tokens that decode, in one compiled call; see `attention_step`."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear, norms: Sequence[Array], eps: float) -> None:
        self._keep = (q, k, v, o, *norms)
        self._hidden, self._head_dim = q.shape[1], norms[1].shape[0]
        self._groups = k.shape[0] // self._head_dim
        check_float32("input norm", norms[0], (self._hidden,))
        check_float32("k norm", norms[2], (self._head_dim,))
        if k.shape != v.shape or o.shape != q.shape[::-1] or self._head_dim % 8:
            raise ValueError(f"q, k, v, o: {q.shape}, {k.shape}, {v.shape}, {o.shape} do not fit together")
        assert native is not None
        matrices = (q.native_parts, k.native_parts, v.native_parts, o.native_parts)
        addresses = (address(norms[0]), address(norms[1]), address(norms[2]))
        heads = q.shape[0] // self._head_dim
        self._native = native.AttentionStep(q.tier, matrices, addresses, eps, heads, self._groups, self._head_dim)

    def __call__(
        self,
        x: Array,
        cosines: Array,
        sines: Array,
        keys: Array,
        values: Array,
        slots: Array,
        runs: DecodeRuns,
        *,
        threads: int,
    ) -> NDArray[np.float32]:
        """x float32 [T, H] -> x + attention(x), [T, H]; writes keys and values, BF16 [slots, G, D], at `slots` [T].

        `runs` says what each token sees, itself included; cosines and sines are float32 [T, D/2].
        """
        tokens = check_input("x", x, np.float32, self._hidden)
        check_float32("cosines", cosines, (tokens, self._head_dim // 2))
        check_float32("sines", sines, (tokens, self._head_dim // 2))
        for name, array in (("keys", keys), ("values", values)):
            if (
                array.dtype != np.uint16
                or array.shape[1:] != (self._groups, self._head_dim)
                or not array.flags.c_contiguous
            ):
                raise ValueError(f"{name}: expected uint16 [slots, {self._groups}, {self._head_dim}]")
        if slots.shape != (tokens,) or runs.count.shape != (tokens,) or runs.last_slot >= len(keys):
            raise ValueError(f"slots, runs: expected {tokens} tokens and slots below {len(keys)}")
        out = np.empty_like(x)
        self._native.run(
            address(x), address(cosines), address(sines), tokens, address(keys), address(values), address(slots),
            address(runs.tables), address(runs.first), address(runs.count), address(out), check_threads(threads),
        )  # fmt: skip
        return out


class DecodeRuns:
    """The cached slots that each decoding token sees: runs where slots are neighbours, tables elsewhere."""

    def __init__(self, cached: Sequence[slice | Array], slots: Array) -> None:
        self._keep = cached
        self.tables = np.array([0 if isinstance(c, slice) else address(c) for c in cached], np.int64)
        self.first = np.array([c.start if isinstance(c, slice) else 0 for c in cached], np.int64)
        self.count = np.array([c.stop - c.start if isinstance(c, slice) else c.size for c in cached], np.int64)
        lowest = min(int(slots.min()), *(c.start if isinstance(c, slice) else int(c.min()) for c in cached))
        highest = [c.stop - 1 if isinstance(c, slice) else int(c.max()) for c in cached]
        self.last_slot = max(int(slots.max()), *highest)
        if lowest < 0 or slots.dtype != np.int64 or self.count.min() < 1:
            raise ValueError("cached: expected non-empty int64 slots >= 0")


def attention_step(
    q: Linear, k: Linear, v: Linear, o: Linear, norms: Sequence[Array], eps: float
) -> AttentionStep | None:
    """Join the linear layers and norms (input [H], q [D], k [D]) of an attention layer; None without the kernels.

    Then the caller composes the layer of `rms_norm`, `Linear`, `norm_rope` and `attend_one`, its twin.
    """
    if native is None or q.tier == "numpy" or norms[1].shape[0] % 8:
        return None
    return AttentionStep(q, k, v, o, norms, eps)
