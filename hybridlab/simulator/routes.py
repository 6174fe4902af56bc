"""How likely a token chooses each expert: as recorded, or each alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from hybridlab.errors import ConfigError
from hybridlab.plans import Tier
from hybridlab.routing import RoutingStats
from hybridlab.simulator.cost_model import Chosen
from hybridlab.spec import ModelSpec


class Routes:
    """`share_LE` float64 [L, E] of the MoE layers: the probability that one token chooses an expert; rows sum to top_k.

    From recorded counts, a share above 1 is cut and given to the others: a token chooses an expert once. Layers that
    nothing is known of are uniform. Raises `ConfigError` for counts of another model.
    """

    def __init__(self, model: ModelSpec, routing: RoutingStats | None = None) -> None:
        experts, top_k = model.num_experts, model.top_k
        self._experts, self._top_k = experts, top_k
        self.layers = model.moe_layers
        self.share_LE = np.full((len(self.layers), experts), top_k / max(1, experts))
        known = dict(zip(routing.layers, routing.counts, strict=True)) if routing is not None else {}
        if known and (set(known) - set(self.layers) or {len(row) for row in known.values()} != {experts}):
            found = f"layers {min(known)} to {max(known)} with {len(next(iter(known.values())))} experts"
            raise ConfigError(f"routing statistics: {found}; the model's {len(self.layers)} layers have {experts}")
        for row, layer in enumerate(self.layers):
            counts = np.asarray(known.get(layer, ()), np.float64)
            if counts.sum() > 0:
                self.share_LE[row] = _probabilities(counts, top_k)
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self._known: dict[tuple, Chosen] = {}

    def chosen(
        self, layer: int, experts: Sequence[int], arrived: frozenset[int], min_tokens: int, tier: Tier | None
    ) -> Chosen:
        """What an op of `experts` computes; `arrived` are those of its layer that a load brings. One object for all
        layers that are alike."""
        shares = self.share_LE[self._row[layer]][list(experts)]
        host = tier is Tier.HOST
        mixed = min_tokens > 1 and tier in (Tier.HOST, Tier.STREAMED)
        least = np.array([float(min_tokens) if mixed and e in arrived else 0.0 for e in experts])
        pairs, counts = np.unique(np.stack([shares, least]), axis=1, return_counts=True)
        key = (pairs.tobytes(), counts.tobytes(), host)
        if key not in self._known:
            self._known[key] = Chosen(pairs[0], counts.astype(np.float64), pairs[1], host)
        return self._known[key]

    def rows_sent(self, exchange: str, ranks: int) -> float:
        """Rows that a token is sent to other ranks as, on average, where each of them has as many experts as another.

        To all of them ("small_ep"), once for each route that leads there, or once for each rank that a route leads to.
        """
        experts, top_k = self._experts, self._top_k
        if exchange == "dispatch_per_route":
            return top_k * (ranks - 1) / ranks
        if exchange == "dispatch_per_rank":
            elsewhere = experts - experts // ranks
            return (ranks - 1) * (1 - comb(elsewhere, top_k) / comb(experts, top_k))
        return float(ranks - 1)


def _probabilities(counts: np.ndarray, top_k: int) -> np.ndarray:
    share = counts / counts.sum() * top_k
    for _ in range(len(counts)):
        over = share > 1.0
        if not over.any():
            break
        rest = ~over & (share < 1.0)
        spare, total = top_k - np.minimum(share, 1.0)[~rest].sum(), share[rest].sum()
        share = np.where(rest, share * (spare / total if total > 0 else 0.0), np.minimum(share, 1.0))
    return np.minimum(share, 1.0)
