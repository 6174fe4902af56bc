"""Small checkpoints that tests open as they are or break first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridlab.checkpoint import PRESETS, make_checkpoint

ORACLES = Path(__file__).parents[2] / "data" / "oracles"

# Two layers, one of them dense; no dimension is a multiple of 128, so every FP8 grid is ragged.
RAGGED = {
    **PRESETS["tiny"],
    "vocab_size": 90,
    "hidden_size": 200,
    "intermediate_size": 150,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 34,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def oracles() -> Path:
    return ORACLES


@pytest.fixture(scope="session")
def ragged_config() -> dict[str, Any]:
    return dict(RAGGED)


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint in several shards, with an index."""
    folder = tmp_path_factory.mktemp("made") / "ragged"
    make_checkpoint(folder, RAGGED, progress=False, shard_bytes=300_000)
    return folder


@pytest.fixture
def copy(ragged: Path, tmp_path: Path) -> Path:
    """A copy of `ragged` to break."""
    return Path(shutil.copytree(ragged, tmp_path / "copy"))


@pytest.fixture
def edit_config(copy: Path) -> Callable[..., Path]:
    """Change keys of the copy's config.json (... removes one); returns the folder."""

    def edit(**changes: Any) -> Path:
        path = copy / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return copy

    return edit


@pytest.fixture
def edit_tensors(oracles: Path, tmp_path: Path) -> Callable[..., Path]:
    """Change tensors of a copy of the FP8 oracle, now in one file (None removes one); returns the folder."""
    from safetensors.torch import load_file, save_file

    def edit(changes: dict[str, Any]) -> Path:
        source, folder = oracles / "qwen3_fp8_128", tmp_path / "edited"
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        tensors = {k: v for f in source.glob("model-*.safetensors") for k, v in load_file(f).items()} | changes
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
        return folder

    return edit
