"""The two precisions of the CPU engine, behind one interface.

`Exact` computes in float64 and rounds to float32 between ops, so that greedy tokens do not depend on batching,
chunking, placement or threads: for checking, not for speed. `Bf16` rounds the inputs of every matrix product to
BF16, accumulates in float32 and keeps the residual stream in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hybridlab import kernels
from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.kernels_numpy import dequantize

LinearFn = Callable[[torch.Tensor], torch.Tensor]
ExpertsFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


WIDE_CACHE_BYTES = 2**28
"""float64 weights that `Exact` keeps."""


class Numerics(Protocol):
    """How linear layers, norms and attention are computed; all take and give float32 tensors."""

    kv_dtype: torch.dtype

    def linear(self, weights: LinearWeights) -> LinearFn:
        """x [T, K] -> [T, N]."""
        ...

    def experts(
        self, gate: Sequence[LinearWeights], up: Sequence[LinearWeights], down: Sequence[LinearWeights]
    ) -> ExpertsFn:
        """(x [T, H], expert_ids int32 [T, K] with -1 = skip, weights [T, K]) -> [T, H]."""
        ...

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """Into the type that elementwise maths and attention use."""
        ...


class Exact:
    """float64 compute, float32 between ops."""

    kv_dtype = torch.float32

    def __init__(self) -> None:
        self._wide: dict[str, torch.Tensor] = {}
        self._room_bytes = WIDE_CACHE_BYTES

    def weights(self, weights: LinearWeights) -> torch.Tensor:
        """float64 [N, K]; kept for small models, made anew each time for large ones."""
        if (wide := self._wide.get(weights.name)) is None:
            wide = torch.from_numpy(dequantize((weights.weight, weights.scale))).double()
            if wide.nbytes <= self._room_bytes:
                self._wide[weights.name] = wide
                self._room_bytes -= wide.nbytes
        return wide

    def linear(self, weights: LinearWeights) -> LinearFn:
        def apply(x_TK: torch.Tensor) -> torch.Tensor:
            return (x_TK.double() @ self.weights(weights).T).float()

        return apply

    def experts(
        self, gate: Sequence[LinearWeights], up: Sequence[LinearWeights], down: Sequence[LinearWeights]
    ) -> ExpertsFn:
        def apply(x_TH: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            num_tokens, top_k = expert_ids.shape
            parts = torch.zeros(num_tokens, top_k, x_TH.shape[1], dtype=torch.float64)
            for e in expert_ids.unique().tolist():
                if e < 0:
                    continue
                rows, slots = (expert_ids == e).nonzero(as_tuple=True)
                x = x_TH[rows].double()
                g = (x @ self.weights(gate[e]).T).float().double()
                u = (x @ self.weights(up[e]).T).float().double()
                h = (torch.nn.functional.silu(g) * u).float().double()
                parts[rows, slots] = (h @ self.weights(down[e]).T).float().double()
            return (parts * weights.double().unsqueeze(-1)).sum(1).float()

        return apply

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class Bf16:
    """The compiled kernels, or their NumPy twin; threads as given."""

    kv_dtype = torch.bfloat16

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def linear(self, weights: LinearWeights) -> LinearFn:
        kernel, threads = kernels.linear(weights.weight, weights.scale), self.threads

        def apply(x_TK: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(kernel(x_TK.numpy(), threads=threads))

        return apply

    def experts(
        self, gate: Sequence[LinearWeights], up: Sequence[LinearWeights], down: Sequence[LinearWeights]
    ) -> ExpertsFn:
        kernel = kernels.moe_layer(
            *([w.weight for w in group] for group in (gate, up, down)),
            *(None if group[0].scale is None else [w.scale for w in group] for group in (gate, up, down)),
        )
        threads = self.threads

        def apply(x_TH: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(
                kernel(x_TH.numpy(), expert_ids.numpy(), weights.numpy(), threads=threads)
            )

        return apply

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def make_numerics(precision: str, threads: int) -> Numerics:
    """Raises `ValueError` naming the precision if it is neither "exact" nor "bf16"."""
    if precision == "exact":
        return Exact()
    if precision == "bf16":
        return Bf16(threads)
    raise ValueError(f"precision {precision!r} is unknown, expected 'exact' or 'bf16'")


def rms_norm(numerics: Numerics, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis, float32 in and out."""
    wide = numerics.up(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).float()
