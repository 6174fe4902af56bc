"""The experts of a checkpoint as blocks in shared weights: what a CUDA device copies from, pinned in each process.

All experts are there; a process pins those that its placement keeps in host memory.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hybridlab.checkpoint import Checkpoint
from hybridlab.checkpoint.residency import populate_ranges
from hybridlab.engine.host_store import HostStore, Kept
from hybridlab.engine.pinned import Pins
from hybridlab.engine.shared_weights import SharedWeights
from hybridlab.engine.weight_index import HUGE_PAGE, WeightIndex, files_of
from hybridlab.errors import WeightsError
from hybridlab.model import build_model
from hybridlab.model.expert_block import Expert, ExpertBlock, experts_of
from hybridlab.model.numerics import Bf16

LAYOUT = "blocks"
Layers = Mapping[int, Sequence[Expert]]


def experts_by_layer(checkpoint: Checkpoint) -> Layers:
    """The experts of every MoE layer, as stored."""
    model = build_model(checkpoint, Bf16(1), 1)
    return {layer: experts_of(model.expert_weights(layer)) for layer in checkpoint.spec.moe_layers}


def blocks_index(checkpoint: Checkpoint, layers: Layers) -> WeightIndex:
    """A run of blocks per layer, expert after expert."""
    size = ExpertBlock.of(next(iter(layers.values()))[0]).num_bytes
    sizes = {_name(layer): len(experts) * size for layer, experts in layers.items()}
    return WeightIndex(LAYOUT, files_of(checkpoint), sizes)


def fill_blocks(checkpoint: Checkpoint, shared: SharedWeights, *, threads: int, progress: bool = False) -> None:
    """Fill `shared` with all experts, unless somebody has."""
    layers = experts_by_layer(checkpoint)
    shared.open(blocks_index(checkpoint, layers), _writer(layers), threads=threads, progress=progress)


def host_store(
    checkpoint: Checkpoint,
    layers: Layers,
    block: ExpertBlock,
    shared: SharedWeights | None,
    kept: Kept,
    *,
    pin: bool,
    threads: int,
    progress: bool = False,
) -> HostStore:
    """A store of all experts over `shared`, of which the `kept` ones are pinned; a private copy of these where there is
    none, or where CUDA does not pin what is read-only."""
    if shared is not None:
        try:
            return _shared_store(checkpoint, layers, block, shared, kept, pin=pin, threads=threads, progress=progress)
        except (WeightsError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            print(f"hybridlab: shared experts are not used ({reason}); this worker copies its own", file=sys.stderr)
    return HostStore.filled(layers, block, kept, pin=pin, threads=threads, progress=progress)


def _shared_store(
    checkpoint: Checkpoint,
    layers: Layers,
    block: ExpertBlock,
    shared: SharedWeights,
    kept: Kept,
    *,
    pin: bool,
    threads: int,
    progress: bool,
) -> HostStore:
    index = blocks_index(checkpoint, layers)
    mapped = shared.open(index, _writer(layers), threads=threads, progress=progress)
    rooms = {layer: _tensor(mapped.weights[_name(layer)]).view(len(layers[layer]), block.num_bytes) for layer in layers}
    rows = {layer: {expert: expert for expert in range(len(experts))} for layer, experts in layers.items()}
    store = HostStore(block, rooms, rows, pins := Pins())
    try:
        for first, end in pinned_ranges(index, block.num_bytes, kept) if pin else ():
            part = mapped.whole[first:end]
            populate_ranges([(part.ctypes.data, part.ctypes.data + part.nbytes)])
            pins.pin(_tensor(part), read_only=True)
    except BaseException:
        store.close()
        raise
    return store


def pinned_ranges(index: WeightIndex, block_bytes: int, kept: Kept) -> list[tuple[int, int]]:
    """(first, end) of the memory of `index` in which the `kept` experts lie, in whole huge pages, which are no one's
    twice: what is pinned already cannot be pinned again, and a copy must lie within one range."""
    found: list[tuple[int, int]] = []
    for layer, experts in kept.items():
        start = index.places[_name(layer)][0]
        for expert in experts:
            first = (start + expert * block_bytes) // HUGE_PAGE * HUGE_PAGE
            end = -(-(start + (expert + 1) * block_bytes) // HUGE_PAGE) * HUGE_PAGE
            if found and first <= found[-1][1]:
                found[-1] = found[-1][0], max(end, found[-1][1])
            else:
                found.append((first, end))
    return found


def _writer(layers: Layers):
    block = ExpertBlock.of(next(iter(layers.values()))[0])
    by_name = {_name(layer): experts for layer, experts in layers.items()}

    def write(name: str, room: np.ndarray) -> None:
        for target, expert in zip(room.reshape(-1, block.num_bytes), by_name[name], strict=True):
            block.write(target, expert)

    return write


def _tensor(read_only: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        return torch.from_numpy(read_only)


def _name(layer: int) -> str:
    return f"layer.{layer}"
