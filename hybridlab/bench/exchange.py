"""What the exchanges of expert parallelism move between ranks: counted as it is sent, and by the formulas."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._C._distributed_c10d import HashStore

from hybridlab.batch import Entry
from hybridlab.bench.devices import origin
from hybridlab.bench.steps import TimedStep, prompt_step, take_turns, timed
from hybridlab.engine import ep_traffic
from hybridlab.engine.collectives import GlooPeers, Traffic
from hybridlab.engine.ep_exchange import Wire, make_exchanges
from hybridlab.engine.ranks import Ranks, spread
from hybridlab.engine.ranks_share import rows_of
from hybridlab.errors import ConfigError
from hybridlab.loading import load
from hybridlab.lowering import Planner
from hybridlab.model.base import Routed
from hybridlab.plans import EXCHANGES
from hybridlab.request import Request, Sampling
from hybridlab.session import Engine
from hybridlab.spec import ModelSpec

if TYPE_CHECKING:
    import pandas as pd

FORMULAS = {"dispatch_per_route": ep_traffic.dispatch_per_route, "dispatch_per_rank": ep_traffic.dispatch_per_rank}
WIRE = Wire()


def exchange_bytes(
    checkpoint: str | Path, *, tokens: int = 256, ranks: Sequence[int] = (2, 4, 8), seed: int = 0
) -> pd.DataFrame:
    """A row per exchange and number of ranks: bytes that a random prompt's MoE layers send, over all ranks and layers.

    One process computes the prompt and tells its routes; then so many ranks, threads with a socket to each other, make
    every exchange of every layer for these routes, without computing experts. `sent_bytes` are counted where tensors
    are handed over, `formula_bytes` come from `engine.ep_traffic` and the routes, `uniform_bytes` from the number of
    experts alone, as if all routes were as likely, without ids, weights and counts. `router_tokens` are those that the
    ranks' routers read in a layer, together. Raises what `hl.load` raises, and `ConfigError` for ranks below 2.
    """
    import pandas as pd

    if not ranks or not all(isinstance(size, int) and size >= 2 for size in ranks):
        raise ConfigError(f"ranks is {ranks!r:.60}, expected ints >= 2")
    rows = []
    for case in _cases(checkpoint, tokens, ranks, seed):
        for exchange in EXCHANGES:
            moved, router_tokens = case.moved(exchange)
            rows.append({**case.row(exchange, moved), "router_tokens": router_tokens, **origin("cpu")})
    return pd.DataFrame(rows)


def rank_steps(checkpoint: str | Path, size: int, *, tokens: int = 256, repeats: int = 3, seed: int = 0) -> list[dict]:
    """As `exchange_bytes`, of an engine of `size` rank processes that computes the prompt; seconds, medians, beside it.

    `exchange_s` and `router_s` are those of a rank in all layers, the first with its waits for the others; `step_s` is
    the whole prompt. In `exact`, so that the routes that one process takes are those of the ranks.
    """
    (case,), rows = _cases(checkpoint, tokens, [size], seed), []
    with load(checkpoint, device="cpu", ranks=size, threads=1, **_room(tokens)) as engine:
        runtime = engine.runtime
        assert isinstance(runtime, Ranks)
        steps = {
            name: prompt_step(engine, tokens, planner=with_exchange(engine, name), seed=seed) for name in EXCHANGES
        }
        moved: dict[str, list[Traffic]] = {}
        for name, step in steps.items():
            before = [each["experts"] for each in runtime.traffic()]
            timed(engine, step)
            after = [each["experts"] for each in runtime.traffic()]
            moved[name] = [now - was for now, was in zip(after, before, strict=True)]
        found: dict[str, list[TimedStep]] = {name: [] for name in EXCHANGES}
        for name, step in take_turns({name: partial(timed, engine, step) for name, step in steps.items()}, repeats):
            found[name].append(step)
    for name in EXCHANGES:
        rows.append({
            **case.row(name, moved[name]),
            "router_tokens": tokens * (size if name == "small_ep" else 1),
            "step_s": statistics.median(step.step_s for step in found[name]),
            "exchange_s": busy_s(found[name], "all_gather", "dispatch", "reduce") / size,
            "router_s": busy_s(found[name], "router") / size,
            **origin("cpu"),
        })  # fmt: skip
    return rows


def with_exchange(engine: Engine, exchange: str) -> Planner:
    """The engine's planner, with that exchange."""
    planner = engine.planner
    placed = replace(planner.placed, exchange=exchange)
    return Planner(planner.model, planner.hardware, planner.placement, planner.overlap, placed, planner.ranks)


def busy_s(steps: Sequence[TimedStep], *kinds: str) -> float:
    """Seconds of all ops of these kinds over all ranks, the median of the steps; an exchange's has its waits in it."""
    sums = [sum(span.end_s - span.start_s for span in step.spans if span.op.kind in kinds) for step in steps]
    return statistics.median(sums)


