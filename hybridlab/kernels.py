"""CPU kernels for FP8 and BF16 weights: the only importer of the compiled extension.

Weights stay where they are (a memory-mapped checkpoint, read-only, any alignment): objects keep references,
never copies. Within one compiled tier a result depends on its own token and weights only: it is bit-identical
over the number of tokens and threads. `kernels_numpy` is the twin for where the extension or AVX2 is missing.

Legend: N rows (outputs), K columns (inputs), T tokens, E experts, k slots, H model width, I expert width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridlab import kernels_numpy
from hybridlab.errors import KernelError

try:
    from hybridlab import _kernels
except ImportError:  # not built for this platform
    _kernels = None

TIERS = ("avx512_vbmi_bf16", "avx2", "numpy")
BLOCK = kernels_numpy.BLOCK
MAX_THREADS = 1024
WEIGHT_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))

Array = NDArray[Any]


def supported_tiers() -> tuple[str, ...]:
    """The tiers that this CPU and build can run, best first; "numpy" always ends the list."""
    return (*(_kernels.supported() if _kernels else ()), "numpy")


def tier() -> str:
    """The tier used by default: the best supported one, or the one named by HYBRIDLAB_ISA.

    Raises KernelError when HYBRIDLAB_ISA names a tier that is unknown or cannot run here.
    """
    return _usable_tier(os.environ.get("HYBRIDLAB_ISA") or supported_tiers()[0], "HYBRIDLAB_ISA")


def native_seconds() -> float:
    """Seconds spent inside compiled calls by this process's threads so far; 0.0 without the extension."""
    return _kernels.native_seconds() if _kernels else 0.0


class Linear:
    """A weight matrix [N, K] ready to multiply; make it with `linear(...)`."""

    def __init__(self, weight: Array, scale: Array | None, tier: str) -> None:
        _check_matrix("weight", weight, scale)
        self._matrix: kernels_numpy.Matrix = (weight, scale)  # keeps the memory alive
        self._native = _kernels.Linear(tier, _parts(weight, scale)) if _kernels and tier != "numpy" else None
        self.tier = tier
        self.shape: tuple[int, int] = weight.shape
        self.weight_bytes: int = weight.nbytes + (0 if scale is None else scale.nbytes)

    def __call__(self, x: Array, out: Array | None = None, *, threads: int) -> NDArray[np.float32]:
        """x float32 [T, K] -> float32 [T, N], written to `out` when given.

        x is rounded to BF16 (nearest even); sums are float32. The GIL is released; concurrent calls are fine.
        A NaN code in a row of the weight makes its results NaN. Raises ValueError for a wrong argument.
        """
        tokens = _check_input("x", x, np.float32, self.shape[1])
        out = _output(out, x, (tokens, self.shape[0]))
        threads = _check_threads(threads)
        if self._native is None:
            out[...] = kernels_numpy.linear(x, self._matrix)
        elif tokens:
            self._native.run(_address(x), tokens, _address(out), threads)
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
        h, i = _check_experts(gate, up, down)
        self._gate, self._up, self._down = gate, up, down  # keeps the memory alive
        self._present = np.array([g is not None for g in gate])
        self._width = h
        self._native = None
        if _kernels and tier != "numpy":
            parts = [
                None if g is None or u is None or d is None else (_parts(*g), _parts(*u), _parts(*d))
                for g, u, d in zip(gate, up, down, strict=True)
            ]
            self._native = _kernels.MoeLayer(tier, parts, h, i)
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
        tokens = _check_input("x", x, np.float32, self._width)
        slots = _check_routing(expert_ids, expert_weights, tokens, self._present)
        out = _output(out, x, (tokens, self._width))
        threads = _check_threads(threads)
        if self._native is None:
            out[...] = kernels_numpy.moe(x, expert_ids, expert_weights, self._gate, self._up, self._down)
        elif tokens:
            self._native.run(_address(x), tokens, slots, _address(expert_ids), _address(expert_weights),
                             _address(out), threads)  # fmt: skip
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


def read_bandwidth_bytes(buffer: NDArray[np.uint8], threads: int) -> int:
    """Read each byte of a C-contiguous uint8 array once, with plain vector loads; timed: the read ceiling.

    Returns the sum (mod 2^64) of its 64-bit words, a last partial word padded with zeros.
    """
    if not isinstance(buffer, np.ndarray) or buffer.dtype != np.uint8 or not buffer.flags.c_contiguous:
        raise ValueError("buffer: expected a C-contiguous uint8 array")
    threads = _check_threads(threads)
    flat = buffer.reshape(-1)
    words = flat.size // 8
    tail = int.from_bytes(flat[8 * words :].tobytes(), "little")
    chosen = tier()
    if _kernels is None or chosen == "numpy":
        total = kernels_numpy.read_words(flat[: 8 * words].view(np.uint64))
    else:
        total = _kernels.read_words(chosen, _address(flat), words, threads)
    return (total + tail) % 2**64


