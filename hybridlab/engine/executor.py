"""Binds a program to tokens: the op kinds of a plan become calls on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from hybridlab.batch import Entry, OnRoute, StepBatch, split
from hybridlab.engine.captured_steps import CapturedSteps
from hybridlab.engine.cuda_memory import HEAD_ROWS
from hybridlab.engine.devices import Device, Execute
from hybridlab.engine.kv_cache import KVStorage
from hybridlab.engine.local_ids import LocalIds, count_ids
from hybridlab.engine.running import Running, drawn_tokens, micro_batch
from hybridlab.errors import PlanError, StrategyError
from hybridlab.model.base import DecodeBatch, Routed
from hybridlab.plans import Move, Op, Program, RequestId, Span, Tier


class Executor:
    """Runs one step at a time on one model, cache and set of lanes."""

    def __init__(self, device: Device, cache: KVStorage) -> None:
        self._device, self._model, self._cache = device, device.model, cache
        device.model.cache = cache
        self._local = LocalIds(device.model.spec.num_experts, device.torch_device)
        self._captured = CapturedSteps(device, cache)
        self._counts_LE: torch.Tensor | None = None
        """Where the model is, and with a last column for skipped routes; None until somebody asks."""

    def take_routes(self) -> np.ndarray:
        """As `moves.Movable`, between steps: what is counted on a device is read here alone."""
        spec = self._model.spec
        if self._counts_LE is None:
            shape = spec.num_layers, spec.num_experts + 1
            self._counts_LE = torch.zeros(shape, dtype=torch.int64, device=self._device.torch_device)
            self._captured.forget()  # steps count from now on
        found = self._counts_LE[list(spec.moe_layers), :-1].cpu().numpy()
        self._counts_LE.zero_()
        return found

    def close(self) -> None:
        """Let go of what captured steps run on, which each of them holds."""
        self._captured.forget()

    def move(self, moves: Sequence[Move]) -> None:
        """As `moves.Movable`, between steps."""
        self._device.move(moves)

    def run(
        self, program: Program, batch: StepBatch, clock_start_s: float, on_route: OnRoute | None = None
    ) -> tuple[dict[RequestId, int], tuple[Span, ...]]:
        """Compute a step; returns the drawn tokens and the spans of its ops."""
        micros, spans = self._run(program, batch.entries, clock_start_s, on_route, all_rows=False)
        return drawn_tokens(micros), spans

    def logits(self, program: Program, entry: Entry) -> torch.Tensor:
        """Logits of every row of one request's step, float32 [T, V]."""
        (micro,), _ = self._run(program, (entry,), 0.0, None, all_rows=True)
        assert micro.logits is not None
        return micro.logits.cpu()

    def _run(
        self,
        program: Program,
        entries: Sequence[Entry],
        clock_start_s: float,
        on_route: OnRoute | None,
        *,
        all_rows: bool,
    ) -> tuple[list[Running], tuple[Span, ...]]:
        groups = split(entries, program.shape.num_microbatches)
        with torch.inference_mode():
            if on_route is None and not all_rows:
                replayed = self._captured.run(program, groups, clock_start_s, self.execute_for)
                if replayed is not None:
                    return replayed
            self._cache.begin()
            micros = [Running(group, micro_batch(group, self._cache)) for group in groups]
            execute = self.execute_for(program, micros, on_route, all_rows=all_rows)
            with self._device.around(program, [len(micro.batch.token_ids) for micro in micros]):
                return micros, self._device.lanes.run(program, execute, clock_start_s)

    def execute_for(
        self, program: Program, micros: list[Running], on_route: OnRoute | None = None, *, all_rows: bool = False
    ) -> Execute:
        """What runs an op of `program` on its microbatch."""
        model = self._model

        def execute(op: Op) -> None:
            micro = micros[op.microbatch]
            match op.kind:
                case "attention":
                    micro.x_TH = model.attention(op.layer, micro.x_TH, micro.batch)
                case "router":
                    routed = model.router(op.layer, micro.x_TH)
                    if on_route is not None:
                        routed = _replaced(routed, on_route, op.layer, micro.entries, model.spec.num_experts)
                    if self._counts_LE is not None:
                        self._counts_LE[op.layer] += count_ids(routed.expert_ids, model.spec.num_experts)
                    micro.routed = self.by_tier(op.layer, routed, program)
                case "experts":
                    assert op.tier is not None
                    micro.parts[op.id] = self._device.experts[op.tier](op, micro.routed[op.tier])
                case "combine":
                    for _, part in sorted(micro.parts.items()):
                        micro.x_TH = micro.x_TH + part
                    micro.parts.clear()
                case "load":
                    self._device.load(op)
                case "mlp":
                    micro.x_TH = model.mlp(op.layer, micro.x_TH)
                case "embed":
                    micro.x_TH = model.embed(micro.batch)
                case "head":
                    rows = [
                        one.x_TH if all_rows or isinstance(one.batch, DecodeBatch) else one.x_TH[_last_rows(one)]
                        for one in micros
                    ]
                    if sum(map(len, rows)):
                        x_RH = rows[0] if len(rows) == 1 else torch.cat(rows)
                        # Of a whole prompt, the logits would take more of a device than all the rest.
                        pieces = [model.head(piece).cpu() for piece in x_RH.split(HEAD_ROWS)] if all_rows else []
                        logits_RV = torch.cat(pieces) if all_rows else model.head(x_RH)
                        for one, own in zip(micros, logits_RV.split([len(x_RH) for x_RH in rows]), strict=True):
                            one.logits = own
                case _:
                    raise PlanError(f"this device cannot run op {op.id} ({op.kind} on {op.lane}) yet")

        return execute

    def by_tier(self, layer: int, routed: Routed, program: Program) -> Mapping[Tier, Routed]:
        """What each tier computes of the router's choice: experts that arrived in the ring stay with it if they have
        `min_tokens` tokens, else the CPU's op takes them. Decided where the choice lies, without waiting for it."""
        least = program.shape.path.min_tokens
        if least <= 1:
            return dict.fromkeys(Tier, routed)
        ids = routed.expert_ids
        arrived = self._local(ids, sorted(program.streamed.get(layer, ()))) >= 0
        in_ring = arrived & (count_ids(ids, self._model.spec.num_experts)[ids.long()] >= least)
        ring, host = torch.where(in_ring, ids, -1), torch.where(in_ring, -1, ids)
        return {
            Tier.RESIDENT: routed,
            Tier.STREAMED: replace(routed, expert_ids=ring),
            Tier.HOST: replace(routed, expert_ids=host),
        }


