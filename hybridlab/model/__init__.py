"""Reference Mixture-of-Experts models in torch, one file per family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridlab.errors import CheckpointError

if TYPE_CHECKING:
    from hybridlab.checkpoint.reader import Checkpoint
    from hybridlab.model.base import Model
    from hybridlab.model.numerics import Numerics


def build_model(checkpoint: Checkpoint, numerics: Numerics, threads: int) -> Model:
    """The model of a checkpoint, its weights still in the memory map; raises `CheckpointError` for other families."""
    from hybridlab.model.qwen3_moe import Qwen3Moe

    families = {"qwen3_moe": Qwen3Moe}
    family = checkpoint.spec.family
    if family not in families:
        raise CheckpointError(f"{checkpoint.folder}: no model for family {family!r}; known: {', '.join(families)}")
    return families[family](checkpoint, numerics, threads)
