"""Files of a checkpoint that are truncated, missing, swapped, or links out of its folder: one clear line each."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hybridlab.checkpoint import open_checkpoint
from hybridlab.errors import CheckpointError


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_file(copy: Path, keep: int) -> None:
    shard = shards(copy)[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(copy)
    assert str(e.value).startswith(f"{shard}: not a whole safetensors file") and "\n" not in str(e.value)


@pytest.mark.parametrize("data", [b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60, b"\x10" + b"\0" * 7 + b"[" * 16])
def test_garbage_file(copy: Path, data: bytes) -> None:
    shard = shards(copy)[1]
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: not a whole safetensors file"):
        open_checkpoint(copy)


def test_swapped_shards(copy: Path) -> None:
    a, b = shards(copy)[:2]
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"safetensors: tensor .* missing, though its index lists it"):
        open_checkpoint(copy)


def test_missing_shard(copy: Path) -> None:
    shards(copy)[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-\d+.safetensors: shard is missing"):
        open_checkpoint(copy)


def test_shard_that_is_no_file(copy: Path) -> None:
    shards(copy)[1].unlink()
    os.mkfifo(copy / "model.safetensors")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        open_checkpoint(copy)


def test_unlisted_shard(copy: Path) -> None:
    total = len(shards(copy))
    shutil.copy(shards(copy)[0], copy / f"model-{total + 1:05d}-of-{total:05d}.safetensors")
    with pytest.raises(CheckpointError, match=r"shard is not listed in model\.safetensors\.index\.json"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", 7])
def test_escaping_shard_name(copy: Path, name: object) -> None:
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: .*expected (a file|the plain name)"):
        open_checkpoint(copy)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_empty_index(copy: Path, text: str) -> None:
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: key 'weight_map' is "):
        open_checkpoint(copy)


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*index\.json found \(found"):
        open_checkpoint(copy)


def hub_cache(source: Path, root: Path) -> Path:
    """The Hub's cache layout: files in blobs/, links to them in snapshots/<hash>/."""
    snapshot = root / "models--org--name" / "snapshots" / "abc123"
    blobs = root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"sha{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha{i}")
    return snapshot


def test_hub_cache_links_are_followed(ragged: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(ragged, tmp_path)
    assert open_checkpoint(snapshot).num_bytes == open_checkpoint(ragged).num_bytes
    (tmp_path / "alias").symlink_to(snapshot)
    open_checkpoint(tmp_path / "alias")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json", None])
def test_link_out_of_the_hub_cache_is_refused(ragged: Path, tmp_path: Path, name: str | None) -> None:
    snapshot = hub_cache(ragged, tmp_path)
    link = snapshot / (name or shards(snapshot)[0].name)
    link.unlink()
    link.symlink_to(ragged / link.name)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(snapshot)
    assert str(e.value).startswith(f"{link}: link leads to {ragged / link.name}, outside ")


def test_link_inside_the_folder_and_out_of_it(copy: Path, tmp_path: Path) -> None:
    shard = shards(copy)[0]
    shard.rename(copy / "data.bin")
    shard.symlink_to("data.bin")
    open_checkpoint(copy)
    (copy / "data.bin").rename(tmp_path / "data.bin")
    with pytest.raises(CheckpointError, match="broken link to"):
        open_checkpoint(copy)
    shard.unlink()
    shard.symlink_to("../data.bin")
    with pytest.raises(CheckpointError, match=r"link leads to .*, outside "):
        open_checkpoint(copy)
