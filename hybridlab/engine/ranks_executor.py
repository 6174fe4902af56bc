"""One rank's part of a step: its stripes of the tokens, its experts, and what it exchanges with the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from hybridlab.batch import Entry, OnRoute, StepBatch, split
from hybridlab.engine.devices import Device, Execute
from hybridlab.engine.ep_exchange import Exchange
from hybridlab.engine.executor import Executor
from hybridlab.engine.host_exchange import HostExchange
from hybridlab.engine.ranks_cache import SharedKV
from hybridlab.engine.ranks_share import Shares, shared_batch
from hybridlab.engine.running import Running, drawn_tokens
from hybridlab.errors import PlanError, StrategyError
from hybridlab.model.base import Routed
from hybridlab.plans import COLLECTIVE_KINDS, Move, Op, Program, RequestId, Span, Tier


class RankExecutor:
    """As `engine.executor.Executor`, of the ops of one rank; all ranks are given the same steps.

    Two groups of ranks are used: `cache` exchanges keys and values on the lane that computes; the one of `exchanges`
    that the program's placement names runs on the NET lane. A rank without tokens takes part in both. Steps of the
    first rank alone are given to it alone. `check` raises after a step that did not get what it waited for on a device.
    """

    def __init__(
        self,
        device: Device,
        cache: SharedKV,
        exchanges: Mapping[str, Exchange],
        rank: int,
        num_ranks: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._device, self._cache, self._exchanges, self._check = device, cache, exchanges, check
        # Its thread waits for every op's rows, if only to see that there are none.
        self._host_takes_nothing = isinstance(device.experts.get(Tier.HOST), HostExchange)
        self._rank, self._num_ranks = rank, num_ranks
        self._executor = Executor(device, cache)
        self._own: WeakKeyDictionary[Program, Program] = WeakKeyDictionary()

    def run(
        self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None = None
    ) -> tuple[dict[RequestId, int], tuple[Span, ...]]:
        """Compute this rank's part of a step; returns the tokens that it draws and the spans of its ops."""
        if on_route is not None:
            raise StrategyError("on_route sees one rank's routers; routing is recorded and replayed without ranks")
        if len(program.shape.ranks) == 1:
            self._cache.shares = None
            return self._executor.run(program, batch, clock_start_s)
        states, spans = self._run(program, batch.entries, clock_start_s, all_rows=False)
        return drawn_tokens(state.micro for state in states), spans

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of this rank's rows of one request's step, float32 [rows, V]."""
        if len(program.shape.ranks) == 1:
            self._cache.shares = None
            return self._executor.logits(program, entry)
        (state,), _ = self._run(program, (entry,), 0.0, all_rows=True)
        logits = state.micro.logits
        return torch.empty(0, self._device.model.spec.vocab) if logits is None else logits.cpu()

    def take_routes(self) -> np.ndarray:
        raise StrategyError("experts do not move between ranks or tiers: take a placement that does not update")

    def move(self, moves: Sequence[Move]) -> None:
        raise StrategyError("experts do not move between ranks or tiers: take a placement that does not update")

    def _run(
        self, program: Program, entries: Sequence[Entry], clock_start_s: float, *, all_rows: bool
    ) -> tuple[list[_State], tuple[Span, ...]]:
        own = self._own_program(program)
        with torch.inference_mode():
            self._cache.begin()
            states = []
            for group in split(entries, program.shape.num_microbatches):
                mine, batch, shares = shared_batch(group, self._cache, self._rank, self._num_ranks)
                states.append(_State(Running(mine, batch), shares))
            execute = self._execute_for(own, states, all_rows=all_rows)
            with self._device.around(own, [self._most_rows(program, state.shares) for state in states]):
                try:
                    return states, self._device.lanes.run(own, execute, clock_start_s)
                finally:
                    self._check()  # what did not come explains whatever else went wrong

    def _most_rows(self, program: Program, shares: Shares) -> int:
        """That this rank's experts can be given of a microbatch."""
        per_token = self._device.model.spec.top_k if program.shape.placement.exchange == "dispatch_per_route" else 1
        return per_token * sum(shares.sizes)

    def _own_program(self, program: Program) -> Program:
        """The ops of this rank; those of different ranks need each other through collectives alone."""
        own = self._own.get(program)
        if own is None:
            ops, order = (tuple(op for op in ops if op.rank == self._rank) for ops in (program.ops, program.order))
            # Keys and values are exchanged within attention, beside the plan's collectives or, on GPUs, among them.
            met = _meetings(ops, order, self._rank)
            for rank in range(self._num_ranks):
                if _meetings(program.ops, program.order, rank) != met:
                    raise PlanError(f"ranks {self._rank} and {rank} compute attention in different orders: deadlock")
            own = self._own[program] = replace(program, ops=ops, order=order)
        return own

    def _execute_for(self, program: Program, states: list[_State], *, all_rows: bool) -> Execute:
        plain = self._executor.execute_for(program, [state.micro for state in states], all_rows=all_rows)
        exchange = self._exchanges[program.shape.placement.exchange]

        def execute(op: Op) -> None:
            state = states[op.microbatch]
            micro = state.micro
            match op.kind:
                case "attention":
                    self._cache.shares = state.shares
                    if len(micro.x_TH):
                        plain(op)
                    else:
                        self._cache.write_nothing(op.layer)
                case "all_gather":
                    state.own_TH, state.from_net = micro.x_TH, None
                    micro.x_TH = exchange.gather(micro.x_TH, state.shares.sizes)
                case "dispatch":
                    state.own_TH, state.from_net = micro.x_TH, None
                    routed = micro.routed[Tier.RESIDENT]
                    state.to_net.append(routed)
                    routed, state.trip = exchange.dispatch(op.layer, routed, state.shares.sizes)
                    micro.routed = self._executor.by_tier(op.layer, routed, program)
                case "reduce":
                    rows = len(micro.routed[Tier.RESIDENT].x_TH)
                    partial = torch.zeros(rows, micro.x_TH.shape[1], device=micro.x_TH.device)
                    for _, part in sorted(micro.parts.items()):
                        partial = partial + part
                    trip = state.shares.sizes if state.trip is None else state.trip
                    state.to_net.append(micro.parts)
                    state.from_net = exchange.reduce(partial, trip)
                    micro.parts = {op.id: state.from_net}
                    micro.x_TH, state.trip = state.own_TH, None
                case "combine":
                    plain(op)
                    state.to_net.clear()
                case "load" | "head":
                    plain(op)
                case "experts" if op.tier is Tier.HOST and self._host_takes_nothing:
                    plain(op)
                case _ if self._rows(op, micro):
                    plain(op)
                case _:
                    self._without_rows(op, micro)

        return execute

    def _rows(self, op: Op, micro: Running) -> int:
        """What an op computes on."""
        if op.kind == "embed":
            return len(micro.batch.token_ids)
        if op.kind == "experts":
            assert op.tier is not None
            return len(micro.routed[op.tier].x_TH)
        return len(micro.x_TH)

    def _without_rows(self, op: Op, micro: Running) -> None:
        """What kernels are not asked for."""
        spec, where = self._device.model.spec, self._device.torch_device
        nothing = torch.empty(0, spec.hidden, device=where)
        if op.kind == "embed":
            micro.x_TH = nothing
        elif op.kind == "experts":
            micro.parts[op.id] = nothing
        elif op.kind == "router":
            ids = torch.empty(0, spec.top_k, dtype=torch.int32, device=where)
            micro.routed = dict.fromkeys(Tier, Routed(nothing, ids, ids.float()))


@dataclass
class _State:
    """A microbatch in a layer: `own_TH` while `micro.x_TH` are all ranks' tokens, `trip` while rows are elsewhere.

    A stream uses the memory of what it made again in its own order, whoever still reads it. So what the NET lane reads
    stays in `to_net` until the lane that made it has been told to wait for the NET lane ("combine"), and what it made
    in `from_net` until the NET lane waits for the reader (its next op).
    """

    micro: Running
    shares: Shares
    own_TH: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    trip: Any = None
    to_net: list[Any] = field(default_factory=list)
    from_net: torch.Tensor | None = None


def _meetings(ops: Sequence[Op], order: Sequence[Op], rank: int) -> list[tuple[str, int, int]]:
    """Where a rank exchanges something with the others: the order on the lane of attention, and that over all lanes."""
    own = [op for op in ops if op.rank == rank and op.kind == "attention"]
    own += [op for op in order if op.rank == rank and op.kind in ("attention", *COLLECTIVE_KINDS)]
    return [(op.kind, op.layer, op.microbatch) for op in own]
