"""What tensors a checkpoint of a given model holds. Shared by the reader and the writer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

from hybridlab.spec import BLOCK_FP8, ModelSpec

DTYPE_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
"""Bytes per element of the stored formats, by their safetensors names."""

SCALE_SUFFIX = "_scale_inv"
"""Name of a weight's scale grid is the weight's name with this appended."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name, shape and stored format.

    `kind` is "embedding", "norm", "router", "linear", "bias", "head" or "scale". A scale holds one factor per
    128x128 block of its weight; a reader may meet it as BF16 too.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: str = "BF16"

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def linear(spec: ModelSpec, module: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    """The weight [rows, cols] of a linear layer and, if it is stored in FP8, its scale grid."""
    if not spec.is_quantised(module):
        yield TensorSpec(f"{module}.weight", (rows, cols), "linear")
        return
    yield TensorSpec(f"{module}.weight", (rows, cols), "linear", "F8_E4M3")
    grid = (ceil(rows / BLOCK_FP8), ceil(cols / BLOCK_FP8))
    yield TensorSpec(f"{module}.weight{SCALE_SUFFIX}", grid, "scale", "F32")


def expected_tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    """Every tensor that the model needs, in the order of computation; other tensors may lie beside them."""
    from hybridlab.checkpoint.families import FAMILIES

    return FAMILIES[spec.family].tensors(spec)
