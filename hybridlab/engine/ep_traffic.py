"""How many bytes each exchange moves, from the formulas alone: what `Peers.traffic` must have counted for one layer.

H hidden, K experts per token; `Wire.hidden` and `Wire.partial` have h and p bytes a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from hybridlab.engine.collectives import Traffic
from hybridlab.engine.ep_exchange import Wire

COUNT_BYTES = 8
"""int64: how many rows come, told to each other rank before they do."""
ID_BYTES = WEIGHT_BYTES = 4
"""int32 and float32, of a route."""


def small_ep(sizes: Sequence[int], rank: int, hidden: int, wire: Wire) -> Traffic:
    """Of `rank`, with `sizes` tokens on each of n ranks, N in all and T on this one.

    Sent: (n - 1) T H h + (N - T) H p. Received: (N - T) H h + (n - 1) T H p. Over all ranks: (n - 1) N H (h + p).
    """
    h, p = hidden * wire.hidden.itemsize, hidden * wire.partial.itemsize
    copies, others = (len(sizes) - 1) * sizes[rank], sum(sizes) - sizes[rank]
    return Traffic(copies * h + others * p, others * h + copies * p)


def dispatch_per_route(
    routes: Sequence[np.ndarray], rank_of_E: np.ndarray, rank: int, hidden: int, wire: Wire
) -> Traffic:
    """Of `rank`, where the routers of all ranks chose `routes`, int [T, K] each, of experts on `rank_of_E`.

    With `out` routes from here to other ranks and `came` from them: sent out (H h + 4) + came H p, received
    came (H h + 4) + out H p, and 8 (n - 1) of counts each way.
    """
    out = sum(int((rank_of_E[routes[rank]] == peer).sum()) for peer in range(len(routes)) if peer != rank)
    came = sum(int((rank_of_E[chosen] == rank).sum()) for peer, chosen in enumerate(routes) if peer != rank)
    return _both_ways(out, came, len(routes), hidden, wire, ID_BYTES)


def dispatch_per_rank(
    routes: Sequence[np.ndarray], rank_of_E: np.ndarray, rank: int, hidden: int, wire: Wire
) -> Traffic:
    """As `dispatch_per_route`, but of (token, rank) pairs, each with K ids and weights: 8 K bytes instead of 4."""
    out = sum(_tokens_for(routes[rank], rank_of_E, peer) for peer in range(len(routes)) if peer != rank)
    came = sum(_tokens_for(chosen, rank_of_E, rank) for peer, chosen in enumerate(routes) if peer != rank)
    top_k = routes[rank].shape[1]
    return _both_ways(out, came, len(routes), hidden, wire, top_k * (ID_BYTES + WEIGHT_BYTES))


def expected_rows_per_token(experts_of_rank: Sequence[int], rank: int, top_k: int) -> tuple[float, float, float]:
    """Rows that a token of `rank` is sent as, on average, if every set of `top_k` experts is as likely as any other.

    For small_ep, dispatch_per_route and dispatch_per_rank: n - 1; K times the share of experts that are elsewhere; and,
    over the other ranks, the chance that one has any of the K.
    """
    total = sum(experts_of_rank)
    others = [count for peer, count in enumerate(experts_of_rank) if peer != rank]
    any_there = sum(1 - comb(total - count, top_k) / comb(total, top_k) for count in others)
    return float(len(others)), top_k * sum(others) / total, any_there


def _tokens_for(chosen_TK: np.ndarray, rank_of_E: np.ndarray, rank: int) -> int:
    return int((rank_of_E[chosen_TK] == rank).any(axis=1).sum())


def _both_ways(out: int, came: int, ranks: int, hidden: int, wire: Wire, note_bytes: int) -> Traffic:
    there, back = hidden * wire.hidden.itemsize + note_bytes, hidden * wire.partial.itemsize
    counts = (ranks - 1) * COUNT_BYTES
    return Traffic(out * there + came * back + counts, came * there + out * back + counts)
