"""What a user would multiply with instead: torch, and ggml and kt-kernel where they are installed.

A peer that is not there gives no row and one line that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from hybridlab.bench.contenders import Calls, Contender, repeated, routings
from hybridlab.bench.shapes import LayerShape, MatrixShape
from hybridlab.bench.weights import WeightPool
from hybridlab.errors import ConfigError
from hybridlab.sections import did_you_mean

if TYPE_CHECKING:
    import torch

TORCH_SETTLE_S = 0.005
"""OpenMP's threads spin for a while after a call; what is measured next must not share its cores with them."""
DEQUANTISED_ROWS = (1, 64)

PEERS: Mapping[str, str] = {
    "torch_bf16": "torch",
    "torch_fp8": "torch",
    "ggml_q8_0": "ggml",
    "ggml_bf16": "ggml",
    "kt_kernel": "kt_kernel",
}
"""Peer -> the module that it needs."""


def find_peers(names: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    """The peers that can run here, and a line for each that cannot; by default of all. () asks for none.

    Raises ConfigError for an unknown name.
    """
    asked = tuple(PEERS) if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in asked:
        if name not in PEERS:
            raise ConfigError(f"bench kernels: peers: unknown {name!r}{did_you_mean(str(name), PEERS)}")
    there = tuple(name for name in asked if find_spec(PEERS[name]) is not None)
    missing = dict.fromkeys(PEERS[name] for name in asked if name not in there)
    return there, [f"{module} is not installed: no rows of it (docs/peers.md)" for module in missing]


def matrix_peers(names: Sequence[str], shape: MatrixShape, pool: WeightPool) -> list[Contender]:
    """Those of `names` that multiply by single matrices."""
    made: dict[str, Callable[[], Contender]] = {
        "torch_bf16": partial(TorchMatrices, shape, pool, "bf16"),
        "torch_fp8": partial(TorchMatrices, shape, pool, "fp8"),
    }
    if {"ggml_q8_0", "ggml_bf16"} & set(names):
        from hybridlab.bench.peer_ggml import GgmlMatrices

        made |= {f"ggml_{kind}": partial(GgmlMatrices, shape, pool, kind) for kind in ("q8_0", "bf16")}
    return [made[name]() for name in names if name in made]


def layer_peers(
    names: Sequence[str], layer: LayerShape, pool: WeightPool, experts: int, threads: int
) -> list[Contender]:
    """Those of `names` that compute a whole layer; kt-kernel's pool of threads is made for one count.

    torch computes with `experts` experts; kt-kernel, which copies them, with as many as the pool has room for.
    """
    made: dict[str, Callable[[], Contender]] = {
        "torch_bf16": partial(TorchLayer, layer, pool, experts, "bf16"),
        "torch_fp8": partial(TorchLayer, layer, pool, experts, "fp8"),
    }
    if "kt_kernel" in names:
        from hybridlab.bench.peer_kt_kernel import KtLayer

        made["kt_kernel"] = partial(KtLayer, layer, pool, threads)
    return [made[name]() for name in names if name in made]


@contextmanager
def torch_threads(threads: int, peers: Sequence[str]) -> Iterator[None]:
    """torch computes with `threads` threads in the block, if it is among the peers, and as before afterwards."""
    if not any(name.startswith("torch") for name in peers):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Torch:
    layout = "rows"
    layout_bytes = 0
    settle_s = TORCH_SETTLE_S

    def __init__(self, weights: str) -> None:
        import torch

        self.weights, self.name = weights, "torch_bf16" if weights == "bf16" else "torch_fp8"
        self.tier = f"torch {torch.__version__.partition('+')[0]}"

    def takes(self, rows: int) -> bool:
        return self.weights == "bf16" or rows in DEQUANTISED_ROWS


class TorchMatrices(_Torch):
    """`torch.nn.functional.linear` in BF16; FP8 is turned into BF16 on each call, block scales and all."""

    def __init__(self, shape: MatrixShape, pool: WeightPool, weights: str) -> None:
        super().__init__(weights)
        num_bytes = shape.n * shape.k * (1 if weights == "fp8" else 2)
        self._matrices = [_tensors(pool, shape.n, shape.k, weights) for _ in range(pool.count(num_bytes))]
        self.weight_bytes = num_bytes

    def calls(self, x: np.ndarray, threads: int) -> Calls:
        import torch

        x_TK = torch.from_numpy(x).to(torch.bfloat16)
        return [partial(_linear, x_TK, *matrix) for matrix in self._matrices]


class TorchLayer(_Torch):
    """`experts` routed experts, as of `OurLayer`, one after the other: gate, up, SiLU, down, weighted sum."""

    def __init__(self, layer: LayerShape, pool: WeightPool, experts: int, weights: str) -> None:
        super().__init__(weights)
        self._top_k = layer.top_k
        self.weight_bytes = layer.expert_bytes(1 if weights == "fp8" else 2)
        distinct = min(experts, pool.count(self.weight_bytes))
        shapes = ((layer.intermediate, layer.hidden),) * 2 + ((layer.hidden, layer.intermediate),)
        made = [[_tensors(pool, *shape, weights) for shape in shapes] for _ in range(distinct)]
        self._experts = repeated(made, experts)

    def takes(self, rows: int) -> bool:
        return rows == 1 or (self.weights == "bf16" and rows <= 2048)

    def calls(self, x: np.ndarray, threads: int) -> Calls:
        import torch

        routes = routings(len(x), len(self._experts), self._top_k)
        x_TH = torch.from_numpy(x).to(torch.bfloat16)
        return [partial(self._step, x_TH, torch.from_numpy(ids), torch.from_numpy(w)) for ids, w in routes]

    def _step(self, x_TH: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        import torch

        out = torch.zeros(x_TH.shape)
        for expert in ids.unique().tolist():
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            x = x_TH[tokens]
            gate, up, down = self._experts[expert]
            hidden = torch.nn.functional.silu(_linear(x, *gate)) * _linear(x, *up)
            out.index_add_(0, tokens, _linear(hidden, *down).float() * weights[tokens, slots, None])
        return out


def _tensors(pool: WeightPool, n: int, k: int, weights: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    import torch

    if weights == "bf16":
        return torch.from_numpy(pool.bf16(n, k)).view(torch.bfloat16), None
    codes, scale = pool.fp8(n, k)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale).to(torch.bfloat16)


def _linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    import torch

    if scale is not None:
        n, k = weight.shape
        grid = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        weight = weight.to(torch.bfloat16) * grid
    return torch.nn.functional.linear(x, weight)
