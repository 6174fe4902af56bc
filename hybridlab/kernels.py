"""CPU kernels for FP8 and BF16 weights: the only importer of the compiled extension.

Weights stay where they are (a memory-mapped checkpoint, read-only, any alignment): objects keep references,
never copies. Within one compiled tier a result depends on its own token and weights only: it is bit-identical
over the number of tokens and threads. `kernels_numpy` is the twin for where the extension or AVX2 is missing.

Legend: N rows (outputs), K columns (inputs), T tokens, E experts, k slots, H model width, I expert width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybridlab import kernels_numpy
from hybridlab.errors import KernelError
from hybridlab.kernel_checks import (
    Array,
    check_experts,
    check_float32,
    check_input,
    check_matrix,
    check_routing,
    check_threads,
    output,
)

try:
    from hybridlab import _kernels as native
except ImportError:  # not built for this platform
    native = None

TIERS = ("avx512_vbmi_bf16", "avx2", "numpy")


_SUPPORTED = (*(native.supported() if native else ()), "numpy")


def supported_tiers() -> tuple[str, ...]:
    """The tiers that this CPU and build can run, best first; "numpy" always ends the list."""
    return _SUPPORTED


def tier() -> str:
    """The tier used by default: the best supported one, or the one named by HYBRIDLAB_ISA.

    Raises KernelError when HYBRIDLAB_ISA names a tier that is unknown or cannot run here.
    """
    return _usable_tier(os.environ.get("HYBRIDLAB_ISA") or supported_tiers()[0], "HYBRIDLAB_ISA")


def native_seconds() -> float:
    """Seconds spent inside compiled calls by this process's threads so far; 0.0 without the extension."""
    return native.native_seconds() if native else 0.0


class Linear:
    """A weight matrix [N, K] ready to multiply; make it with `linear(...)`."""

    def __init__(self, weight: Array, scale: Array | None, tier: str) -> None:
        check_matrix("weight", weight, scale)
        self._matrix: kernels_numpy.Matrix = (weight, scale)  # keeps the memory alive
        self.native_parts = _parts(weight, scale)
        self._native = native.Linear(tier, self.native_parts) if native and tier != "numpy" else None
        self.tier = tier
        self.shape: tuple[int, int] = weight.shape
        self.weight_bytes: int = weight.nbytes + (0 if scale is None else scale.nbytes)

    def __call__(self, x: Array, out: Array | None = None, *, threads: int) -> NDArray[np.float32]:
        """x float32 [T, K] -> float32 [T, N], written to `out` when given.

        x is rounded to BF16 (nearest even); sums are float32. The GIL is released; concurrent calls are fine.
        A NaN code in a row of the weight makes its results NaN. Raises ValueError for a wrong argument.
        """
        tokens = check_input("x", x, np.float32, self.shape[1])
        out = output(out, x, (tokens, self.shape[0]))
        threads = check_threads(threads)
        if self._native is None:
            out[...] = kernels_numpy.linear(x, self._matrix)
        elif tokens:
            self._native.run(address(x), tokens, address(out), threads)
        return out


def linear(weight: Array, scale: Array | None = None, *, tier: str | None = None) -> Linear:
    """Wrap a C-contiguous weight [N, K] without copying it.

    uint8: FP8 E4M3FN codes, with `scale` float32 [ceil(N/128), ceil(K/128)] to multiply by.
    uint16: BF16 bits, without `scale`; the AVX-512 tier takes BF16 subnormals as zero.
    `tier` defaults to `tier()`. Raises ValueError for a wrong argument, KernelError for an unusable tier.
    """
    return Linear(weight, scale, _choose_tier(tier))


class MoeLayer:
    """The routed experts of one layer; make it with `moe_layer(...)`."""

    def __init__(self, gate: Sequence[kernels_numpy.Matrix | None], up: Sequence[kernels_numpy.Matrix | None],
                 down: Sequence[kernels_numpy.Matrix | None], tier: str) -> None:  # fmt: skip
        h, i = check_experts(gate, up, down)
        self._gate, self._up, self._down = gate, up, down  # keeps the memory alive
        self._present = np.array([g is not None for g in gate])
        self._width = h
        self._native = None
        if native and tier != "numpy":
            parts = [
                None if g is None or u is None or d is None else (_parts(*g), _parts(*u), _parts(*d))
                for g, u, d in zip(gate, up, down, strict=True)
            ]
            self._native = native.MoeLayer(tier, parts, h, i)
        self.tier = tier
        self.expert_bytes: list[int] = [
            sum(array.nbytes for matrix in expert if matrix for array in matrix if array is not None)
            for expert in zip(gate, up, down, strict=True)
        ]

    def __call__(
        self,
        x: Array,
        expert_ids: Array,
        expert_weights: Array,
        out: Array | None = None,
        *,
        threads: int,
    ) -> NDArray[np.float32]:
        """x float32 [T, H], ids int32 [T, k], weights float32 [T, k] -> float32 [T, H], in `out` when given.

        out = sum over slots, in slot order, of weight * down(bf16(silu(gate x) * up x)); a negative id skips
        its slot. The GIL is released. Raises ValueError for a wrong argument or the id of an absent expert.
        """
        tokens = check_input("x", x, np.float32, self._width)
        slots = check_routing(expert_ids, expert_weights, tokens, self._present)
        out = output(out, x, (tokens, self._width))
        threads = check_threads(threads)
        if self._native is None:
            out[...] = kernels_numpy.moe(x, expert_ids, expert_weights, self._gate, self._up, self._down)
        elif tokens:
            self._native.run(address(x), tokens, slots, address(expert_ids), address(expert_weights),
                             address(out), threads)  # fmt: skip
        return out


