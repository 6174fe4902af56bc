"""Plans as frozen data: what strategies return and both interpreters run (DESIGN: strategies decide).

A scheduler sees a `QueueView` and returns a `StepPlan`; a placement returns a `PlacementPlan` and, each step,
an `ExpertPath`; lowering turns a `Shape` into a `Program` of `Op`s on lanes. A lane is first-in first-out; an
op starts when its lane is free and its `needs` are done. Times are seconds on the interpreter's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from hybridlab.errors import StrategyError

RequestId = str
Role = Literal["prefill", "decode", "mixed"]
ROLES: tuple[str, ...] = ("prefill", "decode", "mixed")


class Tier(StrEnum):
    """Where an expert's weights live when they are used."""

    RESIDENT = "resident"
    """On the GPU for good."""
    STREAMED = "streamed"
    """Copied from host memory into a ring slot on the GPU for each pass."""
    HOST = "host"
    """In host memory, computed by the CPU."""


EXCHANGES = ("small_ep", "dispatch_per_route", "dispatch_per_rank")


def _tier(value: str) -> Tier:
    try:
        return Tier(value)
    except ValueError as error:
        raise StrategyError(f"{error}; expected one of {', '.join(Tier)}") from None


class LaneKind(StrEnum):
    """The hardware queue that an op occupies."""

    GPU = "gpu"
    CPU = "cpu"
    H2D = "h2d"
    D2H = "d2h"
    NET = "net"


@dataclass(frozen=True, order=True)
class Lane:
    """A first-in first-out queue: one kind of hardware of one worker."""

    worker: str
    kind: LaneKind

    def __str__(self) -> str:
        return f"{self.worker}/{self.kind}"


@dataclass(frozen=True)
class WaitingRequest:
    """A request whose prompt is not yet computed whole; `computed_tokens` of it are in the KV cache.

    These may be found there before the request was ever scheduled: another request began with the same tokens.
    """

    id: RequestId
    arrival_s: float
    remaining_prompt: int
    allocated_kv_tokens: int = 0
    computed_tokens: int = 0
    shared_kv_tokens: int = 0

    @property
    def context_tokens(self) -> int:
        return self.computed_tokens


@dataclass(frozen=True)
class RunningRequest:
    """A request that decodes one token a step; `context_tokens` are in its KV cache."""

    id: RequestId
    context_tokens: int
    allocated_kv_tokens: int = 0
    shared_kv_tokens: int = 0


@dataclass(frozen=True)
class QueueView:
    """All that a scheduler may know. `waiting` is in arrival order; `free_kv_tokens` counts unallocated room.

    A request that needs more than `allocated_kv_tokens` takes whole blocks of `kv_block_tokens` from the
    `free_kv_tokens`. `shared_kv_tokens` of a request's context lie in blocks that requests ahead of it hold too:
    they take nothing from the free ones, and preempting it does not free them. `token_budget` bounds the tokens of
    one step. `last_decode_s` is when a decode last ended (None if never). `rank_sets` are the ranks of this worker that
    a step may run on: all of them, then the first alone, where it can.

    Workers with KV caches of their own see the requests that have nothing in a cache, and those in their own. Where
    prompts are computed for other workers (`worker` begins with "prefill") nothing runs; those who decode also see the
    requests that come from there as running, with no KV tokens allocated yet: a step that names one brings it here.
    """

    now_s: float
    worker: str
    waiting: tuple[WaitingRequest, ...]
    running: tuple[RunningRequest, ...]
    token_budget: int
    free_kv_tokens: int
    kv_block_tokens: int
    last_decode_s: float | None = None
    rank_sets: tuple[tuple[int, ...], ...] = ((0,),)


@dataclass(frozen=True)
class StepPlan:
    """One step of a worker: how many tokens of which requests to compute next.

    `tokens` maps request ids to token counts: 1 for a running request, 1..remaining_prompt for a waiting one.
    `preempt` names requests whose KV cache is given up first (they are recomputed later). `ranks` are those that
    compute it: one of `queue.rank_sets`, None for all, whoever computed its requests before.
    """

    role: Role
    tokens: Mapping[RequestId, int]
    preempt: tuple[RequestId, ...] = ()
    ranks: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.values())


