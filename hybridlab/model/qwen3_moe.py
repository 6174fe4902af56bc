"""Qwen3-MoE: grouped-query attention with q/k norm, softmax top-k routing, dense layers among MoE layers.

Follows `transformers` models/qwen3_moe. Shape suffixes: T tokens, H hidden, N heads, G kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridlab.checkpoint.reader import Checkpoint, LinearWeights
from hybridlab.model.attention import Attention
from hybridlab.model.base import KVStore, MicroBatch, Routed
from hybridlab.model.numerics import ExpertsFn, LinearFn, Numerics, RouterFn, StepFn
from hybridlab.model.rope import Rope
from hybridlab.number_formats import bf16_to_float32


class Qwen3Moe:
    """Computes ops of `hybridlab.plans.OP_KINDS` on the checkpoint's mapped weights. `cache` is set by the engine."""

    cache: KVStore

    def __init__(self, checkpoint: Checkpoint, numerics: Numerics, threads: int) -> None:
        self.spec = spec = checkpoint.spec
        self._numerics = numerics
        self._embedding = numerics.embedding(checkpoint.tensor("model.embed_tokens.weight"))
        self._attention = Attention(numerics, threads)
        self._rope = Rope(spec.rope, spec.head_dim, spec.max_positions, numerics.place)
        self._final_norm = _vector(checkpoint, numerics, "model.norm.weight")
        self._head = numerics.linear(checkpoint.linear("model.embed_tokens" if spec.tie_embeddings else "lm_head"))
        self._layers = [_Layer(checkpoint, numerics, i) for i in range(spec.num_layers)]

    def embed(self, batch: MicroBatch) -> torch.Tensor:
        self._rope.start(batch.positions)
        return self._embedding(batch.token_ids)

    def attention(self, layer: int, x_TH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        spec, weights = self.spec, self._layers[layer]
        cos, sin = self._rope.tables(batch.positions)
        if weights.step is not None and batch.decode_runs is not None:
            keys, values = self.cache.entries(layer)
            return weights.step(x_TH, cos, sin, keys, values, batch)
        normed = self._numerics.rms_norm(x_TH, weights.input_norm, spec.rms_norm_eps)
        tokens = len(normed)
        q = weights.q_proj(normed).view(tokens, spec.num_heads, spec.head_dim)
        k = weights.k_proj(normed).view(tokens, spec.num_kv_heads, spec.head_dim)
        v = weights.v_proj(normed).view(tokens, spec.num_kv_heads, spec.head_dim)
        q = self._numerics.norm_rope(q, weights.q_norm, spec.rms_norm_eps, cos, sin)
        k = self._numerics.norm_rope(k, weights.k_norm, spec.rms_norm_eps, cos, sin)
        self.cache.write(layer, batch.slots, k, v)
        out = self._attention(q, self.cache, layer, batch)
        return x_TH + weights.o_proj(out.view(tokens, -1))

    def mlp(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        weights = self._layers[layer]
        normed = self._numerics.rms_norm(x_TH, weights.mlp_norm, self.spec.rms_norm_eps)
        first = torch.zeros(len(normed), 1, dtype=torch.int32, device=normed.device)
        return x_TH + weights.experts(normed, first, torch.ones(len(normed), 1, device=normed.device))

    def router(self, layer: int, x_TH: torch.Tensor) -> Routed:
        return Routed(*self._layers[layer].router(x_TH))

    def experts(self, layer: int, routed: Routed, experts: Sequence[int]) -> torch.Tensor:
        ids = routed.only(experts, self.spec.num_experts)
        return self._layers[layer].experts(routed.x_TH, ids, routed.weights)

    def expert_weights(self, layer: int) -> tuple[Sequence[LinearWeights], ...]:
        return self._layers[layer].expert_weights

    def head(self, x_RH: torch.Tensor) -> torch.Tensor:
        return self._head(self._numerics.rms_norm(x_RH, self._final_norm, self.spec.rms_norm_eps))


class _Layer:
    """One decoder layer's norms and linear layers; a dense MLP is a MoE of one expert."""

    router: RouterFn
    experts: ExpertsFn

    def __init__(self, checkpoint: Checkpoint, numerics: Numerics, index: int) -> None:
        spec, prefix = checkpoint.spec, f"model.layers.{index}"
        self.input_norm = _vector(checkpoint, numerics, f"{prefix}.input_layernorm.weight")
        self.mlp_norm = _vector(checkpoint, numerics, f"{prefix}.post_attention_layernorm.weight")
        self.q_norm = _vector(checkpoint, numerics, f"{prefix}.self_attn.q_norm.weight")
        self.k_norm = _vector(checkpoint, numerics, f"{prefix}.self_attn.k_norm.weight")
        projections = [f"{prefix}.self_attn.{name}_proj" for name in "qkvo"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            _projection(checkpoint, numerics, name) for name in projections
        )
        self.step: StepFn | None = None  # the same layer in one call, where there are no biases
        if not spec.attention_bias:
            norms = (self.input_norm, self.q_norm, self.k_norm)
            weights = [checkpoint.linear(name) for name in projections]
            self.step = numerics.attention_step(weights, norms, spec.rms_norm_eps)
        if index in spec.dense_layers:
            groups = [[checkpoint.linear(f"{prefix}.mlp.{name}_proj")] for name in ("gate", "up", "down")]
        else:
            gate = checkpoint.linear(f"{prefix}.mlp.gate")
            self.router = numerics.router(gate, self.mlp_norm, spec.rms_norm_eps, spec.top_k, spec.norm_topk_prob)
            groups = [
                [checkpoint.linear(f"{prefix}.mlp.experts.{e}.{name}_proj") for e in range(spec.num_experts)]
                for name in ("gate", "up", "down")
            ]
        self.expert_weights = tuple(groups)
        self.experts = numerics.experts(*groups)


def _projection(checkpoint: Checkpoint, numerics: Numerics, prefix: str) -> LinearFn:
    linear = numerics.linear(checkpoint.linear(prefix))
    if not checkpoint.spec.attention_bias:
        return linear
    bias = _vector(checkpoint, numerics, f"{prefix}.bias")
    return lambda x: linear(x) + bias


def _vector(checkpoint: Checkpoint, numerics: Numerics, name: str) -> torch.Tensor:
    """A norm weight or bias as float32; these are small, so they are converted once."""
    return numerics.place(torch.from_numpy(bf16_to_float32(checkpoint.tensor(name))))
