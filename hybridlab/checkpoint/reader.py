"""Open a checkpoint: every tensor's name, format and shape is checked, nothing is copied."""

from __future__ import annotations

import html
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hybridlab.checkpoint.config import read_config
from hybridlab.checkpoint.files import tensor_files
from hybridlab.checkpoint.jsonfile import shown
from hybridlab.checkpoint.residency import populate
from hybridlab.checkpoint.schema import SCALE_SUFFIX, TensorSpec, expected_tensors
from hybridlab.errors import CheckpointError
from hybridlab.number_formats import bf16_to_float32
from hybridlab.spec import ModelSpec

if TYPE_CHECKING:
    import torch

VERIFY_CHUNK = 1 << 20
"""Elements scanned at once by `verify`: the temporaries stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """Weights of one linear layer y = x @ weight.T, as stored.

    `weight` is [N, K], uint8 (E4M3FN codes) or uint16 (BF16 codes); `scale` is float32
    [ceil(N / 128), ceil(K / 128)], multiplied to its block, or None for BF16. All are read-only views.
    """

    name: str
    weight: np.ndarray
    scale: np.ndarray | None


class Checkpoint:
    """An open checkpoint: `spec` plus read-only views on the memory-mapped tensors. See `open_checkpoint`.

    Views stay valid as long as they are referenced, also after the Checkpoint is gone. `num_bytes` is the sum
    over the tensors that the model needs. It cannot be pickled: other processes open `folder` themselves.
    """

    def __init__(self, folder: Path, spec: ModelSpec, tensors: dict[str, TensorSpec], files: _Files) -> None:
        self.folder = folder
        self.spec = spec
        self.num_bytes = sum(t.num_bytes for t in tensors.values())
        self._tensors = tensors
        self._files = files
        # A few KB per million weights; checked here once so that no kernel meets a NaN scale.
        self._scales = {t.name: _load_scale(files, t) for t in tensors.values() if t.kind == "scale"}

    def has(self, name: str) -> bool:
        """Whether the model has this tensor. Others that lie in the files do not count."""
        return name in self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the model's tensors."""
        return tuple(sorted({self._files.path(name) for name in self._tensors}))

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by name: BF16 as uint16 codes, F8_E4M3 as uint8 codes, scales as float32; read-only."""
        spec = self._tensors.get(name)
        if spec is None:
            raise CheckpointError(f"{self.folder}: the model has no tensor {shown(name)}")
        return self._scales[name] if spec.kind == "scale" else self._files.view(name)

    def linear(self, prefix: str) -> LinearWeights:
        """The linear layer with this module name, such as "model.layers.0.self_attn.q_proj"."""
        name = f"{prefix}.weight"
        return LinearWeights(prefix, self.tensor(name), self._scales.get(name + SCALE_SUFFIX))

    def first_moe_layers(self, count: int) -> Checkpoint:
        """A view that ends after `count` MoE layers, or this one if it has no more: layers are alike when measured.

        Embedding and head stay, so that it is a whole, if senseless, model.
        """
        if len(self.spec.moe_layers) <= count:
            return self
        layers = self.spec.moe_layers[count - 1] + 1
        dense = frozenset(layer for layer in self.spec.dense_layers if layer < layers)
        spec = replace(self.spec, num_layers=layers, dense_layers=dense)
        return Checkpoint(self.folder, spec, {t.name: t for t in expected_tensors(spec)}, self._files)

    def populate(self) -> bool:
        """Map all weights ahead of use (`residency.populate`); reads from disk what is not in the page cache."""
        return populate({self._files.path(name) for name in self._tensors})

    def verify(self, progress: bool = True, num_threads: int = 2) -> None:
        """Read every weight once and raise CheckpointError on the first tensor that holds NaN or infinity."""
        from tqdm.auto import tqdm

        bar = tqdm(total=self.num_bytes, unit="B", unit_scale=True, desc="verify", disable=not progress)
        with bar, ThreadPoolExecutor(num_threads) as pool:
            for spec, bad in pool.map(self._first_bad, self._tensors.values()):
                if bad is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    where = self._files.path(spec.name)
                    raise CheckpointError(f"{where}: tensor {spec.name} is not finite at flat index {bad:,}")
                bar.update(spec.num_bytes)

    def _first_bad(self, spec: TensorSpec) -> tuple[TensorSpec, int | None]:
        codes = self.tensor(spec.name).reshape(-1)
        for start in range(0, codes.size, VERIFY_CHUNK):
            bad = _not_finite(codes[start : start + VERIFY_CHUNK])
            if bad.any():
                return spec, start + int(bad.argmax())
        return spec, None

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"Checkpoint({str(self.folder)!r}: {s.family}, {s.weight_dtype}, {self.num_bytes / 1e9:.2f} GB, "
            f"{s.num_layers} layers, {s.num_experts} experts, top-{s.top_k})"
        )

    def _repr_html_(self) -> str:
        s = self.spec
        rows = {
            "folder": self.folder,
            "family": s.family,
            "weights": f"{s.weight_dtype}, {self.num_bytes / 1e9:.2f} GB, {len(self._tensors):,} tensors",
            "layers": f"{s.num_layers} ({len(s.dense_layers)} dense), hidden {s.hidden}",
            "experts": f"{s.num_experts} of width {s.moe_intermediate}, top-{s.top_k}",
            "attention": f"{s.num_heads} heads, {s.num_kv_heads} kv heads, head dim {s.head_dim}",
            "vocabulary": f"{s.vocab:,}",
        }
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face checkpoint folder (config.json, one or several safetensors files).

    Checks that every tensor the model needs is there in the expected format and shape, and that scales are
    finite and positive; weights themselves are only read by `Checkpoint.verify`. Raises CheckpointError with
    one line that names the file and key or tensor.
    """
    folder = Path(path)
    try:
        spec = read_config(folder)
        files = _Files(tensor_files(folder))
        spec = _untied_if_different(spec, files)
        tensors = _check_presence(folder, spec, files)
        _check_one_format(folder, tensors)
        for tensor in tensors.values():
            _check_tensor(files, tensor)
        return Checkpoint(folder, spec, tensors, files)
    except OSError as e:
        raise CheckpointError(f"{e.filename or folder}: cannot be read ({e.strerror or e})") from None


