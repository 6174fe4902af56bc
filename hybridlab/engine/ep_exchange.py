"""How tokens reach the experts of other ranks in a MoE layer, and how what those add comes back.

Sums are made in the order of ranks (of routes in `DispatchPerRoute`), whatever arrives first. Legend: T tokens of this
rank, A tokens of all ranks, R rows that this rank computes, H hidden, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hybridlab.engine.collectives import Peers
from hybridlab.model.base import Routed
from hybridlab.plans import PlacementPlan
from hybridlab.spec import ModelSpec


@dataclass(frozen=True)
class Wire:
    """In which type hidden states travel to experts, and partial sums (or single results) back.

    float32 is what ops have between them: results do not depend on which rank has which expert beyond the order of
    float32 additions. Anything less rounds.
    """

    hidden: torch.dtype = torch.float32
    partial: torch.dtype = torch.float32


class Exchange(Protocol):
    """One rank's part in the MoE layers of a step. `sizes` are the tokens of every rank, in the order of ranks.

    A layer calls `gather`, its router, `dispatch`, its experts, `reduce`; all ranks do so in the same order.
    """

    def gather(self, x_TH: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The hidden states that this rank's router reads."""
        ...

    def dispatch(self, layer: int, routed: Routed, sizes: Sequence[int]) -> tuple[Routed, Any]:
        """From what this rank's router chose to the rows that this rank's experts compute, and what `reduce` needs.

        Experts of other ranks may still be named in it; they are computed there.
        """
        ...

    def reduce(self, partial_RH: torch.Tensor, trip: Any) -> torch.Tensor:
        """From what this rank's experts made of those rows to what all experts add to its own tokens: [T, H]."""
        ...


