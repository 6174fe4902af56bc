"""config.json -> ModelSpec: both dialects, transformers' defaults, and one clear line for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridlab.checkpoint import PRESETS, preset_spec, read_config
from hybridlab.checkpoint.config import parse_config
from hybridlab.checkpoint.schema import expected_tensors
from hybridlab.errors import CheckpointError
from hybridlab.spec import KVEntry, RopeSpec


def test_spec_of_bf16_oracle(oracles: Path) -> None:
    spec = read_config(oracles / "qwen3_bf16")
    assert (spec.family, spec.weight_dtype, spec.unquantised) == ("qwen3_moe", "bf16", ())
    assert (spec.num_layers, spec.hidden, spec.vocab) == (3, 64, 160)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 32)
    assert (spec.num_experts, spec.top_k, spec.moe_intermediate, spec.dense_intermediate) == (8, 2, 24, 64)
    assert spec.dense_layers == {1} and spec.moe_layers == (0, 2)
    assert spec.norm_topk_prob and spec.rms_norm_eps == 1e-5 and spec.rope == RopeSpec(theta=1e6)
    assert spec.kv_entries == (KVEntry("k", (2, 32)), KVEntry("v", (2, 32)))
    assert spec.eos_token_ids == () and not spec.tie_embeddings and not spec.attention_bias


def test_spec_of_fp8_oracle(oracles: Path) -> None:
    spec = read_config(oracles / "qwen3_fp8_128")
    assert spec.weight_dtype == "fp8" and "lm_head" in spec.unquantised and spec.dense_layers == {0}


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("bf16", ()), ("fp8", ()), ("fp8", ("lm_head",)), ("fp8", ("model.layers.1",))],
)
def test_the_bytes_of_an_expert_are_those_of_its_tensors(dtype: str, kept: tuple[str, ...]) -> None:
    spec = replace(preset_spec("tiny", dtype=dtype), unquantised=kept)
    layers = [f"model.layers.{layer}.mlp.experts.1." for layer in spec.moe_layers]
    sizes = [sum(t.num_bytes for t in expected_tensors(spec) if t.name.startswith(layer)) for layer in layers]
    assert spec.expert_bytes == max(sizes) > 0


def base(**changes: Any) -> dict[str, Any]:
    config = {**PRESETS["tiny"], **changes}
    return {k: v for k, v in config.items() if v is not ...}


def test_both_dialects_say_the_same() -> None:
    new = base(num_experts=..., rope_theta=..., rope_scaling=..., torch_dtype=...)
    new |= {
        "num_local_experts": 16,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    }
    assert parse_config(new, "x") == parse_config(base(), "x") == preset_spec("tiny", dtype="bf16")


def test_transformers_reads_the_same_defaults() -> None:
    transformers = pytest.importorskip("transformers")
    optional = ["norm_topk_prob", "rms_norm_eps", "rope_theta", "max_position_embeddings", "attention_bias"]
    optional += [
        "tie_word_embeddings",
        "decoder_sparse_step",
        "mlp_only_layers",
        "hidden_act",
        "eos_token_id",
    ]
    config = base(**dict.fromkeys(optional, ...))
    theirs = transformers.Qwen3MoeConfig(**config)
    spec = parse_config(config, "x")
    assert spec.norm_topk_prob == theirs.norm_topk_prob and spec.rms_norm_eps == theirs.rms_norm_eps
    assert spec.rope.theta == theirs.rope_parameters["rope_theta"] and spec.dense_layers == frozenset()
    assert spec.max_positions == theirs.max_position_embeddings
    assert (spec.tie_embeddings, spec.attention_bias) == (theirs.tie_word_embeddings, theirs.attention_bias)


def test_head_dim_defaults_to_hidden_over_heads() -> None:
    assert parse_config(base(head_dim=...), "x").head_dim == 256 // 8
    assert parse_config(base(head_dim=None), "x").head_dim == 256 // 8


def test_sparse_step_and_dense_list() -> None:
    spec = parse_config(base(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1, 40]), "x")
    assert spec.moe_layers == (3, 5)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn(key: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    spec = parse_config(base(**{key: rope, "max_position_embeddings": 131072}), "x")
    assert (spec.rope.kind, spec.rope.theta, spec.rope.factor) == ("yarn", 1e6, 4.0)
    assert (spec.rope.original_max_positions, spec.rope.beta_fast, spec.rope.beta_slow) == (32768, 32.0, 1.0)


@pytest.mark.parametrize("extra", [{}, {"mscale": 0.8, "mscale_all_dim": 0.5}, {"attention_factor": 1.25}])
def test_yarn_attention_factor_is_transformers(extra: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, **extra}
    config = base(rope_scaling=rope)
    theirs = ROPE_INIT_FUNCTIONS["yarn"](transformers.Qwen3MoeConfig(**config))[1]
    assert parse_config(config, "x").rope.attention_factor == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [(7, 3, (7,)), ([7, 9], 3, (7, 9)), (None, 3, (3,)), (None, [3, 4], (3, 4)), (None, None, ())],
)
def test_eos_of_generation_config_wins(copy: Path, edit_config: Callable, generation, own, expected) -> None:
    edit_config(eos_token_id=own)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(copy).eos_token_ids == expected


def test_fp8_alias_of_the_skip_list() -> None:
    config = base(quantization_config={"quant_method": "fp8", "ignored_layers": ["lm_head"]})
    spec = parse_config(config, "x")
    assert (spec.weight_dtype, spec.unquantised) == ("fp8", ("lm_head",))


SIZES = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts"]
SIZES += ["num_experts_per_tok", "moe_intermediate_size", "vocab_size", "intermediate_size"]


@pytest.mark.parametrize("key", [*SIZES, "model_type"])
def test_missing_key_is_named(key: str, edit_config: Callable) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: key '{key}' is missing, expected "):
        read_config(edit_config(**{key: ...}))


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -4, 2.5, True, "8", [8], 10**12])
def test_impossible_size_is_named(key: str, value: object, edit_config: Callable) -> None:
    with pytest.raises(CheckpointError, match=rf"key '{key}' is .*, expected an integer from 1 to"):
        read_config(edit_config(**{key: value}))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 17}, "'num_experts_per_tok' is 17, expected at most num_experts (16)"),
        (
            {"num_key_value_heads": 3},
            "'num_key_value_heads' is 3, expected a divisor of num_attention_heads (8)",
        ),
        ({"head_dim": 33}, "'head_dim' is 33, expected an even number"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True, expected false"),
        ({"norm_topk_prob": 1}, "'norm_topk_prob' is 1, expected true or false"),
        ({"rms_norm_eps": -1e-6}, "'rms_norm_eps' is -1e-06, expected a positive number"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' is '1e-6', expected a number"),
        ({"rope_theta": 0}, "'rope_theta' is 0, expected a positive number"),
        ({"mlp_only_layers": [-1]}, "'mlp_only_layers' is [-1], expected a list of integers"),
        ({"mlp_only_layers": {"a": 1}}, "'mlp_only_layers' is {'a': 1}, expected a list of integers"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>', expected a list of integers"),
        ({"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0, expected an integer from 1"),
        ({"torch_dtype": "float32"}, "'torch_dtype' is 'float32', expected 'bfloat16'"),
        ({"dtype": "float16"}, "'dtype' is 'float16', expected 'bfloat16'"),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "'rope_theta' is 1.0, expected"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fats": 1}}, "'rope_scaling.beta_fats' is 1, expected"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "'rope_scaling.factor' is 0.5, expected a number from 1"),
        ({"rope_scaling": "yarn"}, "'rope_scaling' is 'yarn', expected an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "'rope_scaling.type' is 'linear', expected 'default'",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'rope_parameters.rope_type' is 'llama3', expected"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": -2}},
            "'rope_scaling.factor' is -2, expected a positive",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "'quantization_config.quant_method' is 'awq', expected",
        ),
        ({"quantization_config": {}}, "'quantization_config.quant_method' is missing, expected"),
        ({"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}, "scale_fmt' is 'ue8m0', expected 'float'"),
        ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, "is [64, 64], expected [128, 128]"),
        ({"quantization_config": FP8 | {"weight_block_size": None}}, "is None, expected [128, 128]"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "is 'static', expected 'dynamic'"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "is 'e5m2', expected 'e4m3'"),
        ({"quantization_config": FP8 | {"modules_to_not_convert": "lm_head"}}, "expected a list of strings"),
        ({"model_type": "llama"}, "'model_type' is 'llama', expected one of qwen3_moe"),
        ({"model_type": 3}, "'model_type' is 3, expected a string"),
    ],
)
def test_refused_setting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as e:
        parse_config(base(**changes), "some/config.json")
    assert str(e.value).startswith("some/config.json: key '") and message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty, expected a JSON object"),
        ("[]", "expected a JSON object, found list"),
        ("7", "expected a JSON object, found int"),
        ('{"a": 1', "invalid JSON ("),
        ('{"hidden_size": 1, "hidden_size": 2}', "invalid JSON (key 'hidden_size' appears twice)"),
        ('{"a": {"b": 1, "b": 1}}', "invalid JSON (key 'b' appears twice)"),
        ('{"rms_norm_eps": NaN}', "invalid JSON (NaN is not JSON)"),
        ('{"rms_norm_eps": -Infinity}', "invalid JSON (-Infinity is not JSON)"),
        ("[" * 100_000, "invalid JSON (nested too deeply)"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "invalid JSON ("),
        (b"\xff\xfe{", "not UTF-8 text"),
    ],
)
def test_refused_json(copy: Path, text: str | bytes, message: str) -> None:
    path = copy / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as e:
        read_config(copy)
    assert str(e.value).startswith(f"{path}: {message}") and "\n" not in str(e.value)


def test_overflowing_number_is_refused(copy: Path) -> None:
    path = copy / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e999"))
    with pytest.raises(CheckpointError, match="'rms_norm_eps' is inf, expected a positive number"):
        read_config(copy)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: folder not found"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: not a folder"):
        read_config(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"config\.json: file not found"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: not a regular file"):
        read_config(tmp_path)


def test_presets_are_the_public_shapes() -> None:
    spec = preset_spec("qwen3-30b-a3b")
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.vocab) == (48, 128, 8, 151936)
    assert spec.expert_bytes == 3 * (768 * 2048 + 4 * 6 * 16)
    assert preset_spec("qwen3-7b-a1b", layers=3, dtype="bf16").num_layers == 3
    assert preset_spec("tiny").kv_elements_per_token == 4 * 2 * 2 * 32
