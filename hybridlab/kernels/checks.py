"""What the kernels accept: each check raises ValueError naming the argument: C code must never see a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridlab.kernels import numpy_twin as kernels_numpy
from hybridlab.kernels.layouts import Packed

BLOCK = kernels_numpy.BLOCK
MAX_THREADS = 1024
WEIGHT_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))

Array = NDArray[Any]
Weight = tuple[Array | Packed, Array | None]
"""(weight [N, K], scale or None)"""


def check_matrix(name: str, weight: Any, scale: Any) -> None:
    if isinstance(weight, Packed):
        return  # checked when it was made
    if not isinstance(weight, np.ndarray) or weight.ndim != 2 or weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{name}: expected a 2-D array of uint8 (FP8 codes) or uint16 (BF16 bits), got {kind_of(weight)}"
        )
    if not weight.flags.c_contiguous or not all(weight.shape):
        raise ValueError(f"{name}: expected C-contiguous, non-empty rows, got {kind_of(weight)}")
    if weight.dtype == np.uint16:
        if scale is not None:
            raise ValueError(f"{name}: BF16 weights take no scale")
        return
    grid = tuple(-(-size // BLOCK) for size in weight.shape)
    if not isinstance(scale, np.ndarray) or scale.dtype != np.float32 or not scale.flags.c_contiguous:
        raise ValueError(f"{name} scale: expected C-contiguous float32 {list(grid)}, got {kind_of(scale)}")
    if scale.shape != grid:
        raise ValueError(f"{name} scale: expected shape {list(grid)} for a weight {list(weight.shape)}, "
                         f"got {list(scale.shape)}")  # fmt: skip
    if not np.isfinite(scale).all():
        at = np.argwhere(~np.isfinite(scale))[0].tolist()
        raise ValueError(f"{name} scale: {scale[tuple(at)]} at {at}, expected finite numbers")


def check_experts(
    gate: Sequence[Weight | None], up: Sequence[Weight | None], down: Sequence[Weight | None]
) -> tuple[int, int]:
    """Checks that the experts fit together; returns (H, I)."""
    if not gate or not len(gate) == len(up) == len(down):
        raise ValueError(f"gate, up, down: expected equally many experts, got {len(gate)}, {len(up)}, {len(down)}")
    first: Array | Packed | None = None
    for e, expert in enumerate(zip(gate, up, down, strict=True)):
        if all(matrix is None for matrix in expert):
            continue
        for side, matrix in zip(("gate", "up", "down"), expert, strict=True):
            name = f"{side}[{e}]"
            if matrix is None:
                raise ValueError(f"{name}: missing, but expert {e} has other weights")
            check_matrix(name, *matrix)
            first = matrix[0] if first is None else first
            shape = first.shape[::-1] if side == "down" else first.shape
            if matrix[0].shape != shape or matrix[0].dtype != first.dtype:
                raise ValueError(f"{name}: expected {first.dtype} {list(shape)}, got {kind_of(matrix[0])}")
    if first is None:
        raise ValueError("gate: no expert is present")
    return first.shape[1], first.shape[0]


def check_input(name: str, array: Any, dtype: type, columns: int | None) -> int:
    good = isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype == dtype
    if not good or (columns is not None and array.shape[1] != columns):
        width = "" if columns is None else f" with {columns} columns"
        raise ValueError(f"{name}: expected a 2-D {np.dtype(dtype)} array{width}, got {kind_of(array)}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name}: expected an aligned C-contiguous array")
    return array.shape[0]


def check_routing(ids: Any, weights: Any, tokens: int, experts: int, present: NDArray[np.bool_] | None) -> int:
    """Returns the slots of a token; `present` None: all experts are."""
    for name, array, dtype in (("expert_ids", ids, np.int32), ("expert_weights", weights, np.float32)):
        if check_input(name, array, dtype, None) != tokens or array.shape != ids.shape or not array.shape[1]:
            raise ValueError(f"{name}: expected shape [{tokens}, k], k >= 1, the same for both, got {kind_of(array)}")
    if ids.size and ids.max() >= experts:
        raise ValueError(f"expert_ids: {ids.max()} is out of range for {experts} experts")
    if present is None:
        return ids.shape[1]
    # Indexing by -1 would wrap around: a skipped slot counts as present.
    absent = (ids >= 0) & ~present[np.maximum(ids, 0)]
    if absent.any():
        raise ValueError(f"expert_ids: expert {ids[absent][0]} is not present")
    return ids.shape[1]


def output(out: Any, inputs: Sequence[Array], shape: tuple[int, int]) -> NDArray[np.float32]:
    if out is None:
        return np.empty(shape, np.float32)
    if check_input("out", out, np.float32, shape[1]) != shape[0]:
        raise ValueError(f"out: expected shape {list(shape)}, got {list(out.shape)}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array")
    if any(np.may_share_memory(out, array) for array in inputs):
        raise ValueError("out: must not share memory with x or another input")
    return out


def check_room(name: str, array: Any, size: int) -> NDArray[np.uint8]:
    """A flat, writeable uint8 array of exactly `size` bytes, aligned to 64."""
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != (size,):
        raise ValueError(f"{name}: expected uint8 [{size}], got {kind_of(array)}")
    if not array.flags.c_contiguous or not array.flags.writeable or array.ctypes.data % 64:
        raise ValueError(f"{name}: expected a contiguous, writeable array at a multiple of 64 bytes")
    return array


def check_threads(threads: Any) -> int:
    if not isinstance(threads, int | np.integer) or not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads: expected an integer from 1 to {MAX_THREADS}, got {threads!r}")
    return int(threads)


def kind_of(value: Any) -> str:
    array = isinstance(value, np.ndarray | Packed)
    return f"{value.dtype} {list(value.shape)}" if array else type(value).__name__


def check_float32(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """A C-contiguous float32 array of exactly `shape`."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"{name}: expected float32 {list(shape)}, got {kind_of(array)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array")


def check_entries(keys: Any, values: Any, heads: int) -> None:
    """Keys and values BF16 [slots, G, D] for `heads` query heads."""
    for name, array in (("keys", keys), ("values", values)):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint16 or array.ndim != 3:
            raise ValueError(f"{name}: expected uint16 (BF16 bits) [slots, G, D], got {kind_of(array)}")
        fits = array.flags.c_contiguous and array.shape == keys.shape
        if not array.size or not fits or heads < array.shape[1] or heads % array.shape[1]:
            raise ValueError(f"{name}: expected C-contiguous [slots, G, D], G a divisor of {heads} heads")


def check_cached(keys: Any, values: Any, cached: Any, heads: int) -> int:
    """Keys and values BF16 [slots, G, D] and slots inside them; returns the number of cached tokens."""
    check_entries(keys, values, heads)
    if isinstance(cached, slice):
        if cached.step not in (None, 1) or not 0 <= cached.start < cached.stop <= len(keys):
            raise ValueError(f"cached: {cached} is not a run of the {len(keys)} slots")
        return cached.stop - cached.start
    if not isinstance(cached, np.ndarray) or cached.dtype != np.int64 or cached.ndim != 1 or not cached.size:
        raise ValueError(f"cached: expected a slice or a non-empty int64 array, got {kind_of(cached)}")
    if not cached.flags.c_contiguous or cached.min() < 0 or cached.max() >= len(keys):
        raise ValueError(f"cached: expected contiguous slots from 0 to {len(keys) - 1}")
    return cached.size
