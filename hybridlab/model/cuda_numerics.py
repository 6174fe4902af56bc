"""Precision "bf16" on a CUDA device, in torch: everything but the routed experts.

Matrix products take BF16 and accumulate in float32; the residual stream, norms and the router's softmax are float32.
FP8 weights of projections are widened to BF16 once, when the model is built.

Shape suffixes: T tokens, H hidden, N query heads, G key/value heads, D head_dim, F = D / 2, C cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.errors import HybridlabError
from hybridlab.model.base import DecodeBatch, MicroBatch
from hybridlab.model.cuda_attention import decode_attention
from hybridlab.model.cuda_blocks import triton_module, widen_blocks
from hybridlab.model.device_weights import DeviceWeights, OwnWeights
from hybridlab.model.numerics import ExpertsFn, LinearFn, RouterFn, StepFn
from hybridlab.spec import ModelSpec

EMBEDDING = "model.embed_tokens"
"""Of the table that a tied head multiplies by as well."""


class CudaBf16:
    """`hybridlab.model.numerics.Numerics` on one CUDA device (or, to be tested without one, on "cpu").

    Matrices come from `weights`, by default a copy of its own; norms and biases are small, and always its own.
    """

    kv_dtype = torch.bfloat16

    def __init__(self, device: str, weights: DeviceWeights | None = None) -> None:
        self.device = torch.device(device)
        self._weights = weights or OwnWeights(self.device)

    def place(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device)

    def embedding(self, table: np.ndarray) -> LinearFn:
        weight = self._weights.make(EMBEDDING, table.shape, torch.bfloat16, lambda room: _copy_bf16(room, table))
        return lambda ids_T: functional.embedding(ids_T.to(self.device, non_blocking=True), weight).float()

    def workspace_bytes(self, model: ModelSpec, threads: int) -> int:
        return 0  # counted by `engine.cuda_memory`

    def linear(self, weights: LinearWeights) -> LinearFn:
        weight = self.matrix(weights)
        return lambda x_TK: functional.linear(x_TK.to(torch.bfloat16), weight).float()

    def matrix(self, weights: LinearWeights) -> torch.Tensor:
        """A weight [N, K] on the device as BF16."""
        shape = weights.weight.shape
        return self._weights.make(weights.name, shape, torch.bfloat16, lambda room: self._widen(weights, room))

    def experts(
        self, gate: Sequence[LinearWeights], up: Sequence[LinearWeights], down: Sequence[LinearWeights]
    ) -> ExpertsFn:
        if len(gate) > 1:
            return _not_here  # a ring or a set of resident experts computes these
        g, u, d = (self.matrix(group[0]) for group in (gate, up, down))

        def apply(x_TH: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            x = x_TH.to(torch.bfloat16)
            hidden = functional.silu(functional.linear(x, g)) * functional.linear(x, u)
            return functional.linear(hidden, d).float()

        return apply

    def attention_step(
        self, projections: Sequence[LinearWeights], norms: Sequence[torch.Tensor], eps: float
    ) -> StepFn | None:
        return None

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.rms_norm(x_TH, weight_H.shape, weight_H, eps)

    def norm_rope(
        self, x_TND: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TF: torch.Tensor, sin_TF: torch.Tensor
    ) -> torch.Tensor:
        half = x_TND.shape[2] // 2
        is_power_of_2 = half & (half - 1) == 0
        if x_TND.is_cuda and is_power_of_2 and (kernels := triton_module("triton_norm_rope")) is not None:
            return kernels.norm_rope(x_TND, weight_D, eps, cos_TF, sin_TF)
        a, b = self.rms_norm(x_TND, weight_D, eps).chunk(2, dim=-1)
        c, s = cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)
        out = torch.empty(x_TND.shape, dtype=torch.bfloat16, device=x_TND.device)
        out[..., :half] = a * c - b * s
        out[..., half:] = b * c + a * s
        return out

    def router(self, gate: LinearWeights, norm: torch.Tensor, eps: float, top_k: int, normalise: bool) -> RouterFn:
        def fill(room: torch.Tensor) -> None:
            wide = torch.empty(room.shape, dtype=torch.bfloat16, device=self.device)
            self._widen(gate, wide)
            room.copy_(wide)

        weight = self._weights.make(gate.name, gate.weight.shape, torch.float32, fill)

        def apply(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            normed = self.rms_norm(x_TH, norm, eps)
            logits = functional.linear(normed.to(torch.bfloat16).float(), weight)  # float32: near ties must not flip
            weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
            return normed, ids.int(), weights / weights.sum(-1, keepdim=True) if normalise else weights

        return apply

    def attend(self, q_TND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        q = q_TND.to(torch.bfloat16)
        if isinstance(batch, DecodeBatch):
            return decode_attention(q, keys, values, batch)
        out = torch.empty_like(q)
        for context in batch.contexts:
            cached = context.cached if isinstance(context.cached, slice) else context.cached.to(self.device)
            rows = slice(context.first, context.last)
            k, v = (entries[cached].transpose(0, 1)[None] for entries in (keys, values))
            own = q[rows].transpose(0, 1)[None]
            queries, seen = own.shape[2], k.shape[2]
            mask = causal_lower_right(queries, seen) if 1 < queries < seen else None
            result = functional.scaled_dot_product_attention(
                own, k, v, attn_mask=mask, is_causal=1 < queries == seen, enable_gqa=True
            )
            out[rows] = result[0].transpose(0, 1)
        return out

    def attend_one(
        self, q_ND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cached: slice | torch.Tensor
    ) -> torch.Tensor:
        raise HybridlabError("attend() computes every request of a CUDA device")

    def _widen(self, weights: LinearWeights, room: torch.Tensor) -> None:
        if weights.scale is None:
            return _copy_bf16(room, weights.weight)
        codes = torch.from_numpy(np.array(weights.weight)).to(self.device)
        scale = torch.from_numpy(np.array(weights.scale)).to(self.device)
        widen_blocks(codes[None], scale[None], room[None])


def _copy_bf16(room: torch.Tensor, bits: np.ndarray) -> None:
    room.copy_(torch.from_numpy(np.array(bits)).view(torch.bfloat16))


def _not_here(x_TH: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    raise HybridlabError("routed experts of a CUDA device are computed where they live, not by the model")
