"""Qwen3-MoE: its config.json and tensors. Source: transformers' Qwen3MoeConfig, Qwen3MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Iterator

from hybridlab.checkpoint.jsonfile import Fields
from hybridlab.checkpoint.schema import TensorSpec, linear
from hybridlab.checkpoint.settings import read_rope, read_weight_dtype
from hybridlab.spec import KVEntry, ModelSpec

MAX_LAYERS, MAX_EXPERTS = 4096, 16384
"""Far above any model; beyond them a configuration is a mistake and would only be slow to refuse."""


def parse(config: Fields, eos_token_ids: tuple[int, ...]) -> ModelSpec:
    """ModelSpec of a config.json in the Hub's or transformers 5's dialect.

    Settings that are absent get transformers' defaults, except sizes: guessing those would compute nonsense
    or blame a tensor for it. Raises CheckpointError naming file and key.
    """
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads")
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = config.integer("head_dim", max(hidden // heads, 1))
    if head_dim % 2:
        raise config.error("head_dim", f"an even number, not {head_dim} (rotary embedding pairs channels)")
    experts_key = config.first("num_experts", "num_local_experts")
    experts = config.integer(experts_key, high=MAX_EXPERTS)
    top_k = config.integer("num_experts_per_tok")
    if top_k > experts:
        raise config.error("num_experts_per_tok", f"at most {experts_key} ({experts})")
    if config.string("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", "'silu'")
    if config.boolean("use_sliding_window", False):
        raise config.error("use_sliding_window", "false (sliding-window attention is not supported)")
    dense_layers = _dense_layers(config, layers)
    max_positions = config.integer("max_position_embeddings", 32768)
    weight_dtype, unquantised = read_weight_dtype(config)
    return ModelSpec(
        family="qwen3_moe",
        num_layers=layers,
        hidden=hidden,
        vocab=config.integer("vocab_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        top_k=top_k,
        moe_intermediate=config.integer("moe_intermediate_size"),
        dense_intermediate=config.integer("intermediate_size", None if dense_layers else 6144),
        dense_layers=dense_layers,
        norm_topk_prob=config.boolean("norm_topk_prob", False),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config, max_positions),
        max_positions=max_positions,
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        attention_bias=config.boolean("attention_bias", False),
        eos_token_ids=eos_token_ids,
        kv_entries=(KVEntry("k", (kv_heads, head_dim)), KVEntry("v", (kv_heads, head_dim))),
        weight_dtype=weight_dtype,
        unquantised=unquantised,
    )


def _dense_layers(config: Fields, layers: int) -> frozenset[int]:
    """Layer i has experts unless it is in mlp_only_layers or decoder_sparse_step does not divide i + 1."""
    step = config.integer("decoder_sparse_step", 1)
    # Truncated copies of a model keep its whole list; entries past the last layer say nothing.
    listed = config.integers("mlp_only_layers")
    return frozenset(i for i in range(layers) if i in listed or (i + 1) % step)


def tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    """Tensors of Qwen3MoeForCausalLM. Embedding, norms, router and head stay in BF16 in FP8 checkpoints."""
    yield TensorSpec("model.embed_tokens.weight", (spec.vocab, spec.hidden), "embedding")
    for i in range(spec.num_layers):
        yield from _layer(spec, i)
    yield TensorSpec("model.norm.weight", (spec.hidden,), "norm")
    if not spec.tie_embeddings:
        yield TensorSpec("lm_head.weight", (spec.vocab, spec.hidden), "head")


def _layer(spec: ModelSpec, i: int) -> Iterator[TensorSpec]:
    base, hidden = f"model.layers.{i}", spec.hidden
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield TensorSpec(f"{base}.input_layernorm.weight", (hidden,), "norm")
    for letter, width in {"q": q_width, "k": kv_width, "v": kv_width, "o": q_width}.items():
        rows, cols = (hidden, width) if letter == "o" else (width, hidden)
        yield from linear(spec, f"{base}.self_attn.{letter}_proj", rows, cols)
        if spec.attention_bias:
            yield TensorSpec(f"{base}.self_attn.{letter}_proj.bias", (rows,), "bias")
    for letter in "qk":
        yield TensorSpec(f"{base}.self_attn.{letter}_norm.weight", (spec.head_dim,), "norm")
    yield TensorSpec(f"{base}.post_attention_layernorm.weight", (hidden,), "norm")
    if i in spec.dense_layers:
        yield from _mlp(spec, f"{base}.mlp", spec.dense_intermediate)
        return
    yield TensorSpec(f"{base}.mlp.gate.weight", (spec.num_experts, hidden), "router")
    for e in range(spec.num_experts):
        yield from _mlp(spec, f"{base}.mlp.experts.{e}", spec.moe_intermediate)


def _mlp(spec: ModelSpec, base: str, width: int) -> Iterator[TensorSpec]:
    yield from linear(spec, f"{base}.gate_proj", width, spec.hidden)
    yield from linear(spec, f"{base}.up_proj", width, spec.hidden)
    yield from linear(spec, f"{base}.down_proj", spec.hidden, width)
