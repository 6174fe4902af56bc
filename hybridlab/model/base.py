"""What the executor asks of a model: one method per op kind.

Shape suffixes: T tokens of a microbatch, H hidden, K experts per token, V vocabulary, R rows that want logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.kernels.attention import CachedRuns
from hybridlab.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Context:
    """One request's rows of a microbatch: rows [first, last), which stand at positions `start`, `start` + 1, ...

    `cached` lists the KV slots of positions 0 .. start + last - first - 1: a slice where they are neighbours
    (no gather), else an int64 tensor.
    """

    first: int
    last: int
    start: int
    cached: slice | torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Tokens that go through a layer together: `token_ids`, `positions`, `slots` are int64 [T]."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    contexts: tuple[Context, ...]

    @cached_property
    def runs(self) -> CachedRuns:
        """What each token sees, for the compiled kernels."""
        cached = [c.cached if isinstance(c.cached, slice) else c.cached.numpy() for c in self.contexts]
        return CachedRuns(cached, self.slots.numpy(), [c.last - c.first for c in self.contexts])

    @cached_property
    def decode_runs(self) -> CachedRuns | None:
        """`runs`, if every token is a decoding request of its own; else None."""
        return self.runs if len(self.contexts) == len(self.token_ids) else None


@dataclass(frozen=True)
class DecodeBatch(MicroBatch):
    """One new token for each request, with all that says where it stands on the device: a captured step reads it anew.

    `contexts` is empty. `tables` int32 [T, blocks] names each request's KV blocks of `block_tokens` slots, `lengths`
    int32 [T] how many tokens it sees, the new one included.
    """

    tables: torch.Tensor
    lengths: torch.Tensor
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Routed:
    """The router's choice: experts' input x_TH (float32), `expert_ids` int32 [T, K], `weights` float32 [T, K]."""

    x_TH: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor

    def only(self, experts: Sequence[int], num_experts: int) -> torch.Tensor:
        """`expert_ids` with -1 in place of those that are not in `experts`, distinct ids below `num_experts`."""
        if len(experts) == num_experts:
            return self.expert_ids
        mine = torch.zeros(num_experts, dtype=torch.bool)
        mine[list(experts)] = True
        mine = mine.to(self.expert_ids.device)
        return torch.where(mine[self.expert_ids.long()], self.expert_ids, -1)


class KVStore(Protocol):
    """What a model needs of the KV cache; entries are in the order of `ModelSpec.kv_entries`."""

    def write(self, layer: int, slots_T: torch.Tensor, *entries: torch.Tensor) -> None: ...

    def entries(self, layer: int) -> tuple[torch.Tensor, ...]: ...


class Model(Protocol):
    """Hidden states are float32 [T, H] between ops, whatever the precision of the compute inside."""

    spec: ModelSpec
    cache: KVStore

    def embed(self, batch: MicroBatch) -> torch.Tensor: ...

    def attention(self, layer: int, x_TH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Hidden states after the residual add; writes this layer's KV entries."""
        ...

    def mlp(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        """A dense layer, residual added."""
        ...

    def router(self, layer: int, x_TH: torch.Tensor) -> Routed: ...

    def experts(self, layer: int, routed: Routed, experts: Sequence[int]) -> torch.Tensor:
        """Weighted sum over those of each token's experts that are in `experts`, [T, H]."""
        ...

    def expert_weights(self, layer: int) -> tuple[Sequence[LinearWeights], ...]:
        """All gates, all ups and all downs of a MoE layer, as stored."""
        ...

    def head(self, x_RH: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [R, V]."""
        ...
