"""Made checkpoints: reproducible, loadable by transformers, and all or nothing on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybridlab.checkpoint import PRESETS, make_checkpoint, open_checkpoint, writer
from hybridlab.checkpoint.randomness import bf16_pool, fill_signed, fp8_pool, random_source
from hybridlab.errors import CheckpointError
from hybridlab.number_formats import dequantise, fp8_values

PROMPT_TOKENS, PROMPTS, NEW_TOKENS = 24, 3, 8
KNOWN_CODES = [80, 227, 248, 241, 107, 204]
KNOWN_HEAD = [15829, 48743, 48801]


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_same_arguments_same_bytes(tmp_path: Path, ragged_config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "a", ragged_config, routing="olmoe", progress=False)
    monkeypatch.setattr(writer, "NUM_THREADS", 5)
    make_checkpoint(tmp_path / "b", ragged_config, routing="olmoe", progress=False)
    make_checkpoint(tmp_path / "c", ragged_config, routing="olmoe", progress=False, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_shard_size_changes_files_not_weights(tmp_path: Path, ragged: Path, ragged_config: dict) -> None:
    one = make_checkpoint(tmp_path / "one", ragged_config, progress=False)
    many = open_checkpoint(ragged)
    assert (tmp_path / "one" / "model.safetensors").exists() and len(list(ragged.glob("model-*"))) > 1
    index = json.loads((ragged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.num_bytes == one.num_bytes
    for name in index["weight_map"]:
        np.testing.assert_array_equal(one.tensor(name), many.tensor(name))


def test_known_bytes(tmp_path: Path, ragged_config: dict) -> None:
    """Results name their checkpoint by preset and seed: its bytes must not change between versions."""
    checkpoint = make_checkpoint(tmp_path / "m", ragged_config, progress=False)
    layer = checkpoint.linear("model.layers.1.mlp.experts.0.up_proj")
    assert layer.weight[0, :6].tolist() == KNOWN_CODES
    assert checkpoint.tensor("lm_head.weight")[0, :3].tolist() == KNOWN_HEAD


def test_weights_are_spread_as_intended(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", "tiny", progress=False)
    checkpoint.verify(progress=False)
    layers = [checkpoint.linear(f"model.layers.1.mlp.experts.{e}.gate_proj") for e in (0, 1)]
    first, second = (dequantise(w.weight, w.scale) for w in layers if w.scale is not None)
    assert first.std() == pytest.approx(256**-0.5, rel=0.2) and abs(first.mean()) < 0.02 * first.std()
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03
    scales = np.concatenate([w.scale.ravel() for w in layers if w.scale is not None])
    assert len(set(scales.tolist())) == scales.size


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 300_001])
def test_random_fill_of_any_size(size: int) -> None:
    codes, bf16 = np.full(size, 0x7F, np.uint8), np.full(size, 0x7FFF, np.uint16)
    fill_signed(codes, fp8_pool(), random_source("x"))
    fill_signed(bf16, bf16_pool(1.0), random_source("x"))
    assert np.isfinite(fp8_values()[codes]).all() and ((bf16 & 0x7F80) != 0x7F80).all()


def load_in_transformers(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def check_behaviour(model: Any) -> None:
    prompts = torch.randint(0, 2048, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(prompts).logits
        greedy = model.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[:, PROMPT_TOKENS:]
    assert torch.isfinite(logits).all() and 2 < logits.std() < 4
    assert len(greedy.unique()) > PROMPTS * NEW_TOKENS // 2


def test_bf16_runs_in_transformers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", "tiny", dtype="bf16", progress=False)
    check_behaviour(load_in_transformers(tmp_path / "m"))


def test_fp8_runs_in_transformers_once_dequantised(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = make_checkpoint(tmp_path / "m", "tiny", progress=False)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    tensors = {}
    for t in writer.expected_tensors(checkpoint.spec):
        if t.dtype == "F8_E4M3":
            layer = checkpoint.linear(t.name.removesuffix(".weight"))
            assert layer.scale is not None
            tensors[t.name] = torch.from_numpy(dequantise(layer.weight, layer.scale))
        elif t.dtype == "BF16":
            tensors[t.name] = torch.from_numpy(checkpoint.tensor(t.name).copy()).view(torch.bfloat16)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    check_behaviour(load_in_transformers(plain))


def test_what_transformers_saves_opens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(**PRESETS["tiny"] | {"vocab_size": 64, "num_hidden_layers": 2})
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    checkpoint = open_checkpoint(tmp_path / "saved")
    theirs = model.model.layers[0].self_attn.q_proj.weight.detach().view(torch.uint16).numpy()
    np.testing.assert_array_equal(checkpoint.linear("model.layers.0.self_attn.q_proj").weight, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset 'huge' is unknown, expected one of tiny, qwen3-7b-a1b, qwen3-30b-a3b"),
        ({"dtype": "int4"}, "dtype 'int4' is unknown, expected one of fp8, bf16"),
        ({"routing": "zipf"}, "routing 'zipf' is unknown, expected one of uniform, olmoe, mixtral"),
        ({"layers": 0}, "layers is 0, expected an integer from 1"),
        ({"layers": 2.0}, "layers is 2.0, expected an integer from 1"),
        ({"layers": 5}, "layers is 5, expected at most 4"),
        ({"seed": -1}, "seed is -1, expected an integer from 0"),
        ({"shard_bytes": 0}, "shard_bytes is 0, expected a positive integer"),
        (
            {"preset": {**PRESETS["tiny"], "hidden_size": 0}},
            "preset: key 'hidden_size' is 0, expected an integer",
        ),
    ],
)
def test_refused_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(CheckpointError) as e:
        make_checkpoint(tmp_path / "a" / "m", **{"preset": "tiny", "progress": False, **arguments})
    assert message in str(e.value) and not list(tmp_path.iterdir())


def test_existing_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="m: exists already, expected a new or empty folder"):
        make_checkpoint(tmp_path / "m", "tiny", progress=False)
    with pytest.raises(CheckpointError, match=r"notes\.txt: exists already"):
        make_checkpoint(tmp_path / "m" / "notes.txt", "tiny", progress=False)
    with pytest.raises(CheckpointError, match=r"notes\.txt is not a folder"):
        make_checkpoint(tmp_path / "m" / "notes.txt" / "deeper", "tiny", progress=False)
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "notes.txt"]


def test_empty_target_and_missing_parents(tmp_path: Path, ragged_config: dict) -> None:
    (tmp_path / "m").mkdir()
    make_checkpoint(tmp_path / "m", ragged_config, layers=1, progress=False)
    made = make_checkpoint(tmp_path / "x" / "y" / "m", ragged_config, layers=1, progress=False)
    assert made.spec.num_layers == 1 and [p.name for p in (tmp_path / "x" / "y").iterdir()] == ["m"]


def test_shards_have_the_permissions_of_the_json_files(tmp_path: Path, ragged_config: dict) -> None:
    make_checkpoint(tmp_path / "m", ragged_config, progress=False)
    assert len({p.stat().st_mode for p in (tmp_path / "m").iterdir()}) == 1


def test_small_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 5 * 10**9))
    with pytest.raises(CheckpointError, match=r"m: needs 7\.97 GB, but .* has 5\.00 GB free"):
        make_checkpoint(tmp_path / "a" / "m", "qwen3-7b-a1b", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing(
    tmp_path: Path, ragged_config: dict, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real, calls = writer.serialize_file, []

    def fail_on_second(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        real(*args, **kwargs)

    monkeypatch.setattr(writer, "serialize_file", fail_on_second)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        make_checkpoint(tmp_path / "m", ragged_config, progress=False, shard_bytes=100_000)
    assert len(calls) >= 2 and not list(tmp_path.iterdir())