def _replaced(routed: Routed, on_route: OnRoute, layer: int, entries: Sequence[Entry], num_experts: int) -> Routed:
    """What the hook makes of the router's choice; raises `StrategyError` for ids that cannot be."""
    own = routed.expert_ids.cpu().numpy().view()
    own.flags.writeable = False
    ids = check_chosen(on_route(layer, entries, own), own, layer, num_experts)
    if ids is None:
        return routed
    chosen = torch.from_numpy(np.ascontiguousarray(ids)).to(routed.expert_ids.device)
    return replace(routed, expert_ids=chosen)


def check_chosen(ids: object, own: np.ndarray, layer: int, num_experts: int) -> np.ndarray | None:
    """`ids` of an `OnRoute` for the router's `own` choice; raises `StrategyError` for ids that cannot be."""
    if ids is None:
        return None
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.shape != own.shape:
        given = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise StrategyError(f"on_route, layer {layer}: returned {given}, expected int32 {list(own.shape)} or None")
    if ids.min() < 0 or ids.max() >= num_experts:
        span = f"{ids.min()} to {ids.max()}"
        raise StrategyError(f"on_route, layer {layer}: returned experts {span}, expected 0 to {num_experts - 1}")
    return ids


def _last_rows(micro: Running) -> list[int]:
    pairs = zip(micro.entries, micro.batch.contexts, strict=True)
    return [context.last - 1 for entry, context in pairs if entry.wants_token]
