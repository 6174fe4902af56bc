"""Checks that an author of a strategy runs on it: what is wrong, all at once, in words.

Each check returns None when nothing is wrong, else raises `StrategyError` with one line per problem. The same
checks run over every built-in strategy in the tests.
"""

from __future__ import annotations

import inspect
import random
import re
import traceback
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from types import CodeType
from typing import Any

from hybridlab.errors import HybridlabError, StrategyError
from hybridlab.lowering import Planner, lower
from hybridlab.moves import Mover
from hybridlab.plans import (
    ExpertPath,
    LaneKind,
    PlacementPlan,
    QueueView,
    RunningRequest,
    Shape,
    StepPlan,
    Tier,
    WaitingRequest,
)
from hybridlab.routing import RoutingStats
from hybridlab.spec import HardwareSpec, KVEntry, ModelSpec, RopeSpec
from hybridlab.strategies.fields import MOST_PARTS
from hybridlab.strategies.kv_room import fit_step
from hybridlab.strategies.placement.all_host import AllHost
from hybridlab.strategies.registry import resolve
from hybridlab.validation import check_step

_BLOCK = 16
# Numbers, and the ids of requests, in the words of an error: problems that differ in these alone are alike.
_VARYING = re.compile(r"'r?\d+'|\d+(\.\d+)?")

TOY_MODEL = ModelSpec(
    family="toy",
    num_layers=4,
    hidden=64,
    vocab=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=8,
    top_k=2,
    moe_intermediate=32,
    dense_intermediate=64,
    dense_layers=frozenset({0}),
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope=RopeSpec(),
    max_positions=1024,
    tie_embeddings=False,
    attention_bias=False,
    eos_token_ids=(),
    kv_entries=(KVEntry("k", (2, 16)), KVEntry("v", (2, 16))),
    weight_dtype="fp8",
)
TOY_CPU = HardwareSpec("toy cpu", "cpu", num_cores=2, host_memory_bytes=2**34)
TOY_GPU = HardwareSpec("toy gpu", "cuda", num_cores=16, host_memory_bytes=2**36, gpu_memory_bytes=2**34)


def check_scheduler(scheduler: Any, *, seed: int = 0, num_trials: int = 20) -> None:
    """Drive `scheduler` through random queues without a device: every step must be allowed and every queue drain.

    Also checks that it is deterministic, keeps to the budget and to the KV cache, and never waits for nothing.
    """
    scheduler = resolve("scheduler", scheduler)
    problems: list[tuple[str, str]] = []
    for trial in range(num_trials):
        rng = random.Random(f"{seed}/{trial}")
        budget, kv_blocks = rng.choice((8, 16, 64, 512)), rng.choice((6, 24, 200))
        try:
            _drain(scheduler, rng, budget, kv_blocks)
        except Exception as error:
            where = f"trial {trial} (token_budget {budget}, {kv_blocks * _BLOCK} KV tokens): "
            problems.append((where, _words(error, scheduler)))
    _report(f"scheduler {type(scheduler).__name__}", problems)


def check_placement(placement: Any) -> None:
    """Call `placement` for machines with and without a GPU: plans must name real experts and ranks, and lower.

    Moves of its `update` must keep to what `place` planned.
    """
    placement = resolve("placement", placement)
    problems: list[tuple[str, str]] = []
    routing = RoutingStats(tuple((10, 5, 1, 1, 0, 0, 0, 3) for _ in TOY_MODEL.moe_layers), "toy", TOY_MODEL.moe_layers)
    for hardware in (TOY_CPU, TOY_GPU):
        for stats in (RoutingStats(), routing):
            where = f"{hardware.name}: "
            _collect(problems, placement, where, lambda h=hardware, s=stats: _try_placement(placement, h, s))
    if not problems:
        _collect(problems, placement, "", lambda: _try_update(placement, routing))
    _report(f"placement {type(placement).__name__}", problems)