class _Files:
    """The open safetensors files and which of them holds each tensor."""

    def __init__(self, files: dict[Path, frozenset[str] | None]) -> None:
        self._holder: dict[str, tuple[Path, Any]] = {}
        for path, listed in files.items():
            handle = _open(path)
            present = set(handle.keys())
            if listed is not None and (lost := listed - present):
                more = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
                raise CheckpointError(f"{path}: tensor {min(lost)}{more} missing, though its index lists it")
            for name in present if listed is None else listed:
                self._holder[name] = (path, handle)

    def __contains__(self, name: object) -> bool:
        return name in self._holder

    def path(self, name: str) -> Path:
        return self._holder[name][0]

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype, shape) as the file's header has them."""
        info = self._holder[name][1].get_slice(name)
        return info.get_dtype(), tuple(info.get_shape())

    def view(self, name: str) -> np.ndarray:
        path, handle = self._holder[name]
        try:
            tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as e:
            raise CheckpointError(f"{path}: tensor {name} cannot be mapped ({_one_line(e)})") from None
        return _as_numpy(tensor)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    import torch

    codes = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    array = tensor.view(codes.get(tensor.dtype, tensor.dtype)).numpy()
    if not array.flags.aligned:  # a writer that did not align its data: the only case that is copied
        array = array.copy()
    array.flags.writeable = False
    return array


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        size = f"{path.stat().st_size:,} bytes"
        raise CheckpointError(f"{path}: not a whole safetensors file ({size}; {_one_line(e)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_presence(folder: Path, spec: ModelSpec, files: _Files) -> dict[str, TensorSpec]:
    def missing() -> Iterator[str]:
        return (t.name for t in expected_tensors(spec) if t.name not in files)

    # Bounded, so that a configuration of absurd size is refused at once.
    lost = list(islice(missing(), 1000))
    if lost:
        count = f"{len(lost):,} tensors are" if len(lost) > 1 else "1 tensor is"
        at_least = "at least " if len(lost) == 1000 else ""
        names = ", ".join(_some(lost))
        raise CheckpointError(f"{folder}: {at_least}{count} missing that config.json calls for: {names}")
    return {t.name: t for t in expected_tensors(spec)}


def _some(names: Iterable[str], most: int = 4) -> list[str]:
    names = list(names)
    return names if len(names) <= most else [*names[:most], "..."]


def _untied_if_different(spec: ModelSpec, files: _Files) -> ModelSpec:
    """Like transformers 5, believe the file: a stored lm_head that differs from the embedding is not tied."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not spec.tie_embeddings or head not in files or embedding not in files:
        return spec
    if files.header(head) == files.header(embedding) and np.array_equal(files.view(head), files.view(embedding)):
        return spec
    return replace(spec, tie_embeddings=False)


def _check_one_format(folder: Path, tensors: dict[str, TensorSpec]) -> None:
    """The gate, up and down matrices of a layer share one kernel, and so one format."""
    formats: dict[str, set[str]] = defaultdict(set)
    for name, tensor in tensors.items():
        layer, found, rest = name.partition(".mlp.")
        if found and rest.endswith("_proj.weight"):
            formats[layer].add(tensor.dtype)
    mixed = [layer for layer, dtypes in formats.items() if len(dtypes) > 1]
    if mixed:
        raise CheckpointError(
            f"{folder / 'config.json'}: modules_to_not_convert mixes BF16 and FP8 within the MLP or experts of "
            f"{mixed[0]}, expected one format for all of them"
        )


def _check_tensor(files: _Files, spec: TensorSpec) -> None:
    dtype, shape = files.header(spec.name)
    accepted = ("F32", "BF16") if spec.kind == "scale" else (spec.dtype,)
    where = f"{files.path(spec.name)}: tensor {spec.name}"
    if dtype not in accepted:
        raise CheckpointError(f"{where} is stored as {dtype}, expected {' or '.join(accepted)}")
    if shape != spec.shape:
        raise CheckpointError(f"{where} has shape {list(shape)}, expected {list(spec.shape)}")


def _load_scale(files: _Files, spec: TensorSpec) -> np.ndarray:
    scale = files.view(spec.name)
    if scale.dtype == np.uint16:
        scale = bf16_to_float32(scale)
        scale.flags.writeable = False
    # One pass: NaN fails both comparisons' minimum and maximum.
    if scale.size and not (scale.min() > 0 and scale.max() < np.inf):
        where = files.path(spec.name)
        raise CheckpointError(f"{where}: tensor {spec.name} holds a scale that is not finite and positive")
    return scale


def _not_finite(codes: np.ndarray) -> np.ndarray:
    if codes.dtype == np.uint8:
        return (codes & 0x7F) == 0x7F
    if codes.dtype == np.uint16:
        return (codes & 0x7F80) == 0x7F80
    return ~np.isfinite(codes)


if sys.byteorder != "little":
    raise ImportError("hybridlab.checkpoint maps little-endian files and needs a little-endian machine")
