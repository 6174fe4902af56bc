"""The packed layout of a weight matrix: tiles of 16 rows, so that the kernels read one sequential stream.

A panel of 128 rows (the last one: as many tiles as it needs) holds, for each step of 4 bytes of a row (4 FP8 codes or
2 BF16 values), its tiles of 16 rows x 4 bytes one after another: BF16 row by row, FP8 as [4 rows][2 columns] twice for
each 4 rows, the order in which vector instructions unpack bytes. Rows are padded to a multiple of 16 and columns to a
multiple of 128 with zeros, which multiply to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_ROWS, PANEL_ROWS, BLOCK, STEP_BYTES = 16, 128, 128, 4


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [N, K] packed by `kernels.pack`; takes the place of the array in `linear` and `moe_layer`."""

    data: NDArray[np.uint8]
    """Flat, 64-byte aligned."""
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    """uint8 (FP8 codes) or uint16 (BF16 bits), as the array that was packed."""
    scale: NDArray[np.float32] | None

    def __post_init__(self) -> None:
        n, k = self.shape
        grid = (-(-n // BLOCK), -(-k // BLOCK))
        if self.dtype not in (np.uint8, np.uint16) or min(n, k) < 1:
            raise ValueError(f"shape, dtype: expected a non-empty uint8 or uint16, got {self.dtype} {self.shape}")
        size = packed_bytes(n, k, self.dtype.itemsize)
        if self.data.dtype != np.uint8 or self.data.shape != (size,):
            raise ValueError(f"data: expected {size} bytes for a packed {self.dtype} {self.shape}")
        if not self.data.flags.c_contiguous or self.data.ctypes.data % 64:
            raise ValueError("data: expected a contiguous array at a multiple of 64 bytes")
        if (self.scale is not None) != (self.dtype == np.uint8):
            raise ValueError("scale: FP8 codes need one, BF16 takes none")
        if self.scale is not None and (self.scale.shape != grid or self.scale.dtype != np.float32):
            raise ValueError(f"scale: expected float32 {list(grid)}, got {self.scale.dtype} {list(self.scale.shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed data, padding included, scale not."""
        return self.data.nbytes

    def __repr__(self) -> str:
        kind = "FP8" if self.scale is not None else "BF16"
        return f"Packed({kind} {list(self.shape)}, {self.nbytes} bytes)"

    def unpack(self) -> NDArray[Any]:
        """The row-major array [N, K] again, bit for bit."""
        n, k = self.shape
        row_bytes = -(-k // BLOCK) * BLOCK * self.dtype.itemsize
        rows = np.empty((-(-n // TILE_ROWS) * TILE_ROWS, row_bytes), np.uint8)
        for first, panel in _panels(self.data, rows.shape):
            tiles = len(panel) // TILE_ROWS
            if self.dtype == np.uint8:  # [step, tile, lane, pair, row of 4, 2] -> [tile, lane, row of 4, step, pair, 2]
                source = panel.reshape(-1, tiles, 4, 2, 4, 2).transpose(1, 2, 4, 0, 3, 5)
            else:
                source = panel.reshape(-1, tiles, TILE_ROWS, STEP_BYTES).transpose(1, 2, 0, 3)
            rows[first : first + len(panel)] = source.reshape(panel.shape)
        return np.ascontiguousarray(rows.view(self.dtype)[:n, :k])


def pack_rows(weight: NDArray[Any], data: NDArray[np.uint8]) -> None:
    """Packs a C-contiguous weight into `data`, with NumPy: the twin of the compiled packing."""
    n, k = weight.shape
    shape = (-(-n // TILE_ROWS) * TILE_ROWS, -(-k // BLOCK) * BLOCK)
    padded = np.zeros(shape, weight.dtype)
    padded[:n, :k] = weight
    rows = padded.view(np.uint8)
    for first, panel in _panels(data, rows.shape):
        tiles = len(panel) // TILE_ROWS
        source = rows[first : first + len(panel)]
        if weight.dtype == np.uint8:
            source = source.reshape(tiles, 4, 4, -1, 2, 2).transpose(3, 0, 1, 4, 2, 5)
        else:
            source = source.reshape(tiles, TILE_ROWS, -1, STEP_BYTES).transpose(2, 0, 1, 3)
        panel[...] = source.reshape(panel.shape)


def packed_bytes(n: int, k: int, element: int) -> int:
    """Bytes of a packed [n, k] weight of `element` bytes each."""
    return -(-n // TILE_ROWS) * TILE_ROWS * -(-k // BLOCK) * BLOCK * element


def aligned(size: int) -> NDArray[np.uint8]:
    """An uninitialised array of `size` bytes at a multiple of 64."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def _panels(data: NDArray[np.uint8], shape: tuple[int, int]) -> list[tuple[int, NDArray[np.uint8]]]:
    """(first row, view [rows, row bytes]) of each panel; the bytes of a view are in packed order."""
    rows = data.reshape(shape)
    return [(first, rows[first : first + PANEL_ROWS]) for first in range(0, shape[0], PANEL_ROWS)]
