"""Which streamed experts cross the link in a step: none, a share of them, or all, by its number of tokens."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from math import ceil
from typing import Protocol

from hybridlab.errors import StrategyError
from hybridlab.plans import ExpertPath, PlacementPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.spec import NEVER, HardwareSpec, ModelSpec
from hybridlab.strategies.fields import check_positive

PAPER_TOKENS = 4096
"""Below it the published system computes experts on the CPU (paper, section 1)."""
DEFAULT_SHARE = 0.5
"""Where the link and the CPU take as long as each other, half the experts for each is best."""


class Thresholds(Protocol):
    """The fields of a placement that choose paths; None takes what was measured on the machine."""

    @property
    def stream_from_tokens(self) -> int | None: ...
    @property
    def mixed_from_tokens(self) -> int | None: ...
    @property
    def mixed_share(self) -> float | None: ...
    @property
    def min_expert_tokens(self) -> int | None: ...


def check_thresholds(given: Thresholds) -> None:
    """Raise StrategyError naming the field that is off."""
    for name in ("stream_from_tokens", "mixed_from_tokens", "min_expert_tokens"):
        check_positive(name, getattr(given, name), optional=True)
    share = given.mixed_share
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 < share <= 1):
        raise StrategyError(f"mixed_share: expected a number above 0, at most 1, or None, got {share!r}")


def hottest(model: ModelSpec, routing: RoutingStats) -> list[tuple[int, int]]:
    """Every (layer, expert), by its share of its layer's routes; what is not known, by expert, then by layer."""
    share = {
        (layer, expert): count / max(1, sum(row))
        for layer, row in zip(routing.layers, routing.counts, strict=True)
        for expert, count in enumerate(row)
    }
    experts = [(layer, e) for e in range(model.num_experts) for layer in model.moe_layers]
    return sorted(experts, key=lambda key: -share.get(key, 0.0))  # stable: lower numbers first among equals


def path_of(num_tokens: int, given: Thresholds, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
    """CPU, then mixed, then streamed, as steps grow.

    Fields of the placement win over what was measured; without either, all experts stream from the paper's 4,096
    tokens and nothing is mixed.
    """
    mixed_from, stream_from = _bounds(given, hardware)
    if num_tokens >= stream_from:
        return ExpertPath()
    if num_tokens < mixed_from or not placed.ring_slots:
        return ExpertPath(prefetch=())
    share = given.mixed_share or hardware.mixed_share or DEFAULT_SHARE
    return ExpertPath(prefetched(placed, share), given.min_expert_tokens or hardware.min_expert_tokens or 1)


def _bounds(given: Thresholds, hardware: HardwareSpec) -> tuple[int, int]:
    """Tokens from which steps are mixed, and from which they stream."""
    mixed, stream = given.mixed_from_tokens, given.stream_from_tokens
    if mixed is None and stream is None:
        mixed = hardware.mixed_from_tokens
    mixed = mixed or NEVER
    if stream is None and mixed < NEVER:
        stream = hardware.mixed_to_tokens
    return mixed, stream or hardware.stream_from_tokens or PAPER_TOKENS


class _Same:
    """A plan as a key: equal plans may name their experts in different orders."""

    def __init__(self, placed: PlacementPlan) -> None:
        self.placed = placed

    def __hash__(self) -> int:
        return id(self.placed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.placed is other.placed


def prefetched(placed: PlacementPlan, share: float) -> tuple[frozenset[int], ...]:
    """Per layer, the first `share` of the streamed experts in the order in which the plan names them."""
    return _prefetched(_Same(placed), share)


@lru_cache(maxsize=16)  # every step asks
def _prefetched(same: _Same, share: float) -> tuple[frozenset[int], ...]:
    placed = same.placed
    streamed: dict[int, list[int]] = defaultdict(list)
    for (layer, expert), tier in placed.tier_of.items():
        if tier is Tier.STREAMED:
            streamed[layer].append(expert)
    layers = 1 + max((layer for layer, _ in placed.tier_of), default=-1)
    return tuple(frozenset(streamed[layer][: ceil(share * len(streamed[layer]))]) for layer in range(layers))
