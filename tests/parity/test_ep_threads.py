"""Expert and context parallelism against the oracles, with ranks as threads: every size, exchange and precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from torch._C._distributed_c10d import HashStore

from hybridlab.batch import Entry, StepBatch
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import ep_traffic
from hybridlab.engine.collectives import GlooPeers
from hybridlab.engine.devices import cpu_device
from hybridlab.engine.ep_exchange import Wire, make_exchanges, owners
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.ranks import spread
from hybridlab.engine.ranks_cache import SharedKV
from hybridlab.engine.ranks_executor import RankExecutor
from hybridlab.engine.ranks_share import rows_of, share
from hybridlab.errors import PlanError, StrategyError
from hybridlab.hardware import detect
from hybridlab.lowering import Planner
from hybridlab.model.numerics import make_numerics
from hybridlab.plans import EXCHANGES, PlacementPlan, StepPlan
from hybridlab.request import Sampling
from hybridlab.strategies.registry import resolve

BLOCKS = 12
"""KV blocks of 8 tokens for each request."""


class Ranks:
    """Executors of `size` ranks, one thread each; `run` gives all of them the same step."""

    def __init__(self, oracle, size: int, precision: str = "exact") -> None:
        checkpoint = open_checkpoint(oracle.folder)
        self.spec, self.size = checkpoint.spec, size
        self.placed = spread(PlacementPlan(), self.spec, size, "small_ep", "test")
        self.pool = ThreadPoolExecutor(size)
        store = HashStore()

        def make(rank: int) -> tuple[RankExecutor, GlooPeers, GlooPeers]:
            numerics = make_numerics(precision, 1)
            attention, experts = (GlooPeers(name, store, rank, size, timeout_s=60) for name in ("attention", "experts"))
            storage = KVCache(self.spec, BLOCKS * len(oracle.prompts), 8, numerics.kv_dtype)
            cache = SharedKV(storage, attention, self.spec, numerics.kv_dtype)
            exchanges = make_exchanges(experts, Wire(), owners(self.placed, self.spec))
            device = cpu_device(checkpoint, numerics, 1)
            return RankExecutor(device, cache, exchanges, rank, size), attention, experts

        made = list(self.pool.map(make, range(size)))
        self.executors = [executor for executor, _, _ in made]
        self.attention, self.experts = [each for _, each, _ in made], [each for _, _, each in made]

    def planner(self, exchange: str, overlap: str = "sequential") -> Planner:
        hardware, ranks = replace(detect(), device="cpu"), tuple(range(self.size))
        placement = resolve("placement", "all_host")
        placed = replace(self.placed, exchange=exchange)
        return Planner(self.spec, hardware, placement, resolve("overlap", overlap), placed, ranks)

    def run(self, planner: Planner, entries: Sequence[Entry]) -> dict[str, int]:
        step = StepPlan("mixed", {entry.id: len(entry.token_ids) for entry in entries})
        program, batch = planner.program(planner.shape("main", step)), StepBatch("main", step, tuple(entries))
        found = self.pool.map(lambda executor: executor.run(program, batch, 0.0)[0], self.executors)
        tokens: dict[str, int] = {}
        for drawn in found:
            assert not drawn.keys() & tokens.keys()  # one rank alone draws
            tokens |= drawn
        return tokens

    def logits(self, planner: Planner, entry: Entry) -> np.ndarray:
        program = planner.program(planner.shape("main", StepPlan("prefill", {entry.id: len(entry.token_ids)})))
        found = list(self.pool.map(lambda executor: executor.logits(program, entry).numpy(), self.executors))
        whole = np.full((len(entry.token_ids), self.spec.vocab), np.nan, np.float32)
        for rank, part in enumerate(found):
            whole[rows_of(entry, rank, self.size)] = part
        return whole


def entry_of(index: int, ids: Sequence[int], start: int = 0, *, wants_token: bool = True) -> Entry:
    blocks = tuple(range(index * BLOCKS, (index + 1) * BLOCKS))
    return Entry(str(index), tuple(ids), start, blocks, Sampling(), wants_token)


def greedy(ranks: Ranks, planner: Planner, prompts: Sequence[Sequence[int]], chunk: int) -> list[list[int]]:
    """24 tokens after each prompt; prompts are computed in chunks beside the others' decodes."""
    contexts, done = [list(prompt) for prompt in prompts], [0] * len(prompts)
    while any(len(context) < len(prompt) + 24 for context, prompt in zip(contexts, prompts, strict=True)):
        entries = []
        for i, context in enumerate(contexts):
            left = context[done[i] : done[i] + chunk]
            if len(context) < len(prompts[i]) + 24:
                entries.append(entry_of(i, left, done[i], wants_token=done[i] + len(left) == len(context)))
        tokens = ranks.run(planner, entries)
        for entry in entries:
            done[int(entry.id)] += len(entry.token_ids)
            if entry.wants_token:
                contexts[int(entry.id)].append(tokens[entry.id])
    return [context[len(prompt) :] for context, prompt in zip(contexts, prompts, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_exchange_gives_the_oracles_tokens(oracle, size):
    ranks = Ranks(oracle, size)
    prompts = [request["prompt"] for request in oracle.prompts]
    for exchange in EXCHANGES:
        for chunk, overlap in ((100, "sequential"), (9, "dual_batch")):
            assert greedy(ranks, ranks.planner(exchange, overlap), prompts, chunk) == oracle.greedy
    assert size == 1 or not rows_of(entry_of(0, [1]), 1, size)  # the shortest prompt leaves ranks without tokens


def test_experts_are_shared_out_as_evenly_as_can_be(oracle):
    found = {}
    for size in (1, 2, 3, 4, 8):
        ranked = spread(PlacementPlan(), oracle.spec, size, "small_ep", "test").rank_of
        counts = Counter(ranked[oracle.spec.moe_layers[0], e] for e in range(oracle.spec.num_experts))
        found[size] = sorted(counts[rank] for rank in range(size))
        assert max(found[size]) - min(found[size]) <= 1
    uneven = {3: [1, 2], 8: [2, 3, 3]}
    assert uneven[oracle.spec.num_experts] in found.values()
    own = PlacementPlan(rank_of={(oracle.spec.moe_layers[0], 0): 1})
    assert spread(own, oracle.spec, 2, "small_ep", "test").rank_of == own.rank_of
    with pytest.raises(StrategyError, match="placement test: rank_of names rank 5, there are 2"):
        spread(replace(own, rank_of={(0, 0): 5}), oracle.spec, 2, "small_ep", "test")


@pytest.mark.parametrize("size", [2, 3])
def test_logits_of_prompts_in_stripes_are_within_the_tolerance(oracle, size):
    ranks = Ranks(oracle, size)
    for exchange in EXCHANGES:
        planner = ranks.planner(exchange)
        for i, (request, expected) in enumerate(zip(oracle.prompts, oracle.logits, strict=True)):
            got = ranks.logits(planner, entry_of(i, request["prompt"]))
            assert np.abs(got - expected).max() <= oracle.expected["tol_f32"]


def test_bf16_is_as_near_as_one_process_is(oracle):
    ranks = Ranks(oracle, 3, "bf16")
    planner = ranks.planner("small_ep")
    errors, agree = [], []
    for i, (request, expected) in enumerate(zip(oracle.prompts, oracle.logits, strict=True)):
        ids, half = request["prompt"], len(request["prompt"]) // 2
        parts = [ranks.logits(planner, entry_of(i, ids[:half]))] if half else []
        got = np.concatenate([*parts, ranks.logits(planner, entry_of(i, ids[half:], half))])
        errors.append(np.abs(got - expected).ravel())
        agree.append(got.argmax(-1) == expected.argmax(-1))
    assert np.median(np.concatenate(errors)) <= oracle.expected["tol_bf16_median"]
    assert np.concatenate(agree).mean() >= oracle.expected["bf16_top1_agree"] - 0.1


@pytest.mark.parametrize("size", [2, 4, 8])
def test_small_ep_and_stripes_move_what_their_formulas_say(oracle, size):
    ranks, spec = Ranks(oracle, size), oracle.spec
    entries = [entry_of(i, request["prompt"]) for i, request in enumerate(oracle.prompts)]
    ranks.run(ranks.planner("small_ep"), entries)
    sizes = [sum(len(part.token_ids) for part in share(entries, rank, size)) for rank in range(size)]
    kv_bytes = 4 * spec.kv_elements_per_token  # float32 in exact, all layers
    for rank in range(size):
        expected = ep_traffic.small_ep(sizes, rank, spec.hidden, Wire())
        counted = ranks.experts[rank].traffic
        assert counted.sent_bytes == len(spec.moe_layers) * expected.sent_bytes
        assert counted.received_bytes == len(spec.moe_layers) * expected.received_bytes
        assert ranks.attention[rank].traffic.sent_bytes == (size - 1) * sizes[rank] * kv_bytes
        assert ranks.attention[rank].traffic.received_bytes == (sum(sizes) - sizes[rank]) * kv_bytes


def test_ranks_that_disagree_about_order_are_told_before_they_wait(oracle):
    ranks = Ranks(oracle, 2)
    planner = ranks.planner("small_ep")
    step = StepPlan("prefill", {"0": 2, "1": 2})
    program = planner.program(planner.shape("main", step))
    swapped = tuple(op for op in program.ops if op.rank == 0) + tuple(
        op for op in reversed(program.ops) if op.rank == 1
    )
    batch = StepBatch("main", step, (entry_of(0, [1, 2]), entry_of(1, [3, 4])))
    # What a device is given is the order over all lanes: one in which the ranks meet crosswise is told as well.
    moved = [op for op in program.order if (op.rank, op.kind, op.layer) == (1, "reduce", ranks.spec.moe_layers[0])]
    crosswise = (*moved, *(op for op in program.order if op not in moved))
    for strange in (replace(program, ops=swapped), replace(program, order=crosswise)):
        with pytest.raises(PlanError, match="attention in different orders: deadlock"):
            ranks.executors[0].run(strange, batch, 0.0)
