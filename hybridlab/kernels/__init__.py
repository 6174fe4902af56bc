"""CPU kernels for FP8 and BF16 weights: the only importer of the compiled extension.

Weights stay where they are (a memory-mapped checkpoint, read-only, any alignment): objects keep references,
never copies. `pack` copies a weight into tiles, for memory that is filled anyway. Within one compiled tier a result
depends on its own token and weights only: it is bit-identical over layouts and the number of tokens and threads.
`kernels.numpy_twin` is the twin for where the extension is missing.

Legend: N rows (outputs), K columns (inputs), T tokens, E experts, k slots, H model width, I expert width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybridlab.errors import KernelError
from hybridlab.kernels import layouts as kernel_layouts
from hybridlab.kernels import numpy_twin as kernels_numpy
from hybridlab.kernels.checks import (
    Array,
    Weight,
    check_experts,
    check_float32,
    check_input,
    check_matrix,
    check_room,
    check_routing,
    check_threads,
    output,
)
from hybridlab.kernels.layouts import Packed

try:
    from hybridlab import _kernels as native
except ImportError:  # not built for this platform
    native = None

TIERS = ("avx512_vbmi_bf16", "avx512_bf16", "avx512_bw", "avx2", "portable", "numpy")
READ_LOOPS = ("4 sums", "8 sums", "4 sums, prefetch 4 KiB ahead")
"""The loops of `read_bandwidth_bytes`."""

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

    def __init__(self, weight: Array | Packed, scale: Array | None, tier: str) -> None:
        check_matrix("weight", weight, scale)
        self._matrix = (weight, scale)  # keeps the memory alive
        self.native_parts = _parts(weight, scale)
        self._native = native.Linear(tier, self.native_parts) if native and tier != "numpy" else None
        self._plain = None if self._native else _plain(weight, scale)
        self.tier = tier
        self.layout = _layout(weight)
        self.shape: tuple[int, int] = weight.shape
        self.weight_bytes: int = weight.nbytes + (0 if scale is None else scale.nbytes)

    def __call__(self, x: Array, out: Array | None = None, *, threads: int) -> NDArray[np.float32]:
        """x float32 [T, K] -> float32 [T, N], written to `out` when given.

        x is rounded to BF16 (nearest even); sums are float32. The GIL is released; concurrent calls are fine.
        A NaN code in a row of the weight makes its results NaN. Raises ValueError for a wrong argument.
        """
        tokens = check_input("x", x, np.float32, self.shape[1])
        out = output(out, (x,), (tokens, self.shape[0]))
        threads = check_threads(threads)
        if self._native is None:
            assert self._plain is not None
            out[...] = kernels_numpy.linear(x, self._plain)
        elif tokens:
            self._native.run(address(x), tokens, address(out), threads)
        return out


def linear(weight: Array | Packed, scale: Array | None = None, *, tier: str | None = None) -> Linear:
    """Wrap a C-contiguous or packed weight [N, K] without copying it.

    uint8: FP8 E4M3FN codes, with `scale` float32 [ceil(N/128), ceil(K/128)] to multiply by.
    uint16: BF16 bits, without `scale`; the AVX-512 tier takes BF16 subnormals as zero.
    A `Packed` weight brings its scale along. `tier` defaults to `tier()`.
    Raises ValueError for a wrong argument, KernelError for an unusable tier.
    """
    return Linear(weight, _scale_of("scale", weight, scale), _choose_tier(tier))


def pack(weight: Array, scale: Array | None = None, *, out: Array | None = None, threads: int = 1) -> Packed:
    """A copy of a weight (as for `linear`) in 16-row tiles, in parallel and exact; padding costs N % 16, K % 128.

    `out` is memory for it: uint8, flat, aligned to 64, `kernels.layouts.packed_bytes` long.
    Raises ValueError for a wrong argument.
    """
    if isinstance(weight, Packed):
        raise ValueError("weight: is packed already")
    check_matrix("weight", weight, scale)
    threads = check_threads(threads)
    n, k = weight.shape
    size = kernel_layouts.packed_bytes(n, k, weight.itemsize)
    data = kernel_layouts.aligned(size) if out is None else check_room("out", out, size)
    if np.may_share_memory(data, weight):
        raise ValueError("out: must not share memory with weight")
    if native is None or tier() == "numpy":
        kernel_layouts.pack_rows(weight, data)
    else:
        native.pack(tier(), _parts(weight, scale), address(data), threads)
    return Packed(data, weight.shape, weight.dtype, scale)


class MoeLayer:
    """The routed experts of one layer; make it with `moe_layer(...)`."""

    def __init__(self, gate: Sequence[Weight | None], up: Sequence[Weight | None], down: Sequence[Weight | None],
                 tier: str) -> None:  # fmt: skip
        h, i = check_experts(gate, up, down)
        self._keep = (gate, up, down)
        present = np.array([g is not None for g in gate])
        self._experts, self._present = len(present), None if present.all() else present
        self.width = h
        self.native_layer = None
        if native and tier != "numpy":
            parts = [
                None if g is None or u is None or d is None else (_parts(*g), _parts(*u), _parts(*d))
                for g, u, d in zip(gate, up, down, strict=True)
            ]
            self.native_layer = native.MoeLayer(tier, parts, h, i)
        self._plain = None if self.native_layer else [[m and _plain(*m) for m in side] for side in self._keep]
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
        tokens = check_input("x", x, np.float32, self.width)
        slots = check_routing(expert_ids, expert_weights, tokens, self._experts, self._present)
        out = output(out, (x, expert_ids, expert_weights), (tokens, self.width))
        threads = check_threads(threads)
        if self.native_layer is None:
            assert self._plain is not None
            gate, up, down = self._plain
            out[...] = kernels_numpy.moe(x, expert_ids, expert_weights, gate, up, down)
        elif tokens:
            self.native_layer.run(address(x), tokens, slots, address(expert_ids), address(expert_weights),
                             address(out), threads)  # fmt: skip
        return out


def moe_layer(
    gate: Sequence[Array | Packed | None],
    up: Sequence[Array | Packed | None],
    down: Sequence[Array | Packed | None],
    gate_scale: Sequence[Array | None] | None = None,
    up_scale: Sequence[Array | None] | None = None,
    down_scale: Sequence[Array | None] | None = None,
    *,
    tier: str | None = None,
) -> MoeLayer:
    """Wrap E experts without copying: gate and up [I, H], down [H, I]; None for an expert that is absent.

    Weights, scales and `tier` as for `linear`, the same type of weight for all experts; layouts may differ.
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
        pairs = enumerate(zip(weights, scales, strict=True))
        sides.append([None if w is None else (w, _scale_of(f"{name}_scale[{e}]", w, s)) for e, (w, s) in pairs])
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