class SmallEP:
    """Every rank gets all hidden states and repeats the router; its experts' partial sums go back to each token's rank.

    What travels is known before routing: (ranks - 1) x tokens x hidden values each way. Source: PAPER, SmallEP.
    """

    def __init__(self, peers: Peers, wire: Wire) -> None:
        self._peers, self._wire = peers, wire

    def gather(self, x_TH: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        # Its own tokens as the others see them: all ranks must route alike.
        x = x_TH.to(self._wire.hidden)
        return torch.cat(self._peers.exchange([x] * self._peers.size, sizes)).to(x_TH.dtype)

    def dispatch(self, layer: int, routed: Routed, sizes: Sequence[int]) -> tuple[Routed, Sequence[int]]:
        return routed, sizes

    def reduce(self, partial_RH: torch.Tensor, trip: Sequence[int]) -> torch.Tensor:
        pieces = partial_RH.to(self._wire.partial).split(list(trip))
        found = self._peers.exchange(pieces, [trip[self._peers.rank]] * self._peers.size)
        total = found[0].to(partial_RH.dtype)
        for part in found[1:]:
            total = total + part.to(partial_RH.dtype)
        return total


class DispatchPerRank:
    """A token goes once to each rank that has some of its experts; each of those gives back one partial sum.

    `owners` int64 [E] by layer: the rank of each expert. The host reads how many rows each rank gets.
    """

    def __init__(self, peers: Peers, wire: Wire, owners: Mapping[int, torch.Tensor]) -> None:
        self._peers, self._wire, self._owners = peers, wire, owners

    def gather(self, x_TH: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return x_TH

    def dispatch(self, layer: int, routed: Routed, sizes: Sequence[int]) -> tuple[Routed, _Trip]:
        ids, weights = routed.expert_ids, routed.weights.float()
        owner_TK = _owners_of(ids, self._owners[layer])
        rows, notes = [], []
        for peer in range(self._peers.size):
            theirs = owner_TK == peer
            row = theirs.any(1).nonzero().squeeze(1)
            rows.append(row)
            kept = torch.where(theirs, ids, -1)[row].int()
            notes.append(torch.cat((kept, weights[row].contiguous().view(torch.int32)), 1))
        x_RH, note_RN, counts = _sent_out(self._peers, self._wire, routed.x_TH, rows, notes)
        ids_RK, weights_RK = note_RN.chunk(2, dim=1)
        moved = Routed(x_RH, ids_RK.contiguous(), weights_RK.contiguous().view(torch.float32))
        return moved, _Trip(len(ids), rows, counts)

    def reduce(self, partial_RH: torch.Tensor, trip: _Trip) -> torch.Tensor:
        total = partial_RH.new_zeros(trip.num_tokens, partial_RH.shape[1])
        for row, part in zip(trip.rows, _sent_back(self._peers, self._wire, partial_RH, trip), strict=True):
            total[row] += part  # a token is there once
        return total


class DispatchPerRoute:
    """A token goes to each of its experts by itself; each of those gives back its own result, weighted here.

    What the plainest dispatch and combine does: top-k rows for each token, in both directions.
    """

    def __init__(self, peers: Peers, wire: Wire, owners: Mapping[int, torch.Tensor]) -> None:
        self._peers, self._wire, self._owners = peers, wire, owners

    def gather(self, x_TH: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return x_TH

    def dispatch(self, layer: int, routed: Routed, sizes: Sequence[int]) -> tuple[Routed, _RouteTrip]:
        ids = routed.expert_ids
        owner_TK = _owners_of(ids, self._owners[layer])
        places = [(owner_TK == peer).nonzero(as_tuple=True) for peer in range(self._peers.size)]
        notes = [ids[place].int().unsqueeze(1) for place in places]
        x_RH, ids_R1, counts = _sent_out(self._peers, self._wire, routed.x_TH, [token for token, _ in places], notes)
        moved = Routed(x_RH, ids_R1, torch.ones(len(ids_R1), 1, device=x_RH.device))
        trip = _Trip(len(ids), [token for token, _ in places], counts)
        return moved, _RouteTrip(trip, [slot for _, slot in places], routed.weights)

    def reduce(self, partial_RH: torch.Tensor, trip: _RouteTrip) -> torch.Tensor:
        weights = trip.weights.double()
        shape = trip.trip.num_tokens, weights.shape[1], partial_RH.shape[1]
        results = partial_RH.new_zeros(shape)
        back = _sent_back(self._peers, self._wire, partial_RH, trip.trip)
        for token, slot, part in zip(trip.trip.rows, trip.slots, back, strict=True):
            results[token, slot] = part
        total = torch.zeros(shape[0], shape[2], dtype=torch.float64, device=partial_RH.device)
        for slot in range(shape[1]):
            total += results[:, slot].double() * weights[:, slot, None]
        return total.to(partial_RH.dtype)


def make_exchanges(peers: Peers, wire: Wire, owners: Mapping[int, torch.Tensor]) -> dict[str, Exchange]:
    """Each of `plans.EXCHANGES`, over one group of ranks: a program says which it uses."""
    return {
        "small_ep": SmallEP(peers, wire),
        "dispatch_per_route": DispatchPerRoute(peers, wire, owners),
        "dispatch_per_rank": DispatchPerRank(peers, wire, owners),
    }


def owners(placed: PlacementPlan, model: ModelSpec) -> dict[int, torch.Tensor]:
    """int64 [E] for each MoE layer: the rank that has each expert."""
    return {
        layer: torch.tensor([placed.rank_of.get((layer, e), 0) for e in range(model.num_experts)])
        for layer in model.moe_layers
    }


@dataclass(frozen=True)
class _Trip:
    """`rows` of this rank's tokens that went to each rank, and `counts` of rows that came from each."""

    num_tokens: int
    rows: list[torch.Tensor]
    counts: list[int]


@dataclass(frozen=True)
class _RouteTrip:
    trip: _Trip
    slots: list[torch.Tensor]
    weights: torch.Tensor


def _owners_of(ids_TK: torch.Tensor, owner_E: torch.Tensor) -> torch.Tensor:
    """int64 [T, K]; -1 for skipped routes, which go nowhere."""
    return torch.where(ids_TK >= 0, owner_E.to(ids_TK.device)[ids_TK.long().clamp(min=0)], -1)


def _sent_out(
    peers: Peers, wire: Wire, x_TH: torch.Tensor, rows: Sequence[torch.Tensor], notes: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Hidden states and notes of the rows that all ranks have for this one, by rank, and how many those are."""
    numbers = [torch.tensor([len(row)], device=x_TH.device) for row in rows]
    counts = torch.cat(peers.exchange(numbers, [1] * peers.size)).tolist()
    x = x_TH.to(wire.hidden)
    hidden = torch.cat(peers.exchange([x[row] for row in rows], counts))
    return hidden.to(x_TH.dtype), torch.cat(peers.exchange(notes, counts)), counts


def _sent_back(peers: Peers, wire: Wire, partial_RH: torch.Tensor, trip: _Trip) -> list[torch.Tensor]:
    """What each rank made of the rows that this one sent it."""
    pieces = partial_RH.to(wire.partial).split(trip.counts)
    return [part.to(partial_RH.dtype) for part in peers.exchange(pieces, [len(row) for row in trip.rows])]