def _usable_tier(name: str, source: str) -> str:
    if name not in supported_tiers():
        known = "" if name in TIERS else f" (not one of {', '.join(TIERS)})"
        raise KernelError(
            f"{source}: tier {name!r} cannot run here{known}; usable: {', '.join(supported_tiers())}"
        )
    return name


def _choose_tier(name: str | None) -> str:
    return tier() if name is None else _usable_tier(name, "tier")


def _address(array: Array) -> int:
    return array.__array_interface__["data"][0]


def _parts(weight: Array, scale: Array | None) -> tuple[int, int, int, int]:
    return _address(weight), 0 if scale is None else _address(scale), weight.shape[0], weight.shape[1]


def _check_matrix(name: str, weight: Any, scale: Any) -> None:
    if not isinstance(weight, np.ndarray) or weight.ndim != 2 or weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{name}: expected a 2-D array of uint8 (FP8 codes) or uint16 (BF16 bits), got {_kind(weight)}"
        )
    if not weight.flags.c_contiguous or not all(weight.shape):
        raise ValueError(f"{name}: expected C-contiguous, non-empty rows, got {_kind(weight)}")
    if weight.dtype == np.uint16:
        if scale is not None:
            raise ValueError(f"{name}: BF16 weights take no scale")
        return
    grid = tuple(-(-size // BLOCK) for size in weight.shape)
    if not isinstance(scale, np.ndarray) or scale.dtype != np.float32 or not scale.flags.c_contiguous:
        raise ValueError(f"{name} scale: expected C-contiguous float32 {list(grid)}, got {_kind(scale)}")
    if scale.shape != grid:
        raise ValueError(f"{name} scale: expected shape {list(grid)} for a weight {list(weight.shape)}, "
                         f"got {list(scale.shape)}")  # fmt: skip


def _check_experts(
    gate: Sequence[kernels_numpy.Matrix | None],
    up: Sequence[kernels_numpy.Matrix | None],
    down: Sequence[kernels_numpy.Matrix | None],
) -> tuple[int, int]:
    """Checks that the experts fit together; returns (H, I)."""
    if not gate or not len(gate) == len(up) == len(down):
        raise ValueError(
            f"gate, up, down: expected equally many experts, got {len(gate)}, {len(up)}, {len(down)}"
        )
    first: Array | None = None
    for e, expert in enumerate(zip(gate, up, down, strict=True)):
        if all(matrix is None for matrix in expert):
            continue
        for side, matrix in zip(("gate", "up", "down"), expert, strict=True):
            name = f"{side}[{e}]"
            if matrix is None:
                raise ValueError(f"{name}: missing, but expert {e} has other weights")
            _check_matrix(name, *matrix)
            first = matrix[0] if first is None else first
            shape = first.shape[::-1] if side == "down" else first.shape
            if matrix[0].shape != shape or matrix[0].dtype != first.dtype:
                raise ValueError(f"{name}: expected {first.dtype} {list(shape)}, got {_kind(matrix[0])}")
    if first is None:
        raise ValueError("gate: no expert is present")
    return first.shape[1], first.shape[0]


def _check_input(name: str, array: Any, dtype: type, columns: int | None) -> int:
    good = isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype == dtype
    if not good or (columns is not None and array.shape[1] != columns):
        width = "" if columns is None else f" with {columns} columns"
        raise ValueError(f"{name}: expected a 2-D {np.dtype(dtype)} array{width}, got {_kind(array)}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name}: expected an aligned C-contiguous array")
    return array.shape[0]


def _check_routing(ids: Any, weights: Any, tokens: int, present: NDArray[np.bool_]) -> int:
    for name, array, dtype in (("expert_ids", ids, np.int32), ("expert_weights", weights, np.float32)):
        if _check_input(name, array, dtype, None) != tokens or array.shape != ids.shape or not array.shape[1]:
            raise ValueError(
                f"{name}: expected shape [{tokens}, k], k >= 1, the same for both, got {_kind(array)}"
            )
    if ids.size and ids.max() >= len(present):
        raise ValueError(f"expert_ids: {ids.max()} is out of range for {len(present)} experts")
    # Indexing by -1 would wrap around: a skipped slot counts as present.
    absent = (ids >= 0) & ~present[np.maximum(ids, 0)]
    if absent.any():
        raise ValueError(f"expert_ids: expert {ids[absent][0]} is not present")
    return ids.shape[1]


def _output(out: Any, x: Array, shape: tuple[int, int]) -> NDArray[np.float32]:
    if out is None:
        return np.empty(shape, np.float32)
    if _check_input("out", out, np.float32, shape[1]) != shape[0]:
        raise ValueError(f"out: expected shape {list(shape)}, got {list(out.shape)}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array")
    if np.may_share_memory(out, x):
        raise ValueError("out: must not share memory with x")
    return out


def _check_threads(threads: Any) -> int:
    if not isinstance(threads, int | np.integer) or not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads: expected an integer from 1 to {MAX_THREADS}, got {threads!r}")
    return int(threads)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