@dataclass(frozen=True)
class _Case:
    """A prompt's routes, int [N, K] per MoE layer, on ranks that have `rows` of its tokens; `owners` are of experts."""

    preset: str
    spec: ModelSpec
    routes: Mapping[int, np.ndarray]
    rows: Sequence[Sequence[int]]
    owners: Mapping[int, np.ndarray]

    def moved(self, exchange: str) -> tuple[list[Traffic], int]:
        """What each rank moved, and how many tokens all routers read in a layer."""
        store, size = HashStore(), len(self.rows)
        with ThreadPoolExecutor(size) as pool:
            peers = list(pool.map(lambda rank: GlooPeers("exchange", store, rank, size), range(size)))
            seen = list(pool.map(lambda one: self._exchange(one, exchange), peers))
            return [one.traffic for one in peers], sum(seen)

    def _exchange(self, peers: GlooPeers, name: str) -> int:
        exchange = make_exchanges(peers, WIRE, {layer: torch.from_numpy(own) for layer, own in self.owners.items()})[
            name
        ]
        own, sizes, seen = self.rows[peers.rank], [len(rows) for rows in self.rows], 0
        order = np.concatenate([np.asarray(rows, np.int64) for rows in self.rows])
        for layer, routes in self.routes.items():
            x_TH = exchange.gather(torch.zeros(len(own), self.spec.hidden), sizes)
            seen = len(x_TH)
            chosen = torch.from_numpy(
                routes[order if name == "small_ep" else np.asarray(own, np.int64)].astype(np.int64)
            )
            routed = Routed(x_TH, chosen, torch.ones(chosen.shape))
            routed, trip = exchange.dispatch(layer, routed, sizes)
            exchange.reduce(torch.zeros_like(routed.x_TH), trip)
        return seen

    def row(self, exchange: str, moved: Sequence[Traffic]) -> dict[str, Any]:
        size, first = len(self.rows), next(iter(self.routes))
        formula = [self._formula(exchange, layer, rank).sent_bytes for rank in range(size) for layer in self.routes]
        return {
            "preset": self.preset,
            "ranks": size,
            "exchange": exchange,
            "tokens": sum(map(len, self.rows)),
            "moe_layers": len(self.routes),
            "num_experts": self.spec.num_experts,
            "top_k": self.spec.top_k,
            "hidden": self.spec.hidden,
            "hidden_dtype": str(WIRE.hidden).removeprefix("torch."),
            "partial_dtype": str(WIRE.partial).removeprefix("torch."),
            "sent_bytes": sum(each.sent_bytes for each in moved),
            "formula_bytes": sum(formula),
            "uniform_bytes": self._uniform_bytes(exchange, self.owners[first]) * len(self.routes),
            "evidence": "measured",
        }

    def _formula(self, exchange: str, layer: int, rank: int) -> Traffic:
        if exchange == "small_ep":
            return ep_traffic.small_ep([len(own) for own in self.rows], rank, self.spec.hidden, WIRE)
        chosen = [self.routes[layer][list(own)] for own in self.rows]
        return FORMULAS[exchange](chosen, self.owners[layer], rank, self.spec.hidden, WIRE)

    def _uniform_bytes(self, exchange: str, owner_E: np.ndarray) -> float:
        """Hidden states and results of one layer, if every set of experts were as likely."""
        experts = np.bincount(owner_E, minlength=len(self.rows)).tolist()
        place = EXCHANGES.index(exchange)
        expected = (
            ep_traffic.expected_rows_per_token(experts, rank, self.spec.top_k) for rank in range(len(self.rows))
        )
        row_bytes = self.spec.hidden * (WIRE.hidden.itemsize + WIRE.partial.itemsize)
        return sum(len(own) * each[place] for own, each in zip(self.rows, expected, strict=True)) * row_bytes


def _cases(checkpoint: str | Path, tokens: int, sizes: Sequence[int], seed: int) -> list[_Case]:
    """The prompt of `bench.steps.prompt_step`, computed by one process, on so many ranks."""
    routes: dict[int, np.ndarray] = {}
    with load(checkpoint, device="cpu", **_room(tokens)) as engine:
        ids = tuple(prompt_step(engine, tokens, seed=seed).batch.entries[0].token_ids)
        engine.serve([Request("prompt", ids, 1)], on_route=lambda layer, _, chosen: routes.update({layer: chosen}))
        spec, placed = engine.spec, engine.planner.placed
    entry, cases = Entry("prompt", ids, 0, (), Sampling(), wants_token=True), []
    for size in sizes:
        rank_of = spread(placed, spec, size, EXCHANGES[0], "all_host").rank_of
        owners = {layer: np.array([rank_of[layer, e] for e in range(spec.num_experts)]) for layer in routes}
        rows = [rows_of(entry, rank, size) for rank in range(size)]
        cases.append(_Case(Path(checkpoint).name, spec, routes, rows, owners))
    return cases


def _room(tokens: int) -> dict[str, Any]:
    return {"precision": "exact", "token_budget": tokens, "kv_tokens": tokens + 16, "quiet": True}
