"""From the shape of a step to the program that both interpreters run: lower -> arrange -> bind_slots -> validate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hybridlab.errors import PlanError, StrategyError
from hybridlab.moves import Movable, Mover
from hybridlab.plans import (
    ExpertPath,
    Lane,
    LaneKind,
    Op,
    PlacementPlan,
    Program,
    Shape,
    SlotUse,
    StepPlan,
    Tier,
)
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.base import Overlap, Placement
from hybridlab.strategies.fields import MOST_PARTS
from hybridlab.validation import execution_order, validate

_KEPT_PROGRAMS = 32
"""Shapes of a placement times a few placements: with moves between steps, old ones do not come again."""


@dataclass
class Planner:
    """Turns steps into programs, memoised by shape, so that steady state builds no plan.

    `placed` is where experts are now: `update` changes it. The programs used last are kept.
    """

    model: ModelSpec
    hardware: HardwareSpec
    placement: Placement
    overlap: Overlap
    placed: PlacementPlan
    ranks: tuple[int, ...] = (0,)
    _programs: dict[Shape, Program] = field(default_factory=dict, init=False)
    _mover: Mover = field(init=False)

    def __post_init__(self) -> None:
        self._mover = Mover(self.placement, self.placed, self.model)

    @property
    def rank_sets(self) -> tuple[tuple[int, ...], ...]:
        """What steps may run on: all ranks, then the first alone, where there are several."""
        return (self.ranks, self.ranks[:1]) if len(self.ranks) > 1 else (self.ranks,)

    def update(self, backend: Movable, num_steps: int) -> None:
        """After `num_steps` more steps, while none runs: carry out the moves that the placement wants by now.

        Raises `StrategyError` naming a move that cannot be.
        """
        if self.hardware.device != "cpu" and (moves := self._mover.ask(backend, num_steps)):
            placed = self._mover.moved(self.placed, moves)
            backend.move(moves)
            self.placed = placed

    def shape(self, worker: str, step: StepPlan) -> Shape:
        """The shape of `step`; a step of n requests has at most n microbatches."""
        ranks = self.ranks if step.ranks is None else step.ranks
        if ranks not in self.rank_sets:
            expected = " or ".join(map(str, self.rank_sets))
            raise StrategyError(f"the step asks for ranks {ranks}, this machine runs steps on {expected}")
        placed = self.placed if ranks == self.ranks else self.placed.on_first_rank
        wanted = self.overlap.num_microbatches(step)
        if not isinstance(wanted, int) or wanted < 1:
            raise StrategyError(
                f"overlap {type(self.overlap).__name__}: num_microbatches() returned {wanted!r}, expected an int >= 1"
            )
        name = f"placement {type(self.placement).__name__}: expert_path()"
        try:
            path = self.placement.expert_path(step.num_tokens, placed, self.hardware)
        except Exception as error:  # a strategy of the user's may raise anything
            raise StrategyError(f"{name} raised {type(error).__name__}: {error}") from error
        if not isinstance(path, ExpertPath):
            raise StrategyError(f"{name} returned {path!r}, expected an ExpertPath")
        lane = LaneKind.CPU if self.hardware.device == "cpu" else LaneKind.GPU
        return Shape(step.role, worker, lane, path, min(wanted, len(step.tokens)), ranks, placed)

    def program(self, shape: Shape) -> Program:
        """The validated program of `shape`; raises `PlanError` or `StrategyError` when it cannot run."""
        program = self._programs.pop(shape, None)
        if program is None:
            lowered = lower(shape, self.model)
            arranged = check_arranged(lowered, self.overlap.arrange(lowered), type(self.overlap).__name__)
            slots = shape.placement.ring_slots
            ops = bind_slots(arranged, slots)
            try:
                order = validate(ops, ring_slots=slots, ranks=shape.ranks)
            except PlanError as error:
                if ops is arranged or not _can_run(arranged):
                    raise PlanError(f"overlap {type(self.overlap).__name__}: {error}") from None
                raise PlanError(
                    f"{error}; overlap {type(self.overlap).__name__} runs this program with a larger ring alone: raise "
                    f"ring_slots ({slots}) or lower parts_per_layer ({shape.placement.parts_per_layer})"
                ) from None
            program = Program(shape, ops, order)
            if len(self._programs) >= _KEPT_PROGRAMS:
                del self._programs[next(iter(self._programs))]  # the one not used for longest
        self._programs[shape] = program
        return program


def _can_run(ops: Sequence[Op]) -> bool:
    try:
        execution_order(ops)
    except PlanError:
        return False
    return True


def lower(shape: Shape, model: ModelSpec) -> tuple[Op, ...]:
    """Every op of a step in the plain order: layer by layer, microbatch by microbatch, loads just in time."""
    check_placed(shape.placement, model, shape.ranks)
    most = model.num_layers  # dense layers at the end need no (empty) set
    if shape.path.prefetch and not max(model.moe_layers, default=-1) < len(shape.path.prefetch) <= most:
        raise StrategyError(
            f"expert_path() prefetches for {len(shape.path.prefetch)} layers, the model has {model.num_layers}"
        )
    builder = _Builder(shape, model)
    for rank in shape.ranks:
        for microbatch in range(shape.num_microbatches):
            builder.add("embed", builder.compute, rank, microbatch=microbatch, needs=())
    for layer in range(model.num_layers):
        for rank in shape.ranks:
            loads: dict[int, int] = {}  # part -> op id: one load for all microbatches
            for microbatch in range(shape.num_microbatches):
                builder.layer(layer, rank, microbatch, loads)
    for rank in shape.ranks:
        # One for all microbatches, since its weights are large. Behind the last layer and numbered as the last
        # microbatch, so that sorting ops by these keeps it at the end.
        needs = tuple(builder.last[rank, microbatch] for microbatch in range(shape.num_microbatches))
        last = shape.num_microbatches - 1
        builder.add("head", builder.compute, rank, layer=model.num_layers, microbatch=last, needs=needs)
    return tuple(builder.ops)


def check_placed(placed: PlacementPlan, model: ModelSpec, ranks: Sequence[int]) -> None:
    """Every expert that a plan names must exist, on a rank that computes; raises `StrategyError` naming it."""
    layers = frozenset(model.moe_layers)
    for layer, expert in (*placed.tier_of, *placed.rank_of):
        if layer not in layers or not 0 <= expert < model.num_experts:
            raise StrategyError(f"the placement names (layer {layer}, expert {expert}), which the model does not have")
    for (layer, expert), rank in placed.rank_of.items():
        if rank not in ranks:
            raise StrategyError(
                f"the placement puts expert {expert} of layer {layer} on rank {rank}, the step runs on {tuple(ranks)}"
            )
    if not 1 <= placed.parts_per_layer <= MOST_PARTS:
        raise StrategyError(f"parts_per_layer is {placed.parts_per_layer}, expected 1 to {MOST_PARTS}")
    if placed.ring_slots < 0:
        raise StrategyError(f"ring_slots is {placed.ring_slots}, expected at least 0")


def parts_of(placed: PlacementPlan, model: ModelSpec, layer: int, rank: int, tier: Tier) -> list[tuple[int, ...]]:
    """The expert groups of one layer and tier on one rank: streamed ones cut into parts, others whole."""
    experts = [
        e
        for e in range(model.num_experts)
        if placed.tier(layer, e) is tier and placed.rank_of.get((layer, e), 0) == rank
    ]
    if not experts:
        return []
    num_parts = min(placed.parts_per_layer, len(experts)) if tier is Tier.STREAMED else 1
    bounds = [len(experts) * p // num_parts for p in range(num_parts + 1)]
    return [tuple(experts[a:b]) for a, b in pairwise(bounds)]


def check_arranged(lowered: Sequence[Op], arranged: Iterable[Op], overlap_name: str) -> tuple[Op, ...]:
    """Refuse an arrangement that loses, repeats or changes an op, or drops a need."""
    before = {op.id: op for op in lowered}
    seen: set[int] = set()
    try:
        arranged = tuple(arranged)  # it may be a generator
    except TypeError:
        raise StrategyError(f"overlap {overlap_name}: arrange() returned {arranged!r:.60}, expected ops") from None
    for op in arranged:
        if not isinstance(op, Op) or op.id not in before:
            raise StrategyError(f"overlap {overlap_name}: arrange() returned an op that it was not given: {op!r}")
        if op.id in seen:
            raise StrategyError(f"overlap {overlap_name}: arrange() returned op {op.id} ({op.kind}) twice")
        seen.add(op.id)
        if lost := set(before[op.id].needs) - set(op.needs):
            raise StrategyError(f"overlap {overlap_name}: arrange() dropped need {min(lost)} of op {op.id} ({op.kind})")
        if replace(op, needs=before[op.id].needs) != before[op.id]:
            raise StrategyError(f"overlap {overlap_name}: arrange() changed op {op.id} ({op.kind}) beyond its needs")
    if missing := before.keys() - seen:
        op = before[min(missing)]
        raise StrategyError(f"overlap {overlap_name}: arrange() lost op {op.id} ({op.kind} of layer {op.layer})")
    return arranged


def bind_slots(ops: Sequence[Op], ring_slots: int) -> tuple[Op, ...]:
    """Give each load the next ring slot, and make it wait for the readers of that slot's last generation.

    Generations count from the start of the program; the interpreter adds those of earlier steps, so that the
    ring survives from step to step.
    """
    loads = [op for op in ops if op.kind == "load"]
    if not loads:
        return tuple(ops)
    if ring_slots < 1:
        raise PlanError("the placement streams experts, but its ring has no slots (ring_slots = 0)")
    next_slot: dict[int, int] = {}
    slot_of: dict[int, SlotUse] = {}
    load_in: dict[tuple[int, SlotUse], int] = {}
    for op in loads:
        count = next_slot.get(op.rank, 0)
        use = slot_of[op.id] = SlotUse(count % ring_slots, count // ring_slots)
        load_in[op.rank, use] = op.id
        next_slot[op.rank] = count + 1
    readers: dict[int, list[int]] = {}
    bound: dict[int, SlotUse] = dict(slot_of)
    for op in ops:
        for need in op.needs:
            if op.kind == "experts" and op.tier is Tier.STREAMED and need in slot_of:
                readers.setdefault(need, []).append(op.id)
                bound[op.id] = slot_of[need]
    result = []
    for op in ops:
        use = bound.get(op.id)
        if use is None:
            result.append(op)
            continue
        needs = op.needs
        if op.kind == "load" and use.generation > 0:
            last = load_in[op.rank, SlotUse(use.slot, use.generation - 1)]
            needs = (*needs, *(i for i in readers.get(last, ()) if i not in needs))
        result.append(replace(op, slot=use, needs=needs))
    return tuple(result)


class _Builder:
    """Collects ops; remembers, per rank and microbatch, the op that the next one builds on."""

    def __init__(self, shape: Shape, model: ModelSpec) -> None:
        self.shape, self.model = shape, model
        self.compute = shape.compute_lane
        self.ops: list[Op] = []
        self.last: dict[tuple[int, int], int] = {}
        self._groups: dict[tuple[int, int], list[tuple[Tier, int, tuple[int, ...]]]] = {}

    def add(self, kind: str, lane: LaneKind, rank: int, *, microbatch: int = 0, needs=None, **fields) -> int:
        worker = self.shape.worker if rank == self.shape.ranks[0] else f"{self.shape.worker}.{rank}"
        if needs is None:
            needs = (self.last[rank, microbatch],)
        op = Op(len(self.ops), kind, Lane(worker, lane), rank, microbatch=microbatch, needs=needs, **fields)
        self.ops.append(op)
        if kind not in ("load", "experts"):
            self.last[rank, microbatch] = op.id
        return op.id

    def layer(self, layer: int, rank: int, microbatch: int, loads: dict[int, int]) -> None:
        """One microbatch through a layer; what it loads is entered in `loads`, what is there already is used."""
        self.add("attention", self.compute, rank, layer=layer, microbatch=microbatch)
        if layer in self.model.dense_layers:
            self.add("mlp", self.compute, rank, layer=layer, microbatch=microbatch)
            return
        spread, small = len(self.shape.ranks) > 1, self.shape.placement.exchange == "small_ep"
        if spread and small:
            self.add("all_gather", LaneKind.NET, rank, layer=layer, microbatch=microbatch)
        self.add("router", self.compute, rank, layer=layer, microbatch=microbatch)
        if spread and not small:
            self.add("dispatch", LaneKind.NET, rank, layer=layer, microbatch=microbatch)
        routed = self.last[rank, microbatch]
        done = []
        if (groups := self._groups.get((layer, rank))) is None:
            groups = self._groups[layer, rank] = self._grouped(layer, rank)
        for tier, part, experts in groups:
            needs, group = (routed,), {"layer": layer, "part": part, "tier": tier, "experts": experts}
            if tier is Tier.STREAMED:
                if part not in loads:
                    loads[part] = self.add("load", LaneKind.H2D, rank, needs=(), **group)
                needs = (routed, loads[part])
            lane = LaneKind.CPU if tier is Tier.HOST else self.compute
            done.append(self.add("experts", lane, rank, microbatch=microbatch, needs=needs, **group))
        needs = tuple(done) or (routed,)
        if spread:
            reduced = self.add("reduce", LaneKind.NET, rank, layer=layer, microbatch=microbatch, needs=needs)
            needs = (reduced,)
        self.add("combine", self.compute, rank, layer=layer, microbatch=microbatch, needs=needs)

    def _grouped(self, layer: int, rank: int) -> list[tuple[Tier, int, tuple[int, ...]]]:
        """(tier, part, experts) of every experts op; the CPU's op also takes streamed experts that may stay behind."""
        placed, prefetch = self.shape.placement, self.shape.path.prefetch
        groups = [(Tier.RESIDENT, 0, e) for e in parts_of(placed, self.model, layer, rank, Tier.RESIDENT)]
        host = [e for group in parts_of(placed, self.model, layer, rank, Tier.HOST) for e in group]
        for part, experts in enumerate(parts_of(placed, self.model, layer, rank, Tier.STREAMED)):
            arrived = experts if prefetch is None else tuple(e for e in experts if prefetch and e in prefetch[layer])
            if arrived:
                groups.append((Tier.STREAMED, part, arrived))
            stay = experts if self.shape.path.min_tokens > 1 else [e for e in experts if e not in arrived]
            host.extend(stay)
        if host:
            groups.append((Tier.HOST, 0, tuple(sorted(host))))
        return groups
