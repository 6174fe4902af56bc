"""The model families that can be read: one file each, listed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hybridlab.checkpoint import qwen3_moe
from hybridlab.checkpoint.jsonfile import Fields
from hybridlab.checkpoint.schema import TensorSpec
from hybridlab.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """How a family's config.json becomes a ModelSpec (second argument: eos token ids), and its tensors."""

    parse: Callable[[Fields, tuple[int, ...]], ModelSpec]
    tensors: Callable[[ModelSpec], Iterator[TensorSpec]]


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(qwen3_moe.parse, qwen3_moe.tensors),
}
"""`model_type` of config.json -> family."""
