"""Which files make up a checkpoint, and which links among them are followed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, overload

from hybridlab.checkpoint.jsonfile import Fields, read_object, shown
from hybridlab.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def allowed_root(folder: Path) -> Path:
    """The folder inside which links of a checkpoint may point.

    The checkpoint's own folder or, for a snapshot of the Hub's cache (models--org--name/snapshots/<hash>,
    whose files link to ../../blobs), the cache folder of that one model.
    """
    real = folder.resolve()
    cache = real.parent.parent
    return cache if real.parent.name == "snapshots" and cache.name.startswith("models--") else real


@overload
def locate(folder: Path, name: str, *, required: Literal[True] = True) -> Path: ...
@overload
def locate(folder: Path, name: str, *, required: bool) -> Path | None: ...
def locate(folder: Path, name: str, *, required: bool = True) -> Path | None:
    """Path of a file of the checkpoint; None if it is absent and not required. Links must stay inside."""
    path = folder / name
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path}: broken link to {path.readlink()}")
        if required:
            raise CheckpointError(f"{path}: file not found")
        return None
    root = allowed_root(folder)
    target = path.resolve()
    if not target.is_relative_to(root):
        raise CheckpointError(f"{path}: link leads to {target}, outside {root}; expected a target inside it")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    return path


def tensor_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The safetensors files of a checkpoint, each with the tensors that an index (if any) lists for it."""
    single = locate(folder, SINGLE, required=False)
    if single is not None:  # transformers prefers it to an index too
        return {single: None}
    index = locate(folder, INDEX, required=False)
    if index is None:
        weights = (".safetensors", ".bin", ".pt", ".gguf")
        others = sorted(p.name for p in folder.iterdir() if p.suffix in weights)
        beside = f" (found {shown(others[:3])})" if others else ""
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} found{beside}")
    names = _weight_map(index)
    shards = {locate_shard(folder, index, name): frozenset(tensors) for name, tensors in names.items()}
    _refuse_unlisted(folder, index, set(names))
    return dict(shards)


def _weight_map(index: Path) -> dict[str, list[str]]:
    weight_map = Fields(str(index), read_object(index)).object("weight_map")
    if weight_map is None or not weight_map.data:
        raise CheckpointError(f"{index}: key 'weight_map' is missing or empty, expected tensor -> file name")
    names: dict[str, list[str]] = {}
    for tensor, name in weight_map.data.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: tensor {shown(tensor)} is in {shown(name)}, expected a file")
        names.setdefault(name, []).append(tensor)
    return names


def locate_shard(folder: Path, index: Path, name: str) -> Path:
    if not name.endswith(".safetensors") or name != Path(name).name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{index}: shard {shown(name)}, expected the plain name of a .safetensors file")
    path = locate(folder, name, required=False)
    if path is None:
        raise CheckpointError(f"{folder / name}: shard is missing ({index.name} lists it)")
    return path


def _refuse_unlisted(folder: Path, index: Path, listed: set[str]) -> None:
    """A shard of the same set that the index does not know: index and shards do not belong together."""
    totals = {m[1] for name in listed if (m := re.search(r"-of-(\d+)\.safetensors$", name))}
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        m = re.search(r"-of-(\d+)\.safetensors$", path.name)
        if m and m[1] in totals and path.name not in listed:
            raise CheckpointError(f"{path}: shard is not listed in {index.name}")
