"""Opening checkpoints: views without copies, and one clear line for tensors that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlab.checkpoint import PRESETS, make_checkpoint, open_checkpoint
from hybridlab.errors import CheckpointError
from hybridlab.number_formats import bf16_to_float32, dequantise, float32_to_bf16, fp8_values

Q = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.0.gate_proj"


def test_fp8_values_are_torchs() -> None:
    ours, theirs = (
        fp8_values(),
        torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy(),
    )
    np.testing.assert_array_equal(ours, theirs)


def test_bf16_rounding_is_torchs() -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    np.testing.assert_array_equal(float32_to_bf16(x), torch.from_numpy(x).bfloat16().view(torch.uint16).numpy())
    np.testing.assert_array_equal(bf16_to_float32(float32_to_bf16(x)), torch.from_numpy(x).bfloat16().float())


@pytest.mark.parametrize("case", ["qwen3_bf16", "qwen3_fp8_128"])
def test_oracle_opens(oracles: Path, case: str) -> None:
    checkpoint = open_checkpoint(oracles / case)
    checkpoint.verify(progress=False)
    layer = checkpoint.linear(Q)
    spec = checkpoint.spec
    assert layer.name == Q and layer.weight.shape == (spec.num_heads * spec.head_dim, spec.hidden)
    if spec.weight_dtype == "fp8":
        assert layer.weight.dtype == np.uint8 and layer.scale is not None
        assert layer.scale.dtype == np.float32 and layer.scale.shape == (1, 2)
    else:
        assert layer.weight.dtype == np.uint16 and layer.scale is None
    assert checkpoint.tensor("model.norm.weight").dtype == np.uint16
    assert checkpoint.has("lm_head.weight") and not checkpoint.has("lm_head.bias")
    assert case in checkpoint._repr_html_() and case in repr(checkpoint)
    with pytest.raises(CheckpointError, match=r"the model has no tensor 'lm_head\.bias'"):
        checkpoint.tensor("lm_head.bias")


def test_values_are_those_that_the_library_loads(ragged: Path) -> None:
    from safetensors.torch import load_file

    stored = {k: v for f in ragged.glob("*.safetensors") for k, v in load_file(f).items()}
    checkpoint = open_checkpoint(ragged)
    assert checkpoint.num_bytes == sum(t.nbytes for t in stored.values())
    for name, tensor in stored.items():
        raw = tensor.view({1: torch.uint8, 2: torch.uint16, 4: torch.float32}[tensor.itemsize]).numpy()
        np.testing.assert_array_equal(checkpoint.tensor(name), raw, strict=True)


def test_ragged_grid(ragged: Path) -> None:
    down = open_checkpoint(ragged).linear("model.layers.1.mlp.experts.2.down_proj")
    assert down.scale is not None and (down.weight.shape, down.scale.shape) == ((200, 136), (2, 2))
    values = dequantise(down.weight, down.scale)
    assert values.shape == (200, 136) and values[199, 135] == fp8_values()[down.weight[199, 135]] * down.scale[1, 1]


def test_views_are_read_only_and_not_copied(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", PRESETS["tiny"] | {"vocab_size": 60_000}, progress=False)
    anonymous = _anonymous_kb()
    views = [checkpoint.tensor(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert sum(int(v[-1, -1]) for v in views) >= 0 and sum(v.nbytes for v in views) > 60e6
    assert _anonymous_kb() - anonymous < 20_000
    again = checkpoint.tensor("lm_head.weight")
    assert np.shares_memory(again, views[1])
    with pytest.raises(ValueError, match="read-only"):
        again[0, 0] = 1
    scale = checkpoint.linear(EXPERT).scale
    assert scale is not None and not scale.flags.writeable


def _anonymous_kb() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("anonymous memory is read from /proc, which only Linux has")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def test_tied_embeddings_need_no_head(tmp_path: Path, ragged_config: dict) -> None:
    checkpoint = make_checkpoint(tmp_path / "t", ragged_config | {"tie_word_embeddings": True}, progress=False)
    assert checkpoint.spec.tie_embeddings and not checkpoint.has("lm_head.weight")


def test_bf16_scales_are_widened(edit_tensors: Callable) -> None:
    folder = edit_tensors({f"{Q}.weight_scale_inv": torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)})
    scale = open_checkpoint(folder).linear(Q).scale
    np.testing.assert_array_equal(scale, np.array([[0.5, 0.25]], np.float32), strict=True)


def test_extra_tensors_are_ignored(edit_tensors: Callable) -> None:
    extra = {"model.layers.2.input_layernorm.weight": torch.ones(3), "model.mtp.x": torch.ones(2)}
    checkpoint = open_checkpoint(edit_tensors(extra))
    assert not checkpoint.has("model.mtp.x")


@pytest.mark.parametrize("entry", [Q, "model.layers.0", "self_attn.q_proj"])
def test_modules_to_not_convert(edit_tensors: Callable, entry: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = edit_tensors({})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append(entry)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is stored as F8_E4M3, expected BF16"):
        open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.startswith(entry) or entry in n]:
        if tensors[name].dtype == torch.float8_e4m3fn:
            tensors[name] = tensors[name].to(torch.bfloat16)
            del tensors[f"{name}_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).linear(Q).scale is None
    assert open_checkpoint(folder).linear(EXPERT).scale is not None


def test_misaligned_data_is_read(tmp_path: Path, oracles: Path) -> None:
    """Other writers may not align tensors; views of those are copies, the values the same."""
    source = oracles / "qwen3_fp8_128"
    name = f"{Q}.weight_scale_inv"
    folder = Path(shutil.copytree(source, tmp_path / "m"))
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body, moved = b"\0", {"pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    meta = header.pop("__metadata__")
    for key, entry in header.items():
        part = data[8 + size :][slice(*entry["data_offsets"])]
        moved[key] = entry | {"data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps({"__metadata__": meta, **moved}).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + body)
    expected, found = open_checkpoint(source), open_checkpoint(folder)
    for key in header:
        np.testing.assert_array_equal(found.tensor(key), expected.tensor(key), strict=True)
        assert found.tensor(key).flags.aligned


FP8_ONES = torch.ones(128, 256).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head.weight": None}, "1 tensor is missing that config.json calls for: lm_head.weight"),
        (
            {f"model.layers.1.mlp.experts.2.{p}_proj.weight": None for p in ("gate", "up")},
            "2 tensors are missing that config.json calls for: model.layers.1.mlp.experts.2.gate_proj.weight",
        ),
        (
            {f"{Q}.weight_scale_inv": None},
            f"1 tensor is missing that config.json calls for: {Q}.weight_scale_inv",
        ),
        ({f"{Q}.weight": FP8_ONES[:64]}, f"tensor {Q}.weight has shape [64, 256], expected [128, 256]"),
        ({f"{Q}.weight": torch.ones(128, 256)}, f"tensor {Q}.weight is stored as F32, expected F8_E4M3"),
        (
            {f"{Q}.weight": torch.ones(128, 256).half()},
            f"tensor {Q}.weight is stored as F16, expected F8_E4M3",
        ),
        ({"model.norm.weight": torch.ones(256)}, "tensor model.norm.weight is stored as F32, expected BF16"),
        ({f"{Q}.weight_scale_inv": torch.ones(1, 3)}, "_scale_inv has shape [1, 3], expected [1, 2]"),
        ({f"{Q}.weight_scale_inv": torch.ones(1, 2).half()}, "_inv is stored as F16, expected F32 or BF16"),
        (
            {f"{Q}.weight_scale_inv": torch.tensor([[1, torch.nan]])},
            "holds a scale that is not finite and positive",
        ),
        (
            {f"{Q}.weight_scale_inv": torch.tensor([[torch.nan, 1]])},
            "holds a scale that is not finite and positive",
        ),
        (
            {f"{Q}.weight_scale_inv": torch.tensor([[1, torch.inf]])},
            "holds a scale that is not finite and positive",
        ),
        (
            {f"{Q}.weight_scale_inv": torch.tensor([[0.0, 1]])},
            "holds a scale that is not finite and positive",
        ),
        (
            {f"{Q}.weight_scale_inv": torch.tensor([[-1.0, 1]])},
            "holds a scale that is not finite and positive",
        ),
    ],
)
def test_refused_tensors(edit_tensors: Callable, changes: dict, message: str) -> None:
    folder = edit_tensors(changes)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(folder)
    assert message in str(e.value) and str(e.value).startswith(str(folder)) and "\n" not in str(e.value)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_verify_finds_fp8_nan(edit_tensors: Callable, code: int) -> None:
    codes = torch.zeros(128, 256, dtype=torch.uint8)
    codes[3, 5] = code
    checkpoint = open_checkpoint(edit_tensors({f"{Q}.weight": codes.view(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=rf"tensor {Q}\.weight is not finite at flat index 773"):
        checkpoint.verify(progress=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_verify_finds_bf16_nan(edit_tensors: Callable, value: float) -> None:
    norm = torch.ones(256, dtype=torch.bfloat16)
    norm[9] = value
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is not finite at flat index 9"):
        open_checkpoint(edit_tensors({"model.norm.weight": norm})).verify(progress=False)


def test_absurd_sizes_are_refused_at_once(edit_config: Callable) -> None:
    folder = edit_config(num_hidden_layers=4096, num_experts=16384)
    with pytest.raises(CheckpointError, match="at least 1,000 tensors are missing"):
        open_checkpoint(folder)
