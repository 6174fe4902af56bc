"""Our kernels as `bench kernels` times them. Peers (`bench.peers`) have the same two methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from hybridlab import kernels
from hybridlab.bench.shapes import LayerShape, MatrixShape
from hybridlab.bench.weights import WeightPool

Calls = list[Callable[[], object]]
T = TypeVar("T")


class Contender(Protocol):
    """One way to multiply by the same kind of weights; made for one shape, used for every M and thread count.

    `weights` is how they are stored, `weight_bytes` what one matrix (one expert, for a layer) takes,
    `layout_bytes` the memory that a call's weights take beside the checkpoint's own, if that stays mapped.
    """

    name: str
    tier: str
    weights: str
    layout: str
    weight_bytes: int
    layout_bytes: int
    settle_s: float

    def takes(self, rows: int) -> bool:
        """Whether it is worth the time for so many tokens."""
        ...

    def calls(self, x: Any, threads: int) -> Calls:
        """One call per distinct matrix (per step of a layer) for x float32 [rows, k]."""
        ...


class OurMatrices:
    """`kernels.linear` over the matrices of a pool, in one layout: "rows" (views) or "tiles" (packed copies)."""

    name = "hybridlab"
    settle_s = 0.0

    def __init__(
        self, shape: MatrixShape, pool: WeightPool, num_bytes: int, *, weights: str, layout: str, tier: str
    ) -> None:
        self.tier, self.weights, self.layout = tier, weights, layout
        element = 1 if weights == "fp8" else 2
        count = max(1, min(pool.num_bytes, num_bytes) // (shape.n * shape.k * element))
        make = partial(_fp8, pool) if weights == "fp8" else partial(_bf16, pool)
        entries = [prepared(*make(shape.n, shape.k), layout) for _ in range(count)]
        self.matrices = [kernels.linear(*entry, tier=tier) for entry in entries]
        self.weight_bytes = make(shape.n, shape.k)[0].nbytes + _scale_bytes(shape.n, shape.k, weights)
        self.layout_bytes = entries[0][0].nbytes if layout == "tiles" else 0

    def takes(self, rows: int) -> bool:
        """The slow tiers need seconds for a prompt."""
        return rows <= 64 or self.tier == kernels.tier()

    def calls(self, x: NDArray[np.float32], threads: int) -> Calls:
        out = np.empty((len(x), self.matrices[0].shape[0]), np.float32)
        return [partial(matrix, x, out, threads=threads) for matrix in self.matrices]


class OurLayer:
    """`kernels.moe_layer` of `experts` experts, for tokens that choose `top_k` of them."""

    name = "hybridlab"
    settle_s = 0.0

    def __init__(
        self, layer: LayerShape, pool: WeightPool, experts: int, *, weights: str, layout: str, tier: str
    ) -> None:
        self.tier, self.weights, self.layout = tier, weights, layout
        self._top_k, self._experts = layer.top_k, experts
        h, i = layer.hidden, layer.intermediate
        element = 1 if weights == "fp8" else 2
        distinct = min(experts, pool.count(layer.expert_bytes(element)))
        make = partial(_fp8, pool) if weights == "fp8" else partial(_bf16, pool)
        sides = [[prepared(*make(*shape), layout) for _ in range(distinct)] for shape in ((i, h), (i, h), (h, i))]
        gate, up, down = (repeated(side, experts) for side in sides)
        scales = [[entry[1] for entry in side] for side in (gate, up, down)]
        data = [[entry[0] for entry in side] for side in (gate, up, down)]
        self.module = kernels.moe_layer(*data, *scales, tier=tier)
        self.weight_bytes = layer.expert_bytes(element) + sum(
            _scale_bytes(*shape, weights) for shape in ((i, h), (i, h), (h, i))
        )
        self.layout_bytes = sum(side[0][0].nbytes for side in sides) if layout == "tiles" else 0

    def takes(self, rows: int) -> bool:
        return True

    def calls(self, x: NDArray[np.float32], threads: int) -> Calls:
        out = np.empty_like(x)
        routes = routings(len(x), self._experts, self._top_k)
        return [partial(self.module, x, ids, slots, out, threads=threads) for ids, slots in routes]


def repeated(distinct: Sequence[T], count: int) -> list[T]:
    """`count` experts. More than the pool has room for begin with the first ones again: it is far larger than L3."""
    return list(islice(cycle(distinct), count))


def prepared(weight: NDArray[Any], scale: NDArray[np.float32] | None, layout: str) -> tuple[Any, Any]:
    """A weight and its scale as `kernels` takes them in that layout."""
    return (weight, scale) if layout == "rows" else (kernels.pack(weight, scale, threads=PACK_THREADS), None)


PACK_THREADS = 2


def routings(rows: int, experts: int, top_k: int) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Which experts the tokens of successive steps take: ids int32 and weights float32, [rows, top_k] each.

    For one token the steps go through all experts, in a random order, before one comes again; for many tokens there
    is one step of independent random choices.
    """
    rng = np.random.default_rng(experts)
    weights = rng.dirichlet(np.ones(top_k), rows).astype(np.float32)
    if rows > 1:
        ids = rng.random((rows, experts)).argsort(axis=1)[:, :top_k]
        return [(np.ascontiguousarray(ids, np.int32), weights)]
    order = rng.permutation(experts).astype(np.int32)
    return [(order[None, at : at + top_k].copy(), weights) for at in range(0, experts - top_k + 1, top_k)]


def experts_used(routes: Sequence[tuple[NDArray[np.int32], Any]]) -> float:
    """How many distinct experts a step reads, on average."""
    return sum(len(np.unique(ids)) for ids, _ in routes) / len(routes)


def _fp8(pool: WeightPool, n: int, k: int) -> tuple[NDArray[Any], Any]:
    return pool.fp8(n, k)


def _bf16(pool: WeightPool, n: int, k: int) -> tuple[NDArray[Any], Any]:
    return pool.bf16(n, k), None


def _scale_bytes(n: int, k: int, weights: str) -> int:
    return 4 * -(-n // 128) * -(-k // 128) if weights == "fp8" else 0
