"""What random weights a made checkpoint gets: sizes that keep the residual stream and the logits in range.

The residual stream starts with N(0, 1) embeddings; the branches of all layers together add as much variance
again, three quarters of it from MLPs and experts. Linear layers map unit variance to unit variance, and
logits have standard deviation LOGIT_STD, so greedy choices differ from prompt to prompt.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from hybridlab.checkpoint import randomness as rnd
from hybridlab.checkpoint.routing import expert_inclusion, fit_bias, sum_of_squared_weights
from hybridlab.checkpoint.schema import SCALE_SUFFIX, TensorSpec
from hybridlab.number_formats import float32_to_bf16
from hybridlab.spec import ModelSpec

LOGIT_STD = 3.0

ROUTER_STD = 0.7
"""Standard deviation of a router's logits over tokens, bias apart."""

NORM_SPREAD = 0.1

QK_GAIN = 1.2
"""Mean of the q and k norms: attention scores get standard deviation 1.4, so that context matters."""

MLP_SHARE, ATTENTION_SHARE = 0.75, 0.25
"""Variance that all MLPs and all attention layers add to the residual stream, over that of the embeddings."""

SILU_GATED = 0.3557
"""E[(silu(a) * b)^2] for independent standard normal a, b."""

ATTENTION_MEAN = 0.12
"""Variance left of unit-variance values once attention has averaged some 64 of them."""

BIAS_CHANNEL = 0
"""Hidden channel that is 1 for every token in every layer, where routers have a bias."""


class WeightMaker:
    """Makes the tensors of a random checkpoint, each from the seed and its name: any order, any thread."""

    def __init__(self, spec: ModelSpec, seed: int, routing: str) -> None:
        self._spec = spec
        self._seed = seed
        self._bias = {} if routing == "uniform" else _router_biases(spec, seed, routing)
        self._squares = _sums_of_squares(spec, self._bias)

    def fill(self, tensor: TensorSpec, out: np.ndarray) -> None:
        """Write a tensor of the given shape into `out`: uint8 (FP8), uint16 (BF16) or float32 (scales)."""
        source = rnd.random_source(f"{self._seed}/{tensor.name}")
        if tensor.kind == "scale":
            # Blocks differ, as in real checkpoints; 1 / 48 is the variance of u / 2.
            base = self._std(tensor.name.removesuffix(SCALE_SUFFIX)) / rnd.fp8_rms() / sqrt(1 + 1 / 48)
            out[...] = base * (0.75 + 0.5 * rnd.uniform(source, tensor.shape))
            return
        if tensor.dtype == "F8_E4M3":
            rnd.fill_signed(out, rnd.fp8_pool(), source)
        elif tensor.kind == "norm":
            mean = QK_GAIN if tensor.name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            rnd.fill(out, rnd.bf16_table(NORM_SPREAD * mean, mean), source)
        else:
            rnd.fill_signed(out, rnd.bf16_pool(self._std(tensor.name)), source)
        if self._bias:
            self._reserve_channel(tensor, out)

    def _std(self, name: str) -> float:
        spec = self._spec
        fan_in = 1 / sqrt(spec.hidden)
        module = name.split(".")[-2]
        if module == "embed_tokens":
            return 1.0
        if module == "lm_head":
            return LOGIT_STD * fan_in
        if module == "gate":
            return ROUTER_STD * fan_in
        if module == "o_proj":
            variance = ATTENTION_SHARE / spec.num_layers / ATTENTION_MEAN
            return sqrt(variance / (spec.num_heads * spec.head_dim))
        if module == "down_proj":
            layer = int(name.split(".")[2])
            width = spec.dense_intermediate if layer in spec.dense_layers else spec.moe_intermediate
            variance = MLP_SHARE / spec.num_layers / SILU_GATED / self._squares[layer]
            return sqrt(variance / width)
        return fan_in

    def _reserve_channel(self, tensor: TensorSpec, out: np.ndarray) -> None:
        """Keep one hidden channel at 1, to which no layer adds; the routers read their bias there."""
        one = float32_to_bf16(np.ones(1, np.float32))[0]
        if tensor.kind == "embedding":
            out[:, BIAS_CHANNEL] = one
        elif tensor.name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias")):
            out[BIAS_CHANNEL] = 0
        elif tensor.name.endswith("post_attention_layernorm.weight"):
            out[BIAS_CHANNEL] = one
        elif tensor.kind == "router":
            layer = int(tensor.name.split(".")[2])
            # After the norm the channel is 1 / rms, the others rest / rms: the bias grows with the stream.
            rest = sqrt(1 + self._added_variance(layer)) * sqrt(1 + NORM_SPREAD**2)
            column = self._bias[layer] * ROUTER_STD * rest
            out[:, BIAS_CHANNEL] = float32_to_bf16(column.astype(np.float32))

    def _added_variance(self, layer: int) -> float:
        """Variance that the branches before this layer's router have added to each channel of the stream."""
        return (MLP_SHARE * layer + ATTENTION_SHARE * (layer + 1)) / self._spec.num_layers


def _router_biases(spec: ModelSpec, seed: int, routing: str) -> dict[int, np.ndarray]:
    """Bias per expert of each MoE layer, in standard deviations of the router's logits."""
    fits: dict[bytes, np.ndarray] = {}  # layers share a few curves and differ in the order of experts
    biases = {}
    for layer, share in expert_inclusion(spec, routing, seed).items():
        order = np.argsort(share, kind="stable")
        key = share[order].tobytes()
        if key not in fits:
            fits[key] = fit_bias(share[order], spec.top_k)
        biases[layer] = np.empty_like(share)
        biases[layer][order] = fits[key]
    return biases


def _sums_of_squares(spec: ModelSpec, biases: dict[int, np.ndarray]) -> dict[int, float]:
    """Per layer, how much of the experts' variance the weighted sum over the chosen ones keeps (dense: 1)."""
    if not spec.norm_topk_prob:
        # Weights then sum to less than 1, by an amount that nothing here needs to know exactly.
        return dict.fromkeys(range(spec.num_layers), 1.0)
    known: dict[bytes, float] = {}
    out = {}
    for layer in range(spec.num_layers):
        bias = biases.get(layer, np.zeros(spec.num_experts))
        key = np.sort(bias).tobytes()
        if layer not in spec.dense_layers and key not in known:
            known[key] = sum_of_squared_weights(np.sort(bias), spec.top_k, ROUTER_STD)
        out[layer] = 1.0 if layer in spec.dense_layers else known[key]
    return out
