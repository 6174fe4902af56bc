"""Model shapes that random checkpoints are made in, as Hugging Face config.json objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridlab.checkpoint.config import parse_config
from hybridlab.errors import CheckpointError
from hybridlab.spec import BLOCK_FP8, ModelSpec

DTYPES = ("fp8", "bf16")

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Small enough to serve a demo in seconds on two slow cores, yet every matrix has whole FP8 blocks.
    "tiny": {
        **_QWEN3,
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "mlp_only_layers": [0],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 32768,
    },
    # The per-layer shapes of Qwen3-30B-A3B with half its layers and experts: 7 GB in FP8.
    "qwen3-7b-a1b": {
        **_QWEN3,
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
    },
    # Sizes of the public config.json of Qwen/Qwen3-30B-A3B.
    "qwen3-30b-a3b": {
        **_QWEN3,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
    },
}
"""Name -> config.json. Layers can be cut with `layers=`; the weights' format is chosen with `dtype=`."""


def preset_config(preset: str | Mapping[str, Any], *, dtype: str = "fp8", layers: int | None = None) -> dict[str, Any]:
    """The config.json of a checkpoint in that format; `preset` is a name of `PRESETS` or a config itself."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise CheckpointError(f"preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown, expected one of {', '.join(DTYPES)}")
    config = dict(preset)
    if layers is not None:
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise CheckpointError(f"layers is {layers!r}, expected an integer from 1")
        most = parse_config(config, "preset").num_layers
        if layers > most:
            raise CheckpointError(f"layers is {layers}, expected at most {most}: it cuts the preset's {most} layers")
        config["num_hidden_layers"] = layers
        config["mlp_only_layers"] = [i for i in config.get("mlp_only_layers") or [] if i < layers]
    config.pop("quantization_config", None)
    if dtype == "fp8":
        spec = parse_config(config, "preset")
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK_FP8, BLOCK_FP8],
            "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in spec.moe_layers)],
        }
    return config


def preset_spec(preset: str | Mapping[str, Any], *, dtype: str = "fp8", layers: int | None = None) -> ModelSpec:
    """ModelSpec of a preset: sizes for plans and simulations, without a checkpoint on disk."""
    name = preset if isinstance(preset, str) else "config"
    return parse_config(preset_config(preset, dtype=dtype, layers=layers), f"preset {name}")
