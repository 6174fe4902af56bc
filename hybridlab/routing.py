"""Which experts tokens chose: counted per layer, and token by token where it was recorded."""

from __future__ import annotations

import html
import json
import os
import re
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab.errors import ConfigError
from hybridlab.plans import PlacementPlan, Tier

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.spec import ModelSpec

FORMAT = "hybridlab-routing/1"


@dataclass(frozen=True)
class RoutingStats:
    """Routes per (MoE layer, expert), from a recording or a prior; empty `counts` means nothing is known.

    `counts[i][e]` belongs to layer `layers[i]`. `chosen`, of a recording, holds an int16 array [T, L, K] per
    sequence: the K experts that each of its T tokens chose in each of the L layers, the likeliest first.
    """

    counts: tuple[tuple[int, ...], ...] = ()
    source: str = "none"
    layers: tuple[int, ...] = ()
    chosen: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.layers) or len(set(map(len, self.counts))) > 1:
            raise ConfigError(
                f"routing statistics: {len(self.counts)} rows of counts for {len(self.layers)} layers, "
                "expected a row of equal length for each layer"
            )

    @classmethod
    def of_tokens(
        cls, chosen: Sequence[np.ndarray], layers: Sequence[int], num_experts: int, source: str
    ) -> RoutingStats:
        """Count what a recording holds; `chosen` as in the class."""
        counts = np.zeros((len(layers), num_experts), np.int64)
        for tokens in chosen:
            for index in range(len(layers)):
                counts[index] += np.bincount(tokens[:, index].ravel(), minlength=num_experts)
        rows = tuple(tuple(row) for row in counts.tolist())
        return cls(rows, source, tuple(layers), tuple(np.asarray(tokens, np.int16) for tokens in chosen))

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.chosen)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per layer and expert: layer, expert, count, share of the layer's routes."""
        import pandas as pd

        rows = [
            (layer, expert, count, count / max(1, sum(row)))
            for layer, row in zip(self.layers, self.counts, strict=True)
            for expert, count in enumerate(row)
        ]
        return pd.DataFrame(rows, columns=["layer", "expert", "count", "share"])

    def replay(self, model: ModelSpec) -> Replay:
        """A hook for `Engine.serve(on_route=...)` that makes the tokens of `model` choose as recorded.

        Raises `ConfigError` if nothing was recorded token by token, or of another shape than the model's.
        """
        if not self.chosen:
            raise ConfigError(f"routing statistics ({self.source}) hold no recorded tokens; a replay needs some")
        wanted = (model.moe_layers, model.num_experts, model.top_k)
        recorded = (self.layers, len(self.counts[0]), self.chosen[0].shape[2])
        for name, theirs, ours in zip(("layers", "experts", "top-k"), wanted, recorded, strict=True):
            if theirs != ours:
                raise ConfigError(f"replay: {name} {ours} were recorded ({self.source}), the model has {theirs}")
        return Replay(self)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all; raises `ConfigError` naming it."""
        from safetensors.numpy import save

        path = Path(path)
        shape = (len(self.layers), len(self.counts[0]) if self.counts else 0)
        tensors = {"counts": np.array(self.counts, np.int64).reshape(shape)}
        tensors |= {f"chosen.{i}": np.ascontiguousarray(tokens) for i, tokens in enumerate(self.chosen)}
        about = {"format": FORMAT, "source": self.source, "layers": json.dumps(list(self.layers))}
        part = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(save(tensors, about))
            os.replace(part, path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
        finally:
            if part is not None:
                Path(part).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> RoutingStats:
        """Read what `save` wrote. Raises `ConfigError` naming the file and the tensor that is off."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ConfigError(f"{path}: expected routing statistics with format {FORMAT!r}")
                source, layers = about["source"], tuple(int(layer) for layer in json.loads(about["layers"]))
                names = [f"chosen.{i}" for i in range(len(file.keys()) - 1)]
                tensors = {name: file.get_tensor(name) for name in ("counts", *names)}
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: cannot be read as routing statistics ({error})") from None
        counts = tensors.pop("counts")
        _check(path, "counts", counts, counts.ndim == 2 and len(counts) == len(layers) and bool((counts >= 0).all()))
        for name, tokens in tensors.items():
            fits = tokens.ndim == 3 and tokens.shape[1] == len(layers) and tokens.dtype == np.int16 and tokens.size > 0
            _check(path, name, tokens, fits and tokens.min() >= 0 and tokens.max() < counts.shape[1])
        return cls(tuple(map(tuple, counts.tolist())), source, layers, tuple(tensors.values()))

    def _repr_html_(self) -> str:
        rows = []
        for layer, row in zip(self.layers, self.counts, strict=True):
            hot = sorted(row, reverse=True)
            total = max(1, sum(hot))
            quarter = sum(hot[: max(1, len(hot) // 4)]) / total
            rows.append(f"<tr><td>{layer}</td><td>{hot[0] * len(hot) / total:.2f}</td><td>{quarter:.0%}</td></tr>")
        head = "<tr><th>layer</th><th>hottest expert / mean</th><th>hottest quarter's share</th></tr>"
        title = f"{self.source}: {self.num_tokens} tokens recorded, {len(self.layers)} MoE layers"
        return f"<p><b>{html.escape(title)}</b></p><table>{head}{''.join(rows)}</table>"


def hit_rate(placed: PlacementPlan, routing: RoutingStats) -> float:
    """Share of the routes of `routing`, 0 to 1, that go to experts which `placed` keeps on the GPU.

    Raises `ConfigError` if `routing` holds no routes.
    """
    hits = total = 0
    for layer, row in zip(routing.layers, routing.counts, strict=True):
        total += sum(row)
        hits += sum(count for expert, count in enumerate(row) if placed.tier(layer, expert) is Tier.RESIDENT)
    if not total:
        raise ConfigError(f"routing statistics ({routing.source}) hold no routes; a hit rate needs some")
    return hits / total


class Replay:
    """Gives each token of a request the recorded choice of one sequence at the token's position.

    A request takes the sequence of the number in its id ("r00012": 12), without a number one by a hash of the id;
    sequences are counted round, and a sequence begins anew where a request is longer.
    """

    def __init__(self, stats: RoutingStats) -> None:
        self._chosen = stats.chosen
        self._index = {layer: index for index, layer in enumerate(stats.layers)}
        self._number = cache(_number)

    def __call__(self, layer: int, entries: Sequence[Any], expert_ids: np.ndarray) -> np.ndarray:
        """`expert_ids` int32 [T, K] of the router -> the recorded ones, same shape."""
        rows = []
        for entry in entries:
            tokens = self._chosen[self._number(entry.id) % len(self._chosen)]
            at = np.arange(entry.start, entry.start + len(entry.token_ids)) % len(tokens)
            rows.append(tokens[at, self._index[layer]])
        return np.concatenate(rows).astype(np.int32)


def _number(request_id: str) -> int:
    digits = re.search(r"(\d+)$", request_id)
    return int(digits[1]) if digits else zlib.crc32(request_id.encode())


def _check(path: Path, name: str, tensor: np.ndarray, fits: bool) -> None:
    if not fits:
        raise ConfigError(f"{path}: tensor {name!r} ({tensor.dtype} {list(tensor.shape)}) does not fit the others")
