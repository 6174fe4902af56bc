"""What `bench kernels` measures, in which order: sections share their weights, points of one section take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hybridlab import kernels
from hybridlab.bench.contenders import Contender, OurLayer, OurMatrices, experts_used, routings
from hybridlab.bench.peers import layer_peers, matrix_peers
from hybridlab.bench.shapes import LayerShape, MatrixShape, distinct_layers, matrices_of
from hybridlab.bench.timing import Work
from hybridlab.bench.weights import WeightPool, l3_bytes, resident_bytes

LAYOUTS = ("tiles", "rows")
RESIDENT_ROWS = 64
"""More tokens than that are bound by arithmetic, wherever the weights lie."""
BF16_ROWS = (1, 16, 64, 1024)
PREFILL_TOKENS, PREFILL_EXPERTS = 2048, 64
PREFILL_FLOP = 3e11
"""A layer that needs more is left out of the prefill: a call would take seconds."""


@dataclass(frozen=True)
class Settings:
    """What is asked for."""

    layers: tuple[LayerShape, ...]
    rows: tuple[int, ...]
    threads: tuple[int, ...]
    seconds: float

    def pool_bytes(self, out_of_cache: int) -> int:
        """Room for the experts of one token of the largest layer, and far beyond the caches; below half a GiB."""
        step = max(layer.top_k * layer.expert_bytes(1) for layer in self.layers)
        return max(out_of_cache, min(step + (1 << 20), 512 << 20))


@dataclass(frozen=True)
class Point:
    """One M on one number of threads; weights in "memory" (far beyond L3) or in "l3"."""

    rows: int
    threads: int
    place: str = "memory"

    @property
    def contenders_key(self) -> Any:
        """Points with the same key use the same weights and threads."""
        return self.place


@dataclass(frozen=True)
class _LayerPoint(Point):
    @property
    def contenders_key(self) -> Any:
        return self.threads  # kt-kernel's threads are made for one count


@dataclass(frozen=True)
class Section:
    """Points that share what `contenders` makes; `works` are the timed calls of one point."""

    label: str
    points: Sequence[Point]
    contenders: Callable[[Point], list[Contender]]
    works: Callable[[Point, Sequence[Contender]], list[Work]]


def sections(settings: Settings, peers: Sequence[str], pool: WeightPool) -> list[Section]:
    """Matrices, slower tiers, whole layers for one token, and a prefill of a layer."""
    found = []
    for shape in matrices_of(settings.layers):
        points = [Point(rows, threads) for threads in settings.threads for rows in settings.rows]
        if shape.n * shape.k <= l3_bytes() // 2:
            points += [Point(p.rows, p.threads, "l3") for p in points if p.rows <= RESIDENT_ROWS]
        made = partial(_matrix_contenders, shape, pool, peers if shape.matrix == "gate_up" else (), settings.rows)
        found.append(Section(_name(shape), points, made, partial(_matrix_works, shape)))
    for shape in _slow_shapes(settings.layers):
        for tier in kernels.supported_tiers():
            if tier != kernels.tier():
                points = [Point(1, threads) for threads in settings.threads]
                made = partial(_slow_contenders, shape, pool, tier)
                found.append(Section(f"{_name(shape)} {tier}", points, made, partial(_matrix_works, shape)))
    for layer in distinct_layers(settings.layers):
        for work, rows, experts in (("moe_step", 1, layer.experts), ("moe_prefill", PREFILL_TOKENS, PREFILL_EXPERTS)):
            if rows > max(settings.rows) or rows < min(settings.rows):
                continue
            if rows * layer.top_k * 2 * layer.expert_bytes(1) > PREFILL_FLOP:
                continue
            points = [_LayerPoint(rows, threads) for threads in settings.threads]
            made = partial(_layer_contenders, layer, pool, experts, peers)
            found.append(Section(f"{layer.model} {work}", points, made, partial(_layer_works, layer, work, experts)))
    return found


def _slow_shapes(layers: Sequence[LayerShape]) -> list[MatrixShape]:
    """One is enough to compare tiers: the first one asked for."""
    return [layers[0].matrices[0]]


def _matrix_contenders(
    shape: MatrixShape, pool: WeightPool, peers: Sequence[str], rows: Sequence[int], point: Point
) -> list[Contender]:
    make = partial(OurMatrices, shape, pool, tier=kernels.tier())
    if point.place == "l3":
        return [make(resident_bytes(), weights="fp8", layout=layout) for layout in LAYOUTS]
    ours = [make(pool.num_bytes, weights="fp8", layout=layout) for layout in LAYOUTS]
    if set(rows) & set(BF16_ROWS):
        ours += [make(pool.num_bytes, weights="bf16", layout=layout) for layout in LAYOUTS]
    return [*ours, *matrix_peers(peers, shape, pool)]


def _slow_contenders(shape: MatrixShape, pool: WeightPool, tier: str, _: Point) -> list[Contender]:
    layouts = LAYOUTS if tier != "numpy" else ("rows",)  # NumPy unpacks tiles again, which says nothing
    return [OurMatrices(shape, pool, pool.num_bytes, weights="fp8", layout=layout, tier=tier) for layout in layouts]


def _layer_contenders(
    layer: LayerShape, pool: WeightPool, experts: int, peers: Sequence[str], point: Point
) -> list[Contender]:
    make = partial(OurLayer, layer, pool, experts, tier=kernels.tier())
    ours = [make(weights=weights, layout=layout) for weights in ("fp8", "bf16") for layout in LAYOUTS]
    if point.rows > 1:  # kt-kernel would copy all weights and start its threads for nothing
        peers = [name for name in peers if name != "kt_kernel"]
    return [*ours, *(one for one in layer_peers(peers, layer, pool, experts, point.threads) if one.takes(point.rows))]


def _matrix_works(shape: MatrixShape, point: Point, contenders: Sequence[Contender]) -> list[Work]:
    x = _inputs(point.rows, shape.k)
    sizes = {"work": "matrix", "model": shape.model, "matrix": shape.matrix, "n": shape.n, "k": shape.k}
    works = []
    for one in contenders:
        if not one.takes(point.rows) or (_is_ours(one) and one.weights == "bf16" and point.rows not in BF16_ROWS):
            continue
        labels = _labels(one, point, sizes, one.layout_bytes)
        flop = 2.0 * point.rows * shape.n * shape.k
        calls = one.calls(x, point.threads)
        works.append(Work(labels, calls, one.weight_bytes, flop, point.place == "l3", one.settle_s))
    return works


def _layer_works(
    layer: LayerShape, work: str, experts: int, point: Point, contenders: Sequence[Contender]
) -> list[Work]:
    x = _inputs(point.rows, layer.hidden)
    used = experts_used(routings(point.rows, experts, layer.top_k))
    sizes = {"work": work, "model": layer.model, "matrix": "layer", "n": layer.intermediate, "k": layer.hidden}
    works = []
    for one in contenders:
        labels = _labels(one, point, sizes, one.layout_bytes * experts)
        flop = 2.0 * point.rows * layer.top_k * layer.expert_bytes(1)
        calls = one.calls(x, point.threads)
        works.append(Work(labels, calls, one.weight_bytes * used, flop, settle_s=one.settle_s))
    return works


def _labels(one: Contender, point: Point, sizes: dict[str, Any], layout_bytes: int) -> dict[str, Any]:
    return {
        **sizes,
        "contender": one.name,
        "tier": one.tier,
        "slow_tier": _is_ours(one) and one.tier != kernels.tier(),
        "weights": one.weights,
        "layout": one.layout,
        "layout_bytes": layout_bytes,
        "place": point.place,
        "threads": point.threads,
        "rows": point.rows,
    }


def _is_ours(one: Contender) -> bool:
    return one.name == OurMatrices.name


def _inputs(rows: int, k: int) -> np.ndarray:
    """Activations like those behind a norm: float32 [rows, k]."""
    return np.random.default_rng(rows).standard_normal((rows, k), np.float32)


def _name(shape: MatrixShape) -> str:
    return f"{shape.model} {shape.n}x{shape.k}"