def moe_layer(
    gate: Sequence[Array | None],
    up: Sequence[Array | None],
    down: Sequence[Array | None],
    gate_scale: Sequence[Array | None] | None = None,
    up_scale: Sequence[Array | None] | None = None,
    down_scale: Sequence[Array | None] | None = None,
    *,
    tier: str | None = None,
) -> MoeLayer:
    """Wrap E experts without copying: gate and up [I, H], down [H, I]; None for an expert that is absent.

    Weights, scales and `tier` as for `linear`, the same kind of weight for all experts.
    Raises ValueError naming a wrong argument, or KernelError for an unusable tier.
    """
    sides = []
    for name, weights, scales in (
        ("gate", gate, gate_scale),
        ("up", up, up_scale),
        ("down", down, down_scale),
    ):
        scales = [None] * len(weights) if scales is None else scales
        if len(scales) != len(weights):
            raise ValueError(f"{name}_scale: {len(scales)} entries for {len(weights)} experts")
        sides.append([None if w is None else (w, s) for w, s in zip(weights, scales, strict=True)])
    return MoeLayer(*sides, tier=_choose_tier(tier))


def rms_norm(x: Array, weight: Array, eps: float) -> NDArray[np.float32]:
    """x float32 [T, H] / sqrt(mean(x^2) + eps) * weight [H]. Raises ValueError for a wrong argument."""
    tokens = check_input("x", x, np.float32, None)
    check_float32("weight", weight, x.shape[1:])
    if native is None or not uses_compiled():
        return kernels_numpy.rms_norm(x, weight, eps)
    out = np.empty_like(x)
    native.rms_norm(address(x), address(weight), eps, tokens, x.shape[1], address(out))
    return out


def route(logits: Array, top_k: int, normalise: bool) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The `top_k` largest of softmax(logits float32 [T, E]): ids int32 and weights float32, [T, top_k], descending.

    The lower id comes first among equals; `normalise` makes the weights of a token sum to 1.
    """
    tokens = check_input("logits", logits, np.float32, None)
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: expected 1 to {logits.shape[1]}, got {top_k}")
    if native is None or not uses_compiled():
        return kernels_numpy.route(logits, top_k, normalise)
    ids, weights = np.empty((tokens, top_k), np.int32), np.empty((tokens, top_k), np.float32)
    native.route(address(logits), tokens, logits.shape[1], top_k, normalise, address(ids), address(weights))
    return ids, weights


def read_bandwidth_bytes(buffer: NDArray[np.uint8], threads: int) -> int:
    """Read each byte of a C-contiguous uint8 array once, with plain vector loads; timed: the read ceiling.

    Returns the sum (mod 2^64) of its 64-bit words, a last partial word padded with zeros.
    """
    if not isinstance(buffer, np.ndarray) or buffer.dtype != np.uint8 or not buffer.flags.c_contiguous:
        raise ValueError("buffer: expected a C-contiguous uint8 array")
    threads = check_threads(threads)
    flat = buffer.reshape(-1)
    words = flat.size // 8
    tail = int.from_bytes(flat[8 * words :].tobytes(), "little")
    chosen = tier()
    if native is None or chosen == "numpy":
        total = kernels_numpy.read_words(flat[: 8 * words].view(np.uint64))
    else:
        total = native.read_words(chosen, address(flat), words, threads)
    return (total + tail) % 2**64


def _usable_tier(name: str, source: str) -> str:
    if name not in supported_tiers():
        known = "" if name in TIERS else f" (not one of {', '.join(TIERS)})"
        raise KernelError(f"{source}: tier {name!r} cannot run here{known}; usable: {', '.join(supported_tiers())}")
    return name


def uses_compiled() -> bool:
    """Whether the active tier is a compiled one."""
    return native is not None and tier() != "numpy"


def _choose_tier(name: str | None) -> str:
    return tier() if name is None else _usable_tier(name, "tier")


def address(array: Array) -> int:
    """Where an array's data begins; the caller keeps the array alive."""
    return array.__array_interface__["data"][0]


def _parts(weight: Array, scale: Array | None) -> tuple[int, int, int, int]:
    return address(weight), 0 if scale is None else address(scale), weight.shape[0], weight.shape[1]
