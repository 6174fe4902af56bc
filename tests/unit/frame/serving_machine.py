"""A state machine over the serving core, on a device without a model whose answers depend on what the KV cache holds.

Every KV slot keeps a digest of its token and of the slot before it, read through the request's block table. The next
token follows from the last slot. So a block that is shared wrongly, overwritten or stale changes an answer.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections import Counter

from any_scheduler import Anything
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybridlab.batch import StepBatch, StepResult
from hybridlab.kv_blocks import BlockPool
from hybridlab.live_requests import views
from hybridlab.prefix_cache import NoPrefixes, PrefixCache
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.request_queue import RequestQueue
from hybridlab.strategies.base import Scheduler
from hybridlab.strategies.checks import TOY_MODEL
from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill
from hybridlab.strategies.scheduler.fcfs import FCFS
from hybridlab.strategies.scheduler.paper import Paper
from hybridlab.worker_pools import KVPools, OnePool

BLOCK, EOS = 4, 0
MODEL = dataclasses.replace(TOY_MODEL, eos_token_ids=(EOS,), vocab=24, max_positions=200)
WORKERS = ("prefill", "decode")


def next_slot(before: int, token: int) -> int:
    return zlib.crc32(f"{before}/{token}".encode())


def next_token(slot: int) -> int:
    return slot % MODEL.vocab


def answer(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """What one request alone is answered."""
    slot, output = 0, []
    for token in prompt:
        slot = next_slot(slot, token)
    while len(output) < max_tokens and EOS not in output:
        output.append(next_token(slot))
        slot = next_slot(slot, output[-1])
    return output


SCHEDULERS = (FCFS(), FCFS(5), ChunkedPrefill(1), ChunkedPrefill(16), Paper(9, chunk_tokens=3))
requests_given = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt tokens
        st.integers(1, 12),  # most output tokens
        st.integers(0, 6),  # arrival, or delay after another request
        st.sampled_from([0, 0, 1, 2]),  # 1 follows an earlier request, 2 continues it
        st.integers(0, 7),  # which earlier request
        st.sampled_from([None, None, None, 5.0, 30.0]),  # time limit
    ),
    min_size=1,
    max_size=9,
)


class Serving(RuleBasedStateMachine):
    """Two workers share one queue and one KV cache. Time passes when it is told to."""

    replays = 0
    drains: Scheduler = FCFS(4)

    def make_pools(self, num_blocks: int) -> KVPools:
        return OnePool(BlockPool(num_blocks, BLOCK))

    @initialize(
        given=requests_given,
        num_blocks=st.integers(5, 24),
        budget=st.integers(1, 48),
        scheduler=st.sampled_from(SCHEDULERS) | st.integers(0, 99).map(Anything),
        reuse=st.booleans(),
    )
    def begin(self, given, num_blocks, budget, scheduler, reuse) -> None:
        self.pools = self.make_pools(num_blocks)
        one, two = (self.pools.of(worker) for worker in WORKERS)
        prefixes = PrefixCache(one) if reuse and one is two else NoPrefixes()
        # Prompts are beginnings of three texts, so that they share prefixes of every length.
        texts = [tuple(random.Random(f"text{t}").choices(range(1, MODEL.vocab), k=60)) for t in range(3)]
        self.requests: dict[str, Request] = {}
        for index, (prompt, output, at_s, follow, leader, limit_s) in enumerate(given):
            after = f"r{leader % index}" if follow and index else None
            continues = follow == 2 and after is not None
            rid = f"r{index}"
            text, when = texts[prompt % 3][:prompt], {"after": after, "continues": continues, "timeout_s": limit_s}
            self.requests[rid] = Request(rid, text, output, float(at_s), **when)
        everything = self.requests.values()
        self.queue = RequestQueue(everything, self.pools, MODEL, budget, prefixes, replays=self.replays)
        self.scheduler, self.budget, self.now_s = scheduler, budget, 0.0
        self.memory = {pool: [0] * (pool.num_blocks * BLOCK) for pool in (one, two)}
        self.left: dict[int, tuple[str, dict[int, list[int]]]] = {}
        self.flying: dict[str, StepBatch] = {}
        self.final: dict[str, tuple] = {}
        self.drawn: Counter[str] = Counter()
        for rid, request in self.requests.items():
            if not request.continues and len(request.prompt) + request.max_tokens - 1 > num_blocks * BLOCK:
                assert self.queue.records[rid].status is Status.REJECTED, "refused at once"

    @rule(worker=st.sampled_from(WORKERS))
    def start(self, worker: str) -> None:
        """A step begins on an idle worker, or none."""
        self._start(worker, self.scheduler)

    def _start(self, worker: str, scheduler) -> bool:
        if worker in self.flying:
            return False
        self.queue.sweep(self.now_s)
        view = self.queue.view(worker, self.now_s)
        planned = scheduler.schedule(view)
        batch = self.queue.start(view, planned, "test") if planned is not None else None
        if batch is None:
            return False
        assert 0 < sum(len(entry.token_ids) for entry in batch.entries) <= self.budget
        for entry in batch.entries:
            record = self.queue.records[entry.id]
            assert len(entry.token_ids) > 0 and record.arrival_s is not None and record.arrival_s <= self.now_s
            assert len(entry.block_table) * BLOCK >= entry.context_tokens
            self._written_blocks_are_its_own(worker, entry)
        self.flying[worker] = batch
        return True

    @rule(worker=st.sampled_from(WORKERS), broken=st.sampled_from([False] * 9 + [True]))
    def end(self, worker: str, broken: bool) -> None:
        """The step of a worker is done, or has failed."""
        batch = self.flying.pop(worker, None)
        if batch is None:
            return
        for entry in batch.entries:
            self._written_blocks_are_its_own(worker, entry)
        for entry in batch.brings:
            self._bring(entry, self.memory[self.pools.of(worker)])
        tokens = {e.id: token for e in batch.entries if (token := self._compute(worker, e)) is not None}
        self.now_s += 0.25
        error, lost = ("broken", self.replays > 0) if broken else ("", False)
        result = StepResult(batch, self.now_s - 0.25, self.now_s, tokens, error=error, lost=lost)
        self.drawn.update(record.request.id for record, _ in self.queue.apply([result]))

    @precondition(lambda self: bool(getattr(self, "drawn", None)))
    @rule(chance=st.sampled_from([False] * 4 + [True]))
    def lose(self, chance: bool) -> None:
        """Now and then the workers are lost: their steps fail, and the KV cache holds nothing of use any more."""
        if not chance:
            return
        for worker in WORKERS:
            self._lose(worker)
        self.queue.lose_cache()

    def _lose(self, worker: str) -> None:
        if worker in self.flying:
            self.end(worker, True)
        pool = self.pools.of(worker)
        self.memory[pool] = [-1] * len(self.memory[pool])

    def _written_blocks_are_its_own(self, worker: str, entry) -> None:
        for position in range(entry.start, entry.context_tokens):
            assert self.pools.of(worker).holders(entry.block_table[position // BLOCK]) == 1, "a shared block is written"

    def _compute(self, worker: str, entry) -> int | None:
        memory = self.memory[self.pools.of(worker)]

        def slot(position: int) -> int:
            return entry.block_table[position // BLOCK] * BLOCK + position % BLOCK

        if entry.fetch is not None:
            self._bring(entry, memory)
            assert not self.left[entry.fetch.ticket][1] and entry.start == entry.fetch.num_tokens, "not all has come"
        for offset, token in enumerate(entry.token_ids):
            position = entry.start + offset
            before = memory[slot(position - 1)] if position else 0
            memory[slot(position)] = next_slot(before, token)
        if entry.leave is not None:
            assert entry.leave.num_tokens == entry.context_tokens <= len(entry.leave.blocks) * BLOCK
            cut = range(0, entry.context_tokens, BLOCK)
            blocks = [[memory[slot(i)] for i in range(at, min(at + BLOCK, entry.context_tokens))] for at in cut]
            self.left[entry.leave.ticket] = entry.id, dict(enumerate(blocks))
        return next_token(memory[slot(entry.context_tokens - 1)]) if entry.wants_token else None

    def _bring(self, entry, memory: list[int]) -> None:
        """What lies in the blocks of a hand-off, each of which is taken once."""
        rid, content = self.left[entry.fetch.ticket]
        assert rid == entry.id
        for index in range(entry.fetch.first, entry.fetch.first + len(entry.fetch.blocks)):
            base = entry.block_table[index] * BLOCK
            for offset, digest in enumerate(content.pop(index)):
                memory[base + offset] = digest

    @rule(number=st.integers(0, 8))
    def cancel(self, number: int) -> None:
        rid = f"r{number % len(self.requests)}"
        ended = self.queue.records[rid].is_final
        assert self.queue.cancel(rid) is self.queue.cancel(rid) is not ended
        self.queue.sweep(self.now_s)
        if rid not in self._flying_ids():
            assert self.queue.records[rid].is_final and not self.queue.cancel(rid)

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.queue.sweep(self.now_s)
        flying = self._flying_ids()
        for rid, record in self.queue.records.items():
            limit_s = self.requests[rid].timeout_s
            if limit_s is not None and record.arrival_s is not None and record.first_scheduled_s is not None:
                assert record.is_final or rid in flying or record.arrival_s + limit_s > self.now_s, "past its limit"

    def _flying_ids(self) -> set[str]:
        return {entry.id for batch in self.flying.values() for entry in (*batch.entries, *batch.brings)}

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def blocks_partition_the_pool(self) -> None:
        lives = self.queue._live.values()
        tables = {pool: [live.table for live in lives if live.home is pool] for pool in self.memory}
        if self.pools.transfer is not None:
            tables[self.pools.transfer] = [live.leased for live in lives]
        for pool, holding in tables.items():
            held = Counter(block for table in holding for block in table)
            assert all(pool.holders(block) == held[block] for block in range(pool.num_blocks))
            assert pool.free_tokens == (pool.num_blocks - len(held)) * BLOCK
        assert all(len(set(live.table)) == len(live.table) for live in self.queue._live.values())

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def what_is_seen_is_what_all_requests_give(self) -> None:
        lives, prefixes = self.queue._lives, self.queue._prefixes
        for pool in self.memory:
            waiting, running = lives.views(pool)
            here = [live for live in lives.all.values() if live.home in (None, pool)]
            assert [*running, *waiting] == views(here, pool, prefixes)
        assert lives.all.keys() == lives.others.keys() | {live.record.request.id for live in lives.untouched}

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def the_end_is_final(self) -> None:
        for rid, record in self.queue.records.items():
            if record.is_final:
                now = (record.status, record.finish_reason, record.finished_s, tuple(record.output))
                assert self.final.setdefault(rid, now) == now, "ended twice"

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def nobody_overtakes(self) -> None:
        if isinstance(self.scheduler, Anything | Paper):  # short prompts need not wait for long ones
            return
        order = [
            (record.arrival_s, float("inf") if record.first_scheduled_s is None else record.first_scheduled_s, record)
            for record in self.queue.records.values()
            if record.arrival_s is not None and record.arrival_s <= self.now_s
            if record.first_scheduled_s is not None or not record.is_final
        ]
        # Of equal arrivals the one given first is first, but for those whose arrival is known late.
        given = [entry for entry in order if entry[2].request.after is None]
        for entries in (sorted(order, key=lambda entry: entry[:2]), sorted(given, key=lambda entry: entry[0])):
            times_s = [first_s for _, first_s, _ in entries]
            assert times_s == sorted(times_s), "overtaking"

    def teardown(self) -> None:
        """Whatever happened, a plain scheduler drains the queue in a bounded number of steps, and nothing is left."""
        if not hasattr(self, "queue"):
            return
        for worker in tuple(self.flying):
            self.end(worker, False)
        work = sum(len(r.prompt) + r.max_tokens for r in self.requests.values())
        for _ in range(20 * work * len(self.requests) + 100):
            self.queue.sweep(self.now_s)
            if not self.queue.live:
                break
            if started := [worker for worker in WORKERS if self._start(worker, self.drains)]:
                for worker in started:
                    self.end(worker, False)
            else:
                assert self.queue.next_arrival_s is not None, "waits for nothing"
                self.now_s = max(self.now_s, self.queue.next_arrival_s)
            self.blocks_partition_the_pool()
            self.the_end_is_final()
        assert not self.queue.live, "does not drain"
        for pool in {*self.memory, *filter(None, [self.pools.transfer])}:
            assert pool.free_tokens == pool.num_blocks * BLOCK
        for rid, record in self.queue.records.items():
            assert record.is_final and self.drawn[rid] == len(record.output) == len(record.token_times_s)
            self._check_answer(record)

    def _check_answer(self, record: RequestRecord) -> None:
        request = record.request
        if request.after is not None:
            leader = self.queue.records[request.after]
            if record.arrival_s is not None:
                assert record.arrival_s == (leader.finished_s or 0.0) + request.arrival_s
            if request.continues and record.status is Status.FINISHED:
                assert record.prompt == (*leader.prompt, *leader.output, *request.prompt)
        expected = answer(record.prompt, request.max_tokens)
        if record.status is Status.FINISHED:
            assert record.output == expected
            assert record.cached_tokens % BLOCK == 0 and record.cached_tokens < len(record.prompt)
        else:
            assert record.output == expected[: len(record.output)]
            assert record.error or record.status is Status.CANCELLED
