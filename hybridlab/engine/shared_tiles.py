"""The packed layout of a whole checkpoint as shared weights: what each process would otherwise pack for itself."""

from __future__ import annotations

import numpy as np

from hybridlab import kernels
from hybridlab.checkpoint import Checkpoint
from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.checkpoint.schema import DTYPE_BYTES, expected_tensors
from hybridlab.engine.shared_weights import MappedWeights, SharedWeights
from hybridlab.engine.weight_index import WeightIndex, files_of
from hybridlab.kernels import layouts as kernel_layouts
from hybridlab.kernels.checks import Weight
from hybridlab.kernels.layouts import Packed

LAYOUT = "tiles"


def tiles_index(checkpoint: Checkpoint) -> WeightIndex:
    """Every weight that the model multiplies by, packed; scales and the other tensors stay in the checkpoint."""
    kinds = {"linear", "router", "head"} | ({"embedding"} if checkpoint.spec.tie_embeddings else set())
    sizes = {
        tensor.name.removesuffix(".weight"): kernel_layouts.packed_bytes(*tensor.shape, DTYPE_BYTES[tensor.dtype])  # type: ignore[call-arg]
        for tensor in expected_tensors(checkpoint.spec)
        if tensor.kind in kinds
    }
    return WeightIndex(LAYOUT, files_of(checkpoint), sizes)


def pack_into(checkpoint: Checkpoint, name: str, room: np.ndarray) -> None:
    """The bytes that `tiles_index` promises for `name`, written into `room`."""
    linear = checkpoint.linear(name)
    kernels.pack(linear.weight, linear.scale, out=room, threads=1)


class SharedTiles:
    """A `WeightSource` over shared weights, which `open` fills if nobody has: not before memory is planned."""

    def __init__(self, checkpoint: Checkpoint, shared: SharedWeights, threads: int) -> None:
        self._checkpoint, self._shared, self._threads = checkpoint, shared, threads
        self._mapped: MappedWeights | None = None
        self._packed: list[str] = []

    @property
    def num_packed(self) -> int:
        return len(self._packed)

    def open(self, *, progress: bool = False) -> None:
        """Raises `WeightsError` if what is shared belongs to another checkpoint or layout."""

        def write(name: str, room: np.ndarray) -> None:
            pack_into(self._checkpoint, name, room)
            self._packed.append(name)

        index = tiles_index(self._checkpoint)
        self._mapped = self._shared.open(index, write, threads=self._threads, progress=progress)

    def populate(self) -> bool:
        """As `Checkpoint.populate`, of the packed weights: the rows are not read again."""
        assert self._mapped is not None
        return self._mapped.populate()

    def __call__(self, weights: LinearWeights) -> Weight:
        assert self._mapped is not None, "open() comes first"
        data = self._mapped.weights[weights.name]
        n, k = weights.weight.shape
        return Packed(data, (n, k), weights.weight.dtype, weights.scale), weights.scale
