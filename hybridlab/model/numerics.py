"""The two precisions of the CPU engine, behind one interface.

`Exact` computes in float64 and rounds to float32 between ops, so that greedy tokens do not depend on batching,
chunking, placement or threads: for checking, not for speed. `Bf16` rounds the inputs of every matrix product to
BF16, accumulates in float32 and keeps the residual stream in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from hybridlab import kernels
from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.kernels import attention as kernels_attention
from hybridlab.kernels import router as kernels_router
from hybridlab.kernels.numpy_twin import dequantize
from hybridlab.model.base import MicroBatch
from hybridlab.model.weight_layout import Rows, WeightSource
from hybridlab.number_formats import bf16_to_float32
from hybridlab.spec import ModelSpec

LinearFn = Callable[[torch.Tensor], torch.Tensor]
RouterFn = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
ExpertsFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
StepFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, MicroBatch], torch.Tensor]


QUERY_BLOCK = 128
"""Query rows of one piece of attention: bounds the score matrix of a long prompt and balances threads."""
LONG_CONTEXT = 8192
"""Cached tokens that the memory plan allows one request's attention for; longer ones take from the reserve."""
WIDE_CACHE_BYTES = 2**28
"""float64 weights that `Exact` keeps."""


class Numerics(Protocol):
    """How linear layers, norms and attention are computed; all take and give float32 tensors."""

    kv_dtype: torch.dtype

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the CPU where this numerics computes."""
        ...

    def embedding(self, table: np.ndarray) -> LinearFn:
        """BF16 bits [V, H] -> (token ids int64 [T] -> float32 [T, H])."""
        ...

    def workspace_bytes(self, model: ModelSpec, threads: int) -> int:
        """Memory beside the activations: attention scores, keys and values widened, weights widened."""
        ...

    def linear(self, weights: LinearWeights) -> LinearFn:
        """x [T, K] -> [T, N]."""
        ...

    def attention_step(
        self, projections: Sequence[LinearWeights], norms: Sequence[torch.Tensor], eps: float
    ) -> StepFn | None:
        """A whole attention layer for decoding tokens from its q, k, v, o and input, q, k norms, if there is one.

        (x [T, H], cos, sin, keys, values, batch) -> [T, H], residual added; `batch.decode_runs` is not None.
        """
        ...

    def experts(
        self, gate: Sequence[LinearWeights], up: Sequence[LinearWeights], down: Sequence[LinearWeights]
    ) -> ExpertsFn:
        """(x [T, H], expert_ids int32 [T, K] with -1 = skip, weights [T, K]) -> [T, H]."""
        ...

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """Into the type that attention of many queries uses."""
        ...

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight."""
        ...

    def norm_rope(
        self, x_TND: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TF: torch.Tensor, sin_TF: torch.Tensor
    ) -> torch.Tensor:
        """RMS norm of each head, then rotation of (first half, second half) pairs, F = D / 2."""
        ...

    def router(self, gate: LinearWeights, norm: torch.Tensor, eps: float, top_k: int, normalise: bool) -> RouterFn:
        """x [T, H] -> its RMS norm; ids int32 and weights of the `top_k` largest of softmax(gate x), [T, top_k]."""
        ...

    def attend(
        self, q_TND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: MicroBatch
    ) -> torch.Tensor | None:
        """All requests of a microbatch over keys and values [slots, G, D] in one call, if there is one -> [T, N, D]."""
        ...

    def attend_one(
        self, q_ND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cached: slice | torch.Tensor
    ) -> torch.Tensor:
        """One query over the slots `cached` of keys and values [slots, G, D] -> [N, D]."""
        ...


