"""Checkpoints whose config and files do not say the same of tying and of formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hybridlab as hl
from hybridlab.errors import CheckpointError

ORACLES = Path(__file__).parents[2] / "data" / "oracles"


def edited(tmp_path: Path, case: str, **config) -> Path:
    folder = tmp_path / case
    shutil.copytree(ORACLES / case, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_a_stored_head_that_differs_from_the_embedding_is_used(tmp_path):
    folder = edited(tmp_path, "qwen3_bf16", tie_word_embeddings=True)
    assert not hl.open_checkpoint(folder).spec.tie_embeddings
    with safe_open(ORACLES / "qwen3_bf16" / "expected.safetensors", "np") as file:
        expected = file.get_tensor("logits.0")
    prompt = json.loads((folder / "expected.json").read_text())["requests"][0]["prompt"]
    with hl.load(folder, precision="exact", quiet=True, kv_tokens=64) as engine:
        assert np.abs(engine.logits(prompt) - expected).max() < 1e-3


def test_a_stored_head_that_equals_the_embedding_is_tied(tmp_path):
    folder = edited(tmp_path, "qwen3_bf16", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert hl.open_checkpoint(folder).spec.tie_embeddings


def test_formats_mixed_within_a_layers_experts_are_refused(tmp_path):
    config = json.loads((ORACLES / "qwen3_fp8_128" / "config.json").read_text())
    quantisation = config["quantization_config"]
    layer = hl.open_checkpoint(ORACLES / "qwen3_fp8_128").spec.moe_layers[0]
    name = f"model.layers.{layer}.mlp.experts.1.down_proj"
    kept = [*(quantisation.get("modules_to_not_convert") or []), name]
    folder = edited(tmp_path, "qwen3_fp8_128", quantization_config=quantisation | {"modules_to_not_convert": kept})
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards:
        tensors = load_file(shard)
        if f"{name}.weight" in tensors:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float().to(torch.bfloat16)
            save_file(tensors, shard)
    with pytest.raises(
        CheckpointError, match=rf"mixes BF16 and FP8 within the MLP or experts of model\.layers\.{layer}"
    ):
        hl.open_checkpoint(folder)