def check_overlap(overlap: Any) -> None:
    """Arrange programs of several shapes and tiers: every op once, no need lost, no deadlock, the ring respected."""
    overlap = resolve("overlap", overlap)
    problems: list[tuple[str, str]] = []
    placements = (
        PlacementPlan(),
        PlacementPlan(default_tier=Tier.RESIDENT),
        PlacementPlan(default_tier=Tier.STREAMED, ring_slots=2, parts_per_layer=2),
        PlacementPlan(default_tier=Tier.STREAMED, ring_slots=4, parts_per_layer=2, tier_of={(1, 0): Tier.HOST}),
    )
    small_ring = PlacementPlan(default_tier=Tier.STREAMED, ring_slots=1, parts_per_layer=3)
    for role in ("prefill", "decode", "mixed"):
        for num_requests in (1, 4):
            step = StepPlan(role, {str(i): 1 for i in range(num_requests)})
            # Several microbatches may need a larger ring than one.
            for placed in (*placements, *((small_ring,) if num_requests == 1 else ())):
                planner = Planner(TOY_MODEL, TOY_GPU, AllHost(), overlap, placed)
                where = f"{role} of {num_requests}, experts {placed.default_tier}, ring of {placed.ring_slots}: "
                _collect(problems, overlap, where, lambda p=planner, s=step: p.program(p.shape("main", s)))
    ops = lower(Shape("decode", "main", LaneKind.GPU, ExpertPath(), 2, (0,), placements[0]), TOY_MODEL)
    if not problems and list(overlap.arrange(ops)) != list(overlap.arrange(ops)):
        problems.append(("", "arrange() gives different orders for the same ops; programs are cached, so it must not"))
    _report(f"overlap {type(overlap).__name__}", problems)