class _OnCpu:
    """What both have alike."""

    def place(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def embedding(self, table: np.ndarray) -> LinearFn:
        return lambda ids_T: torch.from_numpy(bf16_to_float32(table[ids_T.numpy()]))


class Exact(_OnCpu):
    """float64 compute, float32 between ops."""

    kv_dtype = torch.float32

    def __init__(self) -> None:
        self._wide: dict[str, torch.Tensor] = {}
        self._room_bytes = WIDE_CACHE_BYTES

    def workspace_bytes(self, model: ModelSpec, threads: int) -> int:
        return WIDE_CACHE_BYTES + 8 * model.vocab * model.hidden + 2 * _attention_bytes(model, threads)

    def weights(self, weights: LinearWeights) -> torch.Tensor:
        """float64 [N, K]; kept for small models, made anew each time for large ones."""
        if not weights.name or (wide := self._wide.get(weights.name)) is None:
            wide = torch.from_numpy(dequantize((weights.weight, weights.scale))).double()
            if weights.name and wide.nbytes <= self._room_bytes:  # without a name: a slot of the ring, which changes
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

    def attention_step(
        self, projections: Sequence[LinearWeights], norms: Sequence[torch.Tensor], eps: float
    ) -> StepFn | None:
        return None

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x_TH.double()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_H).float()

    def norm_rope(
        self, x_TND: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TF: torch.Tensor, sin_TF: torch.Tensor
    ) -> torch.Tensor:
        a, b = self.rms_norm(x_TND, weight_D, eps).double().chunk(2, dim=-1)
        c, s = cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1).float()

    def router(self, gate: LinearWeights, norm: torch.Tensor, eps: float, top_k: int, normalise: bool) -> RouterFn:
        logits = self.linear(gate)

        def apply(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            normed = self.rms_norm(x_TH, norm, eps)
            weights, ids = logits(normed).double().softmax(-1).float().topk(top_k, dim=-1)
            return normed, ids.int(), weights / weights.sum(-1, keepdim=True) if normalise else weights

        return apply

    def attend(
        self, q_TND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: MicroBatch
    ) -> torch.Tensor | None:
        return None

    def attend_one(
        self, q_ND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cached: slice | torch.Tensor
    ) -> torch.Tensor:
        k_GDC, v_GCD = keys[cached].double().permute(1, 2, 0), values[cached].double().transpose(0, 1)
        q_GRD = q_ND.double().view(k_GDC.shape[0], -1, q_ND.shape[1]) * q_ND.shape[1] ** -0.5
        return ((q_GRD @ k_GDC).softmax(-1) @ v_GCD).view(q_ND.shape).float()


class Bf16(_OnCpu):
    """The compiled kernels, or their NumPy twin; threads as given."""

    kv_dtype = torch.bfloat16

    def __init__(self, threads: int, weights: WeightSource | None = None) -> None:
        self.threads = threads
        self._weights = weights or Rows()

    def workspace_bytes(self, model: ModelSpec, threads: int) -> int:
        if kernels_attention.is_compiled(model.head_dim):
            sizes = (model.num_heads, model.num_kv_heads, model.head_dim)
            return kernels_attention.workspace_bytes(*sizes, threads, min(model.max_positions, LONG_CONTEXT))
        return _attention_bytes(model, threads)

    def linear(self, weights: LinearWeights) -> LinearFn:
        kernel, threads = kernels.linear(*self._weights(weights)), self.threads

        def apply(x_TK: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(kernel(x_TK.numpy(), threads=threads))

        return apply

    def experts(
        self, gate: Sequence[LinearWeights], up: Sequence[LinearWeights], down: Sequence[LinearWeights]
    ) -> ExpertsFn:
        (g, gs), (u, us), (d, ds) = (zip(*map(self._weights, group), strict=True) for group in (gate, up, down))
        kernel = kernels.moe_layer(g, u, d, gs, us, ds)
        threads = self.threads

        def apply(x_TH: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(kernel(x_TH.numpy(), expert_ids.numpy(), weights.numpy(), threads=threads))

        return apply

    def attention_step(
        self, projections: Sequence[LinearWeights], norms: Sequence[torch.Tensor], eps: float
    ) -> StepFn | None:
        q, k, v, o = (kernels.linear(*self._weights(w)) for w in projections)
        step = kernels_attention.attention_step(q, k, v, o, [norm.numpy() for norm in norms], eps)
        if step is None:
            return None

        def apply(
            x_TH: torch.Tensor,
            cos_TF: torch.Tensor,
            sin_TF: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            batch: MicroBatch,
        ) -> torch.Tensor:
            runs = batch.decode_runs
            assert runs is not None
            arrays = (x_TH.numpy(), cos_TF.numpy(), sin_TF.numpy(), _bits(keys), _bits(values), batch.slots.numpy())
            return torch.from_numpy(step(*arrays, runs, threads=self.threads))

        return apply

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.from_numpy(kernels.rms_norm(x_TH.numpy(), weight_H.numpy(), eps))

    def norm_rope(
        self, x_TND: torch.Tensor, weight_D: torch.Tensor, eps: float, cos_TF: torch.Tensor, sin_TF: torch.Tensor
    ) -> torch.Tensor:
        arrays = (x_TND.numpy(), weight_D.numpy(), eps, cos_TF.numpy(), sin_TF.numpy())
        return torch.from_numpy(kernels_attention.norm_rope(*arrays))

    def router(self, gate: LinearWeights, norm: torch.Tensor, eps: float, top_k: int, normalise: bool) -> RouterFn:
        step = kernels_router.RouterStep(kernels.linear(*self._weights(gate)), norm.numpy(), eps, top_k, normalise)
        threads = self.threads

        def apply(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            normed, ids, weights = step(x_TH.numpy(), threads=threads)
            return torch.from_numpy(normed), torch.from_numpy(ids), torch.from_numpy(weights)

        return apply

    def attend(
        self, q_TND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: MicroBatch
    ) -> torch.Tensor | None:
        if not kernels_attention.is_compiled(q_TND.shape[2]):
            return None
        arrays = (q_TND.numpy(), _bits(keys), _bits(values), batch.runs)
        return torch.from_numpy(kernels_attention.attend(*arrays, threads=self.threads))

    def attend_one(
        self, q_ND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cached: slice | torch.Tensor
    ) -> torch.Tensor:
        slots = cached if isinstance(cached, slice) else cached.numpy()
        out = kernels_attention.attend_one(q_ND.numpy(), _bits(keys), _bits(values), slots, threads=self.threads)
        return torch.from_numpy(out)


def make_numerics(precision: str, threads: int, weights: WeightSource | None = None) -> Numerics:
    """`Exact` reads the mapped rows, `Bf16` what `weights` gives. Raises `ValueError` for an unknown precision."""
    if precision == "exact":
        return Exact()
    if precision == "bf16":
        return Bf16(threads, weights)
    raise ValueError(f"precision {precision!r} is unknown, expected 'exact' or 'bf16'")


def _bits(bf16: torch.Tensor) -> np.ndarray:
    """BF16 storage as the uint16 view that NumPy can hold."""
    return bf16.view(torch.uint16).numpy()


def _attention_bytes(model: ModelSpec, threads: int) -> int:
    """float32 scores and probabilities of one block of queries a thread, and one context's keys and values."""
    context = min(model.max_positions, LONG_CONTEXT)
    scores = 2 * threads * QUERY_BLOCK * model.num_heads * context
    return 4 * (scores + 2 * context * model.num_kv_heads * model.head_dim)
