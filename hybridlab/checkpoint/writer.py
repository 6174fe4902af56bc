"""Make checkpoints of random weights in the layout of the Hugging Face Hub, at the speed of the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, serialize_file
from safetensors import TensorSpec as RawTensor

from hybridlab.checkpoint.config import parse_config
from hybridlab.checkpoint.files import INDEX, SINGLE
from hybridlab.checkpoint.initial import WeightMaker
from hybridlab.checkpoint.presets import preset_config
from hybridlab.checkpoint.reader import Checkpoint, open_checkpoint
from hybridlab.checkpoint.routing import ROUTINGS
from hybridlab.checkpoint.schema import TensorSpec, expected_tensors
from hybridlab.errors import CheckpointError
from hybridlab.spec import ModelSpec

SHARD_BYTES = 256 << 20
"""Default size of a file. Two of them are held in memory: one being filled while the other is written."""

NUM_THREADS = 2
ALIGN_BYTES = 64
RESERVE_BYTES = 64 << 20
"""Disk space that is left free, for headers, index and the file system's own use."""

_STORED = {
    "BF16": ("bfloat16", np.uint16),
    "F8_E4M3": ("float8_e4m3fn", np.uint8),
    "F32": ("float32", np.float32),
}


def make_checkpoint(
    out: Path | str,
    preset: str | Mapping[str, Any],
    *,
    dtype: str = "fp8",
    seed: int = 0,
    layers: int | None = None,
    routing: str = "uniform",
    progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Write a checkpoint of random weights and open it.

    `preset` is a name of `presets.PRESETS` or a config.json object of a supported family; `layers` cuts it.
    `dtype` is "fp8" (128x128 blocks) or "bf16". `routing` is how popular the experts are: "uniform", "olmoe"
    (strongly skewed) or "mixtral" (nearly flat), see `checkpoint.routing`. These arguments and nothing else
    decide the bytes. Files of at most `shard_bytes` are written to a hidden folder beside `out`
    (".<name>.partial-<process id>", removed if anything fails) that is renamed at the end.

    Raises CheckpointError for unknown arguments, a target that is not empty, and too small a disk, before
    anything is written.
    """
    out = Path(out)
    config = preset_config(preset, dtype=dtype, layers=layers)
    spec = parse_config(config, f"preset {preset}" if isinstance(preset, str) else "preset")
    if routing not in ROUTINGS:
        raise CheckpointError(f"routing {routing!r} is unknown, expected one of {', '.join(ROUTINGS)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise CheckpointError(f"seed is {seed!r}, expected an integer from 0")
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise CheckpointError(f"shard_bytes is {shard_bytes!r}, expected a positive integer")
    _refuse_target(out)
    shards = _cut(expected_tensors(spec), shard_bytes)
    _refuse_small_disk(out, sum(t.num_bytes for shard in shards for t in shard))
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as e:
        raise CheckpointError(f"{partial}: cannot be made ({e.strerror or e})") from None
    try:
        _write_shards(partial, shards, WeightMaker(spec, seed, routing), progress)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", _generation_config(spec))
        partial.replace(out)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{out}: cannot be written ({' '.join(str(e).split())[:200]})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_checkpoint(out)


def _refuse_target(out: Path) -> None:
    try:
        if out.is_dir() and not any(out.iterdir()):
            return
        if out.exists() or out.is_symlink():
            raise CheckpointError(f"{out}: exists already, expected a new or empty folder")
    except OSError as e:
        raise CheckpointError(f"{out}: cannot be written ({e.strerror or e})") from None


def _refuse_small_disk(out: Path, num_bytes: int) -> None:
    parent = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    if not parent.is_dir():
        raise CheckpointError(f"{out}: cannot be written, {parent} is not a folder")
    free = shutil.disk_usage(parent).free
    if num_bytes + RESERVE_BYTES > free:
        numbers = f"needs {num_bytes / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free"
        raise CheckpointError(f"{out}: {numbers}")


def _cut(tensors: Iterator[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors in groups of at most `shard_bytes`; a larger tensor stands alone."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    return shards


def _write_shards(folder: Path, shards: list[list[TensorSpec]], maker: WeightMaker, progress: bool) -> None:
    from tqdm.auto import tqdm

    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    sizes = [sum(_aligned(t.num_bytes) for t in shard) for shard in shards]
    buffers = [np.empty(max(sizes), np.uint8) for _ in range(min(2, len(shards)))]
    total = sum(t.num_bytes for shard in shards for t in shard)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="make checkpoint", disable=not progress)
    written: Future[None] | None = None
    with bar, ThreadPoolExecutor(NUM_THREADS) as fillers, ThreadPoolExecutor(1) as writer:
        for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
            views = _views(shard, buffers[i % len(buffers)])
            # The buffer filled now is free: its write ended before the one that may still run was started.
            for tensor in fillers.map(lambda pair: _fill(maker, *pair), list(zip(shard, views, strict=True))):
                bar.update(tensor.num_bytes)
            if written is not None:
                written.result()
            written = writer.submit(_write_file, folder / name, shard, views)
        if written is not None:
            written.result()
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)


def _fill(maker: WeightMaker, tensor: TensorSpec, out: np.ndarray) -> TensorSpec:
    maker.fill(tensor, out)
    return tensor


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _views(shard: list[TensorSpec], buffer: np.ndarray) -> list[np.ndarray]:
    views, start = [], 0
    for tensor in shard:
        data = buffer[start : start + tensor.num_bytes]
        views.append(data.view(_STORED[tensor.dtype][1]).reshape(tensor.shape))
        start += _aligned(tensor.num_bytes)
    return views


def _write_file(path: Path, shard: list[TensorSpec], views: list[np.ndarray]) -> None:
    tensors = {
        t.name: RawTensor(
            dtype=_STORED[t.dtype][0], shape=list(t.shape), data_ptr=view.ctypes.data, data_len=view.nbytes
        )
        for t, view in zip(shard, views, strict=True)
    }
    serialize_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes 0600; the folder was made under the umask


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _generation_config(spec: ModelSpec) -> dict[str, Any]:
    eos = list(spec.eos_token_ids)
    return {"do_sample": False, **({"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {})}