def _drain(scheduler: Any, rng: random.Random, budget: int, kv_blocks: int) -> None:
    """A queue without tokens: the bookkeeping of `request_queue` on counts alone."""
    capacity = kv_blocks * _BLOCK
    prompt = {f"r{i}": rng.randint(1, max(1, capacity // 2)) for i in range(rng.randint(1, 8))}
    output = {rid: rng.randint(1, min(12, capacity - n)) for rid, n in prompt.items()}
    arrival = {rid: i * rng.random() for i, rid in enumerate(prompt)}
    known, computed, drawn = dict(prompt), dict.fromkeys(prompt, 0), dict.fromkeys(prompt, 0)
    # Of some prompts the beginning lies in the KV cache already, while they hold nothing of it.
    found = {rid: rng.choice((0, (n - 1) // _BLOCK * _BLOCK)) for rid, n in prompt.items()}
    blocks = dict.fromkeys(prompt, 0)
    live, now_s, last_decode_s = list(prompt), 0.0, None
    rank_sets = rng.choice((((0,),), ((0, 1),), ((0, 1, 2), (0,))))
    for _ in range(200 * sum(prompt.values()) + 1000):
        if not live:
            return
        now_s += 0.05
        here = [rid for rid in live if arrival[rid] <= now_s]
        for rid in here:
            computed[rid] = computed[rid] if blocks[rid] else found[rid]
        is_running = {rid: drawn[rid] > 0 and computed[rid] == known[rid] - 1 for rid in here}
        view = QueueView(
            now_s,
            "main",
            tuple(
                WaitingRequest(rid, arrival[rid], known[rid] - computed[rid], blocks[rid] * _BLOCK, computed[rid])
                for rid in here
                if not is_running[rid]
            ),
            tuple(RunningRequest(rid, computed[rid], blocks[rid] * _BLOCK) for rid in here if is_running[rid]),
            budget,
            capacity - sum(blocks.values()) * _BLOCK,
            _BLOCK,
            last_decode_s,
            rank_sets,
        )
        step = scheduler.schedule(view)
        if step != scheduler.schedule(view):
            raise StrategyError("schedule() gives two different steps for the same queue; it must not keep state")
        if step is None or (isinstance(step, StepPlan) and not step.tokens):
            if len(here) == len(live):
                raise StrategyError(f"waits for nothing: {len(view.waiting)} waiting, {len(view.running)} running")
            continue
        if wrong := check_step(view, step):
            raise StrategyError("; ".join(wrong))
        if (step := fit_step(view, step)) is None:
            if len(here) == len(live):
                raise StrategyError("asks for requests that cannot get KV cache, while those that hold it wait")
            continue
        for rid in step.preempt:
            blocks[rid], computed[rid] = 0, found[rid]
        for rid, count in step.tokens.items():
            last_decode_s = now_s if is_running[rid] else last_decode_s
            computed[rid] += count
            blocks[rid] = max(blocks[rid], ceil(computed[rid] / _BLOCK))
            if computed[rid] == known[rid]:
                known[rid] += 1
                drawn[rid] += 1
            if drawn[rid] == output[rid]:
                live.remove(rid)
                blocks[rid] = 0
    raise StrategyError(f"{len(live)} requests never finish; steps keep coming but do not get there")


def _try_placement(placement: Any, hardware: HardwareSpec, routing: RoutingStats) -> None:
    placed = placement.place(TOY_MODEL, hardware, routing)
    if not isinstance(placed, PlacementPlan):
        raise StrategyError(f"place() returned {type(placed).__name__}, expected PlacementPlan")
    for layer, expert in (*placed.tier_of, *placed.rank_of):
        if layer not in TOY_MODEL.moe_layers or not 0 <= expert < TOY_MODEL.num_experts:
            raise StrategyError(f"place() names (layer {layer}, expert {expert}), which the model does not have")
    if not 1 <= placed.parts_per_layer <= MOST_PARTS:
        raise StrategyError(f"parts_per_layer is {placed.parts_per_layer}, expected 1 to {MOST_PARTS}")
    tiers = {placed.tier(layer, e) for layer in TOY_MODEL.moe_layers for e in range(TOY_MODEL.num_experts)}
    if hardware.device == "cpu" and tiers != {Tier.HOST}:
        raise StrategyError(f"uses tiers {sorted(tiers)} on a machine without a GPU, expected host alone")
    for num_tokens in (1, 64, 8192):
        path = placement.expert_path(num_tokens, placed, hardware)
        if not isinstance(path, ExpertPath):
            raise StrategyError(f"expert_path({num_tokens}) returned {type(path).__name__}, expected ExpertPath")
        if path.prefetch and len(path.prefetch) != TOY_MODEL.num_layers:
            raise StrategyError(
                f"expert_path() prefetches for {len(path.prefetch)} layers, the model has {TOY_MODEL.num_layers}"
            )
        sequential = resolve("overlap", "sequential")
        planner = Planner(TOY_MODEL, hardware, placement, sequential, placed)
        planner.program(planner.shape("main", StepPlan("prefill", {"r": num_tokens})))


def _try_update(placement: Any, routing: RoutingStats) -> None:
    """Update after update, each with other hot experts; every move must find its room."""
    placed = placement.place(TOY_MODEL, TOY_GPU, routing)
    mover, rng = Mover(placement, placed, TOY_MODEL), random.Random(0)
    for _ in range(16):
        rows = tuple(tuple(rng.choice((0, 0, 1, 30)) for _ in row) for row in routing.counts)
        moves = mover.wanted(RoutingStats(rows, "toy", routing.layers))
        if moves and not mover.every_steps:
            raise StrategyError("update() returned moves, but nothing asks it: update_every_steps is missing, or 0")
        placed = mover.moved(placed, moves)


def _collect(problems: list[tuple[str, str]], strategy: Any, where: str, attempt: Callable[[], Any]) -> None:
    try:
        attempt()
    except Exception as error:
        problems.append((where, _words(error, strategy)))


def _words(error: Exception, strategy: Any) -> str:
    """The error in words; where the strategy's own code raised it, the line too."""
    if isinstance(error, HybridlabError):
        return str(error)
    said = f"raised {type(error).__name__}: {error}"
    files = {code.co_filename for code in _code_of(strategy)}
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    if not own:
        return said
    frame = own[-1]
    return f"{said} in {frame.name}(), {Path(frame.filename).name}:{frame.lineno}: {frame.line or ''}".rstrip(": ")


def _code_of(strategy: Any) -> list[CodeType]:
    return [f.__code__ for cls in type(strategy).__mro__ for f in vars(cls).values() if inspect.isfunction(f)]


def _report(name: str, problems: Sequence[tuple[str, str]]) -> None:
    """Raise StrategyError if there are problems (where, what); of those alike, the first is shown."""
    alike: dict[frozenset[str], list[str]] = {}
    for where, what in problems:
        alike.setdefault(frozenset(_VARYING.sub("#", what).split("; ")), []).append(where + what)
    if not alike:
        return
    lines = [found[0] + (f" (and {len(found) - 1} more like this)" if found[1:] else "") for found in alike.values()]
    count = f"{len(lines)} problem" + ("s" if lines[1:] else "")
    more = f"\n  and {len(lines) - 5} more" if lines[5:] else ""
    raise StrategyError(f"{name}: {count} found\n  " + "\n  ".join(lines[:5]) + more)