def read_bandwidth_bytes(buffer: NDArray[np.uint8], threads: int, loop: int = 0) -> int:
    """Read each byte of a C-contiguous uint8 array once, with plain vector loads; timed: the read ceiling.

    `loop` is one of `READ_LOOPS`: which is fastest depends on the machine. Returns the sum (mod 2^64) of the array's
    64-bit words, a last partial word padded with zeros.
    """
    if not isinstance(buffer, np.ndarray) or buffer.dtype != np.uint8 or not buffer.flags.c_contiguous:
        raise ValueError("buffer: expected a C-contiguous uint8 array")
    if loop not in range(len(READ_LOOPS)):
        raise ValueError(f"loop: expected 0 to {len(READ_LOOPS) - 1}, got {loop!r}")
    threads = check_threads(threads)
    flat = buffer.reshape(-1)
    words = flat.size // 8
    tail = int.from_bytes(flat[8 * words :].tobytes(), "little")
    chosen = tier()
    if native is None or chosen == "numpy":
        total = kernels_numpy.read_words(flat[: 8 * words].view(np.uint64))
    else:
        total = native.read_words(chosen, address(flat), words, loop, threads)
    return (total + tail) % 2**64


def multiply_rate(threads: int, seconds: float = 0.05, *, tier: str | None = None) -> float:
    """FLOP/s of a tier's multiply instruction (VDPBF16PS or FMA) on registers: the multiply ceiling.

    Runs for about `seconds`, up to 60. Raises KernelError for a tier without compiled kernels, ValueError for a wrong
    argument.
    """
    if not isinstance(seconds, int | float) or not 0 < seconds <= 60:
        raise ValueError(f"seconds: expected a number above 0, up to 60, got {seconds!r}")
    chosen = _choose_tier(tier)
    if native is None or chosen == "numpy":
        raise KernelError("multiply_rate: needs a compiled tier")
    return native.multiply_rate(chosen, seconds, check_threads(threads))


def _usable_tier(name: str, source: str) -> str:
    if name not in supported_tiers():
        known = "" if name in TIERS else f" (not one of {', '.join(TIERS)})"
        raise KernelError(f"{source}: tier {name!r} cannot run here{known}; usable: {', '.join(supported_tiers())}")
    return name


def uses_compiled() -> bool:
    """Whether the operations between matrix products are compiled ones: they need AVX2."""
    return native is not None and tier() not in ("portable", "numpy")


def _choose_tier(name: str | None) -> str:
    return tier() if name is None else _usable_tier(name, "tier")


def address(array: Array) -> int:
    """Where the data of a C-contiguous array begins; the caller keeps the array alive."""
    return array.ctypes.data if native is None else native.address(array)


def _parts(weight: Array | Packed, scale: Array | None) -> tuple[int, int, int, int, int]:
    packed = isinstance(weight, Packed)
    data = address(weight.data if packed else weight)
    return data, 0 if scale is None else address(scale), weight.shape[0], weight.shape[1], int(packed)


def _layout(weight: Array | Packed) -> str:
    return "tiles" if isinstance(weight, Packed) else "rows"


def _plain(weight: Array | Packed, scale: Array | None) -> kernels_numpy.Matrix:
    return (weight.unpack() if isinstance(weight, Packed) else weight), scale


def _scale_of(name: str, weight: Array | Packed, scale: Array | None) -> Array | None:
    if not isinstance(weight, Packed):
        return scale
    if scale is not None and scale is not weight.scale:
        raise ValueError(f"{name}: a packed weight brings its own scale")
    return weight.scale
