"""Public models: what their shapes add up to is what is published of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridlab.errors import ConfigError
from hybridlab.simulator.shapes import public_models

TOTAL_BILLIONS = {  # parameters without the multi-token-prediction layer, from the models' cards
    "deepseek-ai/DeepSeek-V3": 671.0,
    "moonshotai/Kimi-K2-Instruct": 1026.4,
    "MiniMaxAI/MiniMax-M2.1": 228.7,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-235B-A22B": 235.1,
    "openai/gpt-oss-20b": 20.9,
    "openai/gpt-oss-120b": 116.8,
    "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "mistralai/Mixtral-8x22B-v0.1": 140.6,
    "deepseek-ai/DeepSeek-V2-Lite": 15.7,
    "allenai/OLMoE-1B-7B-0924": 6.9,
}
KV_BYTES = {  # of a token, all layers, BF16
    "deepseek-ai/DeepSeek-V3": 61 * (512 + 64) * 2,
    "Qwen/Qwen3-30B-A3B": 48 * 2 * 4 * 128 * 2,
    "allenai/OLMoE-1B-7B-0924": 16 * 2 * 16 * 128 * 2,
}


@pytest.mark.parametrize("name", TOTAL_BILLIONS)
def test_a_public_model_has_its_published_size(name):
    spec, shape = public_models()[name]
    weights = sum(replace(shape, expert_bits=8, dense_bits=8, head_bits=8).weight_bytes(spec))
    weights -= len(spec.moe_layers) * shape.router_weights  # counted with two bytes
    assert weights / 1e9 == pytest.approx(TOTAL_BILLIONS[name], rel=0.005)


def test_every_public_model_is_checked():
    assert set(TOTAL_BILLIONS) == set(public_models())


@pytest.mark.parametrize("name", KV_BYTES)
def test_a_token_takes_this_much_of_the_cache(name):
    spec, shape = public_models()[name]
    assert shape.kv_bytes * spec.num_layers == KV_BYTES[name]


@pytest.mark.parametrize("bits", [0, -1, 65, float("nan"), "8", True])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="expert_bits is"):
        public_models()["Qwen/Qwen3-30B-A3B"][1].with_bits(bits)