@dataclass(frozen=True)
class PlacementPlan:
    """Where every expert lives, decided once at load.

    `tier_of` maps (layer, expert) to a tier; `default_tier` holds for those it does not name. `rank_of` maps
    (layer, expert) to a rank (0 if absent). Streamed experts of a layer are cut into `parts_per_layer` groups;
    `ring_slots` slots each hold one group. `exchange`, one of `EXCHANGES`, is how tokens reach experts of other ranks.
    `movable`: tiers may change between steps; `hl.load` sets it where the placement has `update_every_steps`.
    """

    default_tier: Tier = Tier.HOST
    tier_of: Mapping[tuple[int, int], Tier] = field(default_factory=dict)
    rank_of: Mapping[tuple[int, int], int] = field(default_factory=dict)
    ring_slots: int = 0
    parts_per_layer: int = 1
    exchange: str = "small_ep"
    movable: bool = False

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise StrategyError(f"exchange is {self.exchange!r}, expected one of {', '.join(EXCHANGES)}")
        object.__setattr__(self, "default_tier", _tier(self.default_tier))
        tiers = {key: _tier(tier) for key, tier in self.tier_of.items()}
        object.__setattr__(self, "tier_of", MappingProxyType(tiers))
        object.__setattr__(self, "rank_of", MappingProxyType(dict(self.rank_of)))

    def tier(self, layer: int, expert: int) -> Tier:
        return self.tier_of.get((layer, expert), self.default_tier)

    @cached_property
    def on_first_rank(self) -> PlacementPlan:
        """For a step of the first rank alone: its CPU computes the experts of the others."""
        theirs = dict.fromkeys((key for key, rank in self.rank_of.items() if rank), Tier.HOST)
        return replace(self, tier_of={**self.tier_of, **theirs}, rank_of={})

    @cached_property
    def key(self) -> tuple:
        """Hashable identity: plans that place alike share their programs."""
        return (
            self.default_tier,
            tuple(sorted(self.tier_of.items())),
            tuple(sorted(self.rank_of.items())),
            self.ring_slots,
            self.parts_per_layer,
            self.exchange,
            self.movable,
        )

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PlacementPlan) and self.key == other.key)


@dataclass(frozen=True)
class ExpertPath:
    """Which streamed experts cross the link in this step, fixed before the router has run.

    `prefetch` gives a set of experts per layer, None means every streamed expert, () none. After the router, experts
    that arrived and have at least `min_tokens` tokens run on the GPU, the rest on the CPU.
    """

    prefetch: tuple[frozenset[int], ...] | None = None
    min_tokens: int = 0


@dataclass(frozen=True)
class Move:
    """A change of an expert's tier between two steps."""

    layer: int
    expert: int
    tier: Tier

    def __post_init__(self) -> None:
        object.__setattr__(self, "tier", _tier(self.tier))


@dataclass(frozen=True)
class SlotUse:
    """A ring slot as an op uses it; `generation` counts the loads of that slot since the ring was made."""

    slot: int
    generation: int


@dataclass(frozen=True)
class Op:
    """One unit of work on one lane; tokens are bound late (by the router or by recorded routing).

    `kind` is one of `OP_KINDS`; `part` numbers the group of experts of an "experts" or "load" op; `experts`
    names them. `needs` are ids of ops of the same program.
    """

    id: int
    kind: str
    lane: Lane
    rank: int = 0
    layer: int = -1
    part: int = 0
    microbatch: int = 0
    needs: tuple[int, ...] = ()
    tier: Tier | None = None
    experts: tuple[int, ...] = ()
    slot: SlotUse | None = None


OP_KINDS = (
    "embed",
    "attention",
    "router",
    "load",
    "experts",
    "mlp",
    "all_gather",
    "dispatch",
    "reduce",
    "combine",
    "head",
)
COLLECTIVE_KINDS = ("all_gather", "dispatch", "reduce")


@dataclass(frozen=True)
class Shape:
    """What a step's program depends on: no token counts, so that steady state builds no plan.

    `compute_lane` is where attention runs: the GPU lane, or the CPU lane of a machine without a GPU.
    """

    role: Role
    worker: str
    compute_lane: LaneKind
    path: ExpertPath
    num_microbatches: int
    ranks: tuple[int, ...]
    placement: PlacementPlan


@dataclass(frozen=True, eq=False)
class Program:
    """A validated list of ops. Order within a lane is the order of `ops`.

    `order` is one sequence that respects every lane and need, for interpreters whose lanes take turns.
    """

    shape: Shape
    ops: tuple[Op, ...]
    order: tuple[Op, ...]

    @cached_property
    def streamed(self) -> Mapping[int, frozenset[int]]:
        """Layer -> experts that its loads bring."""
        found: dict[int, frozenset[int]] = {}
        for op in self.ops:
            if op.kind == "load":
                found[op.layer] = found.get(op.layer, frozenset()) | frozenset(op.experts)
        return found


@dataclass(frozen=True, slots=True)
class Span:
    """When an op ran, in seconds since the start of the run."""

    op: Op
    start_s: float
    end_s: float
