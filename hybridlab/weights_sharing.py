"""Which weights a load shares with other processes: those that are held, or new ones; and how to have them held."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridlab import weights_held
from hybridlab.checkpoint import Checkpoint, open_checkpoint
from hybridlab.engine import shared_blocks, shared_tiles
from hybridlab.engine.shared_tiles import SharedTiles, tiles_index
from hybridlab.engine.shared_weights import SharedWeights, huge_pages
from hybridlab.engine.weight_index import WeightIndex
from hybridlab.errors import ConfigError, MemoryBudgetError, WeightsError
from hybridlab.hardware.host_memory import detect_host_memory
from hybridlab.weights_held import Held

LAYOUTS = (shared_tiles.LAYOUT, shared_blocks.LAYOUT)
"""For the CPU's kernels, and as a CUDA device copies experts."""
RESERVE_BYTES = 2**29
"""Of free memory that holding weights leaves alone."""


@contextmanager
def sharing(checkpoint: Checkpoint, layout: str, *, create: bool, quiet: bool) -> Iterator[SharedWeights | None]:
    """The held weights of `checkpoint` in `layout`; else, with `create`, room for new ones; else None: pack privately.

    A holder whose weights cannot be used is told of on stderr and left alone. The block's end closes what it was given.
    """
    shared = None
    if layout in LAYOUTS:
        shared = _held(checkpoint, layout, quiet) or (_new(checkpoint, layout) if create else None)
    if shared is not None and not quiet and (text := pages_note()):
        _say(text)
    try:
        yield shared
    finally:
        if shared is not None:
            shared.close()


def free_beside(shared: SharedWeights | None) -> int:
    """Bytes of the host's memory that are free for weights and all else: what `shared` takes already is counted."""
    return detect_host_memory().available_bytes + (0 if shared is None else shared.resident_bytes)


def hold(
    folder: Path | str, *, idle_s: float, layout: str = shared_tiles.LAYOUT, threads: int, progress: bool = True
) -> Held:
    """Fill shared weights and leave them to a process of their own, until nobody has used them for `idle_s` seconds.

    Raises `WeightsError` if they are held already or cannot be shared, `ConfigError` for a layout that is a file's own,
    `CheckpointError`, and `MemoryBudgetError` if they do not fit into the memory that is free.
    """
    if layout not in LAYOUTS:
        expected = " or ".join(map(repr, LAYOUTS))
        raise ConfigError(f"weight_layout is {layout!r:.40}, expected {expected}: rows are mapped from their files")
    checkpoint = open_checkpoint(folder)
    index = index_of(checkpoint, layout)
    with weights_held.claim(folder, layout) as server, SharedWeights.create(index) as shared:
        free = detect_host_memory().available_bytes
        if index.num_bytes + RESERVE_BYTES > free:
            raise MemoryBudgetError(
                f"{(index.num_bytes + RESERVE_BYTES) / 1e9:.2f} GB of memory needed to hold {folder} in {layout}, "
                f"{free / 1e9:.2f} GB free; free memory, or take a smaller checkpoint"
            )
        if layout == shared_blocks.LAYOUT:
            shared_blocks.fill_blocks(checkpoint, shared, threads=threads, progress=progress)
        else:
            SharedTiles(checkpoint, shared, threads).open(progress=progress)
        return weights_held.start(server, shared.fileno(), folder, layout, index.num_bytes, idle_s)


def index_of(checkpoint: Checkpoint, layout: str) -> WeightIndex:
    """What shared weights of `checkpoint` in one of `LAYOUTS` hold."""
    if layout == shared_blocks.LAYOUT:
        return shared_blocks.blocks_index(checkpoint, shared_blocks.experts_by_layer(checkpoint))
    return tiles_index(checkpoint)


def _held(checkpoint: Checkpoint, layout: str, quiet: bool) -> SharedWeights | None:
    try:
        found = weights_held.attach(checkpoint.folder, layout)
        if found is None:
            return None
        descriptor, lease, held = found
        shared = SharedWeights(descriptor, lease)
        try:
            shared.attach(index_of(checkpoint, layout))
        except WeightsError:
            shared.close()
            raise
    except WeightsError as error:
        _say(f"the held weights of {checkpoint.folder} are not used: {error}")
        return None
    if not quiet:
        _say(f"weights: {held}")
    return shared


def _new(checkpoint: Checkpoint, layout: str) -> SharedWeights | None:
    try:
        return SharedWeights.create(index_of(checkpoint, layout))
    except WeightsError as error:
        _say(f"{error}; every worker makes its own copy")
        return None


def pages_note() -> str:
    """What to know of the pages of shared weights here; "" if they are huge."""
    found = huge_pages()
    if found in ("always", "within_size", "advise", "force"):
        return ""
    return (
        f"shared weights lie in small pages (shmem_enabled is {found or 'unknown'!r}): decode may be slower by some 10%"
    )


def _say(text: str) -> None:
    print(f"hybridlab: {text}", file=sys.stderr)
